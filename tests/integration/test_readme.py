"""Every command and code block of the README runs as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import server_process

ROOT = Path(__file__).parent.parent.parent
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
)
DEFAULT_ADDRESS = "127.0.0.1:50051"
RUN_BY_CI = ("make demo",)  # sets up an environment of its own; .ci/run runs it


@pytest.fixture(scope="module")
def address():
    with server_process("--models", str(ROOT / "models")) as server:
        yield server.address


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def run(command: list[str], address: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "STEPSTATE_SERVER": address}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("block", blocks("python"))
def test_python_block_runs_and_prints(block, address, tmp_path):
    done = run([sys.executable, "-c", block.replace(DEFAULT_ADDRESS, address)], address, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not done.stderr


@pytest.mark.parametrize(
    "line", [line for block in blocks("sh") for line in block.splitlines() if line not in RUN_BY_CI]
)
def test_shell_line_runs_and_prints(line, address, tmp_path):
    done = run(["bash", "-c", f"set -o pipefail; {line}"], address, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_block_has_a_language_that_is_run_here():
    assert {kind for kind, _ in BLOCKS} == {"sh", "python"}


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
