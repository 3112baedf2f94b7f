"""How gRPC's events reach the event loop: with fewer threads, and fewer turns of the loop.

A thread of gRPC tells the loop of each event, a message read or written, by one byte in a socket;
the loop's turn for a byte takes that byte and handles every event there is. Of a burst of 64
events the first byte's turn handles all, and 63 more turns find nothing: two to three for each
step. `ServerLoop` takes the bytes together.
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
    """Lets the thread that waits for gRPC's events read the connections too.

    By default (grpcio 1.80 and later) a pool of threads reads them, and wakes that thread for each
    message: a quarter of what an echo costs. gRPC looks at this once, when it is imported; a
    GRPC_EXPERIMENTS that is set already is left as it is.
    """
    os.environ.setdefault("GRPC_EXPERIMENTS", _ONE_POLLER)


class ServerLoop(uvloop.Loop):
    """uvloop's, with one turn for all events of gRPC that are there."""

    def add_reader(
        self, fd: int | HasFileno, callback: Callable[[*Args], Any], *args: *Args
    ) -> None:
        """See `asyncio.loop.add_reader`."""
        if isinstance(fd, socket.socket) and _of_grpc(callback):
            super().add_reader(fd, _at_once, fd, array.array("i", [0]), partial(callback, *args))
        else:
            super().add_reader(fd, callback, *args)


def _of_grpc(callback: Callable[..., Any]) -> bool:
    inner = callback.func if isinstance(callback, partial) else callback
    owner = getattr(inner, "__self__", None)
    return type(owner).__name__ == "PollerCompletionQueue"


def _at_once(told: socket.socket, waiting: array.array[int], handle: Callable[[], object]) -> None:
    """Takes all bytes but the one that `handle` takes: it handles their events too.

    An event is in its queue before its byte is sent, so no event is left without a byte to come.
    All event loops of a process have one socket: another may take the bytes first, and then
    handles the events too, or hands them to their loop.
    """
    fcntl.ioctl(told, termios.FIONREAD, waiting)
    with suppress(BlockingIOError):
        if waiting[0] > 1:
            told.recv(waiting[0] - 1)
        handle()
