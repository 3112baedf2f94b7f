"""Fixtures: raw stubs of a server in this process, clients of both kinds, servers to be killed."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from stepstate.config import ServerConfig
from stepstate.server import Server
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests import offline
from tests.certificates import Authority, Certificate, install
from tests.chaos.restartable import RestartableServer, restartable_server
from tests.integration.clients import KINDS, AnyClient, Connect
from tests.integration.forecasters import write_forecasters
from tests.integration.restarts import StartRestartable
from tests.integration.triton import (
    triton_stub,
)
from tests.integration.wire import (
    STEEP,
    raw_stub,
)
from tests.networks import Network, make_network


@pytest.fixture
async def stub(server: Server) -> AsyncIterator[StepstateServiceStub]:
    """A stub of `server`."""
    async with raw_stub(server.address) as connected:
        yield connected


@pytest.fixture
async def other_stub(server: Server) -> AsyncIterator[StepstateServiceStub]:
    """A stub on another connection to the same server."""
    async with raw_stub(server.address) as connected:
        yield connected


@pytest.fixture
async def restartable(
    model_root: Path, tmp_path: Path, transport: str
) -> AsyncIterator[StartRestartable]:
    """Starts a server with a file as its store, that can be killed and started again."""
    async with AsyncExitStack() as stack:

        async def start(interval: str, *options: str) -> RestartableServer:
            store = ("--store", f"sqlite:{tmp_path / 'restartable.db'}", "--snapshot-interval")
            told = ("--models", str(model_root), "--transport", transport, *store, interval)
            return await stack.enter_async_context(restartable_server(tmp_path, *told, *options))

        yield start


@pytest.fixture
def with_tls(config: ServerConfig, certificate: Certificate, tmp_path: Path) -> ServerConfig:
    """Settings of a server with TLS, whose files a test may replace."""
    files = tmp_path / "tls.crt", tmp_path / "tls.key"
    install(certificate, *files)
    return dataclasses.replace(config, tls_cert=str(files[0]), tls_key=str(files[1]))


@pytest.fixture
def mutual(with_tls: ServerConfig, authority: Authority) -> ServerConfig:
    """Clients have to have a certificate, too."""
    return dataclasses.replace(with_tls, tls_client_ca=str(authority.file))


@pytest.fixture(params=KINDS)
def connect(request: pytest.FixtureRequest) -> Connect:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def steep() -> dict[str, Network]:
    """Networks of every cell that overflow on large finite rows; good rows are below 0.01."""
    kinds = {"lstm": "lstm", "gru": "gru", "tanh": "rnn_tanh", "relu": "rnn_relu"}
    made = [make_network(f"steep-{name}", kind, seed=9) for name, kind in kinds.items()]
    made.append(make_network("steep-projected", hidden=12, projection=5, seed=9))
    for network in made:
        with torch.no_grad():
            network.module.weight_ih_l0.mul_(STEEP)
    return {network.name: network for network in made}


@pytest.fixture
def steep_config(config: ServerConfig, steep: dict[str, Network], tmp_path: Path) -> ServerConfig:
    for network in steep.values():
        network.write(tmp_path)
    return dataclasses.replace(config, models=tmp_path)


@pytest.fixture
async def any_client(connect: Connect, server: Server) -> AsyncIterator[AnyClient]:
    async with connect(server.address) as client:
        yield client


@pytest.fixture
async def triton(server: Server) -> AsyncIterator[GRPCInferenceServiceStub]:
    async with triton_stub(server.address) as connected:
        yield connected


@pytest.fixture
def network(networks: dict[str, Network]) -> Network:
    return networks["lstm"]


@pytest.fixture(scope="module")
def sensor() -> Network:
    return offline.forecasting_network()


@pytest.fixture(scope="module")
def forecasters(sensor: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `write_forecasters`."""
    return write_forecasters(sensor, tmp_path_factory.mktemp("forecasters"))
