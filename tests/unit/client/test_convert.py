from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import grpc
import numpy as np
import pytest

from stepstate.client import convert
from stepstate.client._protocol import calls
from stepstate.client._protocol.replay import SentRequest
from stepstate.client._protocol.retry import is_retryable
from stepstate.client._protocol.steps import step_request
from stepstate.errors import (
    Cancelled,
    Draining,
    Internal,
    InvalidField,
    ServerUnreachable,
    StaleOwner,
    StepAhead,
    TenantLimitReached,
    UnexpectedStatus,
)
from stepstate.transport.convert import encode_model, encode_session
from stepstate.transport.status import DETAILS_KEY, status_of
from stepstate.transport.steps import encode_step
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.floats import x_of
from stepstate.v1.google_rpc import Status
from tests.unit.rig import model_of, outputs, rows_of, timed_network


class Failure(grpc.RpcError):
    """A failed call, as grpc raises it."""

    def __init__(self, code: grpc.StatusCode, details: str | None = "", **trailing: bytes) -> None:
        self._told = code, details, tuple(trailing.items()) or None

    def code(self):
        return self._told[0]

    def details(self):
        return self._told[1]

    def trailing_metadata(self):
        return self._told[2]


def failure_of(error) -> Failure:
    trailing = {DETAILS_KEY: status_of(error).SerializeToString()}
    return Failure(grpc.StatusCode.UNKNOWN, "not looked at", **trailing)


@pytest.mark.parametrize("error", [StepAhead("a", 5, 3), Draining(2.0), Internal("ab12")])
def test_an_error_with_details_is_raised_as_what_it_is(error):
    again = convert.from_rpc(failure_of(error), "host:1")
    assert type(again) is type(error)
    assert again.fields() == error.fields()


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,  # a server that stops ends calls that it had not begun
    ],
)
def test_no_answer_is_a_server_that_can_not_be_reached(code):
    error = convert.from_rpc(Failure(code, "no route"), "host:1")
    assert isinstance(error, ServerUnreachable)
    assert (error.target, error.detail) == ("host:1", "no route")
    assert convert.from_rpc(Failure(code, None), "host:1").detail == code.name


def test_a_status_that_grpcs_client_lost_is_tried_again():
    failure = Failure(grpc.StatusCode.INTERNAL, "Internal error from Core")
    error = convert.from_rpc(failure, "host:1")
    assert isinstance(error, ServerUnreachable)
    assert is_retryable(error)
    assert "lost its status" in str(error)
    assert "Core" not in str(error)


def test_a_call_that_was_given_up_here_is_cancelled():
    with grpc.insecure_channel("127.0.0.1:1") as channel:
        call = channel.unary_unary("/s/M").future(b"", wait_for_ready=True)
        assert call.cancel()
        given_up = convert.from_rpc(call, "host:1")
        waiting = channel.unary_unary("/s/M").future(b"", wait_for_ready=True)
    assert isinstance(given_up, Cancelled)
    assert isinstance(convert.from_rpc(waiting, "host:1"), Cancelled)


def test_any_other_answer_is_named_as_unexpected():
    error = convert.from_rpc(Failure(grpc.StatusCode.UNIMPLEMENTED, "no such method"), "host:1")
    assert isinstance(error, UnexpectedStatus)
    assert (error.code, error.detail) == ("UNIMPLEMENTED", "no such method")
    status = Status(code=3, message="from a proxy")
    assert isinstance(convert.from_status(status), UnexpectedStatus)


def opening(session_id=None, *, start_time=None, idle_timeout=None, durability=None, **wishes):
    options = calls.NewSessionOptions(idle_timeout, durability)
    call = calls.open_session("m", "1", session_id, options, start_time=start_time, **wishes)
    return call.request


def test_an_opening_without_an_id_gets_one_that_can_be_sent_again():
    made = [opening() for _ in range(2)]
    assert made[0].session_id
    assert made[0].session_id != made[1].session_id
    assert not made[0].HasField("start_time")
    assert not made[0].HasField("idle_timeout")
    assert made[0].durability == pb.DURABILITY_UNSPECIFIED


