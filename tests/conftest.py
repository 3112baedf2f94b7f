"""Fixtures: networks on disk, servers on free loopback ports."""

from __future__ import annotations

import shutil
import signal
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from stepstate.client import AsyncClient
from stepstate.config import ServerConfig
from stepstate.server import Server, running_server
from tests.certificates import Authority, Certificate
from tests.hypothesis_profiles import register_profiles
from tests.networks import Network, make_network
from tests.processes import ServerProcess, server_process

ELECTRICITY = Path(__file__).parent.parent / "models"

# Whoever runs the tests in the background, or under nohup, lets them ignore these, and so would
# every program that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

register_profiles()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs what has the mark `transports` on grpcio too; with `long=True`, that is long."""
    mark = metafunc.definition.get_closest_marker("transports")
    if mark is not None and "transport" in metafunc.fixturenames:
        marks = [pytest.mark.long] if mark.kwargs.get("long") else []
        metafunc.parametrize("transport", ["lean", pytest.param("grpcio", marks=marks)])


@pytest.fixture
def transport() -> str:
    """The gRPC server of every server that the fixtures start: `--transport`."""
    return "lean"


@pytest.fixture(scope="session")
def networks() -> dict[str, Network]:
    """One network of each kind, by name."""
    made = (
        make_network("lstm", seed=1),
        make_network("single", inputs=1, outputs=1, layers=1, seed=2),
        make_network("projected", hidden=12, projection=5, seed=3),
        make_network("gru", "gru", seed=4),
        make_network("tanh", "rnn_tanh", seed=5),
        make_network("relu", "rnn_relu", seed=6),
    )
    return {network.name: network for network in made}


@pytest.fixture(scope="session")
def model_root(networks: dict[str, Network], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds all of them."""
    root = tmp_path_factory.mktemp("models")
    for network in networks.values():
        network.write(root)
    return root


@pytest.fixture
def config(model_root: Path, tmp_path: Path, transport: str) -> ServerConfig:
    """A server of all networks, on free ports, that keeps its sessions in a file as by default."""
    return ServerConfig(
        models=model_root,
        listen="127.0.0.1:0",
        metrics_listen="127.0.0.1:0",
        store=f"sqlite:{tmp_path / 'sessions.db'}",
        drain_seconds=5.0,
        transport=transport,
    )


@pytest.fixture
async def server(config: ServerConfig) -> AsyncIterator[Server]:
    """A server in this process, drained at the end of the test."""
    async with running_server(config) as running:
        yield running


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncClient]:
    """A client of `server`."""
    async with AsyncClient(server.address) as connected:
        yield connected


@pytest.fixture
def start_process(
    model_root: Path, transport: str
) -> Callable[..., AbstractContextManager[ServerProcess]]:
    """Starts `stepstate serve` as a process of its own: `with start_process("--option", "1")`."""

    def start(*options: str, models: Path = model_root) -> AbstractContextManager[ServerProcess]:
        return server_process("--models", str(models), "--transport", transport, *options)

    return start


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[sqlite3.Connection]:
    """Every connection that SQLite makes from now on, the newest last."""
    made: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def noted(*arguments: object, **options: object) -> sqlite3.Connection:
        made.append(connect(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(sqlite3, "connect", noted)
    return made


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    """The path of a system program; without it the test is skipped, which CI refuses."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            pytest.skip(f"MISSING PROGRAM: {name}; .ci/run installs it, or: apt-get install {name}")
        return path

    return find


@pytest.fixture(scope="session")
def authority(program: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Signs certificates for tests of TLS."""
    return Authority(tmp_path_factory.mktemp("certificates"), program("openssl"))


@pytest.fixture(scope="session")
def certificate(authority: Authority) -> Certificate:
    """Of a server on this machine."""
    return authority.issue("server", "DNS:localhost,IP:127.0.0.1")


@pytest.fixture
def electricity_root() -> Path:
    """The folder of the shipped models."""
    return ELECTRICITY
