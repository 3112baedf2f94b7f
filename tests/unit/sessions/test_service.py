from __future__ import annotations

import asyncio
import gc
import time
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import numpy as np
import pytest

from stepstate.engine.engine import ROUNDS_TO_A_CHUNK
from stepstate.errors import (
    Draining,
    Internal,
    InvalidField,
    ModelUnknown,
    QueueFull,
    SessionClosed,
    SessionExists,
    SessionExpired,
    SessionLimit,
    SessionUnknown,
    StaleOwner,
    StepAhead,
    StoreUnavailable,
)
from stepstate.sessions import check_id
from stepstate.stores import Ending, Entry, MemoryStore, SessionRecord
from stepstate.stores.base import ENDING_SECONDS
from tests.unit.rig import (
    GRACE_SECONDS,
    IDLE_SECONDS,
    MOST_IDLE_SECONDS,
    Caller,
    Clock,
    Lasting,
    model_of,
    outputs,
    request,
    rounds,
    rows_of,
    timed_network,
)


@pytest.fixture
def x(network):
    return rows_of(network, 8)


@pytest.fixture
def slow_rig(make_rig):
    """Applies one row of a long request in a turn."""
    return make_rig(chunk_rows=1)


class Gate:
    """Holds store calls until it is opened."""

    def __init__(self) -> None:
        self._opened = asyncio.Event()

    def open(self) -> None:
        self._opened.set()

    async def wait(self) -> None:
        await self._opened.wait()


