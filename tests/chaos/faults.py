"""Faults, as context managers and calls by name: what networks, clients and strangers do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Relay:
    """A TCP relay before a server, whose connections can be cut and held at will."""

    def __init__(self, target: str) -> None:
        self.address = ""
        self.connections = 0
        self.withheld = asyncio.Event()
        """Set when bytes came that are held."""
        self._target = target.rpartition(":")
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._pass_replies = asyncio.Event()
        self._pass_requests = asyncio.Event()
        self._pass_replies.set()
        self._pass_requests.set()
        self._cut_in: int | None = None

    def cut(self) -> None:
        """Breaks every connection at once, in both directions, as a reset."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def cut_after(self, count: int) -> None:
        """Breaks every connection when so many more bytes went through, either way."""
        self._cut_in = count

    def hold_replies(self) -> None:
        """Lets no more bytes of the server through; `withheld` tells when some came."""
        self.withheld.clear()
        self._pass_replies.clear()

    def hold_requests(self) -> None:
        """Lets no more bytes of the clients through; `withheld` tells when some came."""
        self.withheld.clear()
        self._pass_requests.clear()

    def release(self) -> None:
        """Lets everything through again."""
        self._pass_replies.set()
        self._pass_requests.set()

    def lose(self) -> None:
        """Breaks the connections; what was held never arrives."""
        self.cut()
        self.release()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relays one connection."""
        self.connections += 1
        host, _, port = self._target
        try:
            server_reader, server_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, server_writer}
        pumps = (
            self._pump(reader, server_writer, self._pass_requests),
            self._pump(server_reader, writer, self._pass_replies),
        )
        for pump in pumps:
            task = asyncio.create_task(pump)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        passing: asyncio.Event,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                if not passing.is_set():
                    self.withheld.set()
                await passing.wait()
                if self._cut_in is not None:
                    data, self._cut_in = data[: self._cut_in], self._cut_in - len(data)
                writer.write(data)
                await writer.drain()
                if self._cut_in is not None and self._cut_in <= 0:
                    self._cut_in = None
                    self.cut()
        writer.close()

    async def end(self) -> None:
        """Cuts everything and waits until it is gone."""
        self.cut()
        self.release()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def relay(target: str) -> AsyncIterator[Relay]:
    """A relay before a server."""
    made = Relay(target)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        server.close()
        await made.end()
        await server.wait_closed()
