"""The `SessionStore` on Redis."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from stepstate.errors import StoreUnavailable
from stepstate.identity import DEFAULT_TENANT, SessionKey, split_key
from stepstate.stores.base import TOMBSTONE_SECONDS, UNREADABLE_SECONDS, SessionStore
from stepstate.stores.redis import commands, keys, scripts
from stepstate.stores.redis.commands import (
    Argument,
    Command,
    Mark,
    Reply,
    micros,
    read_session,
    read_tombstone,
    text_of,
)
from stepstate.stores.redis.connection import RedisConnection
from stepstate.stores.redis.keys import SessionKeys
from stepstate.stores.redis.pipeline import CommandPipeline
from stepstate.stores.redis.scripts import Script
from stepstate.stores.redis.tenants import TenantCounts
from stepstate.stores.types import (
    LAST_SECONDS,
    MICROS,
    DiskUsage,
    SaveRequest,
    SaveResult,
    SessionRecord,
    StoredSession,
    TenantFull,
    Tombstone,
    UnreadableSession,
)
from stepstate.uptime import UptimeClock

SAVES_AT_ONCE = 64
"""Of one script: some hundred microseconds in which Redis does nothing else."""
BUCKETS_AT_ONCE = 32
"""Buckets of a cluster that are searched together for overdue sessions."""
SWEEP_SECONDS = 60.0
"""How often old tombstones are deleted."""
TOMBSTONES_AT_ONCE = 256
PERSISTED_AT_ONCE = 256
READ_AT_ONCE = 64
"""A millisecond of work in one turn of the loop."""

_NO_LIMIT = 2**53
"""More members than there are."""


class RedisStore(SessionStore):
    """Keeps sessions in Redis, for servers of any number of machines.

    What a call has returned is as durable as Redis is configured to be. Its defaults lose all
    changes since the last dump, minutes: set `appendonly yes`; then a crash of Redis loses up to a
    second, and with `appendfsync always` nothing. Replication is asynchronous: a failover may
    lose changes that were just acknowledged. `maxmemory-policy` should be noeviction.

    Args:
        connection: to Redis, or to its cluster.
        clock: monotonic seconds.
        unix_time: seconds since 1970.
    """

    durable = True

    def __init__(
        self,
        connection: RedisConnection,
        *,
        clock: Callable[[], float],
        unix_time: Callable[[], float],
    ) -> None:
        self._connection = connection
        self._unix_time = unix_time
        self._clock = UptimeClock(clock, start=unix_time())
        self._sweep_at = 0.0
        self._started = False
        self._starting = asyncio.Lock()
        self._tenants = TenantCounts(
            self._each, self._ask, now=self._now, cluster=connection.is_cluster
        )
        self._pipelines: dict[str, CommandPipeline] = {}
        self._name = secrets.token_hex(8)
        self._number = 0
        self._closed = False

    def now(self) -> float:
        if not self._started:
            raise StoreUnavailable(f"redis at {self._connection.place} was not reached yet")
        return self._clock()

    async def heartbeat(self) -> None:
        await self._start()
        await self._advance_clock(start=micros(self._clock()))
        if self._clock() >= self._sweep_at:
            await self._delete_old_tombstones()
            self._sweep_at = self._clock() + SWEEP_SECONDS

    async def create(
        self,
        record: SessionRecord,
        *,
        owner: str,
        t: int,
        expires_at: float,
        snapshot: bytes,
        replacing: int = 0,
        max_open_sessions: int | None = None,
    ) -> int | StoredSession | UnreadableSession | TenantFull:
        await self._start()
        fixed = (record.key, record.model_key, record.fingerprint, record.to_json())
        arguments: list[Argument] = [*fixed, owner, t, micros(expires_at), snapshot]
        arguments += (self._now(), micros(self._unix_time()), replacing, *self._mark())
        where = self._keys(record.key)
        reply = await self._tenants.open(
            record.tenant,
            max_open_sessions,
            lambda limit: Command(scripts.CREATE, where, (*arguments, *limit)),
        )
        if isinstance(reply, TenantFull):
            return reply
        created, found = reply
        return int(found) if created else read_session(record.key, found)

    async def acquire(
        self, key: SessionKey, *, owner: str, fingerprints: Collection[str]
    ) -> tuple[StoredSession, bytes] | StoredSession | UnreadableSession | Tombstone | None:
        await self._start()
        where = keys.of_save(key)[:2]
        arguments: list[Argument] = [owner, self._now(), micros(self._unix_time()), *self._mark()]
        arguments += fingerprints
        found, *reply = await self._ask(Command(scripts.ACQUIRE, where, arguments))
        if found == 0:
            return read_tombstone(reply[0], self._clock())
        session = read_session(key, reply[0])
        if found == 1 or isinstance(session, UnreadableSession):
            return session
        return session, bytes(reply[1])

    async def find(self, key: SessionKey) -> StoredSession | UnreadableSession | Tombstone | None:
        found = await self.acquire(key, owner="", fingerprints=())
        assert not isinstance(found, tuple)  # without fingerprints none is taken
        return found

    async def save(self, saves: Sequence[SaveRequest]) -> list[SaveResult]:
        return await self._save(saves, lambda some: commands.save(some, self._mark()))

    async def expire(self, saves: Sequence[SaveRequest], *, delete_at: float) -> list[SaveResult]:
        cluster = self._connection.is_cluster
        return await self._save(
            saves, lambda some: commands.expire(some, delete_at, self._mark(), cluster=cluster)
        )

    async def restore(
        self,
        key: SessionKey,
        epoch: int,
        *,
        expires_at: float,
        max_open_sessions: int | None = None,
    ) -> bool | TenantFull:
        of = self._keys(key)
        where = (of.session, of.due, of.counts, of.expired, of.listing)
        arguments = (epoch, micros(expires_at), *self._mark())
        reply = await self._tenants.open(
            split_key(key)[0],
            max_open_sessions,
            lambda limit: Command(scripts.RESTORE, where, (*arguments, *limit)),
        )
        return reply if isinstance(reply, TenantFull) else bool(reply[0])

    async def end(self, key: SessionKey, epoch: int, tombstone: Tombstone) -> bool:
        await self._start()
        arguments = (epoch, *self._tombstone_arguments(tombstone))
        return bool(await self._ask(Command(scripts.END, self._keys(key), arguments)))

    async def discard(self, key: SessionKey, tombstone: Tombstone) -> bool:
        await self._start()
        (found,) = await self._each(scripts.ENTRIES, [keys.session(key)])
        if not found or isinstance(read_session(key, found), StoredSession):
            return False
        arguments = (key, *self._tombstone_arguments(tombstone), *found)
        return bool(await self._ask(Command(scripts.DISCARD, self._keys(key), arguments)))

    async def overdue(self, before: float, limit: int) -> list[StoredSession]:
        sessions: list[StoredSession] = []
        step = BUCKETS_AT_ONCE if self._connection.is_cluster else keys.BUCKETS
        for first in range(0, keys.BUCKETS, step):
            where = _in_all(keys.due, range(first, first + step))
            rest = limit - len(sessions)
            members = await self._members(where, f"({micros(before)}", rest)
            sessions += await self._readable(members[:rest], before)
            if len(members) >= limit:
                break
        return sessions

    async def expired(self, before: float, limit: int) -> list[StoredSession]:
        where = _in_all(keys.expired)
        score = f"({micros(before)}" if before < float("inf") else "+inf"
        each = -(-limit // keys.BUCKETS)  # the same number of each bucket
        members = await self._members(where, score, _NO_LIMIT, each=each)
        found = await self._readable(members, min(before, LAST_SECONDS))
        sessions = [session for session in found if session.delete_at is not None]
        return sorted(sessions, key=lambda session: session.delete_at or 0.0)[:limit]

    async def page(
        self,
        token: str,
        size: int,
        model: str = "",
        *,
        tenant: str | None = None,
        expired: bool = False,
    ) -> tuple[list[StoredSession | UnreadableSession], str]:
        last = keys.place_after(token)
        members: list[str] = []
        first, step = last[0], 1
        while first < keys.BUCKETS and len(members) <= size:
            buckets = range(first, min(first + step, keys.BUCKETS))
            found = await self._listed(buckets, tenant, expired=expired)
            wanted = (
                member
                for member in found
                if model in ("", keys.model_of(member).partition("/")[0])
                and tenant in (None, split_key(keys.key_of(member))[0])
            )
            later = (m for m in wanted if keys.place_of(m) > last)
            members += sorted(later, key=keys.place_of)
            first, step = first + step, step * 4
        sessions = [session for _, session in await self._sessions(members[:size])]
        is_last = len(members) <= size
        return sessions, "" if is_last else keys.token_of(keys.place_of(members[size - 1]))

    async def count(self) -> Mapping[tuple[str, str], int]:
        return await self._tenants.count()

    async def count_expired(self) -> int:
        where = _in_all(keys.expired)
        return sum(await self._each(scripts.SIZES, where))

    async def probe(self) -> None:
        # One key on each node that has buckets.
        where = {self._connection.node(key): key for key in map(keys.probe, keys.ALL_BUCKETS)}
        await self._ask_all(
            [Command(scripts.PROBE, (key,), (self._name,)) for key in where.values()]
        )

    def disk_usage(self) -> DiskUsage | None:
        return None

    async def close(self) -> None:
        self._closed = True
        for pipeline in self._pipelines.values():
            await pipeline.close()
        await self._connection.close()

    async def _start(self) -> None:
        """Reads the store's clock, if Redis was away when the store was opened."""
        if self._started:
            return
        async with self._starting:
            if not self._started and not await self._advance_clock(start=None):
                await self._advance_clock(start=await self._upgrade())
            self._started = True

    async def _advance_clock(self, *, start: int | None) -> bool:
        """Advances the clock; False: there is none, and `start` is None."""
        now, since, at = self._clock.read()
        arguments = (micros(now), micros(since), "" if start is None else start)
        reply = await self._ask(Command(scripts.CLOCK, [keys.CLOCK], arguments))
        if reply is None:
            return False
        self._clock.set(int(reply) / MICROS, at)
        return True

    async def _upgrade(self) -> int:
        """Adapts the sessions of a version without a clock; returns where the clock starts.

        It starts at the time of the last step in Redis, but not later than now: so stored times
        stay valid, and every session has as much idle time left as it had then, however long ago
        that was and whatever the wall clock was set to. Sessions with impossible times (damaged,
        or written under a wrong clock) are not considered.
        """
        unix_time = self._unix_time()
        where = list(map(keys.due, keys.ALL_BUCKETS))
        latest = [text_of(member) for member in await self._each(scripts.LATEST, where)]
        used_at = [
            session.expires_at - session.record.idle_timeout_seconds
            for _, session in await self._sessions(latest)
            if isinstance(session, StoredSession)
        ]
        for due in where:
            members = await self._members([due], "+inf", _NO_LIMIT)
            sessions = [keys.session(keys.key_of(member)) for member in members]
            firsts = range(0, len(sessions), PERSISTED_AT_ONCE)
            groups = (sessions[first : first + PERSISTED_AT_ONCE] for first in firsts)
            await self._ask_all([Command(scripts.PERSIST, group, ()) for group in groups])
        return micros(max((at for at in used_at if 0 <= at <= unix_time), default=unix_time))

    async def _delete_old_tombstones(self) -> None:
        where = _in_all(keys.tombstones)
        now = self._now()
        while True:
            found = await self._members(where, str(now), TOMBSTONES_AT_ONCE)
            ended = map(SessionKey, found)
            await self._ask_all([commands.delete_tombstone(one, now) for one in ended])
            if len(found) < TOMBSTONES_AT_ONCE:
                return

    async def _save(
        self, saves: Sequence[SaveRequest], command: Callable[[Sequence[SaveRequest]], Command]
    ) -> list[SaveResult]:
        groups = list(self._groups(saves))
        replies = await self._ask_all([command([saves[i] for i in group]) for group in groups])
        results = [SaveResult.MISSING] * len(saves)
        for group, reply in zip(groups, replies, strict=True):
            for i, result in zip(group, reply, strict=True):
                results[i] = SaveResult(result.decode())
        return results

    def _groups(self, saves: Sequence[SaveRequest]) -> Iterable[list[int]]:
        """The indexes of saves that one script may do together."""
        groups: dict[int, list[int]] = {}
        for i, save in enumerate(saves):
            slot = keys.bucket(save.key) if self._connection.is_cluster else 0
            groups.setdefault(slot, []).append(i)
        for group in groups.values():
            for first in range(0, len(group), SAVES_AT_ONCE):
                yield group[first : first + SAVES_AT_ONCE]

    async def _members(
        self, where: Sequence[str], score: str, limit: int, *, each: int = _NO_LIMIT
    ) -> list[str]:
        """Members of some sets, such as "ID MODEL/VERSION", up to a score."""
        members = await self._each(scripts.MEMBERS, where, score, limit, each)
        return [text_of(member) for member in members]

    async def _listed(
        self, buckets: Iterable[int], tenant: str | None, *, expired: bool
    ) -> list[str]:
        """The members of some buckets that are of a tenant, or all."""
        if tenant is not None and tenant != DEFAULT_TENANT:
            where = [keys.listing(number, tenant) for number in buckets]
            return await self._members(where, "+inf" if expired else "0", _NO_LIMIT)
        families = keys.FAMILIES if tenant is None else keys.FAMILIES[:1]
        where = _in_all(keys.due, buckets, families)
        where += _in_all(keys.expired, buckets, families) if expired else []
        return await self._members(where, "+inf", _NO_LIMIT)

    async def _sessions(
        self, members: Sequence[str]
    ) -> list[tuple[str, StoredSession | UnreadableSession]]:
        """The sessions of members; those of deleted sessions are removed from their sets."""
        where = [keys.session(keys.key_of(member)) for member in members]
        replies = await self._each(scripts.ENTRIES, where)
        sessions: list[tuple[str, StoredSession | UnreadableSession]] = []
        others: list[str] = []
        for place, (member, reply) in enumerate(zip(members, replies, strict=True)):
            if reply and text_of(reply[-1]) == keys.model_of(member):
                sessions.append((member, read_session(keys.key_of(member), reply)))
            else:
                others.append(member)
            if place % READ_AT_ONCE == 0:
                await asyncio.sleep(0)
        cluster = self._connection.is_cluster
        tidied = await self._ask_all([commands.tidy(one, cluster=cluster) for one in others])
        problem = "its model is not the one it is kept by"
        return sessions + [
            (member, UnreadableSession(keys.key_of(member), problem))
            for member, removed in zip(others, tidied, strict=True)
            if not removed
        ]

    async def _readable(self, members: Sequence[str], before: float) -> list[StoredSession]:
        """The sessions of members that can be read; the next check of the others is moved.

        Else they would always come first, and hide all others.
        """
        found = await self._sessions(members)
        later = micros(min(before + UNREADABLE_SECONDS, LAST_SECONDS))
        unreadable = [member for member, one in found if isinstance(one, UnreadableSession)]
        await self._ask_all([commands.postpone(member, later) for member in unreadable])
        return [one for _, one in found if isinstance(one, StoredSession)]

    async def _each(
        self, script: Script, where: Sequence[str], *arguments: str | int
    ) -> list[Reply]:
        """The results of a script for each of some keys, in order."""
        if not self._connection.is_cluster:
            return list(await self._ask(Command(script, where, arguments))) if where else []
        replies = await self._ask_all([Command(script, [key], arguments) for key in where])
        return [value for reply in replies for value in reply]

    async def _ask(self, command: Command) -> Reply:
        return await self._pipeline(command).ask(command)

    async def _ask_all(self, some: Sequence[Command]) -> list[Reply]:
        if len(some) == 1:
            return [await self._ask(some[0])]  # gather would take another turn of the loop
        return await asyncio.gather(*(self._pipeline(command).ask(command) for command in some))

    def _pipeline(self, command: Command) -> CommandPipeline:
        if self._closed:
            raise StoreUnavailable(f"the store on redis at {self._connection.place} was closed")
        node = self._connection.node(command.keys[0])
        if node not in self._pipelines:
            self._pipelines[node] = CommandPipeline(self._connection)
        return self._pipelines[node]

    def _keys(self, key: SessionKey) -> SessionKeys:
        return keys.of(key, cluster=self._connection.is_cluster)

    def _tombstone_arguments(self, tombstone: Tombstone) -> tuple[str | int, ...]:
        """The arguments of the scripts that end a session, from the reason on."""
        how = (tombstone.reason.value, tombstone.t, repr(tombstone.idle_timeout_seconds))
        return (*how, self._now() + micros(TOMBSTONE_SECONDS), *self._mark())

    def _now(self) -> int:
        return micros(self._clock())

    def _mark(self) -> Mark:
        self._number += 1
        return self._number, self._name


def _in_all(
    key: Callable[[int, str], str],
    buckets: Iterable[int] = keys.ALL_BUCKETS,
    families: Sequence[str] = keys.FAMILIES,
) -> list[str]:
    """The keys of some buckets, bucket by bucket."""
    return [key(number, family) for number in buckets for family in families]
