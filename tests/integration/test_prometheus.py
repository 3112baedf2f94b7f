"""What a real Prometheus sees of a real server that was used in known ways."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.prometheus import Labels, Prometheus, eventually, running_prometheus
from tests.processes import server_process

SERVICE = "stepstate.v1.StepstateService"
MARK = "sid-in-no-label"
"""The beginning of every session id here."""

UNARY_STEPS, STREAMED_STEPS, PRIMED_ROWS = 5, 7, 10
LSTM_SINGLES = UNARY_STEPS + 2 * STREAMED_STEPS
X = [0.1, -0.2, 0.3]
"""A row; the networks of the tests have three inputs."""


def _refused(code: grpc.StatusCode, call: Callable[..., object], request: object) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    assert caught.value.code() is code


def _id(number: int) -> str:
    return f"{MARK}-{number}"


def use(address: str) -> None:
    """Everything that the tests below count happens here."""
    with grpc.insecure_channel(address) as channel:
        stub = StepstateServiceStub(channel)
        for number in range(4):
            stub.OpenSession(pb.OpenSessionRequest(session_id=_id(number), model="lstm"))
        stub.OpenSession(pb.OpenSessionRequest(session_id=_id(4), model="gru"))
        stub.Step(pb.StepRequest(session_id=_id(4), x=X))
        _use_unary(stub)
        _use_streams(stub)
        stub.CloseSession(pb.CloseSessionRequest(session_id=_id(0)))
        _let_one_expire(stub)
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())


def _use_unary(stub: StepstateServiceStub) -> None:
    for t in range(UNARY_STEPS):
        stub.Step(pb.StepRequest(session_id=_id(0), t=t, x=X))
    last = UNARY_STEPS - 1
    assert stub.Step(pb.StepRequest(session_id=_id(0), t=last, x=X)).replayed
    stub.Step(pb.StepRequest(session_id=_id(1), x=X * PRIMED_ROWS))
    code = grpc.StatusCode
    _refused(code.ABORTED, stub.Step, pb.StepRequest(session_id=_id(0), t=99, x=X))
    _refused(code.NOT_FOUND, stub.Step, pb.StepRequest(session_id=_id(77), x=X))
    _refused(code.INVALID_ARGUMENT, stub.Step, pb.StepRequest(session_id=_id(0), x=X[:2]))
    _refused(
        code.ALREADY_EXISTS, stub.OpenSession, pb.OpenSessionRequest(session_id=_id(1), model="gru")
    )


def _use_streams(stub: StepstateServiceStub) -> None:
    requests = [
        pb.StepRequest(session_id=_id(number), t=t, x=X)
        for t in range(STREAMED_STEPS)
        for number in (2, 3)
    ]
    requests.append(requests[-1])  # replayed
    requests.append(pb.StepRequest(session_id=_id(2), t=50, x=X))  # refused
    replies = list(stub.StreamSteps(iter(requests)))
    assert sum(reply.replayed for reply in replies) == 1
    assert sum(reply.HasField("error") for reply in replies) == 1


def _let_one_expire(stub: StepstateServiceStub) -> None:
    soon = Duration(nanos=50_000_000)
    stub.OpenSession(pb.OpenSessionRequest(session_id=_id(5), model="lstm", idle_timeout=soon))
    time.sleep(0.1)
    _refused(grpc.StatusCode.NOT_FOUND, stub.GetSession, pb.GetSessionRequest(session_id=_id(5)))


@pytest.fixture(scope="module")
def seen(model_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that scraped the server after all of `use`."""
    folder = tmp_path_factory.mktemp("prometheus")
    with (
        server_process("--models", str(model_root)) as server,
        running_prometheus(folder, server) as prometheus,
    ):
        use(server.address)
        prometheus.scrape()
        yield prometheus


