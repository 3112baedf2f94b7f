"""What a client process sends and counts, without a server: parts, due times, records."""

from __future__ import annotations

import asyncio
import math
import time

import numpy as np
import pytest

from benchmarks import BenchError
from benchmarks.calls import Record
from benchmarks.load import CallPath, Kind, Window
from benchmarks.results import Case, Plan
from benchmarks.runner import percentiles
from benchmarks.templates import PackedTemplate, StepTemplate, packed_key, session_key
from benchmarks.timer import Timer
from stepstate.errors import SessionUnknown
from stepstate.transport.status import status_of
from stepstate.v1 import stepstate_pb2 as pb

X = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], np.float32)
NAMES = ["first", "second", "third"]
PLAN = Plan(sessions=(1, 4), seconds=1.0, warm_up=0.0, rounds=1, processes=2)


def reply(t: int, y: float = 1.0) -> bytes:
    return pb.StepResponse(session_id="first", t=t, y=[y]).SerializeToString()


def test_a_session_sends_its_row_with_the_next_t():
    template = StepTemplate("first", X[0])
    for t in range(300):  # from 128 on t takes two bytes
        request = pb.StepRequest.FromString(template.request())
        assert (request.session_id, request.t, list(request.x)) == ("first", t, [1.0, 2.0])


def test_a_reply_and_an_echo_tell_whose_they_are():
    template = StepTemplate("first", X[0])
    assert session_key(reply(1)) == template.key == session_key(template.request())


@pytest.mark.parametrize("wrong", [reply(2), pb.StepResponse(t=1).SerializeToString()])
def test_a_step_with_another_t_or_without_y_is_no_reply(wrong: bytes):
    template = StepTemplate("first", X[0])
    template.request()
    template.check(Kind.STEP, reply(1))
    with pytest.raises(BenchError, match="a step to t = 1 was answered"):
        template.check(Kind.STEP, wrong)


def test_a_refused_step_is_told():
    template = StepTemplate("first", X[0])
    template.request()
    refused = pb.StepResponse(error=status_of(SessionUnknown("first"))).SerializeToString()
    with pytest.raises(SessionUnknown):
        template.check(Kind.STEP, refused)


def test_an_echo_of_something_else_is_told():
    template, packed = StepTemplate("first", X[0]), PackedTemplate(0, 0, NAMES, X)
    for each in (template, packed):
        request = each.request()
        each.check(Kind.ECHO, request)
        with pytest.raises(BenchError, match="something else"):
            each.check(Kind.ECHO, request + b"?")


def test_a_packed_message_has_a_row_of_each_session_and_binds_once():
    template = PackedTemplate(2, 6, NAMES, X)
    first, second = (pb.StreamPackedRequest.FromString(template.request()) for _ in range(2))
    assert [(one.handle, one.session_id) for one in first.bindings] == [
        (6, "first"),
        (7, "second"),
        (8, "third"),
    ]
    assert not second.bindings
    for t, message in enumerate((first, second)):
        assert message.id == template.key == 3
        assert np.frombuffer(message.handles, "<u4").tolist() == [6, 7, 8]
        assert np.frombuffer(message.t, "<u8").tolist() == [t] * 3
        assert np.frombuffer(message.x, "<f4").tolist() == X.ravel().tolist()


def packed_reply(t: list[int], y: list[float]) -> bytes:
    columns = {"t": np.array(t, "<u8").tobytes(), "y": np.array(y, "<f4").tobytes()}
    return pb.StreamPackedResponse(id=1, **columns).SerializeToString()


def test_a_packed_reply_must_have_every_row():
    template = PackedTemplate(0, 0, NAMES, X)
    template.request()
    good = packed_reply([1, 1, 1], [1.0, 2.0, 3.0])
    assert packed_key(Kind.STEP, good) == template.key
    template.check(Kind.STEP, good)
    for wrong in (
        packed_reply([1, 1, 2], [1.0, 2.0, 3.0]),
        packed_reply([1, 1], [1.0, 2.0]),
        packed_reply([1, 1, 1], [1.0, math.nan, 3.0]),
        packed_reply([1, 1, 1], []),
    ):
        with pytest.raises(BenchError, match="rows to t = 1 were answered"):
            template.check(Kind.STEP, wrong)


