"""Remembers sessions in this process only: a restart forgets them all."""

from __future__ import annotations

from collections.abc import Callable

from stepstate.stores.base import Ending, SessionRecord

ENDING_SECONDS = 3600.0
"""An hour: longer than any client goes on retrying."""
MOST_ENDINGS = 100_000
"""About 20 MB; the oldest are forgotten first."""


class MemoryStore:
    """The `SessionStore` without durability.

    Args:
        clock: monotonic seconds.
        most_endings: how many endings are remembered.
    """

    def __init__(self, clock: Callable[[], float], *, most_endings: int = MOST_ENDINGS) -> None:
        self._clock = clock
        self._most_endings = most_endings
        self._records: dict[str, SessionRecord] = {}
        self._endings: dict[str, tuple[float, Ending]] = {}  # the oldest first

    async def create(self, record: SessionRecord) -> None:
        """See `SessionStore.create`."""
        self._endings.pop(record.session_id, None)
        self._records[record.session_id] = record

    async def end(self, session_id: str, ending: Ending) -> None:
        """See `SessionStore.end`."""
        self._records.pop(session_id, None)
        self._endings.pop(session_id, None)
        self._endings[session_id] = (self._clock() + ENDING_SECONDS, ending)
        self._forget()

    async def find(self, session_id: str) -> SessionRecord | Ending | None:
        """See `SessionStore.find`."""
        self._forget()
        if session_id in self._endings:
            return self._endings[session_id][1]
        return self._records.get(session_id)

    async def close(self) -> None:
        """See `SessionStore.close`; nothing to let go of."""

    def _forget(self) -> None:
        now = self._clock()
        while self._endings:
            oldest = next(iter(self._endings))
            if len(self._endings) <= self._most_endings and self._endings[oldest][0] > now:
                return
            del self._endings[oldest]
