"""Well-behaved sessions that go on through a fault, and check every number they were given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np

from stepstate.client import AsyncClient, AsyncSession
from stepstate.errors import Unavailable
from tests.integration.wire import HANG, TOLERANCE, largest_difference
from tests.networks import Network


class Steady:
    """A session that steps on and on, and keeps what it sent and got."""

    def __init__(self, session: AsyncSession, network: Network, seed: int) -> None:
        self._session = session
        self._network = network
        self._random = np.random.default_rng(seed)
        self._sent: list[np.ndarray] = []
        self._got: list[np.ndarray] = []
        self._more = asyncio.Condition()
        self.stopping = False

    async def run(self) -> None:
        """Steps by stream and by call in turn, until it is stopped."""
        while not self.stopping:
            async for y in self._session.stream(self._rows(40)):
                await self._keep(y)
            row = self._row()
            await self._keep(await self._session.step(row))

    async def run_until_unavailable(self) -> None:
        """Steps until the server is gone."""
        try:
            await self.run()
        except Unavailable:
            pass
        else:
            raise AssertionError("the server is still there")

    async def progress(self, rows: int) -> None:
        """Waits until so many more rows were answered."""
        goal = len(self._got) + rows
        async with self._more:
            await self._more.wait_for(lambda: len(self._got) >= goal)

    def check(self, *, whole: bool = True) -> None:
        """Every row was answered once, with the numbers of the offline run."""
        if whole:
            assert len(self._got) == len(self._sent) == self._session.t
        x = np.array(self._sent[: len(self._got)])
        difference = largest_difference(np.array(self._got), self._network.offline(x))
        assert difference <= TOLERANCE

    async def close(self) -> None:
        """Closes the session."""
        await self._session.close()

    def _rows(self, count: int):
        for _ in range(count):
            if self.stopping:
                return
            yield self._row()

    def _row(self) -> np.ndarray:
        row = self._random.standard_normal(3).astype(np.float32)
        self._sent.append(row)
        return row

    async def _keep(self, y: np.ndarray) -> None:
        self._got.append(y)
        async with self._more:
            self._more.notify_all()


@asynccontextmanager
async def steady_sessions(
    address: str, network: Network, count: int = 4
) -> AsyncIterator[list[Steady]]:
    """Sessions that step through the block; at its end they go on a little and are checked."""
    async with AsyncClient(address, timeout=HANG) as client:
        made = [Steady(await client.open(network.name), network, seed) for seed in range(count)]
        try:
            async with asyncio.timeout(2 * HANG), asyncio.TaskGroup() as group:
                for one in made:
                    group.create_task(one.run())
                await asyncio.gather(*(one.progress(20) for one in made))
                yield made
                await asyncio.gather(*(one.progress(60) for one in made))
                for one in made:
                    one.stopping = True
            for one in made:
                one.check()
        finally:
            for one in made:
                await one.close()