def test_a_fork_without_an_id_gets_one_that_can_be_sent_again():
    made = [calls.fork_session("a", None, calls.NewSessionOptions()).request for _ in range(2)]
    assert made[0].new_session_id
    assert made[0].new_session_id != made[1].new_session_id
    chosen = calls.fork_session(
        "a", "b", calls.NewSessionOptions(timedelta(minutes=5), "sync")
    ).request
    assert (chosen.session_id, chosen.new_session_id) == ("a", "b")
    assert chosen.idle_timeout.ToTimedelta() == timedelta(minutes=5)
    assert chosen.durability == pb.DURABILITY_SYNC


def test_an_import_without_an_id_keeps_that_of_the_snapshot():
    options = calls.NewSessionOptions(durability="none")
    (request,) = calls.import_session(b"bytes", None, options).request
    assert (request.data, request.size, request.session_id) == (b"bytes", 5, "")
    assert request.durability == pb.DURABILITY_NONE
    assert not request.HasField("idle_timeout")


@pytest.mark.parametrize("durability", ["", "disk", "SYNC"])
def test_a_durability_that_does_not_exist_is_refused_with_those_that_do(durability):
    with pytest.raises(InvalidField, match="none, async, sync"):
        opening(durability=durability)


@pytest.mark.parametrize("missing", ["", "zero", "HOLD"])
def test_a_missing_policy_that_does_not_exist_is_refused_with_those_that_do(missing):
    with pytest.raises(InvalidField, match="reject, impute, hold"):
        opening(missing=missing)


def test_a_missing_policy_and_a_level_travel_where_they_are_chosen():
    assert opening().missing == pb.MISSING_POLICY_UNSPECIFIED
    assert opening().interval_level == 0
    chosen = opening(missing="hold", interval_level=0.8)
    assert (chosen.missing, chosen.interval_level) == (pb.MISSING_POLICY_HOLD, 0.8)
    with pytest.raises(InvalidField, match="interval_level: is 0"):
        opening(interval_level=0.0)


def test_what_passes_is_worth_asking_again():
    assert is_retryable(Draining(1.0))
    assert is_retryable(StaleOwner("a", 3))
    assert is_retryable(TenantLimitReached("acme", "rows_per_second", 10.0, 0.1))
    assert not is_retryable(TenantLimitReached("acme", "open_sessions", 10.0, 5.0))
    assert not is_retryable(StepAhead("a", 5, 3))
    assert not is_retryable(Internal("ab"))


@pytest.mark.parametrize(
    "start",
    [
        datetime(2026, 3, 1, 12),  # noqa: DTZ001 - without a zone it is in UTC
        datetime(2026, 3, 1, 12, tzinfo=UTC),
        datetime(2026, 3, 1, 14, tzinfo=timezone(timedelta(hours=2))),
    ],
)
def test_a_start_time_travels_in_utc(start):
    request = opening("a", start_time=start, idle_timeout=timedelta(minutes=5))
    assert request.start_time.ToDatetime(tzinfo=UTC) == datetime(2026, 3, 1, 12, tzinfo=UTC)
    assert request.idle_timeout.ToTimedelta() == timedelta(minutes=5)


@pytest.mark.parametrize("rows", [1, 100])
def test_a_step_request_carries_rows_options_and_t(network, rows):
    x = rows_of(network, rows)
    request = step_request("a", SentRequest(0, rows, x.tobytes(), last_only=True))
    assert np.array_equal(x_of(request).reshape(-1, 3), x)
    assert (request.session_id, request.t, request.HasField("t")) == ("a", 0, True)
    assert (request.inspect, request.last_only) == (False, True)


async def test_outputs_and_layers_come_out_as_the_server_put_them_in(rig, network):
    step = await rig.step(await rig.open(), rows_of(network, 5), inspect=True)
    found = convert.inspection(
        encode_step(step),
        convert.model_info(encode_model(rig.scheduler.model)),
        lambda values: values,
    )
    assert np.array_equal(found.y, outputs(step))
    assert len(found.layers) == 2
    for layer, sent in zip(found.layers, step.layers, strict=True):
        assert layer.keys() == sent.keys()
        assert all(np.array_equal(layer[name], sent[name]) for name in sent)


def test_an_error_in_band_is_raised(model):
    response = pb.StepResponse(error=status_of(StepAhead("a", 5, 3)))
    with pytest.raises(StepAhead):
        convert.outputs(response, convert.model_info(encode_model(model)))


