"""Fixtures: `stepstate serve` as a process, one for each module, and a sample of its metrics."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.networks import Network, far_back
from tests.processes import ServerProcess, server_process

OPTIONS = ("--transport", "lean", "--slots", "32")
TOOLS = Path(__file__).parents[2] / "build" / "tools"


@pytest.fixture(scope="session")
def client_root(networks: dict[str, Network], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models: "lstm", and "far", whose snapshots take 4 MB."""
    root = tmp_path_factory.mktemp("client-models")
    for network in (networks["lstm"], far_back(20_000)):
        network.write(root)
    return root


@pytest.fixture(scope="module")
def served(client_root: Path) -> Iterator[ServerProcess]:
    """A server on the lean transport."""
    with server_process("--models", str(client_root), *OPTIONS) as server:
        yield server


@pytest.fixture(scope="module")
def inflating(client_root: Path) -> Iterator[ServerProcess]:
    """The same, that takes compressed requests."""
    options = ("--models", str(client_root), "--allow-compressed-requests", *OPTIONS)
    with server_process(*options) as server:
        yield server


@pytest.fixture(scope="session")
def tool() -> Callable[[str, str], str]:
    """The path of a program; without it the test is skipped, which CI refuses."""

    def find(name: str, how: str) -> str:
        beside_python = str(Path(sys.executable).parent)
        path = shutil.which(name) or shutil.which(name, path=beside_python)
        if path is None:
            pytest.skip(f"MISSING PROGRAM: {name}; .ci/run installs it, or: {how}")
        return path

    return find


@pytest.fixture(scope="session")
def run() -> Callable[..., str]:
    """Runs a program to its end and returns its stdout; it must succeed."""

    def finish(*command: object, seconds: float = 60) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return finish
