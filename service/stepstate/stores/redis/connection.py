"""One Redis, or a cluster, through redis-py; and what the errors mean.

redis-py is configured not to retry: only `pipeline` knows what is safe to send twice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.sentinel import Sentinel
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    MaxConnectionsError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import TimeoutError as RedisTimeout

from stepstate.stores.redis.commands import Command, Reply

AWAY = (RedisError, RedisClusterException, OSError, TimeoutError)
"""All that redis-py raises for a Redis that does not answer as it should."""


class RedisConnection(Protocol):
    """The connection of a store: to one Redis, or to a cluster."""

    place: str
    """For errors; without passwords."""
    is_cluster: bool
    """Whether all keys of a command must be in one bucket."""

    def node(self, key: str) -> str:
        """The node that has a key, as far as is known."""
        ...

    async def send(self, commands: Sequence[Command], *, whole: bool) -> list[Reply]:
        """Sends commands in one pipeline; errors are among the replies.

        Args:
            commands: what to send.
            whole: whether to send the texts of their scripts.

        Raises:
            one of AWAY.
        """
        ...

    async def reconnect(self) -> None:
        """Drops connections and the map of a cluster's nodes: both may be out of date."""
        ...

    async def close(self) -> None:
        """Closes all connections."""
        ...


class SingleConnection(RedisConnection):
    """One Redis.

    Args:
        client: redis-py's client.
        place: host and port.
    """

    is_cluster = False

    def __init__(self, client: Redis, place: str) -> None:
        self.client = client
        self.place = place

    def node(self, key: str) -> str:
        del key
        return ""

    async def send(self, commands: Sequence[Command], *, whole: bool) -> list[Reply]:
        # Like redis-py's pipeline, in half as many turns of the event loop.
        pool = self.client.connection_pool
        connection = await pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            words = [command.words(whole=whole) for command in commands]
            await connection.send_packed_command(connection.pack_commands(words))
            return [await _reply(connection) for _ in commands]
        finally:
            await pool.release(connection)

    async def reconnect(self) -> None:
        with suppress(*AWAY):  # then the next command fails with it
            await self.client.connection_pool.disconnect(inuse_connections=False)

    async def close(self) -> None:
        await self.client.aclose()


async def _reply(connection: AbstractConnection) -> Reply:
    try:
        return await connection.read_response()  # disconnects unless it reads a whole one
    except ResponseError as error:
        return error


class SentinelConnection(SingleConnection):
    """The Redis that Sentinels name as the primary; each new connection asks them.

    Args:
        sentinel: redis-py's client of the Sentinels.
        service: their name for the primary.
        place: host and port of each.
    """

    def __init__(self, sentinel: Sentinel, service: str, place: str) -> None:
        super().__init__(sentinel.master_for(service), f"{place}/{service}")
        self._sentinel = sentinel

    async def close(self) -> None:
        await super().close()
        for each in self._sentinel.sentinels:
            await each.aclose()


class ClusterConnection(RedisConnection):
    """A cluster.

    Args:
        client: redis-py's client.
        place: host and port of the nodes that are asked first.
    """

    is_cluster = True

    def __init__(self, client: RedisCluster, place: str) -> None:
        self.client = client
        self.place = place

    def node(self, key: str) -> str:
        try:
            node = self.client.get_node_from_key(key)
        except RedisClusterException:
            return ""  # not connected yet
        return "" if node is None else str(node.name)

    async def send(self, commands: Sequence[Command], *, whole: bool) -> list[Reply]:
        pipeline = self.client.pipeline()
        for command in commands:
            pipeline.execute_command(*command.words(whole=whole))
        replies: list[Reply] = await pipeline.execute(raise_on_error=False)
        return replies

    async def reconnect(self) -> None:
        with suppress(*AWAY):  # then the next command fails with it
            await self.client.nodes_manager.initialize()  # its connections stay

    async def close(self) -> None:
        await self.client.aclose()


_BY_TYPE: tuple[tuple[type[Exception], str], ...] = (
    (ReadOnlyError, "readonly"),
    (MasterDownError, "masterdown"),
    (BusyLoadingError, "loading"),
    (OutOfMemoryError, "oom"),
    (ClusterDownError, "cluster"),
    (RedisClusterException, "cluster"),  # it can't be reached, or a slot has no node
    (AskError, "cluster"),  # MovedError is one
    (TryAgainError, "cluster"),
)
_CODE = re.compile(
    r"(?:^|-)(READONLY|MASTERDOWN|LOADING|NOREPLICAS|OOM|MISCONF|CLUSTERDOWN|MOVED|ASK|TRYAGAIN) "
)
"""At the start; before Redis 7 also in the middle of the error of a script that met it."""
_OF_A_CLUSTER = {"CLUSTERDOWN", "MOVED", "ASK", "TRYAGAIN"}

_LASTING = (AuthenticationError, AuthorizationError, MaxConnectionsError)
"""Derived from ConnectionError, but they are answers: another try would get the same."""

_ADVICE = {
    "readonly": "it is a replica: see that the address leads to the primary",
    "masterdown": "it is a replica without its primary: see that the address leads to the primary",
    "loading": "it starts, and takes no commands before it has read its data",
    "noreplicas": "too few of its replicas are connected (min-replicas-to-write)",
    "oom": "raise maxmemory, or let sessions end",
    "misconf": "its log says why it can't save to its disk",
    "cluster": "its slots move, or some have no node: `redis-cli --cluster check` tells",
}


def cause_of(error: BaseException) -> str:
    """One of `errors.STORE_CAUSES`."""
    for kind, cause in _BY_TYPE:
        if isinstance(error, kind):
            return cause
    if (code := _CODE.search(str(error))) and isinstance(error, RedisError):
        return "cluster" if code[1] in _OF_A_CLUSTER else code[1].lower()
    if isinstance(error, TimeoutError | RedisTimeout):
        return "timeout"
    lost = isinstance(error, Disconnected | OSError) and not isinstance(error, _LASTING)
    return "disconnected" if lost else "other"


def advice_on(cause: str) -> str:
    """What a cause means and what to do; empty: the error itself says it."""
    return _ADVICE.get(cause, "")


def may_pass(reply: object) -> bool:
    """Whether a new connection may get another reply.

    It may if this connection broke, or if its server can't serve now. That server may be an old
    primary: a proxy or Sentinel has replaced it, but the connection still leads to it.
    """
    return isinstance(reply, BaseException) and cause_of(reply) not in ("other", "timeout")