def test_a_model_is_what_the_server_told():
    info = convert.model_info(encode_model(model_of(*timed_network())))
    assert info.inputs == {"load": "", "heat": ""}
    assert [output.horizons for output in info.outputs] == [(0, 3), (7,)]
    assert info.step_interval == timedelta(hours=1)
    assert info.needs_start_time


async def test_a_session_is_what_the_server_told(rig):
    start = datetime(1931, 2, 3, tzinfo=UTC)
    session = await rig.open("a", idle=50.0, start=start)
    info = convert.session_info(encode_session(rig.sessions.summary(session)))
    assert (info.session_id, info.t, info.idle_timeout) == ("a", 0, timedelta(seconds=50))
    assert info.start_time == start
    assert (info.durable_t, info.residency) == (0, "resident")
    assert (info.durability, info.owner, info.epoch) == (
        session.record.durability.value,
        rig.sessions.summary(session).owner,
        session.epoch,
    )


def test_accuracy_and_drift_are_what_the_server_told():
    info = convert.session_info(
        pb.Session(
            accuracy=[
                pb.Accuracy(
                    output="load",
                    horizon=12,
                    scored=3,
                    mean_absolute_error=1.5,
                    mean_absolute_scaled_error=float("nan"),
                    coverage=0.75,
                    offset=-0.5,
                    recent_scored=2,
                    recent_mean_absolute_error=2.5,
                    recent_mean_absolute_scaled_error=0.5,
                    recent_coverage=1.0,
                    recent_median_absolute_error=2.0,
                )
            ],
            drift=pb.Drift(drifting=True, alarms=2, last_t=0, learning=True, score=0.25),
            missing=pb.MISSING_POLICY_IMPUTE,
            interval_level=0.8,
        )
    )
    (one,) = info.accuracy
    assert (one.output, one.horizon, one.scored) == ("load", 12, 3)
    assert (one.mean_absolute_error, one.coverage, one.offset) == (1.5, 0.75, -0.5)
    assert np.isnan(one.mean_absolute_scaled_error)
    assert (one.recent_scored, one.recent_mean_absolute_error) == (2, 2.5)
    assert (one.recent_mean_absolute_scaled_error, one.recent_coverage) == (0.5, 1.0)
    assert one.recent_median_absolute_error == 2.0
    assert (info.drift.learning, info.drift.score) == (True, 0.25)
    assert (info.drift.drifting, info.drift.alarms, info.drift.last_t) == (True, 2, 0)
    assert (info.missing, info.interval_level) == ("impute", 0.8)
    assert convert.session_info(pb.Session()).drift.last_t is None


def forecast_message(**fields) -> pb.SessionForecast:
    output = pb.OutputForecast(
        name="load",
        unit="MW",
        values=[1, 2, 3, 4, 5, float("nan")],
        methods=[pb.FORECAST_METHOD_DIRECT, pb.FORECAST_METHOD_FED_BACK, 9],
    )
    return pb.SessionForecast(
        session_id="a", t=7, quantiles=[0.5, 0.9], outputs=[output], scenario="hot", **fields
    )


def test_a_forecast_is_what_the_server_told():
    forecast = convert.forecast(forecast_message())
    assert (forecast.session_id, forecast.t, forecast.scenario) == ("a", 7, "hot")
    assert (forecast.times, forecast.levels, list(forecast.outputs)) == (None, (0.5, 0.9), ["load"])
    assert forecast["load"].unit == "MW"
    assert np.array_equal(forecast.values, [[1, 2], [3, 4], [5, np.nan]], equal_nan=True)
    assert forecast.methods == ("direct", "fed back", "")


def test_a_forecast_has_the_time_of_each_horizon_where_the_model_knows_time():
    message = forecast_message()
    message.first_time.FromDatetime(datetime(2026, 3, 1, 12, tzinfo=UTC))
    message.step_interval.FromTimedelta(timedelta(days=1))
    days = [f"2026-03-0{day}T12:00:00" for day in (1, 2, 3)]
    assert convert.forecast(message).times.astype(str).tolist() == days


def test_what_a_newer_server_calls_otherwise_has_no_name():
    info = convert.session_info(pb.Session(durability=9, residency=7))
    assert (info.durability, info.residency, info.resumable) == ("", "", False)
