"""The `SessionStore` on Redis."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from stepstate.errors import StoreUnavailable
from stepstate.stores.base import (
    ENDING_SECONDS,
    DiskUsage,
    SaveRequest,
    SaveResult,
    SessionRecord,
    StoredSession,
    Tombstone,
    UnreadableSession,
)
from stepstate.stores.redis import keys, scripts
from stepstate.stores.redis.connection import Argument, Command, RedisConnection, Reply
from stepstate.stores.redis.index import (
    id_of,
    is_of,
    model_of,
    place_after,
    place_of,
    token_of,
)
from stepstate.stores.redis.pipeline import CommandPipeline
from stepstate.stores.redis.replies import micros, read_ending, read_entry, text_of
from stepstate.stores.redis.scripts import Script
from stepstate.uptime import UptimeClock

SAVES_AT_ONCE = 64
"""Of one script: some hundred microseconds in which Redis does nothing else."""
BUCKETS_AT_ONCE = 32
"""Of a cluster that are asked together for what is overdue."""

FORGET_SECONDS = 60.0
"""How much longer than they need to endings are remembered."""
FORGOTTEN_AT_ONCE = 256
PERSISTED_AT_ONCE = 256

UNREADABLE_SECONDS = 3600.0
"""How long the sweep leaves alone a session whose record can't be read."""
LAST = 2**53 / 1e6
"""The last time that Redis can have."""

_ALL = 2**53
"""More members than there are."""


