"""Stands between a store and its Redis: loses replies, or holds requests back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

PIECE = 65_536


class Proxy:
    """What passes, passes unchanged, until it is told otherwise."""

    def __init__(self, redis_port: int) -> None:
        self.port = 0
        self.losing = False
        """The next reply is lost with its connection."""
        self.holding = False
        """Requests are kept, even beyond the end of their connections, until `let_go`."""
        self.redis_port = redis_port
        """Where new connections go; those that are there stay where they are."""
        self._held: list[tuple[asyncio.StreamWriter, bytes]] = []
        self._pumps: set[asyncio.Task[None]] = set()

    async def let_go(self) -> None:
        """Sends what was held, and waits until Redis has read it."""
        self.holding = False
        for redis, data in self._held:
            redis.write(data)
            await redis.drain()
        await asyncio.sleep(0.05)

    async def serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            redis, to_redis = await asyncio.open_connection("127.0.0.1", self.redis_port)
        except OSError:  # it is away
            to_client.close()
            return
        for pump in (self._requests(client, to_redis), self._replies(redis, to_client)):
            task = asyncio.create_task(pump)
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def close(self) -> None:
        """Ends all connections."""
        for task in self._pumps:
            task.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _requests(self, client: asyncio.StreamReader, to_redis: asyncio.StreamWriter) -> None:
        try:
            while data := await client.read(PIECE):
                if self.holding:
                    self._held.append((to_redis, data))
                else:
                    to_redis.write(data)
            await asyncio.Event().wait()  # until `close`: held requests outlive their client
        finally:
            to_redis.close()

    async def _replies(self, redis: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        try:
            with suppress(ConnectionError):
                while data := await redis.read(PIECE):
                    if self.losing:
                        self.losing = False
                        return
                    to_client.write(data)
        finally:
            to_client.close()


@asynccontextmanager
async def proxy(redis_port: int) -> AsyncIterator[Proxy]:
    """A proxy on a free port."""
    made = Proxy(redis_port)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        await made.close()
