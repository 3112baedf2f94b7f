"""One Redis, or a cluster, by way of redis-py.

redis-py is told not to try anything again: what is safe to send twice is known here only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.sentinel import Sentinel
from redis.exceptions import NoScriptError, RedisClusterException, RedisError, ResponseError

from stepstate.stores.redis.causes import may_pass
from stepstate.stores.redis.scripts import Script

Argument = str | bytes | int
Reply = Any
"""What a script returns: bytes, int, lists of them, or an exception."""

TIMEOUT_SECONDS = 2.0
"""For a pipeline: a Redis that is away is noticed while clients are patient."""
BYTES_A_SECOND = 4 * 2**20
"""A slow network; a large pipeline is given the time that it takes there."""

AWAY = (RedisError, RedisClusterException, OSError, TimeoutError)
"""All that redis-py raises for a Redis that does not answer as it should."""


@dataclass(frozen=True, slots=True)
class Command:
    """A script with its keys, which are in one slot on a cluster, and its arguments."""

    script: Script
    keys: Sequence[str]
    arguments: Sequence[Argument]

    @property
    def size(self) -> int:
        """About its bytes."""
        return sum(len(a) for a in self.arguments if not isinstance(a, int))

    def words(self, *, whole: bool) -> tuple[Argument, ...]:
        """As it is sent: by the script's name, or with its whole text."""
        how = ("EVAL", self.script.text) if whole else ("EVALSHA", self.script.sha)
        return (*how, len(self.keys), *self.keys, *self.arguments)


class RedisConnection(Protocol):
    """A way to Redis."""

    place: str
    """For errors; without passwords."""
    one_slot: bool
    """Whether the keys of a command must be of one bucket."""

    def node(self, key: str) -> str:
        """The node that has a key, or most probably has it."""
        ...

    async def send(self, commands: Sequence[Command], *, whole: bool) -> list[Reply]:
        """Sends commands in one pipeline; errors are among the replies.

        Raises:
            one of AWAY.
        """
        ...

    async def reconnect(self) -> None:
        """Lets go of connections, and of what is known of nodes: all may be out of date."""
        ...

    async def close(self) -> None:
        """Closes all connections."""
        ...


class SingleConnection:
    """One Redis.

    Args:
        client: redis-py's client.
        place: host and port.
    """

    one_slot = False

    def __init__(self, client: Redis, place: str) -> None:
        self.client = client
        self.place = place

    def node(self, key: str) -> str:
        """See `RedisConnection.node`."""
        del key
        return ""

    async def send(self, commands: Sequence[Command], *, whole: bool) -> list[Reply]:
        """See `RedisConnection.send`. Like redis-py's pipeline, in half the turns of the loop."""
        pool = self.client.connection_pool
        connection = await pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            words = [command.words(whole=whole) for command in commands]
            await connection.send_packed_command(connection.pack_commands(words))
            return [await self._reply(connection) for _ in commands]
        finally:
            await pool.release(connection)

    async def _reply(self, connection: AbstractConnection) -> Reply:
        try:
            return await connection.read_response()  # disconnects unless it reads a whole one
        except ResponseError as error:
            return error

    async def reconnect(self) -> None:
        """See `RedisConnection.reconnect`."""
        with suppress(*AWAY):  # then the next command says so
            await self.client.connection_pool.disconnect(inuse_connections=False)

    async def close(self) -> None:
        """See `RedisConnection.close`."""
        await self.client.aclose()


class SentinelConnection(SingleConnection):
    """The Redis that Sentinels name as the primary; each new connection asks them.

    Args:
        sentinel: redis-py's client of the Sentinels.
        service: the name that they have for the primary.
        place: host and port of each.
    """

    def __init__(self, sentinel: Sentinel, service: str, place: str) -> None:
        super().__init__(sentinel.master_for(service), f"{place}/{service}")
        self._sentinel = sentinel

    async def close(self) -> None:
        """See `RedisConnection.close`."""
        await super().close()
        for each in self._sentinel.sentinels:
            await each.aclose()


class ClusterConnection:
    """A cluster.

    Args:
        client: redis-py's client.
        place: host and port where it was first asked.
    """

    one_slot = True

    def __init__(self, client: RedisCluster, place: str) -> None:
        self.client = client
        self.place = place

    def node(self, key: str) -> str:
        """See `RedisConnection.node`."""
        try:
            node = self.client.get_node_from_key(key)
        except RedisClusterException:
            return ""  # not connected yet
        return "" if node is None else str(node.name)

    async def send(self, commands: Sequence[Command], *, whole: bool) -> list[Reply]:
        """See `RedisConnection.send`."""
        pipeline = self.client.pipeline()
        for command in commands:
            pipeline.execute_command(*command.words(whole=whole))
        replies: list[Reply] = await pipeline.execute(raise_on_error=False)
        return replies

    async def reconnect(self) -> None:
        """See `RedisConnection.reconnect`: asks which node has what; other connections stay."""
        with suppress(*AWAY):  # then the next command says so
            await self.client.nodes_manager.initialize()

    async def close(self) -> None:
        """See `RedisConnection.close`."""
        await self.client.aclose()


async def ask(link: RedisConnection, commands: Sequence[Command]) -> list[Reply]:
    """Sends commands and, once more on a new connection, those that a new one may help.

    Scripts that Redis does not know (any more) are sent whole. The scripts bear that they are
    sent twice. Errors that remain are among the replies; when they may be those of a server that
    is the wrong one by now, its connection is not kept.

    Raises:
        one of AWAY.
    """
    replies = await _send(link, commands, whole=False)
    reconnected = whole = False
    while True:
        if any(map(may_pass, replies)):
            await link.reconnect()
            if reconnected:
                return replies
            reconnected = True
        elif not whole and any(map(_is_unknown, replies)):
            whole = True
        else:
            return replies
        await _send_again(link, commands, replies, whole=whole)


async def _send(link: RedisConnection, commands: Sequence[Command], *, whole: bool) -> list[Reply]:
    # redis-py's own timeout costs two turns of the event loop
    seconds = TIMEOUT_SECONDS + sum(command.size for command in commands) / BYTES_A_SECOND
    try:
        async with asyncio.timeout(seconds):
            return await link.send(commands, whole=whole)
    except TimeoutError:
        raise TimeoutError(f"no answer for {seconds:.1f} s") from None
    except AWAY as error:
        if not may_pass(error):
            raise
        return [error] * len(commands)


async def _send_again(
    link: RedisConnection, commands: Sequence[Command], replies: list[Reply], *, whole: bool
) -> None:
    """Puts new replies in the places of those that may be others now."""
    failed = [i for i, reply in enumerate(replies) if may_pass(reply) or _is_unknown(reply)]
    answers = await _send(link, [commands[i] for i in failed], whole=whole)
    for i, answer in zip(failed, answers, strict=True):
        replies[i] = answer


def _is_unknown(reply: object) -> bool:
    """Whether Redis does not know the script by its name."""
    return isinstance(reply, NoScriptError)
