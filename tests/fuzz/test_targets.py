"""All that decodes bytes from outside: whatever comes, it is read or refused in words.

A fault that was found becomes an input in `FOUND`, which every run repeats.
"""

from __future__ import annotations

import importlib
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.connection import run_connection
from tests.fuzz.credentials import certificate_seed
from tests.fuzz.target import Target
from tests.hypothesis_profiles import examples

SECONDS = 30
"""Two processes at once make a minute of it."""
ROOT = Path(__file__).parent.parent.parent
MODULES = [f"tests.fuzz.{name}" for name in ("connection", "calls", "credentials", "files")]
VERSION_3, VERSION_123 = b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x7a"
UTF8, BITS = b"\x0c\x07meter-1", b"\x03\x07\x00eter-1"
FOUND = {
    "certificate": [
        certificate_seed().replace(*change) for change in ((VERSION_3, VERSION_123), (UTF8, BITS))
    ]
}
"""By target, inputs that once failed."""


def targets() -> dict[str, Target]:
    found: dict[str, Target] = {}
    for module in MODULES:
        found |= importlib.import_module(module).TARGETS
    return found


TARGETS = targets()


@examples(300)
@given(st.integers(0, 2**32), st.integers(0, 3000))
def test_whatever_comes_each_call_ends_once_and_nothing_is_left(seed: int, size: int) -> None:
    run_connection(random.Random(seed).randbytes(size))


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_right_and_what_was_found_is_taken(name: str) -> None:
    for data in (*TARGETS[name].seeds, *FOUND.get(name, ()), b""):
        TARGETS[name].run(data)


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "connection"])
@examples(60)
@given(data=st.data())
def test_whatever_is_changed_in_it_is_read_or_refused(name: str, data: st.DataObject) -> None:
    """Some bytes of a seed are replaced, left out, or come twice."""
    target = TARGETS[name]
    changed = bytearray(data.draw(st.sampled_from(target.seeds)))
    for _ in range(data.draw(st.integers(1, 4))):
        first = data.draw(st.integers(0, len(changed)))
        last = data.draw(st.integers(first, min(first + 8, len(changed))))
        changed[first:last] = data.draw(st.binary(max_size=8) | st.just(changed[:last] or b"0"))
    target.run(bytes(changed))


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 240)
def test_a_minute_of_fuzzing_finds_nothing() -> None:
    if find_spec("atheris") is None:
        pytest.skip("MISSING PROGRAM: atheris; make setup installs it where it is to be had")
    command = [sys.executable, "-m", "tests.fuzz", str(SECONDS)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert run.stdout.count("nothing found") == len(TARGETS)
