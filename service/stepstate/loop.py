"""An event loop that takes gRPC's events with fewer threads and fewer turns.

A thread of gRPC signals each event, a message read or written, by one byte in a socket. The loop's
callback for the socket takes one byte and handles every event that is queued. So in a burst of 64
events the first turn handles all of them, and 63 more turns find none: two or three for each step.
`ServerLoop` takes all bytes in one turn.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import termios
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVarTuple

import uvloop

if TYPE_CHECKING:
    from _typeshed import HasFileno

Args = TypeVarTuple("Args")

_ONE_POLLER = "-event_engine_listener"


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
        if isinstance(fd, socket.socket) and _of_grpc(callback):
            super().add_reader(fd, handle_all, fd, array.array("i", [0]), partial(callback, *args))
        else:
            super().add_reader(fd, callback, *args)


def _of_grpc(callback: Callable[..., Any]) -> bool:
    inner = callback.func if isinstance(callback, partial) else callback
    owner = getattr(inner, "__self__", None)
    return type(owner).__name__ == "PollerCompletionQueue"


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