class SlowStore(MemoryStore):
    """A store that answers, or fails, when the test lets it."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__(Clock())
        self.gate = Gate()
        self.fails = fails

    async def create(self, record, **values):
        await self.gate.wait()
        if self.fails:
            raise StoreUnavailable("it is away")
        return await super().create(record, **values)

    async def end(self, session_id, epoch, ending):
        if self.fails:
            raise StoreUnavailable("it is away")
        return await super().end(session_id, epoch, ending)


async def test_an_opened_session_stands_at_0_and_is_found(rig):
    session = await rig.open("a")
    assert rig.sessions.t(session) == 0
    assert rig.sessions.find("a") is session
    assert await rig.sessions.get("a") is session
    assert len(rig.sessions) == 1
    assert session.record.fingerprint == rig.lane.model.manifest.fingerprint


async def test_without_an_id_the_server_makes_one_that_is_unique(rig):
    made = {(await rig.open("")).session_id for _ in range(5)}
    assert len(made) == 5
    for session_id in made:
        check_id(session_id)


@pytest.mark.parametrize("session_id", ["a", "A-Z.a_z:0-9", "x" * 128])
def test_good_ids_pass(session_id):
    check_id(session_id)


@pytest.mark.parametrize("session_id", ["", "a b", "é", "a/b", "a\n", "x" * 129])
async def test_a_bad_id_is_refused_by_open_and_by_look_up(rig, session_id):
    with pytest.raises(InvalidField, match="session_id"):
        await rig.sessions.get(session_id)
    if session_id:
        with pytest.raises(InvalidField, match="session_id"):
            await rig.open(session_id)
    assert len(rig.sessions) == 0


async def test_an_id_that_is_open_is_refused_and_told_where_it_stands(rig, x):
    session = await rig.open("a")
    await rig.step(session, x[:3], 0)
    with pytest.raises(SessionExists) as refused:
        await rig.open("a")
    assert refused.value.fields() == {"session_id": "a", "t": "3"}
    assert rig.sessions.t(session) == 3


async def test_an_id_that_never_was_is_unknown(rig):
    assert rig.sessions.find("never") is None
    with pytest.raises(SessionUnknown, match="never"):
        await rig.sessions.get("never")
    with pytest.raises(SessionUnknown):
        await rig.sessions.close("never")


async def test_the_model_is_the_one_asked_for(make_rig, networks):
    rig = make_rig(model_of(networks["lstm"]), model_of(networks["gru"]))
    session = await rig.open("a", model="gru")
    assert session.record.model == "gru"
    with pytest.raises(InvalidField, match="gru, lstm"):
        await rig.open("b")
    with pytest.raises(ModelUnknown):
        await rig.open("b", model="other")
    with pytest.raises(ModelUnknown):
        await rig.open("b", model="gru", version="2")
    assert len(rig.sessions) == 1


async def test_a_model_that_needs_the_time_refuses_to_open_without(make_rig):
    rig = make_rig(model_of(*timed_network()))
    with pytest.raises(InvalidField, match="start_time"):
        await rig.open("a")
    with pytest.raises(SessionUnknown):
        await rig.sessions.get("a")
    await rig.open("a", start=datetime(2026, 1, 2, tzinfo=UTC))


async def test_row_t_has_the_calendar_of_start_time_plus_t_steps(make_rig):
    rig = make_rig(model_of(*timed_network()))
    start = datetime(2026, 1, 2, 10, 20, tzinfo=UTC)
    early = await rig.open("early", start=start)
    late = await rig.open("late", start=start + timedelta(hours=3))
    x = np.ones((3, 2), np.float32)
    assert late.phase == early.phase + 3
    whole = await rig.y(early, x, 0)
    again = await rig.open("again", start=start)
    single = np.concatenate([await rig.y(again, row) for row in x])
    assert np.abs(whole - single).max() <= 1e-4


@pytest.mark.parametrize("idle", [0.0, -1.0, MOST_IDLE_SECONDS + 1, float("nan"), float("inf")])
async def test_an_idle_timeout_outside_the_limits_is_refused(rig, idle):
    with pytest.raises(InvalidField, match="idle_timeout"):
        await rig.open("a", idle=idle)


async def test_close_tells_the_last_t_and_is_told_for_a_while_then_unknown(rig, x):
    session = await rig.open("a")
    await rig.step(session, x[:3], 0)
    assert await rig.sessions.close("a") == 3
    assert rig.sessions.find("a") is None
    rig.clock.advance(ENDING_SECONDS - 1)
    for use in (rig.sessions.get, rig.sessions.close):
        with pytest.raises(SessionClosed) as told:
            await use("a")
        assert told.value.fields() == {"session_id": "a", "t": "3"}
    rig.clock.advance(1)
    with pytest.raises(SessionUnknown):
        await rig.sessions.get("a")


async def test_a_session_expires_exactly_when_its_time_is_up_without_any_sweep(rig, x):
    session = await rig.open("a", idle=7.0)
    await rig.step(session, x[0], 0)
    rig.clock.advance(6.99)
    assert rig.sessions.find("a") is session
    rig.clock.advance(0.01)
    assert rig.sessions.find("a") is None
    with pytest.raises(SessionExpired) as told:
        await rig.sessions.get("a")
    fields = told.value.fields()
    assert fields.pop("restore_until") in str(told.value)
    assert fields == {"session_id": "a", "t": "1", "idle_timeout_seconds": "7.0"}
    assert len(rig.sessions) == rig.lane.open_sessions == 0


async def test_an_expired_session_is_told_for_a_while_and_then_unknown(rig):
    await rig.open("a")
    rig.clock.advance(IDLE_SECONDS)
    assert await rig.sessions.sweep() == 1
    rig.clock.advance(GRACE_SECONDS - 1)
    with pytest.raises(SessionExpired, match="restore it"):
        await rig.sessions.get("a")
    rig.clock.advance(2)
    await rig.sessions.sweep()
    rig.clock.advance(ENDING_SECONDS - 1)
    with pytest.raises(SessionExpired, match="was deleted"):
        await rig.sessions.get("a")
    rig.clock.advance(1)
    with pytest.raises(SessionUnknown):
        await rig.sessions.get("a")


async def test_a_sweep_ends_those_whose_time_is_up_and_no_others(rig, x):
    for name, idle in (("a", 5.0), ("b", 50.0), ("c", 5.0)):
        await rig.open(name, idle=idle)
    rig.clock.advance(5)
    assert await rig.sessions.sweep() == 2
    assert await rig.sessions.sweep() == 0
    assert [one.record.session_id for one in (await rig.sessions.page("", 10, ""))[0]] == ["b"]
    assert rig.lane.open_sessions == 1


class Forgetful(MemoryStore):
    """Tells what it was given, and must not be searched: that would look at every session."""

    snapshots: ClassVar[list[bytes]] = []

    async def create(self, record: SessionRecord, **fields: Any) -> int | Entry:
        self.snapshots.append(fields["snapshot"])
        return await super().create(record, **fields)

    async def overdue(self, before: float, limit: int) -> list[Entry]:
        raise AssertionError("was searched")


async def test_a_store_that_does_not_last_keeps_no_states_and_is_not_searched(make_rig, x):
    rig = make_rig(store=Forgetful(time.time))
    session = await rig.open("a", idle=5.0)
    await rig.step(session, x[0], 0)
    await rig.open("b", idle=500.0)
    rig.clock.advance(100)
    assert await rig.sessions.sweep() == 1
    assert Forgetful.snapshots == [b"", b""]


class Gathering(MemoryStore):
    """Ends nothing until three are to be ended."""

    barrier: ClassVar[asyncio.Barrier]

    async def end(self, session_id: str, epoch: int, ending: Ending) -> bool:
        await self.barrier.wait()
        return await super().end(session_id, epoch, ending)


async def test_a_sweep_ends_many_in_one_wait_for_the_store(make_rig):
    """So sqlite ends 20,000 in two seconds; one by one it took eleven."""
    Gathering.barrier = asyncio.Barrier(3)
    rig = make_rig(store=Gathering(time.time))
    for name in ("a", "b", "c"):
        await rig.open(name, idle=5.0)
    rig.clock.advance(5)
    assert await asyncio.wait_for(rig.sessions.sweep(), 20) == 3


async def test_a_session_that_another_ends_meanwhile_is_ended_once(rig):
    await rig.open("a", idle=5.0)
    rig.clock.advance(5)
    swept, asked = await asyncio.gather(
        rig.sessions.sweep(), rig.sessions.get("a"), return_exceptions=True
    )
    assert swept == 1
    assert isinstance(asked, SessionExpired)
    assert rig.lane.open_sessions == 0
    assert await rig.sessions.sweep() == 0


async def test_a_session_with_a_step_in_the_engine_does_not_expire(rig, x):
    session = await rig.open("a", idle=5.0)
    caller = rig.send(session, x[0], 0)
    rig.clock.advance(5)
    assert await rig.sessions.sweep() == 0
    await caller.outcome()
    assert rig.sessions.standing(session).seconds_left == 5.0


@pytest.mark.parametrize("end", ["close", "expire"])
async def test_an_id_that_ended_can_be_opened_again_and_starts_from_zero(rig, x, network, end):
    session = await rig.open("a")
    await rig.step(session, x[:3], 0)
    if end == "close":
        await rig.sessions.close("a")
    else:
        rig.clock.advance(IDLE_SECONDS)
    again = await rig.open("a")
    assert rig.sessions.t(again) == 0
    y = await rig.y(again, x[0], 0)
    assert np.abs(y - network.offline(x[:1])).max() <= 1e-5


async def test_a_session_that_is_gone_is_never_restarted_by_a_step(rig, x):
    session = await rig.open("a")
    await rig.step(session, x[0], 0)
    rig.clock.advance(IDLE_SECONDS)
    for _ in range(3):
        assert rig.sessions.find("a") is None
        with pytest.raises(SessionExpired):
            await rig.sessions.get("a")
    assert len(rig.sessions) == 0


async def test_one_more_session_than_the_limit_is_refused_until_one_ends(make_rig):
    rig = make_rig(max_sessions=2)
    await rig.open("a")
    await rig.open("b")
    with pytest.raises(SessionLimit) as refused:
        await rig.open("c")
    assert refused.value.limit == 2
    with pytest.raises(SessionUnknown):
        await rig.sessions.get("c")
    await rig.sessions.close("a")
    await rig.open("c")


@pytest.mark.parametrize("rounds", range(12))
async def test_sessions_that_are_opened_at_once_count_once_each(make_rig, rounds: int):
    """The second is opened at each moment of the opening of the first."""
    rig = make_rig(max_sessions=2)
    first = asyncio.ensure_future(rig.open("a"))
    for _ in range(rounds):
        await asyncio.sleep(0)
    await rig.open("b")
    await first
    with pytest.raises(SessionLimit):
        await rig.open("c")


async def test_more_requests_than_the_limit_are_refused_and_nothing_of_them_is_kept(make_rig, x):
    rig = make_rig(queued_requests=2)
    session = await rig.open("a")
    first, second = rig.send(session, x[0], 0), rig.send(session, x[1], 1)
    with pytest.raises(QueueFull) as refused:
        rig.send(session, x[2], 2)
    assert refused.value.limit == 2
    await first.outcome()
    await second.outcome()
    assert rig.sessions.t(session) == 2
    await rig.step(session, x[2], 2)


async def test_more_rows_than_the_limit_are_refused_unless_nothing_else_waits(make_rig, x):
    rig = make_rig(queued_rows=4)
    session = await rig.open("a")
    long = rig.send(session, x[:6], 0)
    with pytest.raises(QueueFull):
        rig.send(session, x[6], 6)
    await long.outcome()
    await rig.step(session, x[6], 6)


async def test_close_waits_for_accepted_steps_and_later_requests_wait_for_it(slow_rig, x):
    rig = slow_rig
    session = await rig.open("a")
    callers = [rig.send(session, x[:4], 0), rig.send(session, x[4], 4)]
    closing = asyncio.create_task(rig.sessions.close("a"))
    await asyncio.sleep(0)
    assert rig.sessions.find("a") is None
    late, again = await asyncio.gather(rig.sessions.get("a"), rig.open("a"), return_exceptions=True)
    assert isinstance(late, SessionClosed)
    assert late.t == 5
    assert closing.done()
    assert await closing == 5
    assert all(caller.answered for caller in callers)
    assert rig.sessions.find("a") is again is not session


async def test_a_close_whose_caller_gives_up_is_finished_all_the_same(slow_rig, x):
    rig = slow_rig
    session = await rig.open("a")
    caller = rig.send(session, x[:4], 0)
    closing = asyncio.create_task(rig.sessions.close("a"))
    await asyncio.sleep(0)
    closing.cancel()
    await caller.outcome()
    await rounds(5)
    with pytest.raises(SessionClosed) as told:
        await rig.sessions.get("a")
    assert told.value.t == 4
    assert len(rig.sessions) == 0


async def test_of_two_closes_one_succeeds(rig):
    await rig.open("a")
    results = await asyncio.gather(
        rig.sessions.close("a"), rig.sessions.close("a"), return_exceptions=True
    )
    assert results[0] == 0
    assert isinstance(results[1], SessionClosed)


async def test_drain_refuses_what_is_new_and_waits_for_what_was_accepted(slow_rig, x):
    rig = slow_rig
    session = await rig.open("a")
    caller = rig.send(session, x[:4], 0)
    draining = asyncio.create_task(rig.sessions.drain())
    await asyncio.sleep(0)
    with pytest.raises(Draining):
        await rig.open("b")
    with pytest.raises(Draining):
        rig.send(session, x[4], 4)
    assert not draining.done()
    await draining
    assert (await caller.outcome()).t_after == 4


async def test_drain_ends_at_once_when_nothing_is_accepted(rig):
    await asyncio.wait_for(rig.sessions.drain(), 1)


async def test_a_drain_that_is_given_up_still_lets_accepted_steps_be_answered(slow_rig, x):
    rig = slow_rig
    session = await rig.open("a")
    caller = rig.send(session, x[:4], 0)
    draining = asyncio.create_task(rig.sessions.drain())
    await asyncio.sleep(0)
    draining.cancel()
    await rounds(4 * ROUNDS_TO_A_CHUNK + 2)
    assert caller.answered


async def test_two_drains_both_end(slow_rig, x):
    rig = slow_rig
    session = await rig.open("a")
    rig.send(session, x[:4], 0)
    drains = asyncio.gather(rig.sessions.drain(), rig.sessions.drain())
    await asyncio.wait_for(drains, 1)


async def test_pages_give_every_open_session_once(rig):
    for name in "abcde":
        await rig.open(name)
    await rig.sessions.close("b")
    seen, following = [], None
    while following != "":
        page, following = await rig.sessions.page(following or "", 2, "")
        assert len(page) <= 2
        seen += [standing.record.session_id for standing in page]
    assert sorted(seen) == ["a", "c", "d", "e"]


async def test_a_page_can_be_of_one_model(make_rig, networks):
    rig = make_rig(model_of(networks["lstm"]), model_of(networks["gru"]))
    for name, model in (("a", "gru"), ("b", "lstm"), ("c", "gru")):
        await rig.open(name, model=model)
    found, following = await rig.sessions.page("", 10, "gru")
    assert sorted(standing.record.session_id for standing in found) == ["a", "c"]
    assert following == ""


async def test_a_refusal_keeps_its_place_behind_the_steps_before_it(rig, x):
    session = await rig.open("a")
    step, refusal = rig.send(session, x[:4], 0), Caller()
    assert rig.sessions.refuse("a", StepAhead("a", 9, 0), refusal)
    assert not refusal.answered
    await step.outcome()
    assert isinstance(await refusal.error(), StepAhead)
    assert rig.sessions.t(session) == 4


async def test_a_refusal_with_nothing_before_it_is_the_callers_to_deliver(rig):
    await rig.open("a")
    refusal = Caller()
    assert not rig.sessions.refuse("a", StepAhead("a", 9, 0), refusal)
    assert not rig.sessions.refuse("never", SessionUnknown("never"), refusal)
    assert not refusal.answered


async def test_opened_and_closed_sessions_are_counted(rig):
    await rig.open("a")
    await rig.open("b")
    await rig.sessions.close("a")
    rig.clock.advance(IDLE_SECONDS)
    await rig.sessions.sweep()
    count = rig.registry.get_sample_value
    assert count("stepstate_sessions_opened_total", {"model": "lstm", "version": "1"}) == 2
    assert count("stepstate_sessions_closed_total", {"reason": "closed"}) == 1
    assert count("stepstate_sessions_closed_total", {"reason": "expired"}) == 1


async def test_a_session_that_the_store_did_not_take_leaves_nothing_behind(make_rig):
    store = SlowStore(fails=True)
    store.gate.open()
    rig = make_rig(store=store, max_sessions=1)
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await rig.open("a")
    assert len(rig.sessions) == rig.lane.open_sessions == 0
    with pytest.raises(SessionUnknown):
        await rig.sessions.get("a")


async def test_a_session_takes_no_steps_before_the_store_has_it(make_rig):
    store = SlowStore()
    rig = make_rig(store=store)
    opening = asyncio.create_task(rig.open("a"))
    await rounds(2)
    assert rig.sessions.find("a") is None
    wanted = asyncio.create_task(rig.sessions.get("a"))
    await rounds(2)
    assert not wanted.done()
    store.gate.open()
    session = await opening
    assert await wanted is session


async def test_sessions_that_the_store_is_still_taking_count(make_rig):
    store = SlowStore()
    rig = make_rig(store=store, max_sessions=1)
    opening = asyncio.create_task(rig.open("a"))
    again = asyncio.create_task(rig.open("a"))
    await rounds(2)
    with pytest.raises(SessionLimit):
        await rig.open("b")
    store.gate.open()
    await opening
    with pytest.raises(SessionExists):
        await again


async def test_the_time_of_row_0_is_kept(rig):
    start = datetime(2026, 1, 2, tzinfo=UTC)
    assert (await rig.open("a", start=start)).record.start_time == start


async def test_steps_of_many_sessions_share_forwards(rig, x, network):
    opened = [await rig.open(f"s{place}") for place in range(6)]
    for t in range(3):
        callers = [rig.send(session, x[t], t) for session in opened]
        y = [outputs(await caller.outcome())[0] for caller in callers]
        assert np.abs(y - network.offline(x[: t + 1])[-1]).max() <= 1e-5
    rows = rig.registry.get_sample_value(
        "stepstate_microbatch_rows_count", {"model": "lstm", "version": "1"}
    )
    assert rows == 3


def test_a_request_has_the_values_of_its_rows(model):
    assert request(None, [[1, 2, 3], [4, 5, 6]], 0, None).x == [1, 2, 3, 4, 5, 6]


async def test_a_session_that_the_store_could_not_end_is_still_open(make_rig, x):
    store = SlowStore()
    store.gate.open()
    rig = make_rig(store=store)
    session = await rig.open("a")
    store.fails = True
    with pytest.raises(StoreUnavailable):
        await rig.sessions.close("a")
    assert (await rig.step(session, x[:1], 0)).t_after == 1
    store.fails = False
    assert await rig.sessions.close("a") == 1


async def test_an_open_that_a_drain_overtakes_is_refused(make_rig):
    store = SlowStore()
    rig = make_rig(store=store)
    opening = asyncio.create_task(rig.open("a"))
    await rounds(2)
    await rig.sessions.drain()
    store.gate.open()
    with pytest.raises(Draining):
        await opening
    assert len(rig.sessions) == 0


class FailingLate(Lasting):
    """Holds calls until the test opens the gate, and then fails."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.gate = Gate()
        self.error: Exception = StoreUnavailable("it is away")

    async def _fail(self) -> Any:
        await self.gate.wait()
        raise self.error

    async def acquire(self, session_id, **options):
        return await self._fail()

    async def end(self, session_id, epoch, ending):
        return await self._fail()

    async def find(self, session_id):
        return await self._fail()

    async def create(self, record, **options):
        if record.session_id == "late":
            return await self._fail()
        return await super().create(record, **options)


