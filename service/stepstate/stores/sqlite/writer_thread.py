"""The thread that works on the file.

Rule 1: only this thread uses the connection.
Rule 2: all writes that arrive while it works are written together, in one transaction.
Rule 3: writes are done in the order in which they arrived, and before calls: a write waits for a
        few milliseconds of calls at most, however many were there before it.

With a busy event loop a thread waits for the interpreter's lock after each statement, so
few statements matter more than fast ones.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from stepstate.errors import StoreUnavailable
from stepstate.stores.sqlite.file import SessionFile
from stepstate.stores.sqlite.reserve import OutOfSpace
from stepstate.stores.sqlite.writes import Create, Expire, SaveOne, Write, write

T = TypeVar("T")
log = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
"""For a disk that hangs. A transaction waits at most 2 s for another process."""
CALLS_SECONDS = 0.002
"""Of calls before writes that have come meanwhile: a part of a page, or some fifty short ones, so
that they don't wait for a transaction each."""
SWITCH_SECONDS = 0.0005
"""After how long the interpreter's lock is taken from another thread.

Python's default of 5 ms starts again whenever the event loop releases the lock, even for a
microsecond; a loop whose turns take 2 ms keeps a thread waiting for seconds (measured: 3 s, with
uvloop)."""


@dataclass(slots=True, eq=False)
class StoreOp:
    """A call of the store: writes to do together with those of others, or one call on its own."""

    writes: Sequence[Write[Any]] = ()
    call: Callable[[sqlite3.Connection], None] | None = None
    rows: int = 0
    """How many rows the call writes; 0: it only reads."""
    error: Exception | None = None
    done: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class WriterThread:
    """Takes operations from the event loop and does them.

    Args:
        file: the open file.
        unix_time: seconds since 1970; called from the thread.
    """

    def __init__(self, file: SessionFile, unix_time: Callable[[], float]) -> None:
        self.file = file
        self._unix_time = unix_time
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[StoreOp | None] = SimpleQueue()
        self._closed = False
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
        self._thread = Thread(target=self._run, name="stepstate-sqlite", daemon=True)
        self._thread.start()

    async def write(self, writes: Sequence[Write[T]]) -> list[T]:
        """Does writes, all or none, together with those of others; returns their results.

        Raises:
            StoreUnavailable: they are not done, or that is unknown.
        """
        if writes:
            await self._do(StoreOp(writes))
        return [one.result for one in writes]

    async def call(self, call: Callable[[sqlite3.Connection], T], *, rows: int = 0) -> T:
        """The result of a call with the connection; `rows`: how many it writes.

        Raises:
            StoreUnavailable: it is not done, or that is unknown.
        """
        results: list[T] = []
        await self._do(StoreOp(call=lambda file: results.append(call(file)), rows=rows))
        return results[0]

    async def _do(self, op: StoreOp) -> None:
        if self._closed:
            raise StoreUnavailable(f"{self.file.path} was closed")
        self._queue.put(op)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await op.done
        except TimeoutError:
            raise StoreUnavailable(
                f"{self.file.path}: no answer for {ANSWER_SECONDS:g} s; does its disk hang?",
                cause="timeout",
            ) from None

    async def close(self) -> None:
        """Does what was asked for before, and closes the file."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        running, calls = True, deque[StoreOp]()
        while running or calls:
            taken = self._take(wait=not calls)
            running = running and None not in taken
            ops = [op for op in taken if op is not None]
            self._write_all([op for op in ops if op.call is None and not op.done.done()])
            calls.extend(op for op in ops if op.call is not None)
            until = time.perf_counter() + CALLS_SECONDS
            while calls and time.perf_counter() < until:
                self._call(calls.popleft())
        try:
            self.file.close()
        except sqlite3.Error:
            log.exception("closing failed", extra={"path": str(self.file.path)})

    def _take(self, *, wait: bool) -> list[StoreOp | None]:
        taken = [self._queue.get()] if wait else []
        try:
            while True:
                taken.append(self._queue.get_nowait())
        except Empty:
            return taken

    def _write_all(self, ops: list[StoreOp]) -> None:
        error = self._write(ops) if ops else None
        if error is not None and len(ops) > 1 and _may_be_of_one(error):
            for op in ops:  # one has a bad value, or meets a bad page: do the others
                op.error = self._store_error(self._write([op]))
        else:
            for op in ops:
                op.error = self._store_error(error)
        self._finish_all(ops)

    def _write(self, ops: list[StoreOp]) -> Exception | None:
        try:
            writes = [one for op in ops for one in op.writes]
            size = sum(map(_snapshot_bytes, writes))
            with self.file.use(rows=len(writes), size=size) as connection:
                write(connection, writes, now=self.file.clock(), unix_time=self._unix_time())
        except Exception as error:  # noqa: BLE001 (the callers get it)
            self.file.recover(error)
            return error
        return None

    def _call(self, op: StoreOp) -> None:
        assert op.call is not None
        if op.done.done():  # its caller has gone away
            return
        try:
            with self.file.use(rows=op.rows) as connection:
                op.call(connection)
        except Exception as error:  # noqa: BLE001 (the caller gets it)
            self.file.recover(error)
            op.error = self._store_error(error)
        self._finish_all([op])

    def _store_error(self, error: Exception | None) -> Exception | None:
        """`StoreUnavailable` for an error of the file; a bug is returned unchanged."""
        if error is None or not _is_of_file(error):
            return error
        return StoreUnavailable(f"{self.file.path}: {error}", cause=_cause_of(error))

    def _finish_all(self, ops: list[StoreOp]) -> None:
        if not ops:
            return
        try:
            self._loop.call_soon_threadsafe(_finish, ops)
        except RuntimeError:
            log.warning("the event loop ended before its store was closed")


def _finish(ops: list[StoreOp]) -> None:
    for op in ops:
        if op.done.done():  # its caller has gone away
            continue
        if op.error is None:
            op.done.set_result(None)
        else:
            op.done.set_exception(op.error)


def _snapshot_bytes(one: Write[Any]) -> int:
    if isinstance(one, SaveOne | Expire):
        return len(one.save.snapshot or b"")
    return len(one.snapshot) if isinstance(one, Create) else 0


def _is_of_file(error: Exception) -> bool:
    """Whether the file caused it, and not a value."""
    values = sqlite3.DataError | sqlite3.ProgrammingError | sqlite3.InterfaceError
    return isinstance(error, sqlite3.Error | OSError) and not isinstance(error, values)


def _may_be_of_one(error: Exception) -> bool:
    """Whether only some of the operations may have caused it."""
    return not _is_of_file(error) or _cause_of(error) == "corrupt"


_CAUSES = {
    sqlite3.SQLITE_FULL: "full",
    sqlite3.SQLITE_BUSY: "busy",
    sqlite3.SQLITE_LOCKED: "busy",
    sqlite3.SQLITE_READONLY: "readonly",
    sqlite3.SQLITE_CORRUPT: "corrupt",
    sqlite3.SQLITE_NOTADB: "corrupt",
    sqlite3.SQLITE_IOERR: "io",
    sqlite3.SQLITE_CANTOPEN: "io",
}


def _cause_of(error: Exception) -> str:
    """One of `errors.STORE_CAUSES`."""
    if isinstance(error, OutOfSpace):
        return error.cause
    if isinstance(error, OSError):
        return "io"
    return _CAUSES.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, "other")
