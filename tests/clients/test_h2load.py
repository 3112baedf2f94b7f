"""h2load, nghttp2's load generator, makes unary calls."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import grpc
import pytest

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.clients.http2 import framed
from tests.integration.wire import STEP, draw, opening, request
from tests.processes import ServerProcess

pytestmark = pytest.mark.long  # a load generator at work

ROWS = 300
"""Of a request: its reply takes 2,400 bytes, more than the smallest window."""


@pytest.mark.parametrize(
    ("connections", "streams"), [(1, 1), (1, 100), (50, 10)], ids=["one", "streams", "connections"]
)
@pytest.mark.parametrize("window_bits", [10, 16, 30])
def test_every_call_is_answered(
    *,
    served: ServerProcess,
    tool: Callable[[str, str], str],
    run: Callable[..., str],
    tmp_path: Path,
    connections: int,
    streams: int,
    window_bits: int,
):
    """The session has as many rows as were sent: none was lost, and none applied twice."""
    rows, count = (ROWS, 200) if window_bits == 10 else (1, 1_500 if streams > 1 else 100)
    name = uuid4().hex
    body = tmp_path / "body"
    body.write_bytes(framed(request(name, None, draw(rows))))
    with grpc.insecure_channel(served.address) as channel:
        stub = StepstateServiceStub(channel)
        stub.OpenSession(opening(session_id=name))
        printed = run(
            tool("h2load", "apt-get install nghttp2-client"),
            *("-n", count, "-c", connections, "-m", streams, "-w", window_bits, "-W", window_bits),
            *("-H", "content-type: application/grpc", "-H", "te: trailers", "-d", body),
            f"http://{served.address}{STEP}",
        )
        session = stub.GetSession(pb.GetSessionRequest(session_id=name)).session
    assert f"{count} done, {count} succeeded, 0 failed, 0 errored, 0 timeout" in printed
    assert re.search(rf"^status codes: {count} 2xx, 0 3xx, 0 4xx, 0 5xx$", printed, re.MULTILINE)
    assert session.t == count * rows
