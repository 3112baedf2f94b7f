"""The queue of the lines, and the thread that writes them."""

from __future__ import annotations

import logging
import os
import queue
import select
import threading
from contextlib import suppress

from stepstate.logging.limit import LineLimit, Place, place_of
from stepstate.logging.lines import Entry, Render, entry_of, line_of

MAX_QUEUED = 1_000
"""A few MiB at most, and seconds of what a busy server logs."""
FLUSH_SECONDS = 2.0
"""A stop waits that long until everything is written."""

DROPPED = {"queue_full": 0, "rate_limit": 0, "failed": 0}
"""Lines that were not written, by cause. They are the process's, as standard error is."""


class LineQueue(logging.Handler):
    """Puts what records say into the queue of a `LineWriter`."""

    def __init__(self, lines: queue.Queue[Entry | None], limit: LineLimit) -> None:
        super().__init__()
        self._lines = lines
        self._limit = limit

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        place = place_of(record)
        if not self._limit.admits(place):
            self._drop(record, place, "rate_limit")
            return
        try:
            self._lines.put_nowait(entry_of(record))
        except queue.Full:
            self._drop(record, place, "queue_full")
        except Exception:  # noqa: BLE001 - of the record: arguments that do not fit its message
            self._drop(record, place, "failed")

    def _drop(self, record: logging.LogRecord, place: Place, cause: str) -> None:
        DROPPED[cause] += 1
        self._limit.leave_out(place, record)


class LineWriter(threading.Thread):
    """Writes lines to a file.

    It holds no lock and no buffer of Python's while it writes, and does not keep the process
    alive: if nobody reads the file, nothing else waits, also at the end.
    """

    def __init__(self, fd: int, render: Render, limit: LineLimit) -> None:
        super().__init__(name="logs", daemon=True)
        self.lines = queue.Queue[Entry | None](MAX_QUEUED)
        """What is to be written; None only wakes the thread."""
        self._fd = fd
        self._render = render
        self._limit = limit
        self._stopping = threading.Event()

    def run(self) -> None:
        """Writes until `stop`."""
        while not (self._stopping.is_set() and self.lines.empty()):
            with suppress(queue.Empty):
                entry = self.lines.get(timeout=1.0 if self._limit.counting else None)
                if entry is not None:
                    self._write(entry)
            self._write_all(self._limit.summaries())
        self._write_all(self._limit.summaries(at_once=True))

    def stop(self) -> None:
        """Waits until everything is written, or `FLUSH_SECONDS` are over."""
        self._stopping.set()
        with suppress(queue.Full):
            self.lines.put_nowait(None)
        self.join(FLUSH_SECONDS)

    def _write_all(self, entries: list[Entry]) -> None:
        for entry in entries:
            self._write(entry)

    def _write(self, entry: Entry) -> None:
        try:
            data = line_of(entry, self._render)
            while data:
                select.select([], [self._fd], [])  # the file may be a non-blocking one
                data = data[os.write(self._fd, data) :]
        except Exception:  # noqa: BLE001 - the file is gone; the thread goes on
            DROPPED["failed"] += 1
