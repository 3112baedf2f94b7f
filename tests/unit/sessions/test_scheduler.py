from __future__ import annotations

import logging

import numpy as np
import pytest

from stepstate.engine.accelerator import DeviceForward
from stepstate.engine.runtimes import OnnxStepper
from stepstate.errors import Internal, NonFiniteResult, StepAhead, StepMismatch, StepTooOld
from tests.accelerators import ACCELERATORS, there
from tests.unit.rig import HUGE, Rig, model_of, outputs, overflowing_network, rounds, rows_of

CLOSE = 1e-5


@pytest.fixture(params=ACCELERATORS, autouse=True)
def _everywhere(request, monkeypatch):
    monkeypatch.setattr(Rig, "accelerator", there(request.param))


@pytest.fixture
async def session(rig):
    return await rig.open()


@pytest.fixture
def x(network):
    return rows_of(network, 12)


async def assert_stands_at(rig: Rig, session, x: np.ndarray, t: int, network) -> None:
    """The state is that of the first t rows: the next row gives what offline gives."""
    assert rig.sessions.t(session) == t
    y = await rig.y(session, x[t])
    assert np.abs(y[0] - network.offline(x[: t + 1])[-1]).max() <= CLOSE


async def test_steps_advance_t_and_equal_the_offline_network(rig, session, x, network):
    steps = [await rig.step(session, row, t) for t, row in enumerate(x)]
    y = np.concatenate([outputs(step) for step in steps])
    assert np.abs(y - network.offline(x)).max() <= CLOSE
    assert [step.t_after for step in steps] == list(range(1, 13))
    assert rig.results == {"applied": 12}


async def test_a_retried_step_is_applied_once_and_answered_with_the_same_outputs(
    rig, session, x, network
):
    first = await rig.step(session, x[0], 0)
    again = await rig.step(session, x[0], 0)
    assert again.y == first.y
    assert (first.replayed, again.replayed) == (False, True)
    assert again.t_after == first.t_after == 1
    assert rig.results == {"applied": 1, "replayed": 1}
    await assert_stands_at(rig, session, x, 1, network)


@pytest.mark.parametrize(
    "options", [{}, {"last_only": True}, {"inspect": True}, {"inspect": True, "last_only": True}]
)
async def test_a_retried_request_of_many_rows_gets_the_same_outputs(
    rig, session, x, network, options
):
    first = await rig.step(session, x[:5], 0, **options)
    again = await rig.step(session, x[:5], 0, **options)
    assert again.y == first.y
    assert again.replayed
    assert again.t_after == 5
    assert again.layers is first.layers
    await assert_stands_at(rig, session, x, 5, network)


async def test_a_retry_sent_before_the_first_answer_is_not_applied_again(rig, session, x, network):
    first, again = rig.send(session, x[0], 0), rig.send(session, x[0], 0)
    assert (await first.outcome()).y == (await again.outcome()).y
    await assert_stands_at(rig, session, x, 1, network)


@pytest.mark.parametrize("rows", [1, 3])
async def test_a_gap_is_refused_with_the_t_expected_and_changes_nothing(
    rig, session, x, network, rows
):
    await rig.step(session, x[0], 0)
    with pytest.raises(StepAhead) as refused:
        await rig.step(session, x[2 : 2 + rows], 2)
    assert refused.value.fields() == {"session_id": "a", "t": "2", "expected_t": "1"}
    assert rig.results["refused"] == 1
    await assert_stands_at(rig, session, x, 1, network)


async def test_another_payload_at_an_applied_t_is_a_mismatch_and_changes_nothing(
    rig, session, x, network
):
    await rig.step(session, x[0], 0)
    await rig.step(session, x[1:4], 1)
    requests = [
        ((x[5], 0), {}),
        ((x[0], 0), {"inspect": True}),
        ((x[0:2], 0), {}),
        ((x[1:3], 1), {}),
        ((x[1:4], 1), {"last_only": True}),
        ((x[2], 2), {}),
    ]
    for (rows, t), options in requests:
        with pytest.raises(StepMismatch) as refused:
            await rig.step(session, rows, t, **options)
        assert (refused.value.t, refused.value.expected_t) == (t, 4)
    await assert_stands_at(rig, session, x, 4, network)


async def test_a_t_older_than_the_window_is_too_old_and_changes_nothing(rig, session, x, network):
    for t in range(6):
        await rig.step(session, x[t], t)
    for t in (0, 1):
        with pytest.raises(StepTooOld) as refused:
            await rig.step(session, x[t], t)
        assert (refused.value.t, refused.value.expected_t) == (t, 6)
    assert (await rig.step(session, x[2], 2)).replayed
    await assert_stands_at(rig, session, x, 6, network)


async def test_without_t_a_step_is_applied_each_time_it_is_sent(rig, session, x, network):
    for _ in range(2):
        await rig.step(session, x[0])
    assert rig.sessions.t(session) == 2
    y = await rig.y(session, x[1])
    assert np.abs(y[0] - network.offline(x[[0, 0, 1]])[-1]).max() <= CLOSE


async def test_steps_sent_at_once_are_applied_in_order(rig, session, x, network):
    callers = [
        rig.send(session, x[0], 0),
        rig.send(session, x[1:6], 1),
        rig.send(session, x[6], 6, inspect=True),
        rig.send(session, x[7], 7),
        rig.send(session, x[8:], 8),
    ]
    y = np.concatenate([outputs(await caller.outcome()) for caller in callers])
    assert np.abs(y - network.offline(x)).max() <= CLOSE