@pytest.mark.parametrize("surprising", [False, True])
@pytest.mark.parametrize("what", ["get", "close", "close a spilled one", "look", "open", "export"])
async def test_what_fails_after_its_caller_gave_up_is_nobodys(make_rig, clock, what, surprising):
    """`make_rig` fails on what asyncio says: "Task exception was never retrieved"."""
    store = FailingLate(clock)
    rig = make_rig(store=store, clock=clock)
    await rig.open("a")
    if surprising:
        store.error = RuntimeError("no one expects it")
    uses = {
        "get": lambda: rig.sessions.get("b"),
        "close": lambda: rig.sessions.close("a"),
        "close a spilled one": lambda: rig.sessions.close("b"),
        "look": lambda: rig.sessions.look("b"),
        "open": lambda: rig.open("late"),
        "export": lambda: rig.sessions.export("b"),
    }
    caller = asyncio.create_task(uses[what]())
    await rounds(3)
    caller.cancel()
    await asyncio.wait([caller])
    store.gate.open()
    await rounds(10)
    del caller
    gc.collect()
    await rounds(2)
    assert not rig.sessions._lines
    assert rig.sessions.find("a") is not None


async def test_a_snapshot_whose_caller_gave_up_is_nobodys_if_the_session_is_lost(
    make_rig, clock, x
):
    rig = make_rig(store=Lasting(clock), clock=clock, chunk_rows=1)
    session = await rig.open("a")
    caller = rig.send(session, x[:4], 0)
    exporting = asyncio.create_task(rig.sessions.export("a"))
    await rounds(2)
    exporting.cancel()
    rig.sessions._residency.forget(session, StaleOwner("a", 9))
    with pytest.raises(StaleOwner):
        await caller.outcome()
    del exporting, caller
    gc.collect()
    await rounds(2)


async def test_a_surprise_of_the_store_answers_a_step_that_is_ahead(make_rig, clock, x):
    store = FailingLate(clock)
    rig = make_rig(store=store, clock=clock)
    session = await rig.open("a")
    store.error = RuntimeError("no one expects it")
    store.gate.open()
    assert isinstance(await rig.send(session, x[0], 5).error(), Internal)
    await rig.step(session, x[0], 0)
