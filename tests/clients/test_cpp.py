"""gRPC's C++ library as a client: the load generator of the benchmarks, whose steps are checked."""

from __future__ import annotations

import subprocess
import time
from uuid import uuid4

import grpc
import numpy as np
import pytest

from benchmarks.cpp import CppPrograms, MissingTools, build_programs
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.wire import TOLERANCE, draw, opening
from tests.networks import Network
from tests.processes import ServerProcess

pytestmark = pytest.mark.long  # it is compiled, for a minute


@pytest.fixture(scope="module")
def programs() -> CppPrograms:
    try:
        return build_programs()
    except MissingTools as missing:
        pytest.skip(f"MISSING PROGRAM: {missing}; .ci/run installs it")


@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("kind", ["stream", "unary"])
def test_it_steps_sessions_as_offline(
    served: ServerProcess,
    programs: CppPrograms,
    networks: dict[str, Network],
    kind: str,
    connections: int,
):
    """Each reply's id and t are checked by the program, its last output here."""
    rows = {f"{uuid4().hex}": row for row in draw(8)}
    with grpc.insecure_channel(served.address) as channel:
        for name in rows:
            StepstateServiceStub(channel).OpenSession(opening(session_id=name))
    with subprocess.Popen(
        [str(programs.load), served.address, kind, str(connections)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as load:
        for name, row in rows.items():
            load.stdin.write(f"{name} {' '.join(str(float(value)) for value in row)}\n")
        load.stdin.write("\n")
        load.stdin.flush()
        assert load.stdout.readline().strip() == "ready"
        now = time.monotonic()
        printed, _ = load.communicate(f"{now} {now} {now + 0.3}\n", timeout=60)
    assert load.returncode == 0
    sessions = [line.split() for line in printed.partition("\n\n")[0].splitlines()]
    assert {name for name, _, _ in sessions} == set(rows)
    for name, t, first_output in sessions:
        assert int(t) > 1
        expected = networks["lstm"].offline(np.tile(rows[name], (int(t), 1)))[-1, 0]
        assert abs(float(first_output) - expected) < TOLERANCE
