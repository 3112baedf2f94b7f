"""docs/benchmarks.md: its commands are ones, its figures were measured, its pictures are drawn."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from benchmarks import page, pictures, tables
from benchmarks.cli import main
from tests.markdown import ROOT, blocks_of, run_shell

PAGE = ROOT / "docs" / "benchmarks.md"
LINES = [line for _, block in blocks_of(PAGE) for line in block.splitlines()]
RUN_BY_HAND = ("make benchmarks",)  # sets up an environment of its own, and measures for minutes
SHORT = (
    "python -m benchmarks --sessions 1,16 --seconds 1 --rounds 1",
    "python -m benchmarks --help",
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """What writes the page, drawing into a temporary folder."""
    monkeypatch.setattr(pictures, "IMAGES", tmp_path)
    return page


@pytest.mark.long
@pytest.mark.parametrize("line", SHORT)
def test_what_is_short_runs_and_prints(line: str, tmp_path: Path):
    assert line in LINES
    done = run_shell(f"cd {ROOT}; {line}", "", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.long
@pytest.mark.parametrize("line", [one for one in LINES if one not in (*RUN_BY_HAND, *SHORT)])
def test_what_takes_minutes_has_options_that_are_taken(line: str, tmp_path: Path):
    python, dash_m, package, *options = shlex.split(line)
    assert (python, dash_m, package) == ("python", "-m", "benchmarks")
    # Told only when all options are understood, and before anything is measured.
    done = CliRunner().invoke(main, [*options, "--json", f"{tmp_path}/missing/out"])
    assert done.exit_code == 2
    assert "/missing/out' does not exist" in re.sub(r"[\s│]+", " ", done.stderr)


def test_every_command_is_the_one_that_was_measured(script: ModuleType):
    named = re.findall(r"<!-- table (\w+) -->", PAGE.read_text())
    assert sorted(named) == sorted(script.RUNS)
    for name, options in script.RUNS.items():
        assert f"python -m benchmarks {options}" in LINES
        path = tables.MEASURED / f"{name}.json"
        if path.exists():
            assert f"benchmarks {options.split()[0]}" in json.loads(path.read_text())["command"]


def test_every_table_is_as_it_was_measured(script: ModuleType):
    page = PAGE.read_text()
    assert script.rendered(page) == page
    first = next(line for line in page.splitlines() if line.startswith("|  "))
    assert script.rendered(page.replace(first, "| 1 | 2 |")) == page


def test_the_table_of_the_readme_is_as_it_was_measured(script: ModuleType):
    readme = script.README.read_text()
    assert script.with_figures(readme) == readme
    assert script.with_figures(readme.replace("| 512 |", "| 1 |", 1)) == readme


def test_every_picture_can_be_drawn(script: ModuleType, tmp_path: Path):
    script.draw()
    drawn = {path.name for path in tmp_path.iterdir()}
    names = ("transports", "paths", "latency", "scale")
    assert drawn == {f"bench-{name}.svg" for name in names}
    assert all(f"images/{name}" in PAGE.read_text() for name in drawn)


def test_what_was_not_measured_is_not_told(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    some = tmp_path / "some"
    shutil.copytree(tables.MEASURED, some)
    (some / "scale.json").unlink()
    monkeypatch.setattr(tables, "MEASURED", some)
    assert "<!-- table scale -->\nNot measured yet.\n<!-- end -->" in script.rendered(
        PAGE.read_text()
    )
