"""The times of rows against a session's clock, without a server."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone

import numpy as np
import pandas as pd
import pytest

from stepstate.client.times import (
    MAX_GAP_ROWS,
    RowClock,
    TimedRows,
    each_row,
    first_time,
    read_rows,
    split_times,
)
from stepstate.errors import InvalidField
from tests.unit.client.test_types import ONE, THREE

START = datetime(2000, 8, 28)  # noqa: DTZ001 - naive on purpose
STEP = timedelta(minutes=30)


def clock(
    start: datetime | None = START, *, fill: bool = False, interval: timedelta | None = STEP
) -> RowClock:
    return RowClock("m/1", interval, start, takes_missing=fill)


def index(*minutes: float, start: str = "2000-08-28") -> pd.DatetimeIndex:
    return pd.Timestamp(start) + pd.to_timedelta(minutes, unit="min")


def place(made: RowClock, times: object, t: int = 0) -> list[int]:
    rows, _, found = read_rows(ONE, TimedRows(np.zeros(len(times)), times), "x")
    assert len(rows) == len(found.utc)
    return made.place(found, t, "x").tolist()


def regular(freq: str, count: int = 6, **options: object) -> pd.DatetimeIndex:
    return pd.date_range(options.pop("start", "2000-08-28"), periods=count, freq=freq, **options)


# What is taken.


AWARE = [START.replace(tzinfo=timezone(timedelta(hours=2))) + place * STEP for place in range(3)]


@pytest.mark.parametrize(
    ("times", "first"),
    [
        (regular("30min"), START),
        (regular("30min", unit="s"), START),
        (regular("30min").values, START),
        (regular("30min").to_pydatetime().tolist(), START),
        (regular("30min").astype(object), START),
        (pd.period_range("2000-08-28", periods=4, freq="30min"), START),
        (regular("30min", tz="Europe/London"), START - timedelta(hours=1)),
        (AWARE, START - timedelta(hours=2)),
        (pd.Index(AWARE, dtype=object), START - timedelta(hours=2)),
        (regular("30min").values.astype("datetime64[m]"), START),
        (pd.Series(regular("30min")), START),
        (pd.Series(regular("30min", tz="Europe/London")), START - timedelta(hours=1)),
        (pd.Series(pd.period_range("2000-08-28", periods=4, freq="30min")), START),
    ],
    ids=lambda value: type(value).__name__,
)
def test_times_are_read_from_whatever_holds_them_and_are_utc(times, first):
    made = clock(None)
    assert place(made, times) == list(range(len(times)))
    assert made.time(0) == first.replace(tzinfo=UTC)
    assert made.time(5) == (first + 5 * STEP).replace(tzinfo=UTC)


def test_the_days_of_a_daily_model_may_be_dates():
    days = [date(2000, 8, 28), date(2000, 8, 29)]
    daily = clock(interval=timedelta(days=1))
    assert place(daily, days) == [0, 1]
    assert place(daily, pd.Index([date(2000, 8, 30)]), t=2) == [0]


@pytest.mark.parametrize(
    "x",
    [
        pd.Series([1.0, 2.0], index=index(0, 30)),
        pd.DataFrame({"a": [1.0, 2.0]}, index=index(0, 30)),
        TimedRows([1.0, 2.0], list(index(0, 30))),
        [TimedRows(1.0, START), TimedRows(2.0, START + STEP)],
        [TimedRows([1.0, 2.0], index(0, 30))],
        [row for _, row in pd.DataFrame({"a": [1.0, 2.0]}, index=index(0, 30)).iterrows()],
        (pd.Series([1.0], index=index(0)), pd.Series([2.0], index=index(30))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_rows_that_has_times_gives_them(x):
    rows, _, times = read_rows(ONE, x, "x")
    assert rows.tolist() == [[1.0], [2.0]]
    assert clock().place(times, 0, "x").tolist() == [0, 1]
    assert first_time(x, "x") == START.replace(tzinfo=UTC)


@pytest.mark.parametrize(
    "x",
    [[1.0, 2.0], np.zeros(2), pd.Series([1.0, 2.0]), pd.DataFrame({"a": [1.0]}), 3.0, []],
    ids=lambda value: type(value).__name__,
)
def test_rows_without_times_have_none(x):
    assert first_time(x, "x") is None
    if np.size(x):
        assert read_rows(ONE, x, "x")[2] is None


def test_a_row_of_a_frame_is_taken_by_the_names_of_its_values_and_its_time():
    frame = pd.DataFrame([[3.0, 1.0, 2.0]], columns=["c", "a", "b"], index=index(30))
    rows, single, times = read_rows(THREE, frame.iloc[0], "x")
    assert (rows.tolist(), single) == ([[1.0, 2.0, 3.0]], True)
    assert clock().place(times, 1, "x").tolist() == [0]
    with pytest.raises(InvalidField, match="has the columns c, a, d; m/1 takes a, b, c"):
        read_rows(THREE, frame.iloc[0].rename({"b": "d"}), "x")


def test_times_in_a_column_of_a_frame_are_told_to_be_its_index():
    frame = pd.DataFrame({"a": [1.0], "when": index(0)})
    with pytest.raises(
        InvalidField, match=r"takes a: make the times its index, x.set_index\('when'"
    ):
        read_rows(ONE, frame, "x")
    assert read_rows(ONE, frame.set_index("when"), "x")[2] is not None


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (pd.Series([1.0, 2.0], index=["2000-08-28 00:00", "2000-08-28 00:30"]), "index of text"),
        (pd.Series([1.0, 2.0], index=["28.8.2000", "29.8.2000"]), "index of text"),
        (pd.Series([1.0, 2.0], index=[*index(0), pd.NaT]), r"no time for row 1 \(NaT\)"),
        (TimedRows([1.0, 2.0], [START, pd.NaT]), r"no time for row 1 \(NaT\)"),
        (TimedRows([1.0, 2.0], [START]), "has 1 times for 2 rows"),
        (TimedRows(1.0, [START, START + STEP]), "has 2 times for 1 rows"),
        (TimedRows(1.0, "2000-08-28"), "times that can't be read"),
        (TimedRows(1.0, 7), "times that can't be read"),
        ([TimedRows(1.0, START), pd.Series([2.0])], "times for some of its rows"),
    ],
    ids=str,
)
def test_times_that_can_not_be_read_are_told(x, told):
    with pytest.raises(InvalidField, match=f"^x: .*{told}"):
        read_rows(ONE, x, "x")


# What goes on from where the session is.


def test_rows_go_on_where_the_session_is():
    made = clock()
    assert place(made, regular("30min")) == [0, 1, 2, 3, 4, 5]
    assert place(made, index(180, 210), t=6) == [0, 1]
    assert place(made, index(180, 210), t=6) == [0, 1]  # a step that was cancelled, again
    assert made.time(8) == datetime(2000, 8, 28, 4, tzinfo=UTC)


def test_a_clock_is_known_from_the_first_rows_that_have_times():
    made = clock(None)
    assert made.time(0) is None
    assert made.times(np.arange(2)) is None
    assert place(made, index(120, 150), t=4) == [0, 1]
    assert made.time(0) == START.replace(tzinfo=UTC)
    with pytest.raises(InvalidField, match="next row is that of 2000-08-28 03:00:00Z"):
        place(made, index(150), t=6)


def test_rows_that_are_refused_say_nothing_of_a_clock():
    made = clock(None)
    with pytest.raises(InvalidField):
        place(made, index(0, 90))
    assert made.time(0) is None
    assert place(made, index(60)) == [0]


BAD = {
    "reversed": (
        index(60, 30, 0),
        "row 1 is at 2000-08-28 00:30:00Z, before row 0 at .* 01:00:00Z: sort",
    ),
    "duplicate": (index(0, 30, 30, 60), "row 2 is at 2000-08-28 00:30:00Z, as row 1 .*once"),
    "gap": (
        index(0, 30, 120),
        r"row 2 is at .* 02:00:00Z, and 2 rows of m/1 before it are missing",
    ),
    "one missing": (index(0, 60), "row 1 .* 01:00:00Z, and 1 row of m/1 before it is missing"),
    "late": (index(60, 90), "row 0 .* 01:00:00Z, and 2 rows of m/1 before it are missing"),
    "early": (index(-30, 0), "row 0 is at 2000-08-27 23:30:00Z; the session is at t=0"),
    "hourly": (regular("1h"), "has a row every 1:00:00 by its times; m/1 has one every 0:30:00"),
    "quarters": (regular("15min"), "has a row every 0:15:00 by its times; m/1 has"),
    "shifted": (index(0, 37), "row 1 is at 2000-08-28 00:37:00Z, between two rows: m/1 has a row"),
}


@pytest.mark.parametrize("how", BAD)
def test_what_is_not_the_next_rows_is_refused_and_the_first_one_named(how):
    times, told = BAD[how]
    with pytest.raises(InvalidField, match=f"^x: {told}"):
        place(clock(), times)


@pytest.mark.parametrize("how", BAD)
def test_a_policy_lets_rows_be_missing_and_nothing_else(how):
    times, told = BAD[how]
    filled = {"gap": [0, 1, 4], "one missing": [0, 2], "late": [2, 3]}
    if how in filled:
        assert place(clock(fill=True), times) == filled[how]
    else:
        with pytest.raises(InvalidField, match=f"^x: {told}"):
            place(clock(fill=True), times)


def test_a_gap_that_is_a_wrong_date_sooner_is_refused():
    made = clock(fill=True)
    assert place(made, [START + MAX_GAP_ROWS * STEP]) == [MAX_GAP_ROWS]
    with pytest.raises(InvalidField, match=r"100,001 rows .* missing: expected at most 100,000"):
        place(made, [START + (MAX_GAP_ROWS + 1) * STEP])


def test_rows_that_come_one_by_one_with_another_step_are_found_out():
    made = clock(fill=True)
    place(made, index(0))
    with pytest.raises(InvalidField, match="has a row every 1:00:00 by its times"):
        for hour in range(1, 100):
            place(made, index(60 * hour), t=2 * hour - 1)
    assert hour < 30


def test_one_lost_row_in_three_is_no_other_step():
    rng, made, t = np.random.default_rng(0), clock(fill=True), 0
    for row in range(5_000):
        if rng.random() > 0.33:
            t += place(made, index(30 * row).tz_localize("UTC"), t)[-1] + 1
    assert t > 4_900


def test_an_hour_that_is_lost_elsewhere_is_no_change_of_clocks():
    for start in ("2000-03-27 02:00", "2000-03-26 02:00", "2000-05-28 02:00", "2000-03-26 12:00"):
        assert place(clock(None, fill=True), index(0, 90, start=start)) == [0, 3]


def test_times_are_rounded_as_floats_of_seconds_and_milliseconds_are():
    made = clock(interval=timedelta(seconds=1) / 3)
    seconds = START.replace(tzinfo=UTC).timestamp() + np.arange(300) * 0.333333
    assert place(made, (seconds * 1e6).astype("datetime64[us]")) == list(range(300))
    made = clock(interval=timedelta(milliseconds=100))
    assert place(made, index(*np.arange(50) / 600)) == list(range(50))


def test_without_an_interval_rows_only_have_to_go_on():
    made = clock(interval=None)
    assert place(made, index(0, 1, 500)) == [0, 1, 2]
    assert made.time(0) is None
    assert place(made, index(700), t=3) == [0]
    assert place(made, index(700), t=3) == [0]  # again
    with pytest.raises(InvalidField, match="not after the row before it at 2000-08-28 11:40:00Z"):
        place(made, index(700), t=4)
    with pytest.raises(InvalidField, match=r"row 1 is at .*, before row 0 at .*: sort the rows"):
        place(made, index(900, 800), t=4)


# Daylight saving.


SPRING = regular("30min", 14, start="2000-03-25 22:00", tz="Europe/London")
AUTUMN = regular("30min", 14, start="2000-10-28 22:00", tz="Europe/London")


@pytest.mark.parametrize("times", [SPRING, AUTUMN], ids=["spring", "autumn"])
def test_local_times_with_their_zone_go_on_through_a_change_of_clocks(times):
    assert place(clock(None), times) == list(range(14))


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize(
    ("times", "told"),
    [(SPRING, "saving begins"), (AUTUMN, "saving ends")],
    ids=["spring", "autumn"],
)
def test_local_times_without_a_zone_are_refused_with_the_reason(times, told, fill):
    naive = times.tz_localize(None)
    with pytest.raises(InvalidField, match=f"daylight {told}.*tz_localize"):
        place(clock(None, fill=fill), naive)
    made, t = clock(None, fill=fill), 0
    with pytest.raises(InvalidField, match=f"daylight {told}"):
        for row in range(14):  # one by one
            t += place(made, naive[row : row + 1], t)[-1] + 1


def test_an_hour_that_is_missing_in_times_of_utc_is_only_missing():
    times = SPRING.tz_localize(None).tz_localize("UTC")
    assert place(clock(None, fill=True), times)[-1] == 15


# Scenarios, and forks.


def test_a_scenario_may_lack_rows_and_leaves_the_clock_alone():
    made = clock(None)
    _, _, times = read_rows(ONE, TimedRows([1.0, 2.0], index(0, 60)), "x")
    assert made.place_scenario(times, 5, "x").tolist() == [0, 2]
    assert made.time(0) is None
    made = clock()
    assert made.place_scenario(times, 0, "x").tolist() == [0, 2]
    with pytest.raises(InvalidField, match="the session is at t=1"):
        made.place_scenario(times, 1, "x")
    assert clock(interval=None).place_scenario(times, 3, "x").tolist() == [0, 1]


def test_a_forks_clock_goes_on_where_the_sources_is():
    made, forked = clock(None), clock(None)
    place(made, index(0, 30))
    forked.continue_from(made)
    assert forked.time(1) == made.time(1) == (START + STEP).replace(tzinfo=UTC)


def test_a_series_is_streamed_row_by_row_with_its_times():
    x = pd.Series([1.0, 2.0], index=pd.date_range("2026-03-02", periods=2, freq="3h"))
    rows = [split_times(row, "x") for row in each_row(x)]
    assert [row.tolist() for row, _ in rows] == [[1.0], [2.0]]
    hours = [times.utc[0] // 3_600_000_000 % 24 for _, times in rows if times is not None]
    assert hours == [0, 3]
    assert list(each_row(x.reset_index(drop=True))) == [1.0, 2.0]
