"""Forecasts as values, and the calls for those of many sessions, without a server."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from stepstate import errors
from stepstate.cli.plot import plot_forecasts
from stepstate.client import Client, Forecast, Output, OutputForecast
from stepstate.client._protocol import forecasts, retry
from stepstate.client._protocol.forecasts import ForecastProtocol, listed
from stepstate.client._protocol.session import BaseSession
from stepstate.client._protocol.steps import StepProtocol
from stepstate.transport.status import status_of
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.floats import put_floats
from tests.unit.client.test_step_protocol import row, session_at
from tests.unit.client.test_types import ONE, THREE
from tests.unit.rig import Clock

mpl.use("agg")

LEVELS = (0.05, 0.5, 0.95)
VALUES = np.array([[1, 2, 3], [4, 5, 6], [np.nan] * 3, [7, 8, 9.5]], np.float32)
METHODS = ("direct", "fed back", "", "given")
TIMES = np.datetime64("2026-03-01T12:00", "s") + np.arange(4) * np.timedelta64(30, "m")
LOAD = OutputForecast("load", "MW", LEVELS, VALUES, METHODS)
HEAT = OutputForecast("heat", "", LEVELS, VALUES + 10, METHODS)
FORECAST = Forecast("a", 7, "", LEVELS, {"load": LOAD, "heat": HEAT})
TIMED = replace(FORECAST, times=TIMES, scenario="hot")


# Values.


def test_a_forecast_has_its_median_and_outermost_quantiles():
    assert len(FORECAST) == 4
    assert FORECAST.horizons.tolist() == [1, 2, 3, 4]
    assert FORECAST.values is LOAD.values
    assert FORECAST.methods == METHODS
    for found, place in ((FORECAST.low, 0), (FORECAST.median, 1), (FORECAST.high, 2)):
        assert np.array_equal(found, VALUES[:, place], equal_nan=True)
    assert np.array_equal(FORECAST["heat"].median, VALUES[:, 1] + 10, equal_nan=True)


@pytest.mark.parametrize(
    ("levels", "low", "median", "high"),
    [
        ((0.5,), None, 0, None),
        ((0.9, 0.1), 1, None, 0),
        ((0.6, 0.7), None, None, 1),
        ((0.2, 0.1, 0.5), 1, 2, None),
    ],
)
def test_what_was_not_asked_for_is_nan(levels, low, median, high):
    values = np.arange(2 * len(levels), dtype=np.float32).reshape(2, -1)
    output = OutputForecast("y", "", levels, values, ("direct", "direct"))
    for found, place in ((output.low, low), (output.median, median), (output.high, high)):
        assert np.isnan(found).all() if place is None else np.array_equal(found, values[:, place])


def test_a_forecast_is_printed_in_short():
    assert str(FORECAST) == "a from t=7: load 2 … 8 MW, 4 ahead; heat 12 … 18, 4 ahead"
    assert str(TIMED).startswith("a from t=7 under 'hot': ")
    assert repr(TIMED) == (
        "Forecast(session_id='a', t=7, scenario='hot', outputs=['load', 'heat'], "
        "horizons=1..4, levels=[0.05, 0.5, 0.95])"
    )


@pytest.mark.parametrize(
    ("levels", "told"),
    [
        ((0.25, 0.75), "load 0 to 1 … 2 to 3 MW, 2 ahead"),
        ((0.8, 0.1, 0.9), "load 1 to 2 … 4 to 5 MW, 2 ahead"),
        ((0.6, 0.7), "load 0 to 1 … 2 to 3 MW, 2 ahead"),
        ((0.9,), "load@0.9 0 … 1 MW, 2 ahead"),
        ((0.9, 0.5), "load 1 … 3 MW, 2 ahead"),
    ],
)
def test_without_a_median_the_outermost_quantiles_are_printed(levels, told):
    assert told in str(of_levels(levels))


def of_levels(levels) -> Forecast:
    """Two steps ahead, the values counted."""
    values = np.arange(2 * len(levels), dtype=np.float32).reshape(2, -1)
    output = OutputForecast("load", "MW", levels, values, ("direct", "direct"))
    return Forecast("a", 7, "", levels, {"load": output})


def test_a_forecast_is_a_table():
    table = FORECAST.to_pandas()
    assert table.index.tolist() == [1, 2, 3, 4]
    assert table.index.name == "horizon"
    assert list(table) == [
        *[f"load@{level}" for level in LEVELS],
        "load method",
        *[f"heat@{level}" for level in LEVELS],
        "heat method",
    ]
    assert table.loc[2, "load@0.95"] == 6
    timed = TIMED.to_pandas()
    assert timed.index[1] == pd.Timestamp("2026-03-01T12:30")
    assert timed.index.name == "time"


def test_a_forecast_is_drawn():
    plt = pytest.importorskip("matplotlib.pyplot")
    ax = TIMED.plot()
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("load [MW]", "time (UTC)")
    assert ax.get_title() == "a from t=7"
    assert legend(ax) == ["hot 0.05 to 0.95", "hot median"]
    assert len(ax.lines) == len(ax.collections) == 1
    _, other = plt.subplots()
    assert FORECAST.plot(other, output="heat") is other
    assert (other.get_ylabel(), other.get_xlabel()) == ("heat", "steps ahead")
    assert legend(other) == ["0.05 to 0.95", "median"]
    plt.close("all")


def legend(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_scenarios_on_the_same_axes_have_colors_and_names_of_their_own():
    plt = pytest.importorskip("matplotlib.pyplot")
    ax = TIMED.plot()
    replace(TIMED, scenario="cold").plot(ax)
    assert legend(ax) == [
        *("hot 0.05 to 0.95", "hot median"),
        *("cold 0.05 to 0.95", "cold median"),
    ]
    hot, cold = (line.get_color() for line in ax.lines)
    assert hot != cold
    bands = [tuple(band.get_facecolor()[0][:3]) for band in ax.collections]
    assert bands == [mpl.colors.to_rgb(hot), mpl.colors.to_rgb(cold)]
    plt.close("all")


@pytest.mark.parametrize(
    ("levels", "drawn"),
    [
        ((0.25, 0.75), ["0.25 to 0.75"]),
        ((0.9,), ["0.9"]),
        ((0.5, 0.9), ["median", "0.9"]),
        ((0.6, 0.7), ["0.6", "0.7"]),
    ],
)
def test_what_is_there_is_drawn_with_or_without_a_median(levels, drawn):
    plt = pytest.importorskip("matplotlib.pyplot")
    assert legend(of_levels(levels).plot()) == drawn
    plt.close("all")


@pytest.mark.parametrize(
    ("levels", "drawn", "absent"),
    [
        ((0.25, 0.75), ["0.25", "0.75"], ["median"]),
        ((0.3,), ["0.3"], ["median"]),
        ((0.6, 0.7), ["0.6", "0.7"], ["median"]),
        ((0.5,), ["median"], [" 0.5"]),
    ],
)
def test_on_a_terminal_what_is_there_is_drawn(levels, drawn, absent):
    *_, labels = plot_forecasts([of_levels(levels)], color=False).splitlines()
    assert all(label in labels for label in drawn)
    assert not any(label in labels for label in absent)


@pytest.mark.parametrize(
    ("name", "call", "told"),
    [
        ("pandas", FORECAST.to_pandas, "pip install pandas"),
        ("matplotlib.pyplot", FORECAST.plot, "stepstate\\[plot\\]"),
    ],
)
def test_what_is_not_installed_is_named_with_how_to_install_it(monkeypatch, name, call, told):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "stepstate.client.plot", raising=False)
    with pytest.raises(ModuleNotFoundError, match=told):
        call()


# Calls.


@pytest.fixture
def ticking(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=clock))
    return clock


def ask(sessions, horizon=3, *, scenarios=None, models=(ONE,), timeout=10.0, quantiles=None):
    return ForecastProtocol(
        sessions,
        horizon,
        quantiles=quantiles,
        scenarios=scenarios,
        models=models,
        timeout=timeout,
    )


def session(name: str, t: int) -> BaseSession:
    made = session_at(at=t)
    made.session_id = name
    return made


def answer(name: str, t: int = 5, scenario: str = "") -> pb.SessionForecast:
    output = pb.OutputForecast(name="y", methods=[1])
    put_floats(output, pb.OutputForecast.VALUES_FIELD_NUMBER, np.float32([1]).tobytes())
    return pb.SessionForecast(
        session_id=name, t=t, quantiles=[0.5], outputs=[output], scenario=scenario
    )


def failed(name: str, error: errors.StepstateError) -> pb.SessionForecast:
    return pb.SessionForecast(session_id=name, error=status_of(error))


def reply(*messages: pb.SessionForecast) -> pb.ForecastResponse:
    return pb.ForecastResponse(forecasts=messages)


def test_each_session_has_a_result_in_its_place():
    protocol = ask(["a", "b", session("c", 5)])
    ((some, request),) = protocol.calls()
    assert list(request.session_id) == ["a", "b", "c"]
    assert request.horizon == 3
    lost = errors.SessionUnknown("b")
    protocol.answered(some, reply(answer("a"), failed("b", lost), answer("c")))
    assert protocol.done
    told = protocol.results
    assert [type(one) for one in told] == [Forecast, errors.SessionUnknown, Forecast]
    assert [told[0].session_id, told[2].session_id] == ["a", "c"]


def test_scenarios_of_a_session_are_together():
    protocol = ask(["a", "b"], scenarios={"hot": [[1.0]], "cold": [2.0, np.nan]})
    ((some, request),) = protocol.calls()
    assert [(one.name, len(one.x)) for one in request.scenarios] == [("hot", 1), ("cold", 2)]
    lost = errors.SessionUnknown("a")
    protocol.answered(
        some, reply(failed("a", lost), answer("b", scenario="hot"), answer("b", scenario="cold"))
    )
    assert isinstance(protocol.results[0], errors.SessionUnknown)
    assert list(protocol.results[1]) == ["hot", "cold"]


def test_what_passes_is_asked_for_again_until_time_is_up(ticking: Clock):
    protocol = ask(["a", "b"], timeout=1.0)
    ((some, _),) = protocol.calls()
    full = errors.StoreUnavailable("it is slow", 0.1)
    protocol.answered(some, reply(answer("a"), failed("b", full)))
    assert not protocol.done
    assert protocol.pause() >= 0.1
    ((some, request),) = protocol.calls()
    assert list(request.session_id) == ["b"]
    protocol.refused(some, errors.StoreUnavailable("it is slow", 0.1))
    assert protocol.done
    assert isinstance(protocol.results[1], errors.StoreUnavailable)

    protocol = ask(["a", "b"], timeout=1.0)
    ((some, _),) = protocol.calls()
    protocol.answered(some, reply(answer("a"), failed("b", full)))
    ticking.now += 2.0
    assert protocol.pause() == 0.0
    assert isinstance(protocol.results[1], errors.StoreUnavailable)


@pytest.mark.parametrize(
    "said", [answer("a", t=3), failed("a", errors.ForecastImpossible("session 'a'", "no rows"))]
)
def test_a_session_that_was_set_back_is_brought_up_and_asked_for_again(said):
    held = session("a", 5)
    protocol = ask([held, "b"])
    ((some, _),) = protocol.calls()
    protocol.answered(some, reply(said, answer("b")))
    ((one, real, t),) = protocol.behind
    assert (real, t) == (held, said.t)
    protocol.caught_up(one)
    protocol.pause()
    ((some, request),) = protocol.calls()
    assert list(request.session_id) == ["a"]
    protocol.answered(some, reply(answer("a")))
    assert protocol.done
    assert protocol.results[0].t == 5


def test_one_that_is_always_behind_is_given_up(ticking: Clock):
    protocol = ask([session("a", 5)], timeout=5.0)
    rounds = 0
    while not protocol.done:
        ((some, _),) = protocol.calls()
        protocol.answered(some, reply(answer("a", t=3)))
        ((one, _, _),) = protocol.behind
        protocol.caught_up(one)
        ticking.now += protocol.pause()
        rounds += 1
    assert 3 < rounds < 100
    assert isinstance(protocol.results[0], errors.StepAhead)


def test_one_that_can_not_be_brought_up_hides_no_other():
    protocol = ask([session("a", 5), "b"])
    ((some, _),) = protocol.calls()
    protocol.answered(some, reply(answer("a", t=3), answer("b")))
    ((one, _, _),) = protocol.behind
    protocol.caught_up(one, errors.RowsMissing("a", 3, 4))
    assert [type(one) for one in protocol.results] == [errors.RowsMissing, Forecast]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (errors.SessionUnknown("a"), False),
        (errors.SessionLost("a"), False),
        (errors.InvalidField("horizon", "is too large"), True),
        (errors.ServerUnreachable("host:1", "gone"), True),
    ],
)
def test_an_error_of_one_session_is_its_result_and_one_of_the_call_is_raised(error, raised):
    protocol = ask(["a"])
    ((some, _),) = protocol.calls()
    if raised:
        with pytest.raises(type(error)):
            protocol.refused(some, error)
    else:
        protocol.refused(some, error)
        assert protocol.results == [error]
    both = ask(["a", "b"])
    ((some, _),) = both.calls()
    with pytest.raises(type(error)):
        both.refused(some, error)


@pytest.mark.parametrize(
    ("horizon", "quantiles", "most"),
    [(None, None, 5_000), (100, None, 833), (10_000, [0.5] * 100, 1)],
)
def test_so_many_sessions_go_into_a_call_that_its_reply_is_read(horizon, quantiles, most):
    known = replace(ONE, outputs=(Output("y", "", (1, 4)), Output("z", "", (3,))))
    protocol = ask(["a"] * 5_001, horizon, quantiles=quantiles, models=(known,))
    calls = [len(some) for some, _ in protocol.calls()]
    assert (calls[0], sum(calls)) == (most, 5_001)


def test_a_call_for_no_session_is_none():
    protocol = ask([])
    assert protocol.done
    assert list(protocol.calls()) == protocol.results == []


@pytest.mark.parametrize(
    ("scenarios", "told"),
    [
        ({}, "^scenarios: "),
        ({"hot": [[1.0, 2.0]]}, "^scenarios\\['hot'\\]: "),
        ({"hot": "warm"}, "^scenarios\\['hot'\\]: "),
        ({"hot": pd.DataFrame({"wind": [1]})}, "wind"),
        ({"hot": [[1.0, np.inf, 3.0]]}, "^scenarios\\['hot'\\]: holds an infinite value"),
        ([[1.0]], "^scenarios: are not rows by name"),
        ({1: [[1.0]]}, "^scenarios: are not rows by name"),
    ],
)
def test_a_scenario_that_is_no_rows_is_refused_by_name(scenarios, told):
    with pytest.raises(errors.InvalidField, match=told):
        ask(["a"], scenarios=scenarios, models=(THREE,))


def test_a_frame_may_lack_columns_of_a_scenario():
    frame = pd.DataFrame({"c": [3.0, 6.0], "a": [1.0, 4.0]})
    protocol = ask(["a"], scenarios={"hot": frame}, models=(ONE, THREE))
    ((_, request),) = protocol.calls()
    x = np.array(request.scenarios[0].x).reshape(2, 3)
    assert np.array_equal(x, [[1, np.nan, 3], [4, np.nan, 6]], equal_nan=True)
    assert list(frame) == ["c", "a"]


def test_the_horizon_is_a_number_of_steps():
    for horizon, told in ((0, "1 or more"), (10_001, "at most 10000"), (2**40, "at most 10000")):
        with pytest.raises(errors.InvalidField, match=f"^horizon: is {horizon}, expected {told}"):
            ask(["a"], horizon)


def test_levels_are_any_sequence_of_numbers():
    ((_, request),) = ask(["a"], quantiles=np.array([0.25, 0.75], np.float32)).calls()
    assert list(request.quantiles) == [0.25, 0.75]
    with pytest.raises(errors.InvalidField, match=r"^quantiles: are not numbers"):
        ask(["a"], quantiles=["low"])


@pytest.mark.parametrize("single", ["abc", session("a", 5)], ids=["an id", "a session"])
def test_a_single_session_is_no_list_of_them(single):
    with pytest.raises(errors.InvalidField, match=r"^sessions: is a single session"):
        listed(single)
    with (
        Client("127.0.0.1:1") as client,
        pytest.raises(errors.InvalidField, match=r"^sessions: "),
    ):
        client.forecast(single)


# What a server that was set back is sent.


def stepped(*counts: int) -> BaseSession:
    """A session that was stepped by so many rows in each request."""
    made = session_at()
    for value, count in enumerate(counts):
        track = StepProtocol(made, timeout=1.0)
        track.add(row(value, count))
        sent = track.next()
        track.answered(0)
        made.t = sent.end
    return made


def test_the_last_request_is_repeated_as_it_was():
    made = stepped(2, 3, 4)
    track = StepProtocol(made, timeout=1.0)
    track.repeat(0)
    assert track.next().t == 5
    track.refused(errors.StepAhead("a", 5, 0))
    assert [track.next().t, track.answered(0), track.next().t, track.answered(0)] == [
        0,
        None,
        2,
        None,
    ]
    last = track.next()
    assert (last.t, last.count) == (5, 4)
    assert track.answered(0) is last
    assert len(made.replay_buffer) == 9


def test_of_a_request_that_the_server_has_in_part_the_rest_is_sent():
    track = StepProtocol(stepped(2, 5), timeout=1.0)
    track.repeat(4)
    sent = track.next()
    assert (sent.t, sent.count) == (4, 3)
    assert track.answered(0) is sent


def test_rows_that_are_not_kept_can_not_be_repeated():
    made = stepped(2, 5)
    made.mark_durable(2)
    with pytest.raises(errors.RowsMissing) as missing:
        StepProtocol(made, timeout=1.0).repeat(1)
    assert (missing.value.first, missing.value.last) == (1, 1)


def test_a_broken_connection_refuses_all_that_was_in_flight():
    made = session_at()
    track = StepProtocol(made, timeout=10.0, window=4)
    for value in range(4):
        track.add(row(value))
    assert [track.next().t for _ in range(3)] == [0, 1, 2]
    track.broken(errors.ServerUnreachable("host:1", "gone"))
    assert track.error is None
    assert track.rest() > 0
    assert [track.next().t for _ in range(4)] == [0, 1, 2, 3]


def test_the_module_splits_by_what_a_server_gives():
    assert forecasts.CALL_VALUES * 5 < 4 * 2**20
