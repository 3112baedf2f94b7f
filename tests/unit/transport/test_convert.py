from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from stepstate.errors import InvalidField, NonFiniteInput
from stepstate.identity import DEFAULT_TENANT
from stepstate.sessions import Step
from stepstate.stores import MissingPolicy
from stepstate.transport.convert import (
    REPLY_BYTES,
    decode_opening,
    encode_model,
    encode_session,
)
from stepstate.transport.steps import REQUEST_ROWS, decode_step, encode_step
from stepstate.v1 import stepstate_pb2 as pb
from tests.networks import make_network
from tests.offline import forecasting_network
from tests.unit.rig import Caller, model_of, outputs, rows_of, timed_network


@pytest.fixture
async def session(rig):
    return await rig.open()


def request(x: object, **options: object) -> pb.StepRequest:
    return pb.StepRequest(session_id="a", x=np.ravel(x).tolist(), **options)


def decoded(session, x: object, **options: object) -> Step:
    return decode_step(request(x, **options), session, Caller())


@pytest.mark.parametrize("rows", [1, 2, 21, 22, 300])
async def test_rows_arrive_as_they_were_sent(session, network, rows):
    x = rows_of(network, rows)
    step = decoded(session, x, t=7)
    assert np.array_equal(np.float32(step.x).reshape(rows, 3), x)
    assert (step.rows, step.t, step.session) == (rows, 7, session)


async def test_t_0_is_not_no_t(session):
    assert decoded(session, [1, 2, 3], t=0).t == 0
    assert decoded(session, [1, 2, 3]).t is None


@pytest.mark.parametrize("values", [0, 1, 2, 4, 100, 301])
async def test_what_is_not_whole_rows_is_refused_with_the_width(session, values):
    with pytest.raises(InvalidField, match=rf"x: holds {values} values.*rows of 3 \(x0, x1, x2\)"):
        decoded(session, np.zeros(values))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [1, 5, 200])
async def test_a_value_that_is_not_finite_is_refused_with_its_row_and_column(session, bad, rows):
    x = np.zeros((rows, 3))
    x[rows - 1, 1] = bad
    with pytest.raises(NonFiniteInput) as refused:
        decoded(session, x)
    error = refused.value
    assert (error.row, error.column, error.value) == (rows - 1, "x1", str(bad))


@pytest.mark.parametrize("rows", [1, 200])
async def test_infinities_that_cancel_out_are_refused_too(session, rows):
    with pytest.raises(NonFiniteInput):
        decoded(session, [[np.inf, -np.inf, 0.0]] * rows)


@pytest.mark.parametrize("rows", [1, 200])
async def test_the_largest_finite_values_are_accepted(session, rows):
    decoded(session, np.full((rows, 3), np.finfo(np.float32).max))


async def test_last_only_of_one_row_is_the_same_request_as_without(session):
    assert not decoded(session, [1, 2, 3], last_only=True).last_only
    assert decoded(session, [1, 2, 3] * 2, last_only=True).last_only


async def test_more_rows_than_a_request_takes_are_refused(session):
    decoded(session, np.zeros((REQUEST_ROWS, 3)), last_only=True)
    with pytest.raises(InvalidField, match=f"at most {REQUEST_ROWS}"):
        decoded(session, np.zeros((REQUEST_ROWS + 1, 3)), last_only=True)


async def test_a_reply_too_large_for_a_client_is_refused_before_the_work(session):
    row_bytes = 4 * (2 + 2 * 7 * 16)
    most = REPLY_BYTES // row_bytes
    decoded(session, np.zeros((most, 3)), inspect=True)
    with pytest.raises(InvalidField, match=f"at most {most} rows"):
        decoded(session, np.zeros((most + 1, 3)), inspect=True)
    decoded(session, np.zeros((most + 1, 3)), inspect=True, last_only=True)
    decoded(session, np.zeros((most + 1, 3)))


@pytest.mark.parametrize("rows", [1, 2, 40])
async def test_a_reply_carries_the_outputs_to_the_bit(rig, session, network, rows):
    step = await rig.step(session, rows_of(network, rows), 0)
    reply = encode_step(step)
    assert (reply.session_id, reply.t, reply.replayed) == ("a", rows, False)
    assert np.array_equal(np.float32(reply.y), outputs(step).ravel())
    assert not reply.layers
    assert pb.StepResponse.FromString(reply.SerializeToString()) == reply


