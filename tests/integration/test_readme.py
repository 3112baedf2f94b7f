"""Every command and code block of the README runs as it is written there."""

from __future__ import annotations

import pytest

from tests.markdown import ROOT, blocks_of, dead_links, run_python
from tests.processes import server_process

README = ROOT / "README.md"
BLOCKS = blocks_of(README)


@pytest.fixture(scope="module")
def address():
    with server_process("--models", str(ROOT / "models")) as server:
        yield server.address


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def test_python_blocks_run_and_print_what_is_shown(address, tmp_path):
    printed = []
    for block in blocks("python"):
        done = run_python(block, address, tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        assert not done.stderr
        printed.append(done.stdout)
    assert printed == blocks("text")


def test_its_only_command_sets_up_an_environment_and_runs_the_demo():
    assert blocks("sh") == ["make demo\n"]  # .ci/run runs it


def test_every_block_has_a_language_that_is_run_here():
    assert {kind for kind, _ in BLOCKS} == {"sh", "python", "text"}


def test_every_linked_file_exists():
    assert dead_links(README) == []