class RedisStore:
    """Keeps sessions in Redis, for servers of any number of machines.

    What a call has returned is as durable as Redis is told to be. Its defaults lose what came
    since the last dump, minutes: set `appendonly yes`; then a crash of Redis loses up to a
    second, and with `appendfsync always` nothing. Replication is asynchronous: a failover may
    lose what was just acknowledged. `maxmemory-policy` should be noeviction.

    Args:
        link: the way to Redis.
        clock: monotonic seconds.
        wall: Unix seconds.
    """

    durable = True

    def __init__(
        self, link: RedisConnection, *, clock: Callable[[], float], unix_time: Callable[[], float]
    ) -> None:
        self._link = link
        self._unix_time = unix_time
        self._clock = UptimeClock(clock, start=unix_time())
        self._forget_at = 0.0
        self._started = False
        self._starting = asyncio.Lock()
        self._lanes: dict[str, CommandPipeline] = {}
        self._name = secrets.token_hex(8)
        self._number = 0
        self._closed = False

    def now(self) -> float:
        """See `SessionStore.now`."""
        if not self._started:
            raise StoreUnavailable(f"redis at {self._link.place} was not reached yet")
        return self._clock()

    async def beat(self) -> None:
        """See `SessionStore.beat`."""
        await self._start()
        await self._move_clock(begin=micros(self._clock()))
        if self._clock() >= self._forget_at:
            await self._forget()
            self._forget_at = self._clock() + FORGET_SECONDS

    async def create(
        self,
        record: SessionRecord,
        *,
        owner: str,
        t: int,
        expires_at: float,
        snapshot: bytes,
        replacing: int = 0,
    ) -> int | StoredSession | UnreadableSession:
        """See `SessionStore.create`."""
        await self._start()
        what = (record.session_id, record.model_key, record.fingerprint, record.to_json())
        arguments: list[Argument] = [*what, owner, t, micros(expires_at), snapshot]
        arguments += (self._now(), micros(self._unix_time()), replacing, *self._mark())
        command = Command(scripts.CREATE, _all_keys(record.session_id), arguments)
        taken, reply = await self._ask(command)
        return int(reply) if taken else read_entry(record.session_id, reply)

    async def acquire(
        self, session_id: str, *, owner: str, fingerprints: Collection[str]
    ) -> tuple[StoredSession, bytes] | StoredSession | UnreadableSession | Tombstone | None:
        """See `SessionStore.acquire`."""
        await self._start()
        where = (keys.session(session_id), keys.ending(session_id))
        arguments: list[Argument] = [owner, self._now(), micros(self._unix_time()), *self._mark()]
        arguments += fingerprints
        found, *reply = await self._ask(Command(scripts.ACQUIRE, where, arguments))
        if found == 0:
            return read_ending(reply[0], self._clock())
        entry = read_entry(session_id, reply[0])
        if found == 1 or isinstance(entry, UnreadableSession):
            return entry
        return entry, bytes(reply[1])

    async def find(self, session_id: str) -> StoredSession | UnreadableSession | Tombstone | None:
        """See `SessionStore.find`."""
        found = await self.acquire(session_id, owner="", fingerprints=())
        assert not isinstance(found, tuple)  # of no model it takes none
        return found

    async def save(self, saves: Sequence[SaveRequest]) -> list[SaveResult]:
        """See `SessionStore.save`."""
        return await self._save(saves, self._save_command)

    async def expire(self, saves: Sequence[SaveRequest], *, delete_at: float) -> list[SaveResult]:
        """See `SessionStore.expire`."""
        until = micros(delete_at)
        return await self._save(saves, lambda some: self._expire_command(some, until))

    async def restore(self, session_id: str, epoch: int, *, expires_at: float) -> bool:
        """See `SessionStore.restore`."""
        session, _, due, counts, expired, _ = _all_keys(session_id)
        arguments = (epoch, micros(expires_at), *self._mark())
        command = Command(scripts.RESTORE, (session, due, counts, expired), arguments)
        return bool(await self._ask(command))

    async def end(self, session_id: str, epoch: int, ending: Tombstone) -> bool:
        """See `SessionStore.end`."""
        await self._start()
        arguments = (epoch, *self._ended(ending))
        command = Command(scripts.END, _all_keys(session_id), arguments)
        return bool(await self._ask(command))

    async def discard(self, session_id: str, ending: Tombstone) -> bool:
        """See `SessionStore.discard`."""
        await self._start()
        (found,) = await self._each(scripts.ENTRIES, [keys.session(session_id)])
        if not found or isinstance(read_entry(session_id, found), StoredSession):
            return False
        arguments = (session_id, *self._ended(ending), *found)
        return bool(await self._ask(Command(scripts.DISCARD, _all_keys(session_id), arguments)))

    async def overdue(self, before: float, limit: int) -> list[StoredSession]:
        """See `SessionStore.overdue`."""
        entries: list[StoredSession] = []
        step = BUCKETS_AT_ONCE if self._link.one_slot else keys.BUCKETS
        for first in range(0, keys.BUCKETS, step):
            where = [keys.due(number) for number in range(first, first + step)]
            score = f"({micros(before)}"
            members = await self._members(where, score, limit - len(entries))
            entries += await self._readable(members[: limit - len(entries)], before)
            if len(members) >= limit:
                break
        return entries

    async def expired(self, before: float, limit: int) -> list[StoredSession]:
        """See `SessionStore.expired`: as many of each bucket."""
        where = [keys.expired(number) for number in range(keys.BUCKETS)]
        score = f"({micros(before)}" if before < float("inf") else "+inf"
        members = await self._members(where, score, _ALL, each=-(-limit // keys.BUCKETS))
        found = await self._readable(members, min(before, LAST))
        entries = [entry for entry in found if entry.delete_at is not None]
        return sorted(entries, key=lambda entry: entry.delete_at or 0.0)[:limit]

    async def page(
        self, token: str, size: int, model: str = "", *, expired: bool = False
    ) -> tuple[list[StoredSession | UnreadableSession], str]:
        """See `SessionStore.page`: in the order of buckets, and of ids in each.

        Raises:
            InvalidField: page_token.
        """
        last = place_after(token)
        members: list[str] = []
        first, step = last[0], 1
        while first < keys.BUCKETS and len(members) <= size:
            buckets = range(first, min(first + step, keys.BUCKETS))
            where = [keys.due(number) for number in buckets]
            where += [keys.expired(number) for number in buckets if expired]
            found = await self._members(where, "+inf", _ALL)
            later = (m for m in found if is_of(m, model) and place_of(m) > last)
            members += sorted(later, key=place_of)
            first, step = first + step, step * 4
        entries = [entry for _, entry in await self._entries(members[:size])]
        return entries, token_of(place_of(members[size - 1])) if len(members) > size else ""

    async def count(self) -> Mapping[str, int]:
        """See `SessionStore.count`."""
        where = [keys.counts(number) for number in range(keys.BUCKETS)]
        values = await self._each(scripts.COUNTS, where)
        counts: Counter[str] = Counter()
        for model, sessions in zip(values[::2], values[1::2], strict=True):
            if sessions.isdigit():
                counts[text_of(model)] += int(sessions)
        return +counts  # only those above 0

    async def count_expired(self) -> int:
        """See `SessionStore.count_expired`."""
        where = [keys.expired(number) for number in range(keys.BUCKETS)]
        return sum(await self._each(scripts.SIZES, where))

    async def probe(self) -> None:
        """See `SessionStore.probe`: a key on each node that has buckets."""
        where = {self._link.node(key): key for key in map(keys.probe, range(keys.BUCKETS))}
        await self._ask_all(
            [Command(scripts.PROBE, (key,), (self._name,)) for key in where.values()]
        )

    def disk_usage(self) -> DiskUsage | None:
        """See `SessionStore.disk_usage`."""
        return None

    async def close(self) -> None:
        """See `SessionStore.close`."""
        self._closed = True
        for lane in self._lanes.values():
            await lane.close()
        await self._link.close()

    async def _start(self) -> None:
        """Learns the store's clock, which one that was away at first may not have told yet."""
        if self._started:
            return
        async with self._starting:
            if not self._started and not await self._move_clock(begin=None):
                begin = await self._bring_up()
                await self._move_clock(begin=begin)
            self._started = True

    async def _forget(self) -> None:
        where = [keys.endings(number) for number in range(keys.BUCKETS)]
        now = self._now()
        while True:
            ids = await self._members(where, str(now), FORGOTTEN_AT_ONCE)
            await self._ask_all([_forget(session_id, now) for session_id in ids])
            if len(ids) < FORGOTTEN_AT_ONCE:
                return

    async def _move_clock(self, *, begin: int | None) -> bool:
        """Moves the clock on; False: there is none, and `begin` is None."""
        now, since, at = self._clock.read()
        arguments = (micros(now), micros(since), "" if begin is None else begin)
        reply = await self._ask(Command(scripts.CLOCK, [keys.CLOCK], arguments))
        if reply is None:
            return False
        self._clock.set(int(reply) / 1e6, at)
        return True

    async def _bring_up(self) -> int:
        """Takes over what a version without a clock has left; where the clock is to begin.

        That is the time of the last step, as far as it is known, and not later than now: then
        times stay as they are, and every session has the idle time left that it had then. It is
        no matter how long it was ago, or what the wall clock has been set to meanwhile. A session
        whose time can't be, as it is damaged or the clock was wrong, tells nothing.
        """
        unix_time = self._unix_time()
        where = [keys.due(number) for number in range(keys.BUCKETS)]
        latest = [text_of(member) for member in await self._each(scripts.LATEST, where)]
        used_at = [
            entry.expires_at - entry.record.idle_timeout_seconds
            for _, entry in await self._entries(latest)
            if isinstance(entry, StoredSession)
        ]
        for one in where:
            sessions = [keys.session(id_of(m)) for m in await self._members([one], "+inf", _ALL)]
            groups = range(0, len(sessions), PERSISTED_AT_ONCE)
            some = (sessions[first : first + PERSISTED_AT_ONCE] for first in groups)
            await self._ask_all([Command(scripts.PERSIST, group, ()) for group in some])
        return micros(max((at for at in used_at if 0 <= at <= unix_time), default=unix_time))

    async def _save(
        self, saves: Sequence[SaveRequest], command: Callable[[Sequence[SaveRequest]], Command]
    ) -> list[SaveResult]:
        groups = list(self._groups(saves))
        commands = [command([saves[i] for i in group]) for group in groups]
        verdicts = [SaveResult.MISSING] * len(saves)
        for group, reply in zip(groups, await self._ask_all(commands), strict=True):
            for i, verdict in zip(group, reply, strict=True):
                verdicts[i] = SaveResult(verdict.decode())
        return verdicts

    def _groups(self, saves: Sequence[SaveRequest]) -> Iterable[list[int]]:
        """Which saves one script may take, by their numbers."""
        groups: dict[int, list[int]] = {}
        for i, save in enumerate(saves):
            slot = keys.bucket(save.session_id) if self._link.one_slot else 0
            groups.setdefault(slot, []).append(i)
        for group in groups.values():
            for first in range(0, len(group), SAVES_AT_ONCE):
                yield group[first : first + SAVES_AT_ONCE]

    def _save_command(self, saves: Sequence[SaveRequest]) -> Command:
        where: list[str] = []
        arguments: list[Argument] = []
        for save in saves:
            number = keys.bucket(save.session_id)
            where += (keys.session(save.session_id), keys.ending(save.session_id), keys.due(number))
            kept = save.snapshot is None
            numbers = (save.epoch, self._mark()[0], save.t, micros(save.expires_at), int(not kept))
            arguments += (" ".join(map(str, numbers)) + f" {save.owner}", save.snapshot or b"")
        return Command(scripts.SAVE, where, arguments)

    def _expire_command(self, saves: Sequence[SaveRequest], delete_at: int) -> Command:
        where: list[str] = []
        number, name = self._mark()
        arguments: list[Argument] = [delete_at, name]
        for save in saves:
            session, gone, due, counts, expired, _ = _all_keys(save.session_id)
            where += (session, gone, due, counts, expired)
            kept = save.snapshot is None
            numbers = (save.epoch, number, save.t, int(not kept))
            arguments += (" ".join(map(str, numbers)) + f" {save.owner}", save.snapshot or b"")
        return Command(scripts.EXPIRE, where, arguments)

    async def _members(
        self, where: Sequence[str], score: str, most: int, *, each: int = _ALL
    ) -> list[str]:
        """Members of some zsets, such as "ID MODEL/VERSION", up to a score."""
        members = await self._each(scripts.MEMBERS, where, score, most, each)
        return [text_of(member) for member in members]

    async def _entries(
        self, members: Sequence[str]
    ) -> list[tuple[str, StoredSession | UnreadableSession]]:
        """Those of the members that are there; those that went by themselves are forgotten."""
        where = [keys.session(id_of(member)) for member in members]
        replies = await self._each(scripts.ENTRIES, where)
        entries: list[tuple[str, StoredSession | UnreadableSession]] = []
        strange: list[str] = []
        for member, reply in zip(members, replies, strict=True):
            if reply and text_of(reply[-1]) == model_of(member):
                entries.append((member, read_entry(id_of(member), reply)))
            else:
                strange.append(member)
        tidied = await self._ask_all([_tidy(member) for member in strange])
        damaged = [member for member, gone in zip(strange, tidied, strict=True) if not gone]
        return entries + [
            (member, UnreadableSession(id_of(member), "its model is not the one it is kept by"))
            for member in damaged
        ]

    async def _readable(self, members: Sequence[str], before: float) -> list[StoredSession]:
        """The entries of members that can be read; the others are left alone for a while.

        Or they would come first for ever, and hide those behind them.
        """
        found = await self._entries(members)
        later = micros(min(before + UNREADABLE_SECONDS, LAST))
        unreadable = [member for member, entry in found if isinstance(entry, UnreadableSession)]
        await self._ask_all([_postpone(member, later) for member in unreadable])
        return [entry for _, entry in found if isinstance(entry, StoredSession)]

    async def _each(
        self, script: Script, where: Sequence[str], *arguments: str | int
    ) -> list[Reply]:
        """What a script gives for each of some keys, in order."""
        if not self._link.one_slot:
            return list(await self._ask(Command(script, where, arguments))) if where else []
        replies = await self._ask_all([Command(script, [key], arguments) for key in where])
        return [value for reply in replies for value in reply]

    async def _ask(self, command: Command) -> Reply:
        return await self._lane(command).ask(command)

    async def _ask_all(self, commands: Sequence[Command]) -> list[Reply]:
        if len(commands) == 1:
            return [await self._ask(commands[0])]  # gather would take another turn of the loop
        return await asyncio.gather(*(self._lane(command).ask(command) for command in commands))

    def _lane(self, command: Command) -> CommandPipeline:
        if self._closed:
            raise StoreUnavailable(f"the store on redis at {self._link.place} was closed")
        node = self._link.node(command.keys[0])
        if node not in self._lanes:
            self._lanes[node] = CommandPipeline(self._link)
        return self._lanes[node]

    def _ended(self, ending: Tombstone) -> tuple[str | int, ...]:
        """The arguments of the scripts that end a session, from its reason on."""
        how = (ending.reason.value, ending.t, repr(ending.idle_timeout_seconds))
        return (*how, self._now() + micros(ENDING_SECONDS), *self._mark())

    def _now(self) -> int:
        return micros(self._clock())

    def _mark(self) -> tuple[int, str]:
        """Tells this operation from all others, and an earlier one of this store from a later."""
        self._number += 1
        return self._number, self._name


def _all_keys(session_id: str) -> tuple[str, str, str, str, str, str]:
    number = keys.bucket(session_id)
    of_bucket = (keys.due, keys.counts, keys.expired, keys.endings)
    due, counts, expired, endings = (key(number) for key in of_bucket)
    return keys.session(session_id), keys.ending(session_id), due, counts, expired, endings


def _postpone(member: str, score: int) -> Command:
    _, _, due, _, expired, _ = _all_keys(id_of(member))
    return Command(scripts.POSTPONE, (due, expired), (score, member))


def _tidy(member: str) -> Command:
    session, _, due, counts, expired, _ = _all_keys(id_of(member))
    return Command(scripts.TIDY, (session, due, counts, expired), (member, model_of(member)))


def _forget(session_id: str, now: int) -> Command:
    _, gone, *_, endings = _all_keys(session_id)
    return Command(scripts.FORGET, (gone, endings), (session_id, now))
