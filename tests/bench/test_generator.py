"""The load generator in C++: sessions that it steps are as they must be, and it tells what fails.

The servers are real; the load takes a second.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest

from benchmarks import BenchError, cpp
from benchmarks.cpp import CppPrograms, MissingTools, build_programs
from benchmarks.generator import CppGenerator
from benchmarks.load import CallPath, Kind, Load, Sample
from benchmarks.models import INPUTS, NAME, write_bench_model
from benchmarks.runner import window_from_now
from benchmarks.servers import running_floor
from benchmarks.templates import StepTemplate
from stepstate.client import Client
from stepstate.v1 import stepstate_pb2 as pb
from tests.processes import server_process

NAMES = [f"s{number}" for number in range(6)]
X = np.random.default_rng(5).standard_normal((len(NAMES), INPUTS)).astype(np.float32)


@pytest.fixture(scope="module")
def programs() -> CppPrograms:
    try:
        return build_programs()
    except MissingTools as missing:
        pytest.skip(f"MISSING PROGRAM: {missing}; .ci/run installs them")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_bench_model(folder)
    return folder


def load(target: str, path: CallPath, names: list[str], connections: int = 1) -> Load:
    return Load(Kind.STEP, path, target, names, X[: len(names)], connections=connections)


def sent(generator: CppGenerator, asked: Load, seconds: float = 0.5) -> Sample:
    generator.prepare([asked])
    generator.send(window_from_now(0.2, seconds))
    (sample,) = generator.collect()
    return sample


@pytest.mark.long
@pytest.mark.parametrize("transport", ["lean", "grpcio"])
@pytest.mark.parametrize(
    ("path", "connections"),
    [(CallPath.STREAM, 1), (CallPath.STREAM, 3), (CallPath.UNARY, 2)],
    ids=["stream", "connections", "unary"],
)
def test_it_steps_each_session_once_for_each_reply(
    programs: CppPrograms, models: Path, transport: str, path: CallPath, connections: int
):
    with (
        server_process("--models", str(models), "--transport", transport) as server,
        Client(server.address) as client,
        CppGenerator(programs.load) as generator,
    ):
        for name in NAMES:
            client.open(NAME, session_id=name)
        sample = sent(generator, load(server.address, path, NAMES, connections))
        assert [last.session_id for last in generator.last_replies] == NAMES
        for last, x in zip(generator.last_replies, X, strict=True):
            assert client.info(last.session_id).t == last.t
            with client.open(NAME) as same:
                y = same.step(np.tile(x, (last.t, 1)), last_only=True)
            assert last.y == pytest.approx(y.ravel()[0], abs=1e-5)
    steps = sum(last.t for last in generator.last_replies)
    assert 0 < sample.replies == len(sample.latencies) == len(sample.since) < steps
    assert (sample.latencies > 0).all()
    assert sample.since.max() - sample.since.min() < 1.0


@pytest.mark.long
@pytest.mark.parametrize("path", [CallPath.STREAM, CallPath.UNARY])
def test_a_step_that_is_refused_is_told(programs: CppPrograms, models: Path, path: CallPath):
    with (
        server_process("--models", str(models)) as server,
        CppGenerator(programs.load) as generator,
        pytest.raises(BenchError, match="'nobody' is unknown"),
    ):
        generator.prepare([load(server.address, path, ["nobody"])])


@pytest.mark.long
def test_a_server_that_ends_is_told(programs: CppPrograms):
    with (
        running_floor(programs.floor) as floor,
        CppGenerator(programs.load) as generator,
    ):
        generator.prepare([load(floor.address, CallPath.STREAM, NAMES)])
        generator.send(window_from_now(0.0, 20.0))
        killer = threading.Timer(0.5, floor.kill)
        killer.start()
        with pytest.raises(BenchError, match="a stream ended"):
            generator.collect()
        killer.join()


@pytest.mark.long
def test_a_generator_that_was_begun_ends_with_its_context(programs: CppPrograms):
    with running_floor(programs.floor) as floor:
        started = time.monotonic()
        with CppGenerator(programs.load) as generator:
            generator.prepare([load(floor.address, CallPath.STREAM, NAMES)])
            generator.send(window_from_now(0.0, 60.0))
        assert time.monotonic() - started < 30


@pytest.mark.long
def test_the_floor_answers_as_a_server_does(programs: CppPrograms):
    with running_floor(programs.floor) as floor, grpc.insecure_channel(floor.address) as channel:
        step = channel.unary_unary("/stepstate.v1.StepstateService/Step")
        template = StepTemplate("any", X[0])
        for _ in range(3):
            template.check(Kind.STEP, step(template.request()))
        request = pb.StepRequest(session_id="any", t=7, x=X[1])
        reply = pb.StepResponse.FromString(step(request.SerializeToString()))
        assert reply == pb.StepResponse(session_id="any", t=8, durable_t=7, y=[X[1][0]])


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpp.shutil, "which", lambda name: None if name == "protoc" else name)
    monkeypatch.setattr(cpp, "_fails", lambda *_: True)
    with pytest.raises(MissingTools, match="install protobuf-compiler libgrpc\\+\\+-dev"):
        build_programs()
