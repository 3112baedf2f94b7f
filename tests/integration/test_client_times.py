"""Rows with times, through both clients and every call that takes rows; and outputs with theirs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stepstate import errors
from stepstate.client import Outputs, TimedRows
from tests.integration.clients import AnyClient, AnySession, Connect
from tests.networks import Network, make_network
from tests.processes import ServerProcess, server_process

START = datetime(2026, 3, 2, tzinfo=UTC)
STEP = timedelta(minutes=30)
COLUMNS = ["level", "heat"]


def boiler() -> Network:
    """A model of two inputs every half-hour, and the hour of the day."""
    network = make_network("boiler", inputs=4, outputs=3, seed=7)
    network.manifest.update(
        step_interval_seconds=1800,
        inputs=[{"name": name, "unit": "m"} for name in COLUMNS],
        calendar=[{"kind": "fourier", "period_seconds": 86_400, "harmonics": 1}],
        outputs=[{"name": "level", "horizons": [1, 2]}, {"name": "heat", "horizons": [1]}],
    )
    return network


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of `boiler` for all tests: each has sessions of its own."""
    models = tmp_path_factory.mktemp("timed")
    boiler().write(models)
    with server_process("--models", str(models)) as running:
        yield running


@pytest.fixture
async def client(server: ServerProcess, connect: Connect) -> AsyncIterator[AnyClient]:
    async with connect(server.address) as connected:
        yield connected


def frame(*places: int, start: datetime = START) -> pd.DataFrame:
    """Rows of the session's rows by their place, with their times."""
    x = np.random.default_rng(5).normal(size=(200, 2)).astype(np.float32)
    index = pd.DatetimeIndex([start + place * STEP for place in places], name="time")
    return pd.DataFrame(x[list(places)], columns=COLUMNS, index=index)


def with_gaps(*places: int) -> np.ndarray:
    """The same as the rows that a session is to be given, NaN where one is missing."""
    rows = np.full((places[-1] + 1, 2), np.nan, np.float32)
    rows[list(places)] = frame(*places).to_numpy()
    return rows


async def through_step(session: AnySession, rows: pd.DataFrame) -> np.ndarray:
    return (await session.step(rows))[-1]


async def through_rows(session: AnySession, rows: pd.DataFrame) -> np.ndarray:
    for _, row in rows.iterrows():
        y = await session.step(row)
    return y


async def through_stream(session: AnySession, rows: pd.DataFrame) -> np.ndarray:
    return [y async for y in session.stream([row for _, row in rows.iterrows()])][-1]


async def through_stream_of_table(session: AnySession, rows: pd.DataFrame) -> np.ndarray:
    return [y async for y in session.stream(rows)][-1]


async def through_stream_of_timed_rows(session: AnySession, rows: pd.DataFrame) -> np.ndarray:
    return [y async for y in session.stream(TimedRows(rows.to_numpy(), rows.index))][-1]


async def through_prime(session: AnySession, rows: pd.DataFrame) -> np.ndarray:
    return await session.prime(rows)


async def through_chunks(session: AnySession, rows: pd.DataFrame) -> np.ndarray:
    return await session.prime(rows.iloc[n : n + 2] for n in range(0, len(rows), 2))


async def through_inspect(session: AnySession, rows: pd.DataFrame) -> np.ndarray:
    return (await session.inspect(rows)).y[-1]


WAYS: list[Callable[[AnySession, pd.DataFrame], Any]] = [
    through_step,
    through_rows,
    through_stream,
    through_stream_of_table,
    through_stream_of_timed_rows,
    through_prime,
    through_chunks,
    through_inspect,
]
through = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.partition("_")[2])


# Where a session starts.


@pytest.mark.parametrize("kind", ["frame", "chunks", "timed rows", "a list of rows"])
async def test_the_start_is_that_of_the_history_where_none_is_given(client: AnyClient, kind: str):
    rows = frame(*range(20))
    history = {
        "frame": rows,
        "chunks": (rows.iloc[n : n + 7] for n in range(0, 20, 7)),
        "timed rows": TimedRows(rows.to_numpy(), rows.index.to_numpy()),
        "a list of rows": [row for _, row in rows.iterrows()],
    }[kind]
    session = await client.open("boiler", history=history)
    assert session.info.start_time == START
    plain = await client.open("boiler", start_time=START, history=rows.to_numpy())
    other = frame(20)
    assert (await session.step(other)).tolist() == (await plain.step(other)).tolist()


