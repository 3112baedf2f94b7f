"""What a real Prometheus sees of servers whose sessions spill, move, and lose their store."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.prometheus import (
    Prometheus,
    eventually,
    instance,
    running_prometheus,
)
from tests.processes import ServerProcess, server_process

pytestmark = pytest.mark.long  # a real Prometheus watches two servers through an outage

X = [0.1, -0.2, 0.3]
SESSIONS, SLOTS, ROUNDS = 5, 2, 3
OFTEN = ("--snapshot-interval", "0.1")


@dataclass(frozen=True, slots=True)
class Watched:
    """A server, as its client and as Prometheus sees it."""

    stub: StepstateServiceStub
    prometheus: Prometheus
    instance: str

    def step(self, session_id: str, t: int) -> pb.StepResponse:
        return self.stub.Step(pb.StepRequest(session_id=session_id, t=t, x=X))

    def value(self, name: str, **labels: str) -> float:
        """A series now, those of all models together; NaN, which equals nothing, if there is none.

        There is none for a moment when a scrape failed on a busy machine.
        """
        wanted = {"instance": self.instance, **labels}
        selector = ", ".join(f'{label}="{value}"' for label, value in wanted.items())
        found = self.prometheus.value(f"sum({name}{{{selector}}})")
        return math.nan if found is None else found


@contextmanager
def watched(prometheus: Prometheus, server: ServerProcess) -> Iterator[Watched]:
    with grpc.insecure_channel(server.address) as channel:
        yield Watched(StepstateServiceStub(channel), prometheus, instance(server))


def opening(session_id: str, durability: pb.Durability = pb.DURABILITY_ASYNC):
    return pb.OpenSessionRequest(session_id=session_id, model="lstm", durability=durability)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two servers on one file."""

    first: Watched
    """Has few slots, and lost the session "s0" to the other."""
    second: Watched


@pytest.fixture(scope="module")
def pair(model_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """After the first stepped five sessions in turn, and fought with the second about one."""
    folder = tmp_path_factory.mktemp("pair")
    shared = ("--models", str(model_root), "--store", f"sqlite:{folder}/sessions.db", *OFTEN)
    with ExitStack() as stack:
        small = stack.enter_context(server_process(*shared, "--slots", str(SLOTS)))
        other = stack.enter_context(server_process(*shared))
        prometheus = stack.enter_context(running_prometheus(folder, small, other))
        prometheus.scrape()
        first, second = (
            stack.enter_context(watched(prometheus, server)) for server in (small, other)
        )
        for number in range(SESSIONS):
            first.stub.OpenSession(opening(f"s{number}"))
        for t in range(ROUNDS):
            for number in range(SESSIONS):
                assert first.step(f"s{number}", t).t == t + 1
        fight(first, second)
        prometheus.scrape()
        # The count of what is in the store is some seconds old.
        eventually(lambda: sessions(first)["spilled"] + sessions(first)["resident"] == SESSIONS)
        yield Pair(first, second)


def fight(first: Watched, second: Watched) -> None:
    """The second server takes a session that the first has in memory, and steps it."""
    first.step("s0", ROUNDS)
    saved = first.value("stepstate_snapshots_total")
    eventually(lambda: first.value("stepstate_snapshots_total") > saved)
    second.step("s0", ROUNDS + 1)
    first.step("s0", ROUNDS + 1)  # by its old copy, and not saved: the other has the lease
    eventually(lambda: first.value("stepstate_snapshot_failures_total", reason="fenced") == 1)


def sessions(server: Watched) -> dict[str, float]:
    return {
        residency: server.value("stepstate_sessions", residency=residency)
        for residency in ("resident", "spilled")
    }


def test_sessions_beyond_the_slots_are_spilled(pair: Pair) -> None:
    found = sessions(pair.first)
    assert 0 < found["resident"] <= SLOTS
    assert found["spilled"] >= SESSIONS - SLOTS


def test_every_session_that_came_into_memory_left_it_or_is_there(pair: Pair) -> None:
    spills, restores, fenced = (
        pair.first.value(name)
        for name in (
            "stepstate_session_spills_total",
            "stepstate_session_restores_total",
            "stepstate_snapshot_failures_total",
        )
    )
    assert restores >= ROUNDS * (SESSIONS - SLOTS) - SLOTS
    assert SESSIONS + restores - spills - fenced == sessions(pair.first)["resident"]


def test_a_session_taken_from_another_server_is_a_takeover(pair: Pair) -> None:
    assert pair.second.value("stepstate_session_takeovers_total") == 1
    assert pair.second.value("stepstate_session_restores_total") == 1
    assert pair.first.value("stepstate_session_takeovers_total") == 0


def test_the_server_that_lost_it_counts_what_it_could_not_save(pair: Pair) -> None:
    assert pair.first.value("stepstate_snapshot_failures_total", reason="fenced") == 1
    assert pair.first.value("stepstate_snapshot_failures_total", reason="failed") == 0
    assert pair.second.value("stepstate_snapshot_failures_total") == 0


def test_snapshots_have_bytes_and_take_time(pair: Pair) -> None:
    count = pair.first.value("stepstate_snapshots_total")
    assert count >= SESSIONS
    layers, hidden, float_bytes = 2, 16, 4
    state_bytes = 2 * layers * hidden * float_bytes
    assert pair.first.value("stepstate_snapshot_bytes_total") > SESSIONS * state_bytes
    groups = pair.first.value("stepstate_snapshot_seconds_count")
    assert 0 < groups <= count
    assert 0 < pair.first.value("stepstate_snapshot_seconds_sum") < 60
    assert pair.first.value("stepstate_snapshot_seconds_bucket", le="+Inf") == groups


def test_both_reach_their_store_and_nothing_waits_for_it(pair: Pair) -> None:
    for server in (pair.first, pair.second):
        assert server.value("stepstate_store_up") == 1
        assert server.value("stepstate_snapshot_backlog_rows") == 0


def test_a_store_that_goes_away_and_comes_back_is_seen(model_root: Path, tmp_path: Path) -> None:
    place, away = tmp_path / "store", tmp_path / "away"
    place.mkdir()
    options = ("--models", str(model_root), "--store", f"sqlite:{place}/sessions.db", *OFTEN)
    with (
        server_process(*options) as process,
        running_prometheus(tmp_path, process) as prometheus,
        watched(prometheus, process) as server,
    ):
        prometheus.scrape()
        server.stub.OpenSession(opening("async"))
        server.stub.OpenSession(opening("sync", pb.DURABILITY_SYNC))
        assert server.step("sync", 0).durable_t == 1

        place.rename(away)
        eventually(lambda: server.value("stepstate_store_up") == 0)
        for t in range(3):
            assert server.step("async", t).t == t + 1
        eventually(lambda: server.value("stepstate_snapshot_backlog_rows") == 3)
        eventually(lambda: server.value("stepstate_snapshot_failures_total", reason="failed") > 0)
        with pytest.raises(grpc.RpcError) as refused:
            server.step("sync", 1)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        eventually(lambda: prometheus.value('ALERTS{alertname="StepstateStoreAway"}') == 1)

        away.rename(place)
        eventually(lambda: server.value("stepstate_store_up") == 1)
        eventually(lambda: server.value("stepstate_snapshot_backlog_rows") == 0)
        assert server.step("sync", 1).durable_t == 2
