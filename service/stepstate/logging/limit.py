"""How often one place in the code may log."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from stepstate.logging.lines import Entry, cut, iso_time, plain

LINES_PER_SECOND = 10
"""Enough to see what goes on; the metrics count all."""
MAX_LIKE_LENGTH = 200

Place = tuple[object, ...]
"""A line of code, the reason of the record, and the line that raised its exception."""


def place_of(record: logging.LogRecord) -> Place:
    """Where a record is from: the code has a fixed number of places, whatever clients send."""
    raised: tuple[object, ...] = ()
    if isinstance(record.exc_info, tuple) and record.exc_info[2] is not None:
        traceback = record.exc_info[2]
        while traceback.tb_next is not None:
            traceback = traceback.tb_next
        raised = traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
    return record.pathname, record.lineno, plain(getattr(record, "reason", None)), *raised


@dataclass(slots=True)
class _Window:
    """The records of one place within about a second."""

    start: float
    admitted: int = 0
    left_out: int = 0
    like: Entry | None = None

    def summary(self) -> Entry:
        """What is written about those left out."""
        event = f"{self.left_out} more lines like this one were left out"
        return {"event": event, **(self.like or {}), "timestamp": iso_time(time.time())}


class LineLimit:
    """Admits some records a second from each place, and counts those that are left out.

    Any thread may use it.

    Args:
        per_second: for each place.
        clock: monotonic seconds.
    """

    def __init__(
        self, per_second: int = LINES_PER_SECOND, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_second = per_second
        self._clock = clock
        self._windows: dict[Place, _Window] = {}
        self._next_summary = clock() + 1.0
        self._lock = threading.Lock()

    @property
    def counting(self) -> bool:
        """Whether `summaries` is to be asked again soon."""
        return bool(self._windows)

    def admits(self, place: Place) -> bool:
        """Counts a record, and says whether it may be written."""
        now = self._clock()
        with self._lock:
            window = self._windows.setdefault(place, _Window(now))
            if now - window.start >= 1.0:
                window.start, window.admitted = now, 0
            window.admitted += 1
            return window.admitted <= self._per_second

    def leave_out(self, place: Place, record: logging.LogRecord) -> None:
        """Counts a record that is not written, for whatever cause."""
        with self._lock:
            window = self._windows.setdefault(place, _Window(self._clock()))
            window.left_out += 1
            window.like = window.like or {
                "level": record.levelname.lower(),
                "logger": record.name,
                "like": cut(str(record.msg), MAX_LIKE_LENGTH),
                "reason": plain(getattr(record, "reason", None)),
            }

    def summaries(self, *, at_once: bool = False) -> list[Entry]:
        """What is to be written about the records that were left out; once a second, or at once."""
        now = self._clock()
        with self._lock:
            if now < self._next_summary and not at_once:
                return []
            self._next_summary = now + 1.0
            summaries = [one.summary() for one in self._windows.values() if one.left_out]
            for place, window in list(self._windows.items()):
                window.left_out = 0
                if now - window.start >= 1.0:
                    del self._windows[place]
            return summaries
