"""Forecasts never change a session, and a session is the same however it came to where it is."""

from __future__ import annotations

import asyncio

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stepstate.sessions import CopyOptions, ForecastRequest, Scenario
from tests import offline
from tests.hypothesis_profiles import examples
from tests.offline import forecasting_network
from tests.unit.rig import Rig, model_of

SENSORS = [
    forecasting_network(),
    forecasting_network(fallback="first"),
    forecasting_network(quantiles=()),
]
MODELS = [model_of(sensor) for sensor in SENSORS]
CLOSE = 1e-4  # of values around 5, over tens of rows

values = st.floats(-20, 20, width=32)
rows = st.integers(1, 9).flatmap(lambda count: hnp.arrays(np.float32, (count, 2), elements=values))
holes = st.integers(1, 9).flatmap(
    lambda count: hnp.arrays(
        np.float32, (count, 2), elements=st.one_of(values, st.just(float("nan")))
    )
)
scenarios = st.lists(rows, max_size=3).map(
    lambda paths: tuple(Scenario(str(n), path.ravel()) for n, path in enumerate(paths))
)
wishes = st.builds(
    ForecastRequest,
    st.integers(0, 5),
    st.lists(st.floats(0.01, 0.99), max_size=3).map(tuple),
    scenarios,
)


async def _apply(rig: Rig, session_id: str, action: object) -> np.ndarray:
    session = await rig.sessions.get(session_id)
    return await rig.y(session, action)


@examples(60)
@given(st.sampled_from(range(3)), rows, st.lists(st.one_of(rows, holes, wishes), max_size=8))
def test_forecasts_between_steps_change_nothing(which, first, actions):
    """Bit for bit, and again after it went through a snapshot."""

    async def run() -> None:
        rig = Rig(MODELS[which])
        for session_id in ("asked", "left"):
            session = await rig.open(session_id, missing="impute")
            await rig.y(session, first)
        for number, action in enumerate(actions):
            if isinstance(action, ForecastRequest):
                told = [await rig.sessions.forecast(["asked"], action) for _ in range(2)]
                assert _bytes(told[0]) == _bytes(told[1])
            else:
                asked, left = [await _apply(rig, name, action) for name in ("asked", "left")]
                assert asked.tobytes() == left.tobytes()
            if number == len(actions) // 2:
                data, _ = await rig.sessions.export("asked")
                await rig.sessions.close("asked")
                await rig.sessions.restore(data, CopyOptions("asked", None, None))
        slots = np.array([rig.sessions.find(name).slot for name in ("asked", "left")])
        states = rig.scheduler.engine.read_states(slots)
        assert states[0].tobytes() == states[1].tobytes()

    asyncio.run(run())


def _bytes(told) -> list[bytes]:
    if isinstance(told[0], Exception):
        return [str(told[0]).encode()]
    return [output.values.tobytes() for one in told[0] for output in one.outputs]


@examples(60)
@given(st.sampled_from(range(3)), rows, st.lists(rows, max_size=6), st.data())
def test_however_rows_are_split_and_batched_they_equal_the_sequence_offline(
    which, first, parts, data
):
    x = np.concatenate([first, *parts])

    async def run() -> np.ndarray:
        rig = Rig(MODELS[which])
        session, mate = await rig.open("a"), await rig.open("mate")
        found, place = [], 0
        while place < len(x):
            count = data.draw(st.integers(1, len(x) - place))
            other = rig.send(mate, x[:1]) if count == 1 else None
            found.append(await rig.y(session, x[place : place + count]))
            place += count
            if other is not None:
                await other.outcome()
        return np.concatenate(found)

    wanted = offline.outputs(SENSORS[which], x)
    assert np.abs(asyncio.run(run()) - wanted).max() < CLOSE