async def test_a_history_of_local_times_starts_in_utc(client: AnyClient):
    rows = frame(*range(4)).tz_convert("Europe/Berlin")
    session = await client.open("boiler", history=rows)
    assert session.info.start_time == START


async def test_a_history_is_held_against_a_start_that_is_given(client: AnyClient):
    rows = frame(*range(4))
    before = {info.session_id async for info in client.sessions()}
    with pytest.raises(
        errors.InvalidField, match=r"history: row 0 .* 2 rows of boiler/1 .*missing"
    ):
        await client.open("boiler", start_time=START - 2 * STEP, history=rows)
    with pytest.raises(errors.InvalidField, match="leave out the rows that it has already"):
        await client.open("boiler", start_time=START + STEP, history=rows)
    assert {info.session_id async for info in client.sessions()} == before


# Gaps.


@through
@pytest.mark.parametrize("missing", ["impute", "hold"])
@pytest.mark.parametrize(
    "places", [(0, 1, 2, 5, 6, 8, 9), (3, 4, 6, 9)], ids=["within", "at start"]
)
async def test_gaps_become_missing_rows(
    client: AnyClient, way: Callable, missing: str, places: tuple[int, ...]
):
    session = await client.open("boiler", start_time=START, missing=missing)
    plain = await client.open("boiler", start_time=START, missing=missing)
    y = await way(session, frame(*places))
    want = await plain.prime(with_gaps(*places))
    assert np.allclose(y, want, atol=1e-5)
    assert session.t == (await client.info(session.session_id)).t == 10
    rest = await way(session, frame(12, 13))
    assert np.allclose(rest, await plain.prime(with_gaps(*places, 12, 13)[10:]), atol=1e-5)


BAD = {
    "a gap": ((0, 1, 4, 5), "row 2 is at 2026-03-02 02:00:00Z, and 2 rows of boiler/1 before it"),
    "reversed": ((3, 2, 1, 0), "before row 0 at 2026-03-02 01:30:00Z: sort the rows"),
    "a duplicate": ((0, 1, 1, 2), "row 2 is at 2026-03-02 00:30:00Z, as row 1"),
    "another step": ((0, 2, 4, 6), "has a row every 1:00:00 by its times; boiler/1 has"),
}


@pytest.mark.parametrize("way", [through_step, through_prime, through_inspect])
@pytest.mark.parametrize("how", BAD)
async def test_what_is_no_next_row_is_refused_and_changes_nothing(
    client: AnyClient, way: Callable, how: str
):
    session = await client.open("boiler", start_time=START)
    places, told = BAD[how]
    with pytest.raises(errors.InvalidField, match=told):
        await way(session, frame(*places))
    assert session.t == (await client.info(session.session_id)).t == 0
    await way(session, frame(0, 1))
    assert session.t == 2


