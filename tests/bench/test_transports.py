"""`python -m benchmarks transports`: everything takes part, in C++ and without a compiler."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cpp import MissingTools, build_programs

pytestmark = pytest.mark.long  # measures real servers

SHORT = "--sessions 1,2 --connections 2 --callers 2 --packed-rows 4 --sequences 2 --rounds 1"
STEPPING = {"Stepstate lean", "Stepstate grpcio"}
ECHOES = {"grpc.aio echo", "lean echo"}


def measure(
    tmp_path: Path, *options: str, path: str | None = None
) -> tuple[str, dict[str, object]]:
    """What it prints, and what takes part in each load."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks", "transports", *SHORT.split(), *options]
    done = subprocess.run(
        [*command, "--seconds", "0.5", "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=None if path is None else {"PATH": path},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    for found in results:
        for (one,) in found["rounds"].values():
            assert one["steps"] > 0
            assert one["steps_per_second"] > 0
    return done.stdout + done.stderr, {one["load"]: set(one["rounds"]) for one in results}


def test_measures_every_transport_and_echo_under_every_load(tmp_path: Path):
    try:
        build_programs()
    except MissingTools as missing:
        pytest.skip(f"MISSING PROGRAM: {missing}; .ci/run installs them")
    told, found = measure(tmp_path)
    everyone = STEPPING | ECHOES | {"C++ echo"}
    assert found.pop("packed, 4 rows") == STEPPING | {"bare forward of 4"}
    if "perf_analyzer is left out" not in told:
        assert found.pop("perf_analyzer, 2 sequences") == STEPPING
    assert found == {
        "1 stream": everyone | {"bare forward of 1"},
        "2 streams": everyone | {"bare forward of 2"},
        "2 connections": everyone | {"bare forward of 2"},
        "2 callers of Step": everyone | {"bare forward of 2"},
    }
    assert "rate ÷ C++ echo's" in told


def test_without_a_compiler_the_client_is_in_python(tmp_path: Path):
    told, found = measure(tmp_path, path="")
    assert "can't be built: install g++" in told
    assert "rate ÷ grpc.aio echo's" in told
    assert found["2 connections"] == STEPPING | ECHOES | {"bare forward of 2"}
