"""The queue of the lines, and the thread that writes them."""

from __future__ import annotations

import logging
import os
import queue
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from stepstate.logging.limit import LineLimit, Place, place_of
from stepstate.logging.lines import Entry, Render, entry_of, line_of

MAX_QUEUED = 1_000
"""A few MiB at most, and seconds of what a busy server logs."""
FLUSH_SECONDS = 2.0
"""A stop waits that long until everything is written."""

DROPPED = {"queue_full": 0, "rate_limit": 0, "failed": 0}
"""Lines that were not written, by cause. They are the process's, as standard error is."""


class LineOutput(Protocol):
    """Where lines are written; a write may wait."""

    def write(self, lines: list[bytes]) -> None:
        """Writes some lines.

        Raises:
            OSError: not all of them could be written.
        """
        ...


class DescriptorOutput:
    """An open file: a pipe, a terminal."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, lines: list[bytes]) -> None:
        """Writes each line by itself, so that those of several processes do not mix in a pipe."""
        for line in lines:
            write_all(self._fd, line)


def write_all(fd: int, data: bytes) -> None:
    """Writes bytes to a file, which may be a non-blocking one."""
    ready = select.poll()  # `select.select` takes only descriptors below 1,024
    ready.register(fd, select.POLLOUT)
    while data:
        ready.poll()
        data = data[os.write(fd, data) :]


class LineQueue(logging.Handler):
    """Puts what records say into the queue of a `LineWriter`.

    Args:
        lines: the queue.
        limit: how many from each place are written.
        dropped: counts those that are not, by cause.
        place: of a record; None: it is not limited.
    """

    def __init__(
        self,
        lines: queue.Queue[Entry | None],
        limit: LineLimit,
        dropped: dict[str, int],
        place: Callable[[logging.LogRecord], Place | None] = place_of,
    ) -> None:
        super().__init__()
        self._lines = lines
        self._limit = limit
        self._dropped = dropped
        self._place = place

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        place = self._place(record)
        if place is not None and not self._limit.admits(place):
            self._drop(record, place, "rate_limit")
            return
        try:
            self._lines.put_nowait(entry_of(record))
        except queue.Full:
            self._drop(record, place, "queue_full")
        except Exception:  # noqa: BLE001 - of the record: arguments that do not fit its message
            self._drop(record, place, "failed")

    def _drop(self, record: logging.LogRecord, place: Place | None, cause: str) -> None:
        self._dropped[cause] += 1
        self._limit.leave_out(place or place_of(record), record)


class LineWriter(threading.Thread):
    """Writes lines to a file.

    It holds no lock and no buffer of Python's while it writes, and does not keep the process
    alive: if nobody reads the file, nothing else waits, also at the end.

    Args:
        output: the file.
        render: makes the text of a line.
        limit: says what was left out.
        dropped: counts lines that could not be written.
        max_queued: lines that may wait.
        at_once: lines of one write, where as many wait.
    """

    def __init__(
        self,
        output: LineOutput,
        render: Render,
        limit: LineLimit,
        *,
        dropped: dict[str, int],
        max_queued: int = MAX_QUEUED,
        at_once: int = 1,
    ) -> None:
        super().__init__(name="logs", daemon=True)
        self.lines = queue.Queue[Entry | None](max_queued)
        """What is to be written; None only wakes the thread."""
        self._output = output
        self._render = render
        self._limit = limit
        self._dropped = dropped
        self._at_once = at_once
        self._stopping = threading.Event()

    def run(self) -> None:
        """Writes until `stop`."""
        while not (self._stopping.is_set() and self.lines.empty()):
            self._write(self._take())
            self._write(self._limit.summaries())
        self._write(self._limit.summaries(at_once=True))

    def stop(self) -> None:
        """Waits until everything is written, or `FLUSH_SECONDS` are over."""
        self._stopping.set()
        with suppress(queue.Full):
            self.lines.put_nowait(None)
        self.join(FLUSH_SECONDS)

    def _take(self) -> list[Entry]:
        """What waits to be written, once there is something."""
        taken: list[Entry] = []
        with suppress(queue.Empty):
            entry = self.lines.get(timeout=1.0 if self._limit.counting else None)
            while entry is not None:
                taken.append(entry)
                if len(taken) == self._at_once:
                    break
                entry = self.lines.get_nowait()
        return taken

    def _write(self, entries: list[Entry]) -> None:
        if not entries:
            return
        try:
            self._output.write([line_of(entry, self._render) for entry in entries])
        except Exception:  # noqa: BLE001 - the file is gone; the thread goes on
            self._dropped["failed"] += len(entries)
