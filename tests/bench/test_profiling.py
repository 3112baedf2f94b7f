"""The profile by part: what it names exists, and a server's time is found in every part."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.cpp import MissingTools, build_programs
from benchmarks.parts import LOOP, PARTS, Frame, part_of
from tests.markdown import ROOT

PACKAGE = ROOT / "service" / "stepstate"
PLACES = [place for places in PARTS.values() for place in places]


def names_in(node: ast.AST, outer: str = "") -> Iterator[str]:
    """Classes and functions, each with those that it is in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield outer + child.name
            yield from names_in(child, f"{outer}{child.name}.")
        else:
            yield from names_in(child, outer)


@pytest.mark.parametrize("place", PLACES)
def test_every_place_that_a_part_names_exists(place: str):
    file, _, name = place.partition(": ")
    assert (PACKAGE / file).is_dir() if file.endswith("/") else (PACKAGE / file).is_file()
    assert not name or name in names_in(ast.parse((PACKAGE / file).read_text()))


def test_no_place_belongs_to_two_parts():
    assert len(PLACES) == len(set(PLACES))


@pytest.mark.parametrize(
    ("stack", "part"),
    [
        ([("h2grpc/server.py", "_ServerProtocol.data_received")], "frames"),
        ([("h2grpc/server.py", "_ServerProtocol._flush")], "write"),
        (
            [("h2grpc/call.py", "Call.message"), ("transport/bidi.py", "BidiStream._pause")],
            "checks",
        ),
        ([("transport/parts.py", "parser.parse")], "decode"),
        ([("engine/linear.py", "Linear.into"), ("budget.py", "any")], "forward"),
        ([("cli/serve.py", "_run")], LOOP),
        ([], LOOP),
    ],
)
def test_the_narrowest_place_of_the_innermost_function_counts(
    stack: list[tuple[str, str]], part: str
):
    found, _ = part_of([Frame(*one) for one in stack])
    assert found == part


@pytest.mark.long
def test_a_server_is_profiled_while_it_steps(tmp_path: Path):
    try:
        build_programs()
    except MissingTools as missing:
        pytest.skip(f"MISSING PROGRAM: {missing}; .ci/run installs them")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks", "profile", "--model", "bench-gru"]
    loads = ["--sessions", "16", "--connections", "2", "--callers", "2", "--packed-rows", "4"]
    done = subprocess.run(
        [*command, *loads, "--seconds", "1", "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    if "Permission" in done.stderr:
        pytest.skip("MISSING PERMISSION: processes may not be traced here")
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    loads = ["16 streams", "2 connections", "2 callers of Step", "packed, 4 rows"]
    assert [found["load"] for found in results] == loads
    for found in results:
        assert sum(found["parts"].values()) == pytest.approx(found["cpu_us_per_step"])
        assert found["parts"]["forward"] > 0
        assert found["rows_per_forward"] is None or 1 <= found["rows_per_forward"] <= 16
    seen = {part for found in results for part, us in found["parts"].items() if us}
    assert {"frames", "forward", "write"} <= seen
