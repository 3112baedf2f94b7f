"""Every command and code block of the README runs as it stands there."""

from __future__ import annotations

import pytest

from tests.markdown import ROOT, blocks_of, dead_links, run_python, run_shell
from tests.processes import server_process

README = ROOT / "README.md"
BLOCKS = blocks_of(README)
RUN_BY_CI = ("make demo",)  # sets up an environment of its own; .ci/run runs it


@pytest.fixture(scope="module")
def address():
    with server_process("--models", str(ROOT / "models")) as server:
        yield server.address


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


@pytest.mark.parametrize("block", blocks("python"))
def test_python_block_runs_and_prints(block, address, tmp_path):
    done = run_python(block, address, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not done.stderr


@pytest.mark.parametrize(
    "line", [line for block in blocks("sh") for line in block.splitlines() if line not in RUN_BY_CI]
)
def test_shell_line_runs_and_prints(line, address, tmp_path):
    done = run_shell(line, address, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_block_has_a_language_that_is_run_here():
    assert {kind for kind, _ in BLOCKS} == {"sh", "python"}


def test_every_linked_file_exists():
    assert dead_links(README) == []