def test_the_server_is_a_healthy_target(seen: Prometheus) -> None:
    (target,) = seen.get("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    assert seen.value('stepstate_build_info{version!=""}') == 1


def test_applied_steps_are_rows(seen: Prometheus) -> None:
    applied = seen.by("model", 'stepstate_steps_total{result="applied"} > 0')
    assert applied == {"lstm": LSTM_SINGLES + PRIMED_ROWS, "gru": 1}


@pytest.mark.parametrize("result", ["replayed", "refused"])
def test_replayed_and_refused_steps_are_requests(seen: Prometheus, result: str) -> None:
    """One of each came on a unary call, and one on a stream."""
    assert seen.value(f'stepstate_steps_total{{model="lstm", result="{result}"}}') == 2


def test_refused_requests_are_counted_by_reason(seen: Prometheus) -> None:
    assert seen.by("reason", "stepstate_requests_refused_total > 0") == {
        "STEP_AHEAD": 2,  # one of them in band
        "SESSION_UNKNOWN": 1,
        "SESSION_EXISTS": 1,
        "SESSION_EXPIRED": 1,
        "INVALID_FIELD": 1,
    }


def test_sessions_are_counted_as_they_come_and_go(seen: Prometheus) -> None:
    eventually(lambda: seen.value('stepstate_sessions_closed_total{reason="expired"}') == 1)
    assert seen.value('stepstate_sessions_closed_total{reason="closed"}') == 1
    assert seen.by("model", "stepstate_sessions_opened_total > 0") == {"lstm": 5, "gru": 1}
    assert seen.by("model", 'stepstate_sessions{residency="resident"} > 0') == {"lstm": 3, "gru": 1}


def test_memory_is_that_of_the_open_sessions(seen: Prometheus) -> None:
    eventually(lambda: seen.value('stepstate_sessions_closed_total{reason="expired"}') == 1)
    layers, hidden, float_bytes = 2, 16, 4
    last_row = len(X)  # what replaces a missing one
    assert seen.by("model", "stepstate_state_bytes > 0") == {
        "lstm": 3 * (2 * layers * hidden + last_row) * float_bytes,
        "gru": (layers * hidden + last_row) * float_bytes,
    }
    assert seen.by("model", "stepstate_replay_bytes > 0").keys() == {"lstm"}  # the primed rows
    assert seen.value("sum(stepstate_queue_rows)") == 0


@pytest.mark.parametrize("stage", ["queue", "compute", "total"])
def test_every_single_step_is_timed_in_every_stage(seen: Prometheus, stage: str) -> None:
    of_stage = f'{{model="lstm", stage="{stage}"}}'
    infinite = of_stage.replace("}", ', le="+Inf"}')
    assert seen.value(f"stepstate_step_seconds_count{of_stage}") == LSTM_SINGLES
    assert seen.value(f"stepstate_step_seconds_bucket{infinite}") == LSTM_SINGLES


def test_queue_and_compute_add_up_to_the_total(seen: Prometheus) -> None:
    seconds = seen.by("stage", 'stepstate_step_seconds_sum{model="lstm"}')
    assert seconds["queue"] + seconds["compute"] == pytest.approx(seconds["total"])
    assert 0 < seconds["compute"] < 10


def test_microbatches_hold_all_single_rows(seen: Prometheus) -> None:
    assert seen.value('stepstate_microbatch_rows_sum{model="lstm"}') == LSTM_SINGLES
    forwards = seen.value('stepstate_microbatch_rows_count{model="lstm"}')
    assert forwards is not None
    assert LSTM_SINGLES / 2 <= forwards <= LSTM_SINGLES  # two sessions were stepped at once


def test_calls_have_the_labels_of_go_grpc_middleware(seen: Prometheus) -> None:
    handled = seen.samples("grpc_server_handled_total > 0")
    assert {_grpc(labels): count for labels, count in handled.items()} == {
        ("OK", "Check", "grpc.health.v1.Health", "unary"): 1,
        ("OK", "OpenSession", SERVICE, "unary"): 6,
        ("AlreadyExists", "OpenSession", SERVICE, "unary"): 1,
        ("OK", "Step", SERVICE, "unary"): UNARY_STEPS + 3,
        ("Aborted", "Step", SERVICE, "unary"): 1,
        ("NotFound", "Step", SERVICE, "unary"): 1,
        ("InvalidArgument", "Step", SERVICE, "unary"): 1,
        ("NotFound", "GetSession", SERVICE, "unary"): 1,
        ("OK", "CloseSession", SERVICE, "unary"): 1,
        ("OK", "StreamSteps", SERVICE, "bidi_stream"): 1,
    }


def _grpc(labels: Labels) -> tuple[str, ...]:
    """Code, method, service and type."""
    return tuple(value for name, value in sorted(labels) if name.startswith("grpc_"))


def test_every_call_that_started_was_handled_and_timed(seen: Prometheus) -> None:
    started = seen.by("grpc_method", "sum by (grpc_method) (grpc_server_started_total)")
    handled = seen.by("grpc_method", "sum by (grpc_method) (grpc_server_handled_total)")
    timed = seen.by("grpc_method", "grpc_server_handling_seconds_count")
    assert started == handled == timed


@pytest.mark.parametrize("direction", ["received", "sent"])
def test_messages_are_counted_on_streams_and_calls(seen: Prometheus, direction: str) -> None:
    """A refused call received a message and sent none; an in-band error is a message."""
    messages = seen.by("grpc_method", f"grpc_server_msg_{direction}_total")
    assert messages["StreamSteps"] == 2 * STREAMED_STEPS + 2
    assert messages["Step"] == UNARY_STEPS + 3 + (3 if direction == "received" else 0)


def test_a_cancelled_stream_is_counted_as_canceled(model_root: Path, tmp_path: Path) -> None:
    """Go spells it with one l."""
    with server_process("--models", str(model_root)) as server:
        with grpc.insecure_channel(server.address) as channel:
            stub = StepstateServiceStub(channel)
            stub.OpenSession(pb.OpenSessionRequest(session_id=_id(0), model="lstm"))
            call = stub.StreamSteps(_one_and_wait(pb.StepRequest(session_id=_id(0), x=X)))
            next(call)
            call.cancel()
        wanted = f'grpc_code="Canceled",grpc_method="StreamSteps",grpc_service="{SERVICE}"'
        eventually(lambda: wanted in urlopen(server.metrics_url).read().decode())


def _one_and_wait(request: pb.StepRequest) -> Iterator[pb.StepRequest]:
    yield request
    time.sleep(1)


def test_no_label_holds_a_session_id(seen: Prometheus) -> None:
    for series in seen.get("series", **{"match[]": '{job="stepstate"}'}):
        assert not any(MARK in value for value in series.values()), series


def test_a_series_count_stays_small(seen: Prometheus) -> None:
    """Labels are bounded: what a server of six models exposes fits a small Prometheus."""
    assert (seen.value('count({job="stepstate"})') or 0) < 2_000


def test_the_alert_rules_are_evaluated_and_quiet(seen: Prometheus) -> None:
    eventually(lambda: {rule["health"] for rule in _rules(seen)} == {"ok"})
    assert [rule["name"] for rule in _rules(seen) if rule["state"] == "firing"] == []


def _rules(prometheus: Prometheus) -> list[dict]:
    return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
