"""How many open sessions tenants have, and how a limit of them holds.

On one Redis the script that opens a session counts and compares, so nobody can come between. On a
cluster the counts are on several nodes, and no script sees them all. So there servers take turns:
whoever opens a session of a limited tenant waits in the tenant's queue, and counts those before it
as open.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from stepstate.errors import StoreUnavailable
from stepstate.identity import DEFAULT_TENANT
from stepstate.stores.redis import keys, scripts
from stepstate.stores.redis.commands import Command, Reply, text_of
from stepstate.stores.redis.scripts import Script
from stepstate.stores.types import TenantFull

TURN_SECONDS = 0.01
"""Between two looks at the queue of a tenant that may be full."""
QUEUE_MICROS = 30_000_000
"""How long a place in the queue is kept for a server that may have been killed. One that is paused
for longer while it opens a session may pass the limit by that session."""
_FULL = 2
"""What scripts reply when a tenant has no room."""

Limit = tuple[int | str, int | str]
"""The last arguments of the scripts that open a session: the limit, and how many are open if the
script can't count them; empty: none."""


class AskEach(Protocol):
    """The results of a script for each of some keys, in order; see `RedisStore`."""

    async def __call__(
        self, script: Script, where: Sequence[str], *arguments: str | int
    ) -> list[Reply]:
        """Asks."""
        ...


class TenantCounts:
    """The open sessions of tenants.

    Args:
        each: asks for the keys of all buckets.
        ask: asks one command.
        now: the store's time, in microseconds.
        cluster: whether the counts are on several nodes.
    """

    def __init__(
        self,
        each: AskEach,
        ask: Callable[[Command], Awaitable[Reply]],
        *,
        now: Callable[[], int],
        cluster: bool,
    ) -> None:
        self._each = each
        self._ask = ask
        self._now = now
        self._cluster = cluster

    async def count(self) -> Mapping[tuple[str, str], int]:
        """See `SessionStore.count`."""
        counts: Counter[tuple[str, str]] = Counter()
        for model, sessions in await self._of_default():
            counts[DEFAULT_TENANT, model] += sessions
        for field, sessions in await self._of_others():
            tenant, separator, model = field.partition("/")
            counts[tenant, model] += sessions if separator else 0  # else it is of all models
        return +counts  # only those above 0

    async def open(
        self, tenant: str, limit: int | None, command: Callable[[Limit], Command]
    ) -> TenantFull | list[Reply]:
        """Opens a session, unless its tenant has no room.

        Args:
            tenant: whose it is.
            limit: how many it may have; None: any number.
            command: what opens it, with a limit.

        Returns:
            The reply to the command.
        """
        if limit is None:
            reply: list[Reply] = await self._ask(command(("", "")))
            return reply
        if self._cluster:
            return await self._open_in_turn(tenant, limit, command)
        reply = await self._ask(command((limit, "")))
        return TenantFull(reply[1], limit) if reply[0] == _FULL else reply

    async def _open_in_turn(
        self, tenant: str, limit: int, command: Callable[[Limit], Command]
    ) -> TenantFull | list[Reply]:
        queue, place = keys.queue(tenant), f"{self._now()} {secrets.token_hex(8)}"
        try:
            before = await self._before(queue, place)
            while True:
                count = before + await self._open_of(tenant)
                reply: list[Reply] = await self._ask(command((limit, count)))
                if reply[0] != _FULL:
                    return reply
                if not before:
                    return TenantFull(count, limit)
                while before:  # whether those find room is not known
                    await asyncio.sleep(TURN_SECONDS)
                    before = await self._before(queue, place)
        finally:
            with suppress(StoreUnavailable):  # it is dropped later
                await self._ask(Command(scripts.LEAVE, [queue], (place,)))

    async def _before(self, queue: str, place: str) -> int:
        """How many are before a place in a queue, which is taken if it is not."""
        arguments = (place, self._now() - QUEUE_MICROS)
        return int(await self._ask(Command(scripts.TURN, [queue], arguments)))

    async def _open_of(self, tenant: str) -> int:
        if tenant == DEFAULT_TENANT:
            return sum(sessions for _, sessions in await self._of_default())
        return sum(sessions for name, sessions in await self._of_others() if name == tenant)

    async def _of_default(self) -> Iterator[tuple[str, int]]:
        return await self._fields(map(keys.counts, keys.ALL_BUCKETS))

    async def _of_others(self) -> Iterator[tuple[str, int]]:
        buckets = keys.ALL_BUCKETS if self._cluster else keys.ALL_BUCKETS[:1]
        return await self._fields(
            keys.tenant_counts(number, cluster=self._cluster) for number in buckets
        )

    async def _fields(self, where: Iterable[str]) -> Iterator[tuple[str, int]]:
        """The fields of some hashes that are numbers."""
        values = await self._each(scripts.COUNTS, list(where))
        fields = zip(values[::2], values[1::2], strict=True)
        return ((text_of(name), int(number)) for name, number in fields if number.isdigit())
