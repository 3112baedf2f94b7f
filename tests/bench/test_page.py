"""docs/benchmarks.md: its commands are ones, its figures were measured, its pictures are drawn."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from stepstate.cli import main
from tests.markdown import ROOT, blocks_of, run_shell

PAGE = ROOT / "docs" / "benchmarks.md"
LINES = [line for _, block in blocks_of(PAGE) for line in block.splitlines()]
RUN_BY_HAND = ("make benchmarks",)  # sets up an environment of its own, and measures for minutes
SHORT = ("stepstate bench --sessions 1,16 --seconds 1 --rounds 1", "stepstate bench --help")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """docs/benchmarks.py, which draws into a temporary folder."""
    spec = importlib.util.spec_from_file_location("benchmarks", PAGE.with_suffix(".py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "IMAGES", tmp_path)
    return module


@pytest.mark.parametrize("line", SHORT)
def test_what_is_short_runs_and_prints(line: str, tmp_path: Path):
    assert line in LINES
    done = run_shell(line, "", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("line", [one for one in LINES if one not in (*RUN_BY_HAND, *SHORT)])
def test_what_takes_minutes_has_options_that_are_taken(line: str, tmp_path: Path):
    program, *options = shlex.split(line)
    assert program == "stepstate"
    # Told only when all options are understood, and before anything is measured.
    done = CliRunner().invoke(main, [*options, "--json", f"{tmp_path}/missing/out"])
    assert done.exit_code == 2
    assert "/missing/out' does not exist" in re.sub(r"[\s│]+", " ", done.stderr)


def test_every_command_is_the_one_that_was_measured(script: ModuleType):
    named = re.findall(r"<!-- table (\w+) -->", PAGE.read_text())
    assert sorted(named) == sorted(script.RUNS)
    for name, options in script.RUNS.items():
        assert f"stepstate bench {options}" in LINES
        path = script.MEASURED / f"{name}.json"
        if path.exists():
            assert f"bench {options.split()[0]}" in json.loads(path.read_text())["command"]


def test_every_table_is_as_it_was_measured(script: ModuleType):
    page = PAGE.read_text()
    assert script.rendered(page) == page
    first = next(line for line in page.splitlines() if line.startswith("|  "))
    assert script.rendered(page.replace(first, "| 1 | 2 |")) == page


def test_every_picture_can_be_drawn(script: ModuleType, tmp_path: Path):
    script.draw()
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"bench-paths.svg", "bench-latency.svg", "bench-scale.svg"}
    assert all(f"images/{name}" in PAGE.read_text() for name in drawn)


def test_what_was_not_measured_is_not_told(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    some = tmp_path / "some"
    shutil.copytree(script.MEASURED, some)
    (some / "scale.json").unlink()
    monkeypatch.setattr(script, "MEASURED", some)
    assert "<!-- table scale -->\nNot measured yet.\n<!-- end -->" in script.rendered(
        PAGE.read_text()
    )
