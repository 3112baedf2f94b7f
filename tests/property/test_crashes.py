"""Servers that share a store, crash, are cut off and take sessions from each other, and a model.

The model knows lines of rows: which one each server has of a session, and which one the store
has. What the store holds is learned from the saves that it did; which sessions are resident
is seen. All else is worked out: outputs come from the float64 reference, errors from the rules.

Rule 1: a sync session has every row it acknowledged, whatever happens.
Rule 2: an async session goes back to its last save at the most, and durable_t tells where that is.
Rule 3: one without durability goes on from where it is saved, or is an error that says why not.
Rule 4: a reply is remembered as long as its row, in the store too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from stepstate.errors import (
    NotFound,
    SessionClosed,
    SessionExists,
    SessionExpired,
    SessionLost,
    SessionUnknown,
    StaleOwner,
    StepAhead,
    StepMismatch,
    StepPositionUnknown,
    StepstateError,
    StepTooOld,
    StoreUnavailable,
)
from stepstate.sessions import CopyOptions, ResidentSession
from stepstate.stores import (
    Durability,
    EndReason,
    SaveRequest,
    SaveResult,
    StoredSession,
    Tombstone,
)
from tests.hypothesis_profiles import examples
from tests.networks import make_network
from tests.reference import lstm
from tests.unit.rig import IDLE_SECONDS, Caller, Clock, Lasting, Rig, model_of, outputs, rounds

NETWORK = make_network("lstm", hidden=4, seed=1)
MODEL = model_of(NETWORK)
CLOSE = 1e-5
WINDOW = 3
NAMES = "abcd"
SERVERS = 2

names = st.sampled_from("aaabbcd")
places = st.integers(0, SERVERS - 1)
seeds = st.integers(0, 2**32 - 1)
counts = st.sampled_from([1, 1, 1, 2, 5])
flags = st.booleans()
durabilities = st.sampled_from([*Durability, Durability.SYNC, Durability.ASYNC])


@dataclass(frozen=True)
class Applied:
    """A request that was applied, and its reply, if anybody was given it."""

    t: int
    x: np.ndarray
    inspect: bool
    y: bytes | None

    @property
    def single(self) -> bool:
        return len(self.x) == 1 and not self.inspect


@dataclass(frozen=True)
class Line:
    """A session's rows, and the requests that brought them."""

    applied: tuple[Applied, ...] = ()

    @property
    def t(self) -> int:
        return sum(len(request.x) for request in self.applied)

    def then(self, x: np.ndarray, *, inspect: bool = False, y: bytes | None = None) -> Line:
        return Line((*self.applied, Applied(self.t, x, inspect, y)))

    def truth(self) -> np.ndarray:
        """y of all rows, by the reference."""
        x = np.concatenate([request.x for request in self.applied])
        return lstm(NETWORK.tensors(), x, layers=2)

    def remembered(self) -> list[Applied]:
        """Of single rows those that no later one W, 2W, ... rows on replaced; W long requests."""
        singles = {request.t % WINDOW: request for request in self.applied if request.single}
        long = [request for request in self.applied if not request.single]
        return [*singles.values(), *long[-WINDOW:]]

    def covers(self, t: int) -> bool:
        return any(kept.t <= t < kept.t + len(kept.x) for kept in self.remembered())

    def up_to(self, t: int) -> Line:
        """Its beginning; t is where a request ends."""
        line = Line(tuple(request for request in self.applied if request.t < t))
        assert line.t == t, f"half of a request was saved: {t} of {self}"
        return line


@dataclass
class Copy:
    """A session in the memory of a server."""

    line: Line
    durability: Durability
    epoch: int
    idle: float
    expires_at: float
    durable_t: int
    position_unknown: bool = False


