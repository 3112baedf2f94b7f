"""Sessions against a simple model: a dict of lists of rows, and what was answered to each t.

The model knows no slots, rings, queues or batches. Outputs come from the
float64 reference; errors are what the rules of DESIGN say they are.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stepstate.errors import (
    SessionClosed,
    SessionExists,
    SessionExpired,
    SessionLimit,
    SessionUnknown,
    StepAhead,
    StepMismatch,
    StepstateError,
    StepTooOld,
)
from stepstate.identity import DEFAULT_TENANT
from stepstate.stores.base import TOMBSTONE_SECONDS
from tests.hypothesis_profiles import examples
from tests.networks import make_network
from tests.reference import lstm
from tests.unit.rig import (
    GRACE_SECONDS,
    IDLE_SECONDS,
    MAX_IDLE_SECONDS,
    Caller,
    Rig,
    model_of,
    outputs,
)

NETWORK = make_network("lstm", hidden=8, seed=1)
MODEL = model_of(NETWORK)
CLOSE = 1e-5
WINDOW = 3
MAX_SESSIONS = 3

names = st.sampled_from("aaaabbcd")
seeds = st.integers(0, 2**32 - 1)
counts = st.sampled_from([1, 1, 1, 2, 5, 9])
flags = st.booleans()


@dataclass
class Applied:
    """A request that was applied, and its reply."""

    t: int
    x: np.ndarray
    inspect: bool
    last_only: bool
    y: bytes

    @property
    def single(self) -> bool:
        return len(self.x) == 1 and not self.inspect


@dataclass
class Open:
    """An open session, as its client could know it."""

    idle: float
    expires_at: float
    rows: list[np.ndarray] = field(default_factory=list)
    applied: list[Applied] = field(default_factory=list)

    @property
    def t(self) -> int:
        return len(self.rows)

    def remembered(self) -> list[Applied]:
        """Of single rows those that no later one W, 2W, ... rows on replaced; W long requests."""
        singles: dict[int, Applied] = {}
        for request in self.applied:
            if request.single:
                singles[request.t % WINDOW] = request
        long = [request for request in self.applied if not request.single]
        return [*singles.values(), *long[-WINDOW:]]

    def covers(self, t: int) -> bool:
        return any(kept.t <= t < kept.t + len(kept.x) for kept in self.remembered())


@dataclass
class Ended:
    """A session that is gone."""

    error: StepstateError
    told_until: float


@dataclass
class Expired:
    """A session that was idle for too long, and is kept."""

    session: Open
    error: SessionExpired
    delete_at: float


def told(error: StepstateError) -> dict[str, str]:
    """What an error tells; of a time only whether there is one."""
    fields = error.fields()
    if fields.get("restore_until"):
        fields["restore_until"] = "kept"
    return fields


def rows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)


class SessionsMachine(RuleBasedStateMachine):
    """Every rule does one thing to the real sessions and to the model, and compares."""

    def __init__(self) -> None:
        super().__init__()
        self.surprises: list[dict[str, object]] = []
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda _, why: self.surprises.append(why))
        self.model: dict[str, Open | Ended | Expired] = {}

    @initialize(chunk_rows=st.sampled_from([1, 4, 128]), batch_rows=st.sampled_from([1, 2, 256]))
    def start(self, chunk_rows: int, batch_rows: int) -> None:
        self.rig = Rig(
            MODEL,
            max_sessions=MAX_SESSIONS,
            replay_rows=WINDOW,
            chunk_rows=chunk_rows,
            batch_rows=batch_rows,
        )

    def teardown(self) -> None:
        self.loop.close()
        assert not self.surprises

    # The real side.

    def run(self, story):
        return self.loop.run_until_complete(asyncio.wait_for(story, 10))

    async def send(self, name: str, x, t, *, inspect: bool, last_only: bool) -> Caller:
        session = await self.rig.sessions.get(name)
        return self.rig.send(session, x, t, inspect=inspect, last_only=last_only)

    async def ask(self, name: str, x, t, *, inspect: bool = False, last_only: bool = False):
        return await (await self.send(name, x, t, inspect=inspect, last_only=last_only)).outcome()

    def refused(self, story, error: StepstateError) -> None:
        with pytest.raises(type(error)) as raised:
            self.run(story)
        assert told(raised.value) == told(error)

    # The model's side.

    @property
    def now(self) -> float:
        return self.rig.clock.now

    def look(self, name: str) -> Open | StepstateError:
        """The open session, or the error that says why there is none."""
        found = self.model.get(name)
        if isinstance(found, Open) and found.expires_at <= self.now:
            # Told of from now on: its end is noticed when it is used, or swept.
            error = SessionExpired(name, found.t, found.idle, "kept")
            found = self.model[name] = Expired(found, error, self.now + GRACE_SECONDS)
        if isinstance(found, Expired):
            kept = found.delete_at > self.now
            return found.error if kept else replace(found.error, restore_until="")
        if isinstance(found, Ended) and found.told_until <= self.now:
            found = None
        if found is None:
            return SessionUnknown(name)
        return found.error if isinstance(found, Ended) else found

    def lives(self, name: str) -> bool:
        found = self.model.get(name)
        return isinstance(found, Open) and found.expires_at > self.now

    def opened(self, name: str) -> Open | None:
        """The open session. Where there is none its step is refused, and its client opens it."""
        found = self.look(name)
        if isinstance(found, Open):
            return found
        self.refused(self.ask(name, rows(1, 0), None), found)
        self.open_or_be_refused(name, None)
        found = self.look(name)
        return found if isinstance(found, Open) else None

    def apply(self, session: Open, step, x, *, inspect: bool, last_only: bool) -> None:
        """Compares a reply with the reference, then takes it into the model."""
        t = session.t
        assert not step.replayed
        assert step.t_after == t + len(x)
        session.rows += list(x)
        truth = lstm(NETWORK.tensors(), np.array(session.rows), layers=2)
        wanted = truth[-1:] if last_only else truth[t:]
        assert np.abs(outputs(step) - wanted).max() <= CLOSE
        if inspect:
            h = step.layers[-1]["h"]
            head = NETWORK.tensors()["head.weight"], NETWORK.tensors()["head.bias"]
            assert np.abs(h @ head[0].T + head[1] - wanted).max() <= CLOSE
        session.applied.append(Applied(t, x, inspect, last_only and len(x) > 1, step.y))
        session.expires_at = self.now + session.idle

    # Rules.

    @rule(name=names, idle=st.sampled_from([None, 20.0, MAX_IDLE_SECONDS]))
    def open(self, name: str, idle: float | None) -> None:
        self.open_or_be_refused(name, idle)

    def open_or_be_refused(self, name: str, idle: float | None) -> None:
        found = self.look(name)
        story = self.rig.open(name, idle=idle)
        if isinstance(found, Open):
            self.refused(story, SessionExists(name, found.t))
        elif self.held() >= MAX_SESSIONS:
            self.refused(story, SessionLimit(MAX_SESSIONS))
        else:
            self.run(story)
            idle = IDLE_SECONDS if idle is None else idle
            self.model[name] = Open(idle, self.now + idle)

    def held(self) -> int:
        """Sessions that hold a place: an overdue one does until it is used or swept."""
        return sum(isinstance(session, Open) for session in self.model.values())

    @rule(name=names, count=counts, seed=seeds, with_t=flags, inspect=flags, last_only=flags)
    def step(self, *, name, count, seed, with_t, inspect, last_only) -> None:
        if (session := self.opened(name)) is None:
            return
        x = rows(count, seed)
        options = {"inspect": inspect, "last_only": last_only}
        step = self.run(self.ask(name, x, session.t if with_t else None, **options))
        self.apply(session, step, x, **options)

    @rule(order=st.permutations("abcd"), count=counts, seed=seeds, repeat=st.integers(1, 3))
    def step_all_at_once(self, order, count, seed, repeat) -> None:
        """Several requests of every open session, all sent before any is answered."""
        live = [name for name in order if self.lives(name)]
        plan = [(name, rows(count, seed + place)) for place, name in enumerate(live * repeat)]

        async def story() -> list:
            ahead = {name: self.model[name].t for name in live}
            callers = []
            for name, x in plan:
                callers.append(
                    await self.send(name, x, ahead[name], inspect=False, last_only=False)
                )
                ahead[name] += count
            return [await caller.outcome() for caller in callers]

        for (name, x), step in zip(plan, self.run(story()), strict=True):
            self.apply(self.model[name], step, x, inspect=False, last_only=False)

    @rule(name=names, pick=st.integers(0, 100))
    def retry_what_is_remembered(self, name: str, pick: int) -> None:
        session = self.opened(name)
        if session is None or not session.applied:
            return
        kept = session.remembered()
        request = kept[pick % len(kept)]
        options = {"inspect": request.inspect, "last_only": request.last_only}
        step = self.run(self.ask(name, request.x, request.t, **options))
        assert step.replayed
        assert step.y == request.y
        assert step.t_after == request.t + len(request.x)

    @rule(name=names, pick=st.integers(0, 20), count=counts, seed=seeds)
    def step_at_an_old_t(self, name: str, pick: int, count: int, seed: int) -> None:
        session = self.opened(name)
        if session is None or not session.t:
            return
        t = pick % session.t
        known = StepMismatch if session.covers(t) else StepTooOld
        self.refused(self.ask(name, rows(count, seed), t), known(name, t, session.t))

    @rule(name=names, pick=st.integers(0, 100))
    def retry_what_is_forgotten(self, name: str, pick: int) -> None:
        session = self.opened(name)
        if session is None:
            return
        kept = session.remembered()
        forgotten = [request for request in session.applied if request not in kept]
        if forgotten:
            request = forgotten[pick % len(forgotten)]
            known = StepMismatch if session.covers(request.t) else StepTooOld
            story = self.ask(
                name, request.x, request.t, inspect=request.inspect, last_only=request.last_only
            )
            self.refused(story, known(name, request.t, session.t))

    @rule(name=names, gap=st.integers(1, 50), count=counts, inspect=flags)
    def leave_a_gap(self, *, name: str, gap: int, count: int, inspect: bool) -> None:
        if (session := self.opened(name)) is not None:
            t = session.t + gap
            story = self.ask(name, rows(count, 0), t, inspect=inspect)
            self.refused(story, StepAhead(name, t, session.t))

    @rule(name=names, count=counts, seed=seeds)
    def cancel_before_it_is_taken(self, name: str, count: int, seed: int) -> None:
        if (session := self.opened(name)) is None:
            return

        async def story() -> None:
            caller = await self.send(
                name, rows(count, seed), session.t, inspect=False, last_only=False
            )
            caller.cancelled = True
            assert await caller.error() is None

        self.run(story())

    @rule(name=names, count=counts, seed=seeds)
    def lose_the_reply_and_retry(self, name: str, count: int, seed: int) -> None:
        if (session := self.opened(name)) is None:
            return
        x, t = rows(count, seed), session.t
        first = self.run(self.ask(name, x, t))
        again = self.run(self.ask(name, x, t))
        assert again.replayed
        assert again.y == first.y
        self.apply(session, first, x, inspect=False, last_only=False)

    @rule(name=names, count=st.integers(4, 8), seed=seeds)
    def step_on_and_on(self, name: str, count: int, seed: int) -> None:
        """More single rows than the window remembers."""
        for place in range(count):
            options = {"with_t": True, "inspect": False, "last_only": False}
            self.step(name=name, count=1, seed=seed + place, **options)

    @rule(name=names)
    def look_up(self, name: str) -> None:
        found = self.look(name)
        if isinstance(found, Open):
            assert self.rig.sessions.t(self.run(self.rig.sessions.get(name))) == found.t
        else:
            self.refused(self.rig.sessions.get(name), found)

    @rule(name=st.sampled_from("abcdddd"))
    def close(self, name: str) -> None:
        found = self.look(name)
        if isinstance(found, Open):
            assert self.run(self.rig.sessions.close(name)) == found.t
            error = SessionClosed(name, found.t)
            self.model[name] = Ended(error, self.now + TOMBSTONE_SECONDS)
        else:
            self.refused(self.rig.sessions.close(name), found)

    @rule(seconds=st.sampled_from([1.0, 1.0, 1.0, 19.0, 20.0, 99.0, 100.0]), sweep=flags)
    def let_time_pass(self, *, seconds: float, sweep: bool) -> None:
        self.rig.clock.advance(seconds)
        if sweep:
            self.sweep()

    @precondition(lambda self: self.model and not self.held())
    @rule(seconds=st.sampled_from([TOMBSTONE_SECONDS, GRACE_SECONDS, GRACE_SECONDS + 1.0]))
    def let_endings_be_forgotten(self, seconds: float) -> None:
        self.rig.clock.advance(seconds)
        self.sweep()

    @rule(name=names)
    def restore(self, name: str) -> None:
        """An expired session comes back with its state, its t and what it remembers."""
        found, known = self.look(name), self.model.get(name)
        story = self.rig.sessions.restore_expired(name)
        if isinstance(found, Open):
            self.refused(story, SessionExists(name, found.t))
        elif not isinstance(known, Expired):
            self.refused(story, found)
        elif self.held() >= MAX_SESSIONS:
            self.refused(story, SessionLimit(MAX_SESSIONS))
        else:
            session = self.run(story)
            assert self.rig.sessions.t(session) == known.session.t
            known.session.expires_at = self.now + known.session.idle
            self.model[name] = known.session

    def sweep(self) -> None:
        overdue = self.held()
        for name in list(self.model):
            self.look(name)
        assert self.run(self.rig.sessions.sweep()) == overdue - self.held()
        self.see_deletions()

    def see_deletions(self) -> None:
        """Expired sessions leave when their grace is over, or when too many are kept."""
        kept = [name for name, known in self.model.items() if isinstance(known, Expired)]
        there = self.run(self.rig.store.expired(math.inf, len(kept) + MAX_SESSIONS))
        gone = [name for name in kept if name not in {one.record.session_id for one in there}]
        early = [name for name in gone if self.model[name].delete_at >= self.now]
        assert len(early) == max(0, self.held() + len(kept) - len(gone) + len(early) - MAX_SESSIONS)
        for name in gone:
            error = replace(self.model[name].error, restore_until="")
            self.model[name] = Ended(error, self.now + TOMBSTONE_SECONDS)
        assert all(self.model[n].delete_at >= self.now for n in kept if n not in gone)

    @invariant()
    def t_and_counts_are_the_models(self) -> None:
        if not hasattr(self, "rig"):
            return
        sessions = self.rig.sessions
        assert len(sessions) == self.rig.scheduler.open_sessions == self.held()
        assert sessions.queued_rows == self.rig.scheduler.queued_rows == 0
        for standing in self.run(sessions.page("", 10, "", tenant=DEFAULT_TENANT))[0]:
            known = self.model[standing.record.session_id]
            assert standing.t == known.t
            assert standing.seconds_left == known.expires_at - self.now
        assert not self.surprises


TestSessions = SessionsMachine.TestCase
TestSessions.settings = examples(100, stateful_step_count=50)