def test_refused_rows_and_messages_are_told_at_once():
    status = status_of(SessionUnknown("second"))
    for refused in (
        pb.StreamPackedResponse(id=1, errors=[pb.RowError(row=1, status=status)]),
        pb.StreamPackedResponse(id=1, error=status),
    ):
        with pytest.raises(SessionUnknown):
            packed_key(Kind.STEP, refused.SerializeToString())


def test_packed_messages_in_flight_have_different_sessions():
    paths = (CallPath.UNARY, CallPath.PACKED)
    plan = Plan(
        sessions=(1, 100),
        seconds=1.0,
        warm_up=0.0,
        rounds=1,
        processes=2,
        paths=paths,
        rows=(16, 64),
        in_flight=2,
    )
    assert plan.cases() == [
        Case(CallPath.UNARY, 1, 1),
        Case(CallPath.UNARY, 100, 1),
        Case(CallPath.PACKED, 100, 16),
        Case(CallPath.PACKED, 256, 64),
    ]


def test_more_packed_rows_than_sessions_are_refused():
    plan = Plan(
        sessions=(1,),
        seconds=1.0,
        warm_up=0.0,
        rounds=1,
        processes=10,
        paths=(CallPath.PACKED,),
        rows=(600,),
    )
    with pytest.raises(BenchError, match="600 rows × 2 messages in flight × 10 processes"):
        plan.cases()


def test_in_closed_loop_replies_within_the_window_count():
    record = Record(Window(0.0, 10.0, 20.0), paced=False)
    for since, now in ((8.0, 9.0), (9.0, 10.0), (15.0, 16.0), (19.0, 21.0)):
        record.answered(since, now)
    sample = record.sample()
    assert sample.latencies.tolist() == [1.0, 1.0]
    assert sample.since.tolist() == [9.0, 15.0]
    assert (sample.replies, sample.unanswered) == (2, 0)


def test_at_a_fixed_rate_what_was_due_within_the_window_counts_however_late():
    record = Record(Window(0.0, 10.0, 20.0), paced=True)
    for since, now in ((9.0, 15.0), (12.0, 13.0), (19.0, 29.0)):
        record.answered(since, now)
    record.unanswered((9.5, 18.0, 20.5), 30.0)
    sample = record.sample()
    assert sample.latencies.tolist() == [1.0, 10.0, 12.0]
    assert sample.since.tolist() == [12.0, 19.0, 18.0]
    assert sample.replies == 2  # at 15 and at 13
    assert sample.unanswered == 1


def test_percentiles_are_in_milliseconds():
    found = percentiles(np.arange(1, 1_002) / 1e3)
    assert found["50"] == pytest.approx(501)
    assert found["99.9"] == pytest.approx(1_000)
    assert found["100"] == pytest.approx(1_001)


async def test_a_timer_wakes_in_order_and_never_early():
    woken: list[float] = []

    async def sleeper(moment: float) -> None:
        await timer.until(moment)
        assert time.monotonic() >= moment
        woken.append(moment)

    now = time.monotonic()
    with Timer() as timer:
        # Some have passed, and some pass before the one that it was first set for.
        moments = [now + after for after in (-1.0, 0.0, 0.03, 0.01, 0.0103, 0.02, 0.01)]
        await asyncio.gather(*map(sleeper, moments))
    assert woken == sorted(woken)


async def test_a_timer_forgets_who_no_longer_waits():
    with Timer() as timer:
        now = time.monotonic()
        left = asyncio.create_task(timer.until(now + 0.01))
        await asyncio.sleep(0)
        left.cancel()
        await timer.until(now + 0.02)