class Door:
    """A server's way to the store: open, shut, or so slow that no answer comes in time."""

    durable = True

    def __init__(self, store: Lasting) -> None:
        self.mode = "up"
        self.saves: list[SaveRequest] = []
        """What the store did."""
        self.gate: asyncio.Event | None = None
        """Saves wait for it."""
        self._store = store

    async def _through(self, act: Callable[..., Awaitable], *args: object, **options: object):
        if self.mode in {"away", "dead"}:
            raise StoreUnavailable("it is away")
        answer = await act(*args, **options)
        if self.mode == "late":
            raise StoreUnavailable("no answer in time")
        return answer

    async def save(self, saves: Sequence[SaveRequest]) -> list[SaveResult]:
        if self.gate is not None:
            await self.gate.wait()
        return await self._through(self._save, saves)

    async def _save(self, saves: Sequence[SaveRequest]) -> list[SaveResult]:
        verdicts = await self._store.save(saves)
        done = zip(saves, verdicts, strict=True)
        self.saves += [save for save, verdict in done if verdict is SaveResult.DONE]
        assert SaveResult.MISSING not in verdicts
        return verdicts

    async def create(self, record, **what):
        return await self._through(self._store.create, record, **what)

    async def acquire(self, session_id, **what):
        return await self._through(self._store.acquire, session_id, **what)

    async def find(self, session_id):
        return await self._through(self._store.find, session_id)

    async def end(self, session_id, epoch, ending):
        return await self._through(self._store.end, session_id, epoch, ending)

    def now(self) -> float:
        return self._store.now()

    async def heartbeat(self):
        return await self._through(self._store.heartbeat)

    async def expire(self, saves, **options):
        return await self._through(self._store.expire, saves, **options)

    async def restore(self, session_id, epoch, **options):
        return await self._through(self._store.restore, session_id, epoch, **options)

    async def overdue(self, before, limit):
        return await self._through(self._store.overdue, before, limit)

    async def expired(self, before, limit):
        return await self._through(self._store.expired, before, limit)

    async def count_expired(self):
        return await self._through(self._store.count_expired)

    async def page(self, token, size, models, **options):
        return await self._through(self._store.page, token, size, models, **options)

    async def count(self):
        return await self._through(self._store.count)

    async def close(self) -> None:
        pass


class Server:
    """A server, and what the model knows of its memory."""

    def __init__(self, store: Lasting, clock: Clock, owner: str, slots: int) -> None:
        self.owner = owner
        self.door = Door(store)
        self.copies: dict[str, Copy] = {}
        self.rig = Rig(
            MODEL,
            store=self.door,
            clock=clock,
            owner=owner,
            max_sessions=slots,
            replay_rows=WINDOW,
        )


@dataclass(frozen=True)
class Exported:
    """A snapshot, and what is in it."""

    data: bytes
    line: Line
    durability: Durability
    idle: float


@dataclass
class Kept:
    """A line in the store."""

    line: Line
    durability: Durability
    idle: float


def rows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)