async def test_a_replayed_reply_says_so_and_has_the_same_t_and_outputs(rig, session, network):
    x = rows_of(network, 3)
    first, again = [encode_step(await rig.step(session, x, 0, inspect=True)) for _ in range(2)]
    assert again.replayed
    again.replayed = False
    assert again.SerializeToString() == first.SerializeToString()


@pytest.mark.parametrize(
    ("name", "fields"),
    [("lstm", "ifgocmh"), ("gru", "hrzn"), ("tanh", "h"), ("projected", "ifgocmh")],
)
async def test_inspected_layers_have_the_fields_of_their_cell(make_rig, networks, name, fields):
    rig = make_rig(model_of(networks[name]))
    step = await rig.step(await rig.open(), rows_of(networks[name], 4), inspect=True)
    reply = encode_step(step)
    assert len(reply.layers) == 2
    for layer, message in zip(step.layers, reply.layers, strict=True):
        assert {field.name for field, _ in message.ListFields()} == set(fields)
        for field, values in message.ListFields():
            assert np.array_equal(np.float32(values), layer[field.name].ravel())


def test_an_opening_has_what_was_asked_for():
    asked = pb.OpenSessionRequest(session_id="a", model="m", version="2")
    assert decode_opening(asked, DEFAULT_TENANT).idle_timeout_seconds is None
    assert decode_opening(asked, DEFAULT_TENANT).start_time is None
    asked.idle_timeout.FromTimedelta(timedelta(seconds=2.5))
    asked.start_time.FromDatetime(datetime(1969, 7, 20, 20, 17, tzinfo=UTC))
    found = decode_opening(asked, DEFAULT_TENANT)
    assert (found.session_id, found.model, found.version) == ("a", "m", "2")
    assert found.idle_timeout_seconds == 2.5
    assert found.start_time == datetime(1969, 7, 20, 20, 17, tzinfo=UTC)


@pytest.mark.parametrize(("seconds", "nanos"), [(2**60, 0), (-(2**60), 0), (0, 2_000_000_000)])
def test_a_start_time_that_is_none_is_refused_by_name(seconds, nanos):
    asked = pb.OpenSessionRequest()
    asked.start_time.seconds, asked.start_time.nanos = seconds, nanos
    with pytest.raises(InvalidField, match="start_time"):
        decode_opening(asked, DEFAULT_TENANT)


@pytest.mark.parametrize("seconds", [2**60, -(2**60)])
async def test_an_idle_timeout_beyond_any_duration_is_refused_by_name(rig, seconds):
    asked = pb.OpenSessionRequest()
    asked.idle_timeout.seconds = seconds
    with pytest.raises(InvalidField, match="idle_timeout"):
        await rig.sessions.open(decode_opening(asked, DEFAULT_TENANT))


async def test_a_session_is_told_as_it_stands(rig, network):
    start = datetime(1931, 2, 3, 4, 5, 6, tzinfo=UTC)
    session = await rig.open("b", idle=50.0, start=start)
    await rig.step(session, rows_of(network, 2))
    rig.clock.advance(20)
    caller = rig.send(session, rows_of(network, 1))
    told = encode_session(rig.sessions.summary(session))
    assert (told.session_id, told.model, told.version, told.t) == ("b", "lstm", "1", 2)
    assert told.idle_timeout.ToTimedelta() == timedelta(seconds=50)
    assert told.start_time.ToDatetime(tzinfo=UTC) == start
    left = told.expire_time.ToDatetime(tzinfo=UTC) - datetime.now(UTC)
    assert 25 < left.total_seconds() <= 30
    assert told.queued_requests == 1
    await caller.outcome()


async def test_a_session_without_a_start_time_is_told_without_one(rig, session):
    assert not encode_session(rig.sessions.summary(session)).HasField("start_time")


def test_a_model_is_told_as_its_manifest_has_it():
    told = encode_model(model_of(*timed_network()))
    assert (told.name, told.version, told.cell.kind, told.cell.hidden_size) == (
        "timed",
        "1",
        "lstm",
        16,
    )
    assert [column.name for column in told.inputs] == ["load", "heat"]
    assert [list(output.horizons) for output in told.outputs] == [[0, 3], [7]]
    assert told.step_interval.ToTimedelta() == timedelta(hours=1)
    assert told.needs_start_time


