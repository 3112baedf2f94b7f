"""An event loop that takes gRPC's events with fewer threads and fewer turns.

A thread of gRPC signals each event, a message read or written, by one byte in a socket. The loop's
callback for the socket takes one byte and handles every event that is queued. So in a burst of 64
events the first turn handles all of them, and 63 more turns find none: two or three for each step.
`ServerLoop` takes all bytes in one turn.

The thread also reads all connections, and goes on with one of them as long as bytes come faster
than it takes them. `ServerLoop` starts another thread for the others then.
"""

from __future__ import annotations

import array
import fcntl
import logging
import os
import re
import socket
import termios
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVarTuple

import uvloop

if TYPE_CHECKING:
    from _typeshed import HasFileno

Args = TypeVarTuple("Args")

log = logging.getLogger(__name__)

MAX_POLLERS = 8
"""As many connections can be flooded before one of them delays the others."""
CHECK_SECONDS = 0.1
"""Between two looks at the pollers."""
STUCK_SECONDS = 0.05
"""A poller that ran for so long, and waited a few times at most, has not got to others."""
FEW_WAITS = 2
_ONE_POLLER = "-event_engine_listener"
_POLL = "_poll_wrapper"  # of gRPC's queue: what its thread runs, until the queue is shut down


def set_up_grpc() -> None:
    """Makes gRPC read connections in the thread that waits for its events, and log nothing.

    By default (grpcio 1.80 and later) a pool of threads reads them and wakes that thread for each
    message, which is a quarter of the cost of an echo.

    Its log is for what a client does wrong, such as a compressed request: a line for each, without
    a limit, which the thread that reads connections writes to stderr and waits for.

    gRPC reads both variables once, when it is imported. What is already set stays.
    """
    os.environ.setdefault("GRPC_EXPERIMENTS", _ONE_POLLER)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


class ServerLoop(uvloop.Loop):
    """uvloop's loop, with one turn for all queued events of gRPC."""

    def add_reader(
        self, fd: int | HasFileno, callback: Callable[[*Args], Any], *args: *Args
    ) -> None:
        """See `asyncio.loop.add_reader`."""
        queue = _queue_of(callback)
        if isinstance(fd, socket.socket) and queue is not None:
            super().add_reader(fd, handle_all, fd, array.array("i", [0]), partial(callback, *args))
            poll = getattr(queue, _POLL, None)  # another version of gRPC may call it otherwise
            if poll is not None:
                self._look_at(Pollers(poll))
        else:
            super().add_reader(fd, callback, *args)

    def _look_at(self, pollers: Pollers) -> None:
        pollers.check()
        self.call_later(CHECK_SECONDS, self._look_at, pollers)


def _queue_of(callback: Callable[..., Any]) -> object:
    """The queue of gRPC whose events a callback handles; None: it is another callback."""
    inner = callback.func if isinstance(callback, partial) else callback
    owner = getattr(inner, "__self__", None)
    return owner if type(owner).__name__ == "PollerCompletionQueue" else None


class Pollers:
    """The threads that read connections and take gRPC's events: at first one, which gRPC starts.

    Another one is started only when all are stuck, because two that take events may swap those of
    two calls.

    Args:
        poll: what such a thread runs.
    """

    def __init__(self, poll: Callable[[], None]) -> None:
        self._poll = poll
        self._waited: dict[int, tuple[float, int]] = {}
        """By thread: how long it had run and how often it had waited, when it was last seen to."""

    def check(self) -> None:
        """Starts another poller if all that there are have not waited for a while."""
        threads = [one for one in threading.enumerate() if one.name.endswith(f"({_POLL})")]
        stuck = [self._is_stuck(one) for one in threads]
        if all(stuck) and 0 < len(threads) < MAX_POLLERS:
            log.warning("a connection is flooded: another thread reads the others")
            threading.Thread(target=self._poll, daemon=True).start()

    def _is_stuck(self, thread: threading.Thread) -> bool:
        assert thread.ident is not None
        assert thread.native_id is not None
        ran = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        if thread.native_id not in self._waited:
            self._waited[thread.native_id] = ran, _waits(thread.native_id)
        ran_then, waits_then = self._waited[thread.native_id]
        if ran - ran_then < STUCK_SECONDS:
            return False
        waits = _waits(thread.native_id)
        if waits - waits_then > FEW_WAITS:
            self._waited[thread.native_id] = ran, waits
            return False
        return True


def _waits(native_id: int) -> int:
    """How often a thread has waited: for a lock, or for the kernel."""
    status = Path(f"/proc/self/task/{native_id}/status").read_text()
    return int(re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.MULTILINE)[0])


def handle_all(
    signals: socket.socket, waiting: array.array[int], handle: Callable[[], object]
) -> None:
    """Takes all bytes but one; `handle` takes that one and handles the events of all.

    An event is queued before its byte is sent, so no event stays in the queue without a byte. All
    event loops of a process share the socket: another loop may take the bytes first, and then it
    handles the events, or hands them to their loop.
    """
    fcntl.ioctl(signals, termios.FIONREAD, waiting)
    with suppress(BlockingIOError):
        if waiting[0] > 1:
            signals.recv(waiting[0] - 1)
        handle()
