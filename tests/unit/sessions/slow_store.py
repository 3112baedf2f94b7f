"""A store that answers when a test says so."""

from __future__ import annotations

import asyncio

from stepstate.errors import (
    StoreUnavailable,
)
from stepstate.stores import MemoryStore
from tests.unit.rig import (
    Clock,
)


class Gate:
    """Holds store calls until it is opened."""

    def __init__(self) -> None:
        self._opened = asyncio.Event()

    def open(self) -> None:
        self._opened.set()

    async def wait(self) -> None:
        await self._opened.wait()


class SlowStore(MemoryStore):
    """A store that answers, or fails, when the test lets it."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__(Clock())
        self.gate = Gate()
        self.fails = fails

    async def create(self, record, **values):
        await self.gate.wait()
        if self.fails:
            raise StoreUnavailable("it is away")
        return await super().create(record, **values)

    async def end(self, session_id, epoch, ending):
        if self.fails:
            raise StoreUnavailable("it is away")
        return await super().end(session_id, epoch, ending)
