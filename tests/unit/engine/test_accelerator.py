"""States on a device: the same tests run its path on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from stepstate.engine import check_accelerator
from stepstate.engine.accelerator import DeviceForward
from stepstate.engine.tracking.tracker import Tracker
from stepstate.errors import DeviceUnavailable, Internal, NonFiniteResult
from tests.accelerators import there
from tests.networks import make_network
from tests.offline import forecasting_network
from tests.unit.rig import HUGE, model_of, outputs, overflowing_network, rows_of

CLOSE = 1e-5
NETWORKS = {
    "lstm": make_network("lstm", seed=1),
    "projected": make_network("projected", hidden=12, projection=5, seed=3),
    "gru": make_network("gru", "gru", seed=4),
    "relu": make_network("relu", "rnn_relu", seed=6),
}


@pytest.fixture(params=["cpu", "cuda"])
def accelerator(request: pytest.FixtureRequest) -> str:
    return str(there(request.param))


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each forward on the device had."""
    rows: list[int] = []
    step = DeviceForward.step

    def noted(forward: DeviceForward, slots: np.ndarray, *rest: np.ndarray):
        rows.append(len(slots))
        return step(forward, slots, *rest)

    monkeypatch.setattr(DeviceForward, "step", noted)
    return rows


@pytest.mark.parametrize("name", NETWORKS)
async def test_batches_of_every_size_give_the_numbers_of_the_offline_network(
    make_rig, accelerator, name
):
    network = NETWORKS[name]
    rig = make_rig(model_of(network), accelerator=accelerator, max_sessions=24)
    sessions = [await rig.open(f"s{place}") for place in range(24)]
    x = np.stack([rows_of(network, 20, seed=place) for place in range(24)])
    at, got = [0] * 24, [[] for _ in range(24)]
    moments = np.random.default_rng(5)
    for count in (1, 2, 3, 5, 8, 9, 16, 17, 24, *moments.integers(1, 24, 25).tolist()):
        chosen = [s for s in moments.permutation(24)[:count].tolist() if at[s] < 20]
        calls = [rig.send(sessions[s], x[s, at[s]], at[s]) for s in chosen]
        for s, call in zip(chosen, calls, strict=True):
            got[s].append(outputs(await call.outcome())[0])
            at[s] += 1
    assert sum(at) > 200
    for s in range(24):
        if got[s]:
            assert np.abs(np.array(got[s]) - network.offline(x[s, : at[s]])).max() <= CLOSE


async def test_a_row_that_overflows_changes_no_state_and_no_other_row(make_rig, accelerator):
    network = overflowing_network()
    rig = make_rig(model_of(network), accelerator=accelerator)
    sessions = [await rig.open(name) for name in "abc"]
    x = np.ones((3, network.module.input_size), np.float32)
    before = [outputs(await rig.step(one, x[0], 0)) for one in sessions]
    bad = x.copy()
    bad[1] = HUGE
    calls = [rig.send(one, row, 1) for one, row in zip(sessions, bad, strict=True)]
    errors = [type(await call.error()) for call in calls]
    assert errors == [type(None), NonFiniteResult, type(None)]
    assert [rig.sessions.t(one) for one in sessions] == [2, 1, 2]
    again = await rig.step(sessions[1], x[1], 1)
    assert np.allclose(outputs(again), outputs(await calls[0].outcome()), rtol=CLOSE)
    assert np.allclose(before[0], before[1], rtol=CLOSE)


async def test_a_state_moves_between_host_and_device(make_rig, accelerator):
    network, x = NETWORKS["lstm"], rows_of(NETWORKS["lstm"], 9)
    here = make_rig(model_of(network))
    there = make_rig(model_of(network), accelerator=accelerator)
    first, second = here.scheduler.engine, there.scheduler.engine
    session = await here.open()
    got = [outputs(await here.step(session, row))[0] for row in x[:3]]
    moved = await there.open()
    second.write_state(moved.slot, first.read_states(np.array([session.slot]))[0])
    got += [outputs(await there.step(moved, row))[0] for row in x[3:6]]
    first.write_state(session.slot, second.read_states(np.array([moved.slot]))[0])
    got += [outputs(await here.step(session, row))[0] for row in x[6:]]
    assert np.abs(np.array(got) - network.offline(x)).max() <= CLOSE


