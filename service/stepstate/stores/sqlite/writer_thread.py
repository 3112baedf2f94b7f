"""The thread that works on the file.

Rule 1: only this thread touches the connection.
Rule 2: whatever came while it worked is written together, in one transaction.
Rule 3: jobs are written in the order in which they came.

With a busy event loop a thread waits for the interpreter's lock after each statement, so
few statements matter more than fast ones.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread

from stepstate.errors import StoreUnavailable
from stepstate.stores.sqlite.file import SessionFile
from stepstate.stores.sqlite.reserve import OutOfSpace
from stepstate.stores.sqlite.writes import Create, Expire, Part, SaveOne, write

log = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
"""For a disk that hangs. A transaction waits 2 s for another process at the most."""
FAIR_SECONDS = 0.0005
"""How long a thread may be kept from the interpreter's lock before it is taken for it.

Python's 5 ms begin anew whenever the event loop lets go of the lock, if only for a microsecond;
a loop whose turns take 2 ms keeps a thread waiting for seconds (measured: 3 s, with uvloop)."""


@dataclass(slots=True, eq=False)
class StoreOp:
    """What is asked for: parts to write together with those of others, or a call on its own."""

    parts: Sequence[Part] = ()
    call: Callable[[sqlite3.Connection], None] | None = None
    rows: int = 0
    """How many rows the call writes; 0: it only reads."""
    error: Exception | None = None
    done: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def finish(self) -> None:
        """Lets its caller go on."""
        if self.done.done():  # its caller is gone
            return
        if self.error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(self.error)


class WriterThread:
    """Takes jobs from the event loop, and hands them back done.

    Args:
        file: the open file.
        wall: Unix seconds.
    """

    def __init__(self, file: SessionFile, unix_time: Callable[[], float]) -> None:
        self.file = file
        self._unix_time = unix_time
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[StoreOp | None] = SimpleQueue()
        self._closed = False
        sys.setswitchinterval(min(sys.getswitchinterval(), FAIR_SECONDS))
        self._thread = Thread(target=self._run, name="stepstate-sqlite", daemon=True)
        self._thread.start()

    async def do(self, job: StoreOp) -> None:
        """Returns when the job is done; its parts then hold their answers.

        Raises:
            StoreUnavailable: it is not, or it is not known.
        """
        if self._closed:
            raise StoreUnavailable(f"{self.file.path} was closed")
        self._jobs.put(job)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await job.done
        except TimeoutError:
            raise StoreUnavailable(
                f"{self.file.path}: no answer for {ANSWER_SECONDS:g} s; does its disk hang?",
                cause="timeout",
            ) from None

    async def close(self) -> None:
        """Finishes what was asked for and closes the file."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        going = True
        while going:
            jobs = self._take()
            going = None not in jobs
            wanted = [job for job in jobs if job is not None and not job.done.done()]
            # A failing write must not fail a read, and a long read should not delay writes.
            self._write([job for job in wanted if job.call is None])
            self._call([job for job in wanted if job.call is not None])
        self._close()

    def _take(self) -> list[StoreOp | None]:
        jobs = [self._jobs.get()]
        try:
            while True:
                jobs.append(self._jobs.get_nowait())
        except Empty:
            return jobs

    def _write(self, jobs: list[StoreOp]) -> None:
        if not jobs:
            return
        error = self._try_to_write(jobs)
        if error is not None and len(jobs) > 1 and _may_be_of_one(error):
            for (
                job
            ) in jobs:  # one of them has a value, or a page, that is bad: let the others go on
                self._fail([job], self._try_to_write([job]))
        else:
            self._fail(jobs, error)
        self._hand_back(jobs)

    def _try_to_write(self, jobs: list[StoreOp]) -> Exception | None:
        try:
            parts = [part for job in jobs for part in job.parts]
            connection = self.file.connection()
            self.file.make_room(len(parts), sum(map(_size_of, parts)))
            write(connection, parts, now=self.file.clock(), unix_time=self._unix_time())
        except Exception as error:  # noqa: BLE001 (a job's failure is its caller's)
            self.file.failed(error)
            return error
        return None

    def _call(self, jobs: list[StoreOp]) -> None:
        for job in jobs:
            assert job.call is not None
            try:
                connection = self.file.connection()
                if job.rows:
                    self.file.make_room(job.rows, 0)
                job.call(connection)
            except Exception as error:  # noqa: BLE001 (a job's failure is its caller's)
                self.file.failed(error)
                self._fail([job], error)
        if jobs:
            self._hand_back(jobs)

    def _fail(self, jobs: list[StoreOp], error: Exception | None) -> None:
        for job in jobs:
            if error is not None and _is_the_files(error):
                problem = f"{self.file.path}: {error}"
                job.error = StoreUnavailable(problem, cause=_cause_of(error))
            else:
                job.error = error  # a surprise is told as it is

    def _hand_back(self, jobs: list[StoreOp]) -> None:
        try:
            self._loop.call_soon_threadsafe(_finish, jobs)
        except RuntimeError:
            log.warning("the event loop ended before its store was closed")

    def _close(self) -> None:
        try:
            self.file.close()
        except sqlite3.Error:
            log.exception("closing failed", extra={"path": str(self.file.path)})


def _finish(jobs: list[StoreOp]) -> None:
    for job in jobs:
        job.finish()


def _size_of(part: Part) -> int:
    """The bytes of a part's snapshot."""
    if isinstance(part, SaveOne | Expire):
        return len(part.save.snapshot or b"")
    return len(part.snapshot) if isinstance(part, Create) else 0


def _is_the_files(error: Exception) -> bool:
    """Whether the file is to blame, and not a value."""
    values = sqlite3.DataError | sqlite3.ProgrammingError | sqlite3.InterfaceError
    return isinstance(error, sqlite3.Error | OSError) and not isinstance(error, values)


def _may_be_of_one(error: Exception) -> bool:
    """Whether some of the jobs may be done without the others."""
    return not _is_the_files(error) or _cause_of(error) == "corrupt"


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
