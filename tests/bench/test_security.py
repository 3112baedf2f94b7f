"""`python -m benchmarks security`: every protection is measured, with a client that gets in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SHORT = "--sessions 2 --connections 2 --callers 2 --packed-rows 4 --rounds 1 --warm-up 0.1"
EVERYONE = {"none", "tokens and limits", "JWT", "TLS", "mutual TLS"}


@pytest.mark.long
def test_every_protection_is_measured_under_every_load(tmp_path: Path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks", "security", *SHORT.split()]
    done = subprocess.run(
        [*command, "--seconds", "0.2", "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    loads = {"2 streams", "packed, 4 rows", "2 connections", "2 callers of Step"}
    assert {one["load"] for one in results} == loads
    for one in results:
        assert set(one["rounds"]) == EVERYONE
        assert all(measured["steps"] > 0 for (measured,) in one["rounds"].values())
