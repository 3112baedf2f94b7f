"""The messages of a call of grpcio's server, handed over where the lean transport hands them over.

grpcio is asked for each message, and says when a reply has left: a task for each direction.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc

from stepstate.h2grpc import MessageSink

if TYPE_CHECKING:
    from stepstate.transport.peers import Context


class Pump:
    """Reads and writes the messages of one call; as `Call` of the lean transport does.

    Args:
        context: of the call.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._reading: asyncio.Task[None] | None = None
        self._writing: asyncio.Task[None] | None = None
        self._reply: bytes | None = None
        self._has_reply = asyncio.Event()
        self._may_read = asyncio.Event()
        self._may_read.set()

    def attach(self, sink: MessageSink) -> None:
        """Hands all requests over to a sink."""
        self._reading = asyncio.create_task(self._read(sink))
        self._writing = asyncio.create_task(self._write(sink))

    def detach(self) -> None:
        """Hands no more requests over."""
        for task in (self._reading, self._writing):
            if task is not None:
                task.cancel()
        # A cancelled task keeps its error, whose frames lead here: no reference cycle.
        self._reading = self._writing = None

    def send(self, payload: bytes) -> bool:
        """Sends a reply; the next one when `MessageSink.writable` says that this one has left."""
        self._reply = payload
        self._has_reply.set()
        return False

    def pause(self) -> None:
        """Reads no more."""
        self._may_read.clear()

    def resume(self) -> None:
        """Reads again."""
        self._may_read.set()

    async def _read(self, sink: MessageSink) -> None:
        read = self._context.read
        while (data := await read()) is not grpc.aio.EOF:
            sink.received(data)
            del data  # an idle stream keeps nothing of its last request
            if not self._may_read.is_set():
                await self._may_read.wait()
        sink.half_closed()

    async def _write(self, sink: MessageSink) -> None:
        write = self._context.write
        while True:
            if self._reply is None:
                self._has_reply.clear()
                await self._has_reply.wait()
            assert self._reply is not None
            await write(self._reply)
            self._reply = None
            sink.writable()
