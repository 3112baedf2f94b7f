"""Connections on which anything comes: nothing is raised, nothing is left, each call ends once."""

from __future__ import annotations

import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.program import Program
from tests.hypothesis_profiles import examples

SECONDS = 60
ROOT = Path(__file__).parent.parent.parent


@examples(300)
@given(st.integers(0, 2**32), st.integers(0, 3000))
def test_whatever_comes_each_call_ends_once_and_nothing_is_left(seed: int, size: int) -> None:
    Program(random.Random(seed).randbytes(size)).run()


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 120)
def test_a_minute_of_fuzzing_finds_nothing() -> None:
    if find_spec("atheris") is None:
        pytest.skip("MISSING PROGRAM: atheris; make setup installs it where it is to be had")
    command = [sys.executable, "-m", "tests.fuzz", str(SECONDS)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-5000:]
    assert "Done" in run.stderr