async def test_long_requests_inspection_and_missing_rows_go_on_from_the_device(
    make_rig, accelerator
):
    network, x = NETWORKS["lstm"], rows_of(NETWORKS["lstm"], 60)
    rig = make_rig(model_of(network), accelerator=accelerator, chunk_rows=8)
    session = await rig.open(missing="hold")
    got = [outputs(await rig.step(session, x[:1])), outputs(await rig.step(session, x[1:40]))]
    got.append(outputs(await rig.step(session, x[40:45], inspect=True)))
    got += [outputs(await rig.step(session, row)) for row in x[45:59]]
    hole = x[59].copy()
    hole[1] = np.nan
    x[59, 1] = x[58, 1]
    got.append(outputs(await rig.step(session, hole)))
    assert np.abs(np.concatenate(got) - network.offline(x)).max() <= CLOSE


async def test_a_slot_that_is_used_again_starts_from_zero(make_rig, accelerator):
    network, x = NETWORKS["gru"], rows_of(NETWORKS["gru"], 3)
    rig = make_rig(model_of(network), accelerator=accelerator, max_sessions=1)
    for _ in range(2):
        session = await rig.open()
        y = [outputs(await rig.step(session, row))[0] for row in x]
        assert np.abs(np.array(y) - network.offline(x)).max() <= CLOSE
        await rig.sessions.close("a")
        await asyncio.sleep(0)


def tracked_network():
    """A model without lagged inputs that keeps books on its forecasts."""
    network = make_network("tracked", inputs=2, outputs=3, seed=11)
    network.manifest.update(
        inputs=[{"name": "level"}, {"name": "heat"}],
        outputs=[{"name": "level", "horizons": [1, 2, 3]}],
        tracking={"horizons": [1, 3], "season_steps": 4, "rate": 0.2},
    )
    return network


async def test_forecasts_are_tracked_as_on_the_host(make_rig, accelerator, forwards):
    network = tracked_network()
    rigs = [make_rig(model_of(network), accelerator=place) for place in (None, accelerator)]
    sessions = [[await rig.open(name) for name in "abc"] for rig in rigs]
    for t in range(30):
        rows = rows_of(network, 3, seed=t)
        calls = [
            rig.send(session, row, t)
            for rig, opened in zip(rigs, sessions, strict=True)
            for session, row in zip(opened, rows, strict=True)
        ]
        for call in calls:
            await call.outcome()
    slots = np.array([session.slot for session in sessions[0]])
    here, there = (rig.scheduler.engine.read_states(slots) for rig in rigs)
    assert forwards
    assert np.allclose(here, there, atol=CLOSE, equal_nan=True)
    tracked = here[:, rigs[0].scheduler.engine.layout.tracked_from :]
    assert len(np.unique(tracked)) > 6  # something was


async def test_a_surprise_after_the_forward_leaves_every_part_of_a_state(
    make_rig, accelerator, monkeypatch
):
    network = tracked_network()
    rig = make_rig(model_of(network), accelerator=accelerator)
    session, engine = await rig.open(), rig.scheduler.engine
    for row in rows_of(network, 6):
        await rig.step(session, row)
    slots = np.array([session.slot])
    before = engine.read_states(slots).tobytes()
    with monkeypatch.context() as broken:
        broken.setattr(Tracker, "observe", lambda *_, **__: 1 / 0)
        assert isinstance(await rig.send(session, rows_of(network, 1), 6).error(), Internal)
    assert engine.read_states(slots).tobytes() == before
    assert rig.sessions.t(session) == 6


async def test_a_model_with_lagged_inputs_stays_on_the_host(make_rig, accelerator, forwards):
    network = forecasting_network()
    here, there = (make_rig(model_of(network), accelerator=on) for on in (None, accelerator))
    x = rows_of(network, 12)
    sessions = [(rig, await rig.open()) for rig in (here, there)]
    for row in x:
        y = [await rig.y(session, row) for rig, session in sessions]
        assert y[0].tobytes() == y[1].tobytes()
    assert not forwards


def test_a_device_that_is_not_there_is_reported_before_the_start():
    with pytest.raises(DeviceUnavailable, match=r"--device cuda:99: .*leave the option out"):
        check_accelerator("cuda:99")