async def test_t_is_checked_when_the_turn_of_a_step_has_come(rig, session, x):
    good, late = rig.send(session, x[0], 0), rig.send(session, x[2], 2)
    await good.outcome()
    assert isinstance(await late.error(), StepAhead)


async def test_an_error_of_one_step_lets_those_after_it_go_on(rig, session, x, network):
    rig.send(session, x[0], 0)
    wrong, good = rig.send(session, x[5], 5), rig.send(session, x[1], 1)
    assert np.abs(outputs(await good.outcome())[0] - network.offline(x[:2])[-1]).max() <= CLOSE
    assert isinstance(await wrong.error(), StepAhead)


@pytest.mark.parametrize("rows", [1, 4])
async def test_a_step_cancelled_before_it_is_taken_did_not_happen(rig, session, x, network, rows):
    caller = rig.send(session, x[:rows], 0)
    caller.cancelled = True
    await rounds(4)
    assert rig.results == {"cancelled": 1}
    await assert_stands_at(rig, session, x, 0, network)


async def test_a_step_cancelled_while_it_waits_for_another_did_not_happen(rig, session, x, network):
    first, second = rig.send(session, x[0], 0), rig.send(session, x[1], 1)
    second.cancelled = True
    await first.outcome()
    assert rig.results == {"applied": 1, "cancelled": 1}
    await assert_stands_at(rig, session, x, 1, network)


async def test_a_long_request_cancelled_between_two_chunks_did_not_happen(make_rig, x, network):
    rig = make_rig(chunk_rows=2)
    session = await rig.open()
    caller = rig.send(session, x[:10], 0)
    await rounds(3)
    caller.cancelled = True
    await rounds(20)
    assert rig.results == {"cancelled": 1}
    await assert_stands_at(rig, session, x, 0, network)


@pytest.mark.parametrize("rows", [1, 4])
async def test_a_step_cancelled_after_it_was_applied_happened_and_its_retry_is_answered(
    rig, session, x, network, rows
):
    caller = rig.send(session, x[:rows], 0)
    while not caller.answered:
        await rounds(1)
    caller.cancelled = True
    again = await rig.step(session, x[:rows], 0)
    assert again.replayed
    assert again.y == (await caller.outcome()).y
    await assert_stands_at(rig, session, x, rows, network)


async def test_rows_that_overflow_float32_are_refused_and_change_nothing(make_rig):
    network = overflowing_network()
    rig = make_rig(model_of(network))
    session = await rig.open()
    x = rows_of(network, 4)
    before = await rig.y(session, x[0], 0)
    for bad in (HUGE, [x[1], HUGE], [HUGE, x[1], x[2]]):
        with pytest.raises(NonFiniteResult) as refused:
            await rig.step(session, bad, 1)
        assert refused.value.t == 1
    assert rig.results == {"applied": 1, "refused": 3}
    twin = await rig.open("twin")
    assert (await rig.y(twin, x[0], 0) == before).all()
    assert (await rig.y(session, x[1], 1) == await rig.y(twin, x[1], 1)).all()


async def test_a_forward_that_raises_is_an_internal_error_whose_id_is_in_the_log(
    *, rig, session, x, network, monkeypatch, caplog
):
    with monkeypatch.context() as broken:
        for forward in (OnnxStepper, DeviceForward):
            broken.setattr(forward, "step", lambda *_: 1 / 0)
        with caplog.at_level(logging.ERROR), pytest.raises(Internal) as failed:
            await rig.step(session, x[0], 0)
    assert caplog.records[0].error_id == failed.value.error_id
    assert caplog.records[0].exc_info
    assert rig.results == {"failed": 1}
    await assert_stands_at(rig, session, x, 0, network)


async def test_last_only_gives_the_last_row_and_applies_all(rig, session, x, network):
    y = await rig.y(session, x[:7], 0, last_only=True)
    assert y.shape == (1, 2)
    assert np.abs(y[0] - network.offline(x[:7])[-1]).max() <= CLOSE
    await assert_stands_at(rig, session, x, 7, network)


async def test_only_a_step_that_is_applied_counts_as_use(rig, session, x):
    rig.clock.advance(60)
    await rig.step(session, x[0], 0)
    assert rig.sessions.summary(session).seconds_left == 100
    await rig.step(session, x[1:3], 1)
    rig.clock.advance(30)
    await rig.step(session, x[0], 0)
    assert rig.sessions.summary(session).seconds_left == 70


async def test_a_slot_that_is_used_again_starts_from_zero_and_remembers_nothing(rig, x, network):
    old = await rig.open("old")
    await rig.step(old, x[0], 0)
    await rig.step(old, x[1:4], 1)
    await rig.sessions.close("old")
    new = await rig.open("new")
    assert new.slot == old.slot
    y = outputs(await rig.step(new, x[0], 0))
    assert np.abs(y - network.offline(x[:1])).max() <= CLOSE
    with pytest.raises(StepAhead):
        await rig.step(new, x[1:4], 2)


async def test_gauges_follow_sessions_and_queue(rig, session, x):
    assert (rig.scheduler.open_sessions, rig.scheduler.state_bytes) == (1, 4 * (2 * 2 * 16 + 3))
    caller = rig.send(session, x[:5], 0)
    assert rig.scheduler.queued_rows == rig.sessions.queued_rows == 5
    await caller.outcome()
    assert rig.scheduler.queued_rows == 0
    assert rig.scheduler.replay_bytes == 5 * 2 * 4
    await rig.sessions.close("a")
    assert (rig.scheduler.open_sessions, rig.scheduler.state_bytes, rig.scheduler.replay_bytes) == (
        0,
        0,
        0,
    )
