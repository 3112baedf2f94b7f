"""An exception for one row reaches its sender only: no other row and no state changes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from stepstate.engine.accelerator import DeviceForward
from stepstate.engine.engine import isolated
from stepstate.engine.imputation import Imputer
from stepstate.engine.network import Network
from stepstate.engine.runtimes import OnnxStepper
from stepstate.engine.tracking.tracker import Tracker
from stepstate.errors import Internal
from stepstate.sessions import ForecastRequest
from stepstate.sessions.forecasting.origins import OriginCopier
from tests.accelerators import ACCELERATORS, there
from tests.networks import make_network
from tests.offline import forecasting_network, rows
from tests.unit.rig import Caller, Rig, model_of, outputs, request

CLOSE = 1e-5
GUILTY = 666.0
SESSIONS = 40


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_items_that_raise_are_found_and_the_others_run_once(count, share):
    guilty = set(np.flatnonzero(np.random.default_rng(count).random(count) < share).tolist())
    ran: list[int] = []
    failed: dict[int, Exception] = {}

    def run(some):
        if guilty & set(some):
            raise ValueError(sorted(guilty & set(some)))
        ran.extend(some)
        return len(some)

    parts = isolated(range(count), run, failed.__setitem__)
    assert sorted(ran) == sorted(set(range(count)) - guilty)
    assert [place for some, _ in parts for place in some] == ran
    assert all(ran_rows == len(some) for some, ran_rows in parts)
    assert failed.keys() == guilty


def poisoned(real: Callable, place: int) -> Callable:
    """The same, but raises where an argument holds the guilty value."""

    def raises(*arguments, **named):
        x = arguments[place]
        if (np.asarray(x) == GUILTY).any():
            raise IndexError(f"row {np.argwhere(np.asarray(x) == GUILTY)[0]}")
        return real(*arguments, **named)

    return raises


def poisoned_tracking(real: Callable) -> Callable:
    def raises(*arguments, truths, **named):
        real(*arguments, truths=truths, **named)  # what it counted must not be counted again
        if GUILTY in truths:
            raise ZeroDivisionError

    return raises


FAULTS = {
    "forward": lambda patch: [
        patch.setattr(OnnxStepper, "step", poisoned(OnnxStepper.step, 1)),
        patch.setattr(Network, "sequence", poisoned(Network.sequence, 1)),
        patch.setattr(DeviceForward, "step", poisoned(DeviceForward.step, 2)),
    ],
    "imputation": lambda patch: patch.setattr(Imputer, "apply", poisoned(Imputer.apply, 1)),
    "tracking": lambda patch: patch.setattr(Tracker, "observe", poisoned_tracking(Tracker.observe)),
}


@pytest.fixture(params=ACCELERATORS, autouse=True)
def _everywhere(request, monkeypatch):
    monkeypatch.setattr(Rig, "accelerator", there(request.param))


@pytest.fixture(params=["plain", "lagged"])
def make(request, make_rig) -> Callable[[], Rig]:
    """A model that steps on an accelerator, and one that never does; both track forecasts."""
    network = forecasting_network(fallback="first")
    if request.param == "plain":
        lagged = network.manifest
        network = make_network("sensor1", inputs=2, outputs=13, seed=11)
        network.manifest.update({k: lagged[k] for k in ("inputs", "outputs", "tracking")})
    model = model_of(network)
    return lambda: make_rig(model, max_sessions=2 * SESSIONS)


def history(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(5, 1, (4, 2)).astype(np.float32)


async def opened(rig: Rig) -> list:
    """Sessions that have a few rows each."""
    sessions = [await rig.open(f"s{place}", missing="impute") for place in range(SESSIONS)]
    for place, session in enumerate(sessions):
        await rig.y(session, history(place))
    return sessions


def states(rig: Rig, sessions: list) -> np.ndarray:
    return rig.scheduler.engine.read_states(np.array([session.slot for session in sessions]))


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return np.allclose(one, other, atol=CLOSE, rtol=CLOSE, equal_nan=True)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("guilty", [{0, 8, 31}, set(range(0, SESSIONS, 2))], ids=len)
async def test_rows_that_raise_fail_alone_in_a_micro_batch_and_in_a_chunk(
    make, monkeypatch, fault, rows, guilty
):
    """Every other one gets what it gets in a rig where nobody raises, and is counted once."""
    rig, quiet = make(), make()
    sessions, others = await opened(rig), await opened(quiet)
    before = states(rig, sessions)
    x = [history(100 + place)[:rows] for place in range(SESSIONS)]
    for place in range(SESSIONS):
        x[place][rows - 1, 1] = np.nan if fault == "imputation" else 0.0
    sent = [row.copy() for row in x]
    for place in guilty:
        sent[place][rows - 1, 0] = GUILTY
    with monkeypatch.context() as patch:
        FAULTS[fault](patch)
        callers = [rig.send(session, sent[place]) for place, session in enumerate(sessions)]
        for place in guilty:
            assert isinstance(await callers[place].error(), Internal)
        found = {n: outputs(await callers[n].outcome()) for n in range(SESSIONS) if n not in guilty}
    calm = [quiet.send(one, x[place]) for place, one in enumerate(others) if place not in guilty]
    for caller, y in zip(calm, found.values(), strict=True):
        assert same(outputs(await caller.outcome()), y)
    innocent = [place for place in range(SESSIONS) if place not in guilty]
    after, wanted = states(rig, sessions), states(quiet, others)
    assert same(after[innocent], wanted[innocent])
    assert after[sorted(guilty)].tobytes() == before[sorted(guilty)].tobytes()
    ts = [rig.sessions.t(session) for session in sessions]
    assert ts == [4 if place in guilty else 4 + rows for place in range(SESSIONS)]
    assert [score.scored for score in rig.scheduler.engine.score_totals.scores] == [
        score.scored for score in quiet.scheduler.engine.score_totals.scores
    ]
    assert rig.results["failed"] == len(guilty)
    for place in guilty:  # and they go on as if nothing had been sent
        assert same(await rig.y(sessions[place], x[place]), await quiet.y(others[place], x[place]))


@pytest.mark.parametrize("fault", ["forward", "tracking"])
async def test_a_packed_row_that_raises_fails_alone(make, monkeypatch, fault):
    """Of a pack that shares its forward with single rows, and with another pack."""
    rig, quiet = make(), make()
    sessions, others = await opened(rig), await opened(quiet)
    guilty = {3, 17, 18, 39}
    x = np.stack([history(100 + place)[0] for place in range(SESSIONS)])
    sent = x.copy()
    sent[sorted(guilty), 0] = GUILTY
    parts = [np.arange(10, 25), np.arange(25, 40)]
    with monkeypatch.context() as patch:
        FAULTS[fault](patch)
        callers = [rig.send(sessions[place], sent[place]) for place in range(10)]
        packs = [rig.send_pack([sessions[place] for place in part], sent[part]) for part in parts]
        for place, caller in enumerate(callers):
            assert isinstance(await caller.error(), Internal if place in guilty else type(None))
    for caller, part in zip(packs, parts, strict=True):
        pack = await caller.outcome()
        assert {int(part[row]) for row, _ in pack.errors} == guilty & set(part.tolist())
        assert all(isinstance(error, Internal) for _, error in pack.errors)
        for row, place in enumerate(part.tolist()):
            calm = await quiet.y(others[place], x[place])
            assert np.isnan(pack.y[row]).all() if place in guilty else same(pack.y[row], calm[0])
    ts = [rig.sessions.t(session) for session in sessions]
    assert ts == [4 + (place not in guilty) for place in range(SESSIONS)]
    assert not rig.table.busy_array.any()
    assert rig.sessions.queued_rows == 0


@pytest.mark.parametrize("rows", [1, 3])
async def test_rows_that_make_no_columns_fail_alone(make, rows):
    """What the transport would have to let through by mistake: a row of another width."""
    rig = make()
    sessions = await opened(rig)
    callers = [Caller() for _ in range(5)]
    steps = [
        request(session, history(9)[:rows], None, caller)
        for session, caller in zip(sessions, callers, strict=False)
    ]
    for step in steps:
        rig.sessions.submit(step)
    steps[2].x = [1.0] * 7
    errors = [await caller.error() for caller in callers]
    assert [type(error) for error in errors] == [type(None)] * 2 + [Internal] + [type(None)] * 2
    await rig.y(sessions[2], history(9)[:rows])


@pytest.mark.parametrize("where", ["copy", "rollout"])
async def test_a_session_whose_forecast_raises_hides_no_other(make, monkeypatch, where):
    rig = make()
    sessions = await opened(rig)
    names = [session.session_id for session in sessions]
    wish = ForecastRequest(2, (), ())
    wanted = await rig.sessions.forecast(names, wish)
    guilty = {5, 33}
    slots = {sessions[place].slot for place in guilty}
    if where == "copy":
        real = OriginCopier._copy  # noqa: SLF001 - one session of the group

        def copy(self, session):
            if session.slot in slots:
                raise KeyError(session.slot)
            return real(self, session)

        monkeypatch.setattr(OriginCopier, "_copy", copy)
    else:
        read = Network.read
        cells = states(rig, [sessions[place] for place in guilty])[
            :, : rig.scheduler.engine.layout.cell
        ]

        def raises(self, phase, state, past=None):
            if any((state == torch.from_numpy(cell)).all(dim=1).any() for cell in cells):
                raise KeyError
            return read(self, phase, state, past)

        monkeypatch.setattr(Network, "read", raises)
    found = await rig.sessions.forecast(names, wish)
    for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
        if place in guilty:
            assert isinstance(one, Internal)
        else:
            assert same(one[0].outputs[0].values, other[0].outputs[0].values)


async def test_an_exception_for_all_rows_reaches_each_sender(make, monkeypatch):
    rig = make()
    sessions = await opened(rig)

    def broken(*_, **__):
        raise RuntimeError("out of memory")

    for cls in (OnnxStepper, DeviceForward):
        monkeypatch.setattr(cls, "step", broken)
    callers = [rig.send(session, history(9)[0]) for session in sessions]
    for caller in callers:
        assert isinstance(await caller.error(), Internal)
    assert {rig.sessions.t(session) for session in sessions} == {4}


@pytest.mark.parametrize("count", [1, 5])
async def test_a_surprise_while_tracking_changes_no_state(make_rig, monkeypatch, count):
    rig = make_rig(model_of(forecasting_network()), replay_rows=64)
    sessions = [await rig.open(name) for name in ("a", "b")]
    for session in sessions:
        await rig.y(session, rows(20))
    slots = np.array([session.slot for session in sessions])
    before = rig.scheduler.engine.read_states(slots)
    observe = Tracker.observe

    def surprise(self, values, base, at, **named):
        observe(self, values, base, at, **named)
        if at == 20 + count - 1:  # the last row of the request
            raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(Tracker, "observe", surprise)
        callers = [rig.send(session, rows(count, seed=3)) for session in sessions]
        for caller in callers:
            assert isinstance(await caller.error(), Internal)
    assert rig.scheduler.engine.read_states(slots).tobytes() == before.tobytes()
    assert [rig.sessions.t(session) for session in sessions] == [20, 20]
