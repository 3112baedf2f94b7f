"""`python -m benchmarks transports`: everyone takes part, and nobody waits for what is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cpp import MissingTools, build_programs
from tests.markdown import ROOT

pytestmark = pytest.mark.long  # measures real servers

SHORT = (
    "--sessions 1,2 --connections 2 --callers 2 --packed-rows 4 --sequences 2 --beside 2 "
    "--rounds 1 --seconds 0.4 --warm-up 0.2"
)
STEPPING = {"Stepstate lean", "Stepstate grpcio"}
BESIDE = {
    "2 streams, durability async": {"Stepstate lean", "Stepstate lean, sqlite"},
    "2 streams, GRU": {"Stepstate lean"},
    "2 streams, 12 layers": {"Stepstate lean"},
    "2 streams, 8 lags": {"Stepstate lean"},
    "2 streams, 24 horizons, tracked": {"Stepstate lean"},
}
ECHOES = {"grpc.aio echo", "lean echo"}


def measure(
    tmp_path: Path, *options: str, path: str | None = None
) -> tuple[str, dict[str, object]]:
    """What it prints, and what takes part in each load."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks", "transports", *SHORT.split(), *options]
    done = subprocess.run(
        [*command, "--json", str(out)],
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


def test_measures_everyone_under_every_load(tmp_path: Path):
    try:
        build_programs()
    except MissingTools as missing:
        pytest.skip(f"MISSING PROGRAM: {missing}; .ci/run installs them")
    told, found = measure(tmp_path, "--other", str(ROOT))
    stepping = STEPPING | {"other commit"}
    everyone = stepping | ECHOES | {"C++ echo"}
    assert found.pop("packed, 4 rows") == stepping | {"bare forward of 4"}
    if "perf_analyzer is left out" not in told:
        assert found.pop("perf_analyzer, 2 sequences") == stepping
    saved = "2 streams, durability async"
    assert found.pop(saved) == BESIDE[saved]
    for load in BESIDE.keys() - {saved}:
        assert found.pop(load) == {"Stepstate lean", "other commit"}
    assert found == {
        "1 stream": everyone | {"bare forward of 1"},
        "2 streams": everyone | {"bare forward of 2"},
        "2 connections": everyone | {"bare forward of 2"},
        "2 callers of Step": everyone | {"bare forward of 2"},
    }
    assert "rate ÷ C++ echo's" in told
    assert "1 stream | Stepstate lean ÷ C++ echo | " in re.sub(" +", " ", told)


def test_without_a_compiler_and_git_the_rest_takes_part(tmp_path: Path):
    told, found = measure(tmp_path, path="")
    assert "can't be built: install g++" in told
    assert "no commit that git finds here: nothing is compared with its server" in told
    assert "rate ÷ grpc.aio echo's" in told
    assert found["2 connections"] == STEPPING | ECHOES | {"bare forward of 2"}
    assert {load: found[load] for load in BESIDE} == BESIDE