class CrashesMachine(RuleBasedStateMachine):
    """Every rule does one thing to the real servers and to the model, and compares."""

    def __init__(self) -> None:
        super().__init__()
        self.surprises: list[dict[str, object]] = []
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda _, why: self.surprises.append(why))
        self.clock = Clock()
        self.store = Lasting(self.clock)
        self.kept: dict[str, Kept] = {}
        self.exported: list[Exported] = []
        self.servers: list[Server] = []
        self.started = 0
        self.opened = 0
        self.slots = 2

    @initialize(slots=st.sampled_from([1, 2, 8]))
    def start(self, slots: int) -> None:
        self.slots = slots
        self.servers = [self.new_server() for _ in range(SERVERS)]

    def new_server(self) -> Server:
        self.started += 1

        async def make() -> Server:
            made = Server(self.store, self.clock, f"server-{self.started}", self.slots)
            await made.rig.sessions.start()
            return made

        return self.run(make())

    def teardown(self) -> None:
        for server in self.servers:
            server.door.mode = "dead"
        self.run(rounds(10))
        self.loop.close()
        assert not self.surprises

    # The real side.

    def run(self, story):
        return self.loop.run_until_complete(asyncio.wait_for(story, 20))

    async def send(self, server: Server, name: str, x, t, *, inspect: bool = False) -> Caller:
        session = await server.rig.sessions.get(name)
        return server.rig.send(session, x, t, inspect=inspect)

    async def ask(self, server: Server, name: str, x, t, **options: bool):
        return await (await self.send(server, name, x, t, **options)).outcome()

    def refused(self, server: Server, story, error: StepstateError) -> None:
        with pytest.raises(type(error)) as raised:
            self.run(story)
        if not isinstance(error, StoreUnavailable):
            fields, wanted = raised.value.fields(), error.fields()
            if "restore_until" in wanted:
                assert fields.pop("restore_until")
                assert wanted.pop("restore_until") == "kept"
            assert fields == wanted
        self.settle(server)

    # What the model sees of the real side.

    def entry(self, name: str) -> StoredSession | None:
        return self.store.stored(name)

    def resident(self, server: Server, name: str) -> ResidentSession | None:
        return server.rig.table.get(name)

    def settle(self, server: Server) -> None:
        """Takes in what a server saved, and what left it or came to it meanwhile."""
        self.run(rounds(8))
        for save in server.door.saves:
            copy, kept = server.copies[save.key], self.kept[save.key]
            if save.snapshot is None:
                assert kept.line.t == save.t, "it was saved as clean, and was not"
            kept.line = copy.line.up_to(save.t)
        server.door.saves.clear()
        for name in list(server.copies):
            if self.resident(server, name) is None:
                self.left(server.copies.pop(name), name)
        for name in list(self.kept):
            if self.entry(name) is None:
                del self.kept[name]

    def left(self, copy: Copy, name: str) -> None:
        """A session may leave when the store has all of it, or it is another's, or it ended."""
        entry = self.entry(name)
        if (
            entry is not None
            and entry.epoch == copy.epoch
            and copy.durability is not Durability.SYNC
        ):
            assert self.kept[name].line == copy.line, "it was forgotten, and was not saved"

    # The model's side.

    @property
    def now(self) -> float:
        return self.clock.now

    def newest(self, copy: Copy, name: str) -> bool:
        entry = self.entry(name)
        return entry is not None and entry.epoch == copy.epoch

    def told(self, name: str) -> StepstateError:
        """Why there is no session of the name."""
        found = self.run(self.store.find(name))
        if isinstance(found, StoredSession):
            return SessionExpired(name, found.t, found.record.idle_timeout_seconds, "kept")
        if not isinstance(found, Tombstone):
            return SessionUnknown(name)
        closed = found.reason is EndReason.CLOSED
        return SessionClosed(name, found.t) if closed else SessionLost(name)

    def look(self, server: Server, name: str) -> Copy | StepstateError:
        """What a server has of a session when it is asked for it, or the error that it answers.

        A copy that it takes from the store is the model's from then on.
        """
        copy = server.copies.get(name)
        if copy is not None and copy.expires_at > self.now:
            return copy
        if server.door.mode != "up":
            return StoreUnavailable("")
        if copy is not None and self.newest(copy, name):
            return SessionExpired(name, copy.line.t, copy.idle, "kept")
        return self.stored(name)

    def stored(self, name: str) -> Copy | StepstateError:
        """What a server that loads a session has of it.

        Where its lease was not given up there may have been more: whoever has it, or had.
        """
        entry = self.entry(name)
        if entry is None:
            return self.told(name)
        if entry.expires_at <= self.now:
            return SessionExpired(name, entry.t, entry.record.idle_timeout_seconds, "kept")
        kept = self.kept[name]
        if entry.owner and kept.durability is Durability.NONE:
            return SessionLost(name)
        durable_t = 0 if kept.durability is Durability.NONE else entry.t
        position_unknown = entry.owner != "" and kept.durability is Durability.ASYNC
        return Copy(
            kept.line, kept.durability, 0, kept.idle, entry.expires_at, durable_t, position_unknown
        )

    def got(self, server: Server, name: str) -> Copy | None:
        """The copy that a server steps, made resident; None if there is none, which it says.

        Where there is no such session any more its client opens it.
        """
        found = self.look(server, name)
        story = server.rig.sessions.get(name)
        if isinstance(found, StepstateError):
            self.refused(server, story, found)
            if isinstance(found, NotFound):
                self.opened += 1
                durability = tuple(Durability)[self.opened % len(Durability)]
                self.open_or_be_refused(server, name, durability, None)
            copy = server.copies.get(name)
            return copy if copy is not None and copy.expires_at > self.now else None
        session = self.run(story)
        self.take_in(server, name, found, session)
        self.settle(server)
        assert server.rig.sessions.t(session) == found.line.t
        return found

    def take_in(self, server: Server, name: str, copy: Copy, session: ResidentSession) -> None:
        copy.epoch = session.epoch
        stale = server.copies.get(name)
        if stale is not copy:
            server.copies[name] = copy

    def apply(self, copy: Copy, step, x: np.ndarray, *, inspect: bool) -> None:
        """Compares a reply with the reference, then takes it into the model."""
        assert not step.replayed
        line = copy.line.then(x, inspect=inspect, y=step.y)
        assert step.t_after == line.t
        assert np.abs(outputs(step) - line.truth()[copy.line.t :]).max() <= CLOSE
        copy.line = line
        copy.expires_at = self.now + copy.idle

    def check_durable(self, copy: Copy, name: str, durable_t: int) -> None:
        """durable_t only ever tells of rows that are in the store."""
        if copy.durability is Durability.NONE:
            assert durable_t == 0
            return
        assert copy.durable_t <= durable_t <= copy.line.t
        if self.newest(copy, name):
            assert durable_t <= self.kept[name].line.t
        copy.durable_t = durable_t

    # Rules: clients.

    @rule(place=places, name=names, durability=durabilities, idle=st.sampled_from([None, 20.0]))
    def open(self, place: int, name: str, durability: Durability, idle: float | None) -> None:
        self.open_or_be_refused(self.servers[place], name, durability, idle)

    def open_or_be_refused(
        self, server: Server, name: str, durability: Durability, idle: float | None
    ) -> None:
        story = server.rig.open(name, idle=idle, durability=durability)
        idle = IDLE_SECONDS if idle is None else idle
        self.adopt(server, name, story, Kept(Line(), durability, idle))

    def adopt(self, server: Server, name: str, story, new: Kept) -> None:
        """A new session, or the refusal that there is one."""
        there = self.there(server, name)
        if there is not None:
            before = self.entry(name)
            self.refused(server, story, there)
            after = self.entry(name)
            if after is not None and (before is None or before.record is not after.record):
                self.kept[name] = new  # the store did it, and nobody was told
            return
        session = self.run(story)
        self.settle(server)
        self.kept[name] = new
        durable_t = 0 if new.durability is Durability.NONE else new.line.t
        server.copies[name] = Copy(
            new.line, new.durability, session.epoch, new.idle, self.now + new.idle, durable_t
        )

    def there(self, server: Server, name: str) -> StepstateError | None:
        """Why a session of the name can't be opened."""
        copy = server.copies.get(name)
        if copy is not None and copy.expires_at > self.now:
            return SessionExists(name, copy.line.t)
        if server.door.mode != "up":
            return StoreUnavailable("")
        entry = self.entry(name)
        ends = copy is not None and self.newest(copy, name)  # with its copy here
        if entry is None or ends or entry.expires_at <= self.now:
            return None
        return SessionExists(name, entry.t)

    @rule(place=places, name=names, count=counts, seed=seeds, with_t=flags, inspect=flags)
    def step(self, *, place, name, count, seed, with_t, inspect) -> None:
        server = self.servers[place]
        if (copy := self.got(server, name)) is None:
            return
        x, t = rows(count, seed), copy.line.t
        story = self.ask(server, name, x, t if with_t else None, inspect=inspect)
        if self.resident(server, name).lease_in_doubt:
            self.refused(server, story, StoreUnavailable(""))
            return
        if copy.position_unknown and not with_t:
            self.refused(server, story, StepPositionUnknown(name, t))
            return
        copy.position_unknown = False
        if copy.durability is not Durability.SYNC:
            step = self.run(story)
            self.apply(copy, step, x, inspect=inspect)
            self.settle(server)
            self.check_durable(copy, name, step.durable_t)
            return
        self.step_sync(server, name, copy, story, x, inspect=inspect)

    def step_sync(self, server, name, copy, story, x, *, inspect) -> None:
        """A sync step is in the store when it is answered, or nothing was answered."""
        if server.door.mode == "up" and self.newest(copy, name):
            step = self.run(story)
            self.apply(copy, step, x, inspect=inspect)
            self.settle(server)
            assert step.durable_t == step.t_after == self.entry(name).t == self.kept[name].line.t
            copy.durable_t = step.durable_t
            return
        before = copy.line
        copy.line = before.then(x, inspect=inspect)  # what a late save would be of
        if server.door.mode == "up":
            self.refused(server, story, StaleOwner(name, self.stored_t(name)))
        else:
            self.refused(server, story, StoreUnavailable(""))
        assert name not in server.copies

    def stored_t(self, name: str) -> int:
        """Where a session is saved, or ended."""
        found = self.run(self.store.find(name))
        return 0 if found is None else found.t

    @rule(place=places, name=names, mode=st.sampled_from(["away", "late"]), seed=seeds, then=flags)
    def step_without_the_store(self, *, place, name, mode, seed, then) -> None:
        """In sync nothing is answered; in async rows are, and durable_t says that they wait."""
        door = self.servers[place].door
        before = door.mode
        if self.got(self.servers[place], name) is None:
            return
        door.mode = mode
        self.step(place=place, name=name, count=2, seed=seed, with_t=True, inspect=False)
        self.save_in_the_background(place)
        if then:
            self.step(place=place, name=name, count=1, seed=seed, with_t=True, inspect=False)
        door.mode = before

    @rule(place=places, name=names, count=st.integers(2, 6), seed=seeds)
    def step_on_and_on(self, place: int, name: str, count: int, seed: int) -> None:
        """More single rows than the window remembers."""
        for number in range(count):
            options = {"with_t": True, "inspect": False}
            self.step(place=place, name=name, count=1, seed=seed + number, **options)

    @rule(place=places, name=names, pick=st.integers(0, 100))
    def retry_what_is_remembered(self, place: int, name: str, pick: int) -> None:
        server = self.servers[place]
        copy = self.got(server, name)
        if copy is None or not copy.line.applied:
            return
        kept = copy.line.remembered()
        request = kept[pick % len(kept)]
        step = self.run(self.ask(server, name, request.x, request.t, inspect=request.inspect))
        assert step.replayed
        assert step.t_after == request.t + len(request.x)
        assert request.y in (None, step.y)
        assert np.abs(outputs(step) - copy.line.truth()[request.t : step.t_after]).max() <= CLOSE
        self.check_durable(copy, name, step.durable_t)

    @rule(place=places, name=names, pick=st.integers(0, 20), count=counts, seed=seeds)
    def step_at_an_old_t(self, *, place, name, pick, count, seed) -> None:
        server = self.servers[place]
        copy = self.got(server, name)
        if copy is None or not copy.line.t:
            return
        t = pick % copy.line.t
        known = StepMismatch if copy.line.covers(t) else StepTooOld
        error = known(name, t, copy.line.t)
        self.refused(server, self.ask(server, name, rows(count, seed), t), error)

    @rule(place=places, name=names, gap=st.integers(1, 50), count=counts)
    def leave_a_gap(self, place: int, name: str, gap: int, count: int) -> None:
        server = self.servers[place]
        if (copy := self.got(server, name)) is None:
            return
        t, entry = copy.line.t, self.entry(name)
        story = self.ask(server, name, rows(count, 0), t + gap)
        if server.door.mode != "up":  # another may have taken it
            self.refused(server, story, StoreUnavailable(""))
        elif entry is not None and entry.epoch != copy.epoch:
            self.refused(server, story, StaleOwner(name, entry.t))
            assert name not in server.copies
        else:
            self.refused(server, story, StepAhead(name, t + gap, t))

    @rule(place=places, order=st.permutations(NAMES), seed=seeds, repeat=st.integers(1, 3))
    def step_all_at_once(self, place: int, order: Sequence[str], seed: int, repeat: int) -> None:
        """All sessions that the server can have, sent for and stepped before any is answered."""
        server = self.servers[place]
        if server.door.mode != "up":
            return
        copies = {}
        for name in order:
            found = self.look(server, name)
            if isinstance(found, Copy) and self.takes_steps(server, name):
                copies[name] = found
        plan = {name: [rows(1, seed + number) for number in range(repeat)] for name in copies}

        async def play(name: str) -> list:
            session = await server.rig.sessions.get(name)
            self.take_in(server, name, copies[name], session)
            t = copies[name].line.t
            callers = [server.rig.send(session, x, t + i) for i, x in enumerate(plan[name])]
            steps = []
            for caller, x in zip(callers, plan[name], strict=True):
                steps.append(await caller.outcome())
                self.apply(copies[name], steps[-1], x, inspect=False)
            return steps

        async def play_all() -> list[list]:
            return await asyncio.gather(*map(play, plan))

        for name, steps in zip(plan, self.run(play_all()), strict=True):
            copies[name].position_unknown = False
            for step in steps:
                if copies[name].durability is Durability.SYNC:
                    assert step.durable_t == step.t_after
        self.settle(server)

    def takes_steps(self, server: Server, name: str) -> bool:
        """Whether a step of a session, resident or not, would be committed."""
        copy = server.copies.get(name)
        if copy is None:
            return True
        return self.newest(copy, name) and not self.resident(server, name).lease_in_doubt

    @rule(place=places, name=names)
    def look_up(self, place: int, name: str) -> None:
        """It takes nothing over, and tells what get would find."""
        server = self.servers[place]
        before = self.entry(name)
        found = self.look(server, name)
        story = server.rig.sessions.look(name)
        if isinstance(found, StepstateError):
            self.refused(server, story, found)
            return
        standing = self.run(story)
        assert (standing.t, standing.durable_t) == (found.line.t, found.durable_t) or (
            standing.resident and found.durable_t <= standing.durable_t <= standing.t
        )
        assert standing.resident == (found is server.copies.get(name))
        self.settle(server)
        assert self.entry(name) == before

    @rule(place=places, name=st.sampled_from("abcddd"))
    def close(self, place: int, name: str) -> None:
        server = self.servers[place]
        if (copy := self.got(server, name)) is None:
            return
        story = server.rig.sessions.close(name)
        if server.door.mode != "up":
            self.refused(server, story, StoreUnavailable(""))
        elif self.newest(copy, name):
            assert self.run(story) == copy.line.t
            self.settle(server)
            assert self.told(name).fields() == SessionClosed(name, copy.line.t).fields()
        else:
            self.refused(server, story, StaleOwner(name, copy.line.t))
            assert name not in server.copies

    # Rules: copies.

    @rule(place=places, name=names, new=names, durability=st.sampled_from([None, *Durability]))
    def fork(self, place: int, name: str, new: str, durability: Durability | None) -> None:
        server = self.servers[place]
        if (source := self.got(server, name)) is None:
            return
        kept = Kept(source.line, durability or source.durability, source.idle)
        self.adopt(
            server, new, server.rig.sessions.fork(name, CopyOptions(new, None, durability)), kept
        )

    @rule(place=places, name=names)
    def export(self, place: int, name: str) -> None:
        server = self.servers[place]
        if (copy := self.got(server, name)) is None:
            return
        data, standing = self.run(server.rig.sessions.export(name))
        if copy.durability is not Durability.SYNC:
            assert standing.t == copy.line.t
        self.exported.append(Exported(data, copy.line, copy.durability, copy.idle))

    @rule(place=places, name=names, pick=st.integers(0, 100))
    def import_(self, place: int, name: str, pick: int) -> None:
        if not self.exported:
            return
        server, some = self.servers[place], self.exported[pick % len(self.exported)]
        story = server.rig.sessions.restore(some.data, CopyOptions(name, None, None))
        self.adopt(server, name, story, Kept(some.line, some.durability, some.idle))

    # Rules: faults.

    @rule(place=places)
    def crash(self, place: int) -> None:
        """kill -9; another server is started in its place."""
        self.servers[place].door.mode = "dead"
        self.run(rounds(8))
        assert not self.servers[place].door.saves
        self.servers[place] = self.new_server()

    @rule(place=places, name=names, turns=st.integers(0, 12), count=st.integers(1, 3), seed=seeds)
    def crash_amid_steps(self, *, place, name, turns, count, seed) -> None:
        """What was saved by then is there, request by request; in sync all that was answered."""
        server = self.servers[place]
        if (copy := self.got(server, name)) is None:
            return
        line = copy.line
        session = self.run(server.rig.sessions.get(name))
        plan = [rows(1 + (number % 2), seed + number) for number in range(count)]

        async def story() -> list[Caller]:
            callers = []
            t = line.t
            for x in plan:
                callers.append(server.rig.send(session, x, t))
                t += len(x)
            await rounds(turns)
            return callers

        callers = self.run(story())
        server.door.mode = "dead"
        answered = sum(caller.answered and caller.deliveries == 1 for caller in callers)
        good = [c for c in callers[:answered] if self.run(c.error()) is None]
        for x in plan:
            line = line.then(x)
        newest = self.newest(copy, name)
        if newest:
            self.kept[name].line = line.up_to(self.entry(name).t)
        if copy.durability is Durability.SYNC:
            acked = copy.line.t + sum(len(x) for x in plan[: len(good)])
            assert not good or (newest and self.entry(name).t >= acked)
        server.door.saves = [s for s in server.door.saves if s.key != name]
        self.servers[place] = self.new_server()

    @rule(place=places)
    def restart(self, place: int) -> None:
        """A drain leaves every session whole in the store, and its lease to whoever wants it."""
        server = self.servers[place]
        mine = {name: copy for name, copy in server.copies.items() if self.newest(copy, name)}
        self.run(server.rig.sessions.drain())
        self.settle(server)
        if server.door.mode == "up":
            for name, copy in mine.items():
                assert self.kept[name].line == copy.line
                assert self.entry(name).owner == ""
        server.door.mode = "dead"
        self.servers[place] = self.new_server()

    @rule(place=places)
    def save_in_the_background(self, place: int) -> None:
        server = self.servers[place]
        try:
            self.run(server.rig.sessions.writer.save_round())
        except StoreUnavailable:
            assert server.door.mode != "up"
        self.settle(server)
        if server.door.mode == "up":
            for name, copy in server.copies.items():
                if copy.durability is Durability.ASYNC and self.newest(copy, name):
                    assert self.kept[name].line == copy.line
                    assert (
                        server.rig.table.durable_t[self.resident(server, name).handle]
                        == copy.line.t
                    )

    @rule(place=places, mode=st.sampled_from(["up", "up", "up", "away", "late"]))
    def cut_off(self, place: int, mode: str) -> None:
        """A server loses the store, or its answers, or has it again."""
        self.servers[place].door.mode = mode

    @rule(name=names, place=places, seed=seeds)
    def be_overtaken_amid_a_commit(self, name: str, place: int, seed: int) -> None:
        """A commit is under way while the other server takes the session: it comes to nothing."""
        server, other = self.servers[place], self.servers[1 - place]
        copy = self.got(server, name)
        if copy is None or copy.durability is not Durability.SYNC:
            return
        up = server.door.mode == other.door.mode == "up"
        if not up or not self.takes_steps(server, name) or name in other.copies:
            return
        x = rows(1, seed)

        async def story() -> tuple:
            server.door.gate = asyncio.Event()
            caller = await self.send(server, name, x, copy.line.t)
            await rounds(20)
            assert not caller.answered
            session = await other.rig.sessions.get(name)
            server.door.gate.set()
            error = await caller.error()
            server.door.gate = None
            return session, error

        taken = replace(copy, durable_t=copy.line.t)
        session, error = self.run(story())
        assert isinstance(error, StaleOwner)
        assert error.expected_t == copy.line.t
        self.settle(server)
        assert name not in server.copies
        self.take_in(other, name, taken, session)
        self.settle(other)

    @rule(seconds=st.sampled_from([1.0, 1.0, 1.0, 1.0, 19.0, 20.0, 100.0]), sweep=flags)
    def let_time_pass(self, *, seconds: float, sweep: bool) -> None:
        self.clock.advance(seconds)
        if not sweep:
            return
        for server in self.servers:
            try:
                self.run(server.rig.sessions.sweep())
            except StoreUnavailable:
                assert server.door.mode != "up"
            self.settle(server)
            if server.door.mode == "up":
                assert all(copy.expires_at > self.now for copy in server.copies.values())

    # Always.

    @invariant()
    def the_store_and_the_arenas_are_as_the_model_says(self) -> None:
        assert {name for name in NAMES if self.entry(name) is not None} == set(self.kept)
        for name, kept in self.kept.items():
            assert self.entry(name).t == kept.line.t
        for server in self.servers:
            sessions, scheduler = server.rig.sessions, server.rig.scheduler
            assert len(sessions) == scheduler.open_sessions == len(server.copies) <= self.slots
            assert sessions.queued_rows == scheduler.queued_rows == 0
            for name, copy in server.copies.items():
                session = self.resident(server, name)
                assert sessions.t(session) == copy.line.t
                if copy.durability is not Durability.NONE and self.newest(copy, name):
                    durable_t = server.rig.table.durable_t[session.handle]
                    assert durable_t <= self.kept[name].line.t, "durable_t is of rows not saved"
        assert not self.surprises


TestCrashes = CrashesMachine.TestCase
TestCrashes.settings = examples(80, stateful_step_count=50)