def test_a_model_without_time_is_told_without_an_interval():
    told = encode_model(model_of(make_network("m", "gru")))
    assert not told.HasField("step_interval")
    assert not told.needs_start_time


@pytest.fixture(params=["impute", "hold"])
async def tolerant(rig, request):
    return await rig.open("tolerant", missing=request.param)


@pytest.mark.parametrize("rows", [1, 5, 200])
async def test_nan_is_missing_where_the_session_says_what_stands_in(tolerant, rows):
    x = np.zeros((rows, 3))
    x[rows - 1, 1:] = np.nan
    step = decoded(tolerant, x)
    assert step.missing_rows == 1
    assert step.impute is (tolerant.record.missing is MissingPolicy.IMPUTE)
    assert np.array_equal(np.float32(step.x).reshape(rows, 3), x, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 200])
async def test_an_infinite_value_is_never_missing(tolerant, rows):
    x = np.zeros((rows, 3))
    x[0, 0], x[rows - 1, 2] = np.nan, np.inf
    with pytest.raises(NonFiniteInput) as refused:
        decoded(tolerant, x)
    assert (refused.value.row, refused.value.column) == (rows - 1, "x2")


async def test_advancing_is_a_request_of_rows_that_miss_everything(tolerant):
    step = decode_step(
        pb.StepRequest(session_id="a", advance=7, last_only=True), tolerant, Caller()
    )
    assert (step.rows, step.missing_rows, len(step.x)) == (7, 7, 21)
    assert np.isnan(step.x).all()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"x": [1.0, 2.0, 3.0], "advance": 1}, "the one or the other"),
        ({"advance": REQUEST_ROWS + 1, "last_only": True}, "at most 100000"),
        ({"advance": 2**32 - 1, "last_only": True}, "at most 100000"),
    ],
)
async def test_advancing_has_its_bounds(tolerant, options, problem):
    with pytest.raises(InvalidField, match=problem):
        decode_step(pb.StepRequest(session_id="a", **options), tolerant, Caller())


async def test_a_session_that_takes_nothing_missing_is_not_advanced(session):
    with pytest.raises(InvalidField, match="set to impute or hold"):
        decode_step(pb.StepRequest(session_id="a", advance=1), session, Caller())


async def test_a_reply_says_what_stood_in(make_rig):
    rig = make_rig(model_of(forecasting_network()))  # lags reach back 7 rows
    session = await rig.open(missing="hold")
    marks = []
    for x in (np.ones((5, 2)), [np.nan, 1.0], np.full((9, 2), np.nan), np.ones((1, 2))):
        reply = encode_step(await rig.step(session, x))
        marks.append((reply.imputed_rows, reply.fallback_rows))
    assert marks == [(0, 5), (1, 1), (9, 1), (0, 0)]


@pytest.mark.parametrize("number", [4, -1])
def test_a_policy_of_a_later_version_is_refused(number):
    with pytest.raises(InvalidField, match="missing"):
        decode_opening(pb.OpenSessionRequest(missing=number), DEFAULT_TENANT)


async def test_a_session_tells_how_good_its_forecasts_are(make_rig):
    rig = make_rig(model_of(forecasting_network()))
    session = await rig.open(missing="impute", level=0.8)
    await rig.y(session, np.ones((9, 2)))
    told = encode_session(rig.sessions.summary(session))
    assert told.missing == pb.MISSING_POLICY_IMPUTE
    assert told.interval_level == pytest.approx(0.8)
    assert [(one.output, one.horizon, one.scored) for one in told.accuracy] == [
        ("level", 1, 8),
        ("level", 3, 6),
    ]
    assert not told.drift.HasField("last_t")


async def test_a_model_without_tracking_tells_nothing_of_forecasts(rig, session):
    told = encode_session(rig.sessions.summary(session))
    assert not told.accuracy
    assert not told.HasField("drift")
    assert told.interval_level == 0


@pytest.mark.parametrize("level", [-0.1, 1.0, 2.0, float("nan")])
async def test_an_interval_level_is_between_0_and_1(make_rig, level):
    rig = make_rig(model_of(forecasting_network()))
    with pytest.raises(InvalidField, match="interval_level"):
        await rig.open(level=level)


async def test_an_interval_level_needs_a_model_that_tracks(rig):
    with pytest.raises(InvalidField, match="tracks no horizon"):
        await rig.open(level=0.9)
