"""Very many sessions, over a real server and real client processes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import grpc
import pytest

from benchmarks import BenchError
from benchmarks.clients import Clients, running_clients
from benchmarks.idle import IdleSessions
from benchmarks.procstat import counters, series
from benchmarks.servers import ServerProcess, bench_folder, running_stepstate
from benchmarks.sessions import SessionOptions
from stepstate.metrics.pages import SHARED_SECONDS
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub

pytestmark = pytest.mark.long  # hundreds of sessions from processes of their own


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with bench_folder() as folder, running_stepstate(folder, "memory:") as running:
        yield running


@pytest.fixture(scope="module")
def clients() -> Iterator[Clients]:
    with running_clients(2) as running:
        yield running


def sessions(server: ServerProcess) -> dict[str, int]:
    """t of every open session."""
    with grpc.insecure_channel(server.address) as channel:
        stub, found, token = StepstateServiceStub(channel), {}, ""
        while True:
            page = stub.ListSessions(pb.ListSessionsRequest(page_size=1_000, page_token=token))
            found |= {session.session_id: session.t for session in page.sessions}
            token = page.next_page_token
            if not token:
                return found


@pytest.mark.parametrize("count", [3, 512, 1_100])
def test_every_session_is_opened_stepped_and_closed(
    server: ServerProcess, clients: Clients, count: int
):
    idle = IdleSessions(count, server.address, clients)
    assert idle.open(SessionOptions()) > 0
    assert sessions(server) == dict.fromkeys(idle.names, 0)
    idle.step()
    stepped = sessions(server)
    assert set(stepped) == set(idle.names)
    assert min(stepped.values()) >= 1
    assert series(server.metrics_url, "stepstate_sessions", residency="resident") == count
    first = idle.first(2)
    first.close()
    assert set(sessions(server)) == set(idle.names) - set(first.names)
    time.sleep(SHARED_SECONDS)
    closed = counters(server.metrics_url)["stepstate_sessions_closed_total"]
    rest = idle.first(count)
    rest.names = idle.names[2:]
    rest.close()
    assert sessions(server) == {}
    time.sleep(SHARED_SECONDS)
    assert counters(server.metrics_url)["stepstate_sessions_closed_total"] == closed + count - 2


def test_sessions_expire_at_one_moment(server: ServerProcess, clients: Clients):
    before = series(server.metrics_url, "stepstate_sessions_closed_total", reason="expired")
    moment = time.monotonic() + 2.0
    IdleSessions(40, server.address, clients).open(SessionOptions(expires_at=moment))
    deadline = moment + 30
    while series(server.metrics_url, "stepstate_sessions_closed_total", reason="expired") < (
        before + 40
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert time.monotonic() > moment


def test_a_refusal_is_told(server: ServerProcess):
    with running_clients(1) as clients:
        idle = IdleSessions(1, server.address, clients)
        with pytest.raises(BenchError, match=r"a client failed: a call failed: .*is unknown"):
            idle.close()