@pytest.mark.parametrize(
    "way", [through_rows, through_stream, through_stream_of_table, through_chunks]
)
@pytest.mark.parametrize("how", BAD)
async def test_rows_that_come_bit_by_bit_are_applied_until_one_is_not_the_next(
    client: AnyClient, way: Callable, how: str
):
    session = await client.open("boiler", start_time=START)
    with pytest.raises(errors.InvalidField, match=r"(x|history): (row|has)"):
        await way(session, frame(*BAD[how][0]))
    await session.refresh()
    fine = {"a gap": 2, "a duplicate": 2, "another step": 1, "reversed": 0}[how]
    if way is through_chunks:  # what was in flight may have been applied or not
        assert session.t in {0, fine // 2 * 2}
    else:
        assert session.t == fine


async def test_a_session_that_is_gone_on_with_knows_its_times(client: AnyClient, connect, server):
    session = await client.open("boiler", start_time=START)
    await session.step(frame(0, 1, 2))
    async with connect(server.address) as other:
        again = await other.session(session.session_id)
        with pytest.raises(
            errors.InvalidField, match="row 0 is at 2026-03-02 02:00:00Z, and 1 row"
        ):
            await again.step(frame(4))
        await again.step(frame(3, 4))
        assert again.t == 5


async def test_an_error_names_the_row_that_was_given(client: AnyClient):
    rows = frame(0, 1, 4, 5, 9)
    rows.iloc[3, 1] = np.inf
    for way in (through_step, through_prime):
        session = await client.open("boiler", start_time=START, missing="impute")
        with pytest.raises(errors.NonFiniteInput) as refused:
            await way(session, rows)
        assert (refused.value.row, refused.value.column) == (3, "heat")


# Many sessions.


async def test_in_a_stream_of_many_each_session_has_its_own_times(client: AnyClient):
    early = await client.open("boiler", start_time=START, missing="impute")
    late = await client.open("boiler", start_time=START + 3 * STEP)
    bad = await client.open("boiler", start_time=START)

    def items() -> Iterator[tuple[AnySession, Any]]:
        for place in (3, 4, 6):
            for session in (early, late, bad):
                yield session, frame(place).iloc[0]

    found: dict[str, list] = {early.session_id: [], late.session_id: [], bad.session_id: []}
    async for result in client.stream(items()):
        found[result.session.session_id].append(result)
    first, second, third = found.values()
    times = [START + place * STEP for place in (3, 4, 6)]
    assert [(one.time, one.t) for one in first] == list(zip(times, (4, 5, 7), strict=True))
    assert [one.imputed_rows for one in first] == [3, 0, 1]
    assert [one.time for one in second] == [*times[:2], None]
    assert "1 row of boiler/1 before it is missing" in str(second[2].error)
    assert all("3 rows of boiler/1 before it" in str(one.error) for one in third)


async def test_a_pack_holds_times_against_each_session(client: AnyClient):
    sessions = [await client.open("boiler", start_time=START + n * STEP) for n in range(2)]
    async with client.packed(sessions) as pack:
        rows = frame(0, 1)  # the first row of each
        assert not (await pack.step(rows)).errors
        with pytest.raises(errors.InvalidField, match="x of session 1: row 0 is at"):
            await pack.step(frame(1, 3))
        again = frame(1, 2, 3)
        assert not (await pack.step(again, which=[0, 1, 1])).errors
    assert [session.t for session in sessions] == [2, 3]


# Scenarios.


async def test_scenarios_begin_with_the_sessions_next_row(client: AnyClient):
    session = await client.open("boiler", history=frame(*range(8)), missing="impute")
    path = frame(8, 9, 10)
    timed = await session.forecast(4, scenarios={"a": path, "gap": path.iloc[[0, 2]]})
    plain = {"a": path.to_numpy(), "gap": path.to_numpy(copy=True)}
    plain["gap"][1] = np.nan
    want = await session.forecast(4, scenarios=plain)
    for name, one in timed.items():
        assert np.allclose(one.values, want[name].values, atol=1e-5, equal_nan=True)
        assert one.times[0] == np.datetime64("2026-03-02T04:00:00")
    late = await session.forecast(4, scenarios={"late": path.iloc[1:]})
    later = np.concatenate([np.full((1, 2), np.nan), path.to_numpy()[1:]])
    want = await session.forecast(4, scenarios={"late": later})
    assert np.allclose(late["late"].values, want["late"].values, atol=1e-5, equal_nan=True)
    for places, told in (((7, 8), "at t=8"), ((9, 8), "sort"), ((8, 8), "once")):
        with pytest.raises(errors.InvalidField, match=rf"scenarios\['bad'\]: .*{told}"):
            await session.forecast(4, scenarios={"bad": frame(*places)})
    for horizon in (4, None):  # the model's longest is less
        with pytest.raises(errors.InvalidField, match="begins 13 steps ahead, after the forecast"):
            await session.forecast(horizon, scenarios={"far": frame(20, 21)})
    assert session.t == 8


async def test_sessions_at_different_rows_take_the_same_scenario_in_one_call(client: AnyClient):
    sessions = [await client.open("boiler", history=frame(*range(n))) for n in (5, 6, 9, 6)]
    path = frame(6, 7, 8, 9)
    found = await client.forecast(sessions, 6, scenarios={"a": path})
    assert isinstance(found[2], errors.InvalidField)  # it has rows of the scenario already
    for place, skip in ((0, 1), (1, 0), (3, 0)):
        rows = np.concatenate([np.full((skip, 2), np.nan, np.float32), path.to_numpy()])
        (want,) = await client.forecast([sessions[place]], 6, scenarios={"a": rows})
        assert np.allclose(found[place]["a"].values, want["a"].values, atol=1e-5, equal_nan=True)
    with pytest.raises(errors.InvalidField, match="is given by its id"):
        await client.forecast([sessions[0].session_id], 6, scenarios={"a": path})


async def test_a_scenario_is_laid_out_from_where_the_server_is(client: AnyClient, connect, server):
    session = await client.open("boiler", history=frame(*range(8)))
    async with connect(server.address) as other:
        ahead = await other.session(session.session_id)
        await ahead.step(frame(8))
        path = frame(9, 10)
        found = await session.forecast(3, scenarios={"a": path})
        want = await ahead.forecast(3, scenarios={"a": path.to_numpy()})
    assert found["a"].t == 9
    assert np.allclose(found["a"].values, want["a"].values, atol=1e-5, equal_nan=True)


# Outputs with names and times.


async def test_a_step_gives_named_columns_with_the_times_of_the_rows(client: AnyClient):
    session = await client.open("boiler", start_time=START, missing="impute")
    plain = await client.open("boiler", start_time=START, missing="impute")
    out = await session.step(frame(0, 1, 4), named=True)
    y = await plain.step(frame(0, 1, 4))
    assert isinstance(out, Outputs)
    assert np.array_equal(out.y, y)
    assert out.columns == session.model.output_columns == ("level+1", "level+2", "heat+1")
    assert (out.ts.tolist(), out.t, out.time) == ([0, 1, 4], 5, START + 4 * STEP)
    assert np.array_equal(out["level+2"], y[:, 1])
    assert np.array_equal(out["level"], y[:, :2])
    assert np.array_equal(out.at("level", horizon=2), y[:, 1])
    table = out.to_pandas()
    assert table.index.tolist() == [time.tz_localize(None) for time in frame(0, 1, 4).index]
    assert list(table.columns) == list(out.columns)
    assert np.array_equal(table.to_numpy(), y)
    one = await session.step(frame(5).iloc[0], named=True)
    assert one.to_dict() == dict(zip(out.columns, one.y, strict=True))
    assert (one.y.shape, one.t, one.time) == ((3,), 6, START + 5 * STEP)
    assert (await session.step(frame(6, 7), named=True, last_only=True)).ts.tolist() == [7]


async def test_a_stream_gives_them_too(client: AnyClient):
    session = await client.open("boiler", start_time=START)
    outs = [out async for out in session.stream(frame(0, 1, 2).to_numpy(), named=True)]
    assert [out.time for out in outs] == [START + place * STEP for place in range(3)]
    assert [out.t for out in outs] == [1, 2, 3]
    assert session.time() == outs[-1].time
    assert session.time(10) == START + 10 * STEP


async def test_a_stream_takes_a_time_for_each_row(client: AnyClient):
    session = await client.open("boiler", start_time=START)
    with pytest.raises(errors.InvalidField, match="has 1 times for 2 rows"):
        _ = [y async for y in session.stream(TimedRows([[1, 2], [3, 4]], [START]))]


async def test_a_session_tells_of_itself(client: AnyClient):
    session = await client.open("boiler", start_time=START, session_id="meter-7", durability="sync")
    await session.step(frame(0, 1))
    told = repr(getattr(session, "real", session))
    assert "'meter-7' of boiler/1, open, t=2, durable_t=2, time=2026-03-02 00:30:00Z" in told
    await session.close()
    assert ", closed, " in repr(getattr(session, "real", session))
    again = await client.open("boiler", start_time=START)
    await client.close(again.session_id)
    with pytest.raises(errors.SessionClosed):
        await again.step(frame(0))
    assert ", closed, " in repr(getattr(again, "real", again))


async def test_rows_of_a_step_that_was_cancelled_may_come_again(client: AnyClient):
    session = await client.open("boiler", start_time=START)
    stepping = asyncio.ensure_future(session.step(frame(0, 1)))
    await asyncio.sleep(0)
    stepping.cancel()
    await asyncio.gather(stepping, return_exceptions=True)
    if session.t == 0:
        await session.step(frame(0, 1))
    assert session.t == 2
