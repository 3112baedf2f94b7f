"""The way to the store: notes whether it answers, for health and metrics."""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from typing import TypeVar

from stepstate.errors import StoreUnavailable
from stepstate.stores import SessionStore

log = logging.getLogger(__name__)

T = TypeVar("T")


class StoreLink:
    """A store, and whether its last answer was one.

    Args:
        store: the store.
    """

    def __init__(self, store: SessionStore) -> None:
        self.store = store
        self.up = True
        self.failures = 0

    async def ask(self, answer: Awaitable[T]) -> T:
        """Waits for an answer of the store.

        Raises:
            StoreUnavailable: there is none.
        """
        try:
            result = await answer
        except StoreUnavailable as error:
            self.failures += 1
            if self.up:
                log.warning("the store is away", extra={"problem": error.problem})
            self.up = False
            raise
        if not self.up:
            log.warning("the store is back")
        self.up = True
        return result
