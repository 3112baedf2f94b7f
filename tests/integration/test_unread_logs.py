"""Standard error may be a pipe that nobody reads: a stopped collector, a terminal on hold."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.processes import ServerProcess, server_process

REFUSED = 1_000
STEPS = 20
STOP_SECONDS = 20.0
"""Only a stop that hangs takes this long."""


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A FIFO that holds one page, and its end for reading."""
    path = tmp_path / "stderr"
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, 4096)
    yield path, reading
    os.close(reading)


def _dropped(server: ServerProcess) -> float:
    """Log lines that the server says it did not write."""
    with urlopen(server.metrics_url) as page:
        found = re.findall(
            r"^stepstate_log_lines_dropped_total\S* (\S+)$", page.read().decode(), re.MULTILINE
        )
    return sum(map(float, found))


def _refuse(stub: StepstateServiceStub, times: int) -> None:
    """Sends requests that are refused, for three reasons."""
    calls = []
    for number in range(times):
        names = ("no-such-session", "known", "not a session id")
        t = None if number % 3 == 0 else 99
        calls.append(
            stub.Step.future(pb.StepRequest(session_id=names[number % 3], t=t, x=[0.0] * 3))
        )
        if len(calls) == 100 or number == times - 1:
            assert all(call.exception() for call in calls)
            calls = []


def _use(server: ServerProcess) -> None:
    """Thousands of requests are refused, and steps are answered meanwhile."""
    with grpc.insecure_channel(server.address) as channel:
        stub = StepstateServiceStub(channel)
        stub.OpenSession(pb.OpenSessionRequest(session_id="known", model="lstm"))
        for t in range(STEPS):
            _refuse(stub, REFUSED // STEPS)
            reply = stub.Step(pb.StepRequest(session_id="known", t=t, x=[0.0] * 3), timeout=10)
            assert reply.t == t + 1


def test_a_pipe_that_nobody_reads_stops_neither_steps_nor_the_end(
    model_root: Path, pipe: tuple[Path, int]
):
    path, reading = pipe
    with server_process("--models", str(model_root), log=path) as server:
        _use(server)
        assert _dropped(server) > REFUSED / 2
        server.process.terminate()
        assert server.process.wait(timeout=STOP_SECONDS) == 0
    assert 0 < len(os.read(reading, 2**20)) <= 4096


def test_what_could_not_be_written_is_written_once_the_pipe_is_read(
    model_root: Path, pipe: tuple[Path, int]
):
    """The last lines too, and how many were left out."""
    path, reading = pipe
    with server_process("--models", str(model_root), "--log-format", "json", log=path) as server:
        _use(server)
        dropped = _dropped(server)
        os.set_blocking(reading, True)
        server.process.terminate()
        data = b""
        while more := os.read(reading, 2**16):
            data += more
    lines = [json.loads(line) for line in data.splitlines()]
    assert lines[-1]["event"] == "stopped" or "left out" in lines[-1]["event"]
    assert "stopped" in [line["event"] for line in lines]
    left_out = [re.match(r"(\d+) more lines", line["event"]) for line in lines]
    assert sum(int(match[1]) for match in left_out if match) == dropped
