"""Fixtures of the unit tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from stepstate.models import Model
from tests.networks import Network
from tests.unit.rig import Clock, Rig, model_of


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def network(networks: dict[str, Network]) -> Network:
    """The LSTM of two layers."""
    return networks["lstm"]


@pytest.fixture(scope="session")
def model(network: Network) -> Model:
    return model_of(network)


@pytest.fixture
async def make_rig(model: Model) -> AsyncIterator[Callable[..., Rig]]:
    """Makes rigs; the test fails if anything raised on the loop behind its back."""
    surprises: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: surprises.append(context))

    def make(*models: Model, **options: object) -> Rig:
        return Rig(*(models or (model,)), **options)

    yield make
    assert not surprises


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Iterator[Rig]:
    """Sessions of the LSTM; at the end nothing may be left in the queues."""
    made = make_rig()
    yield made
    assert made.sessions.queued_rows == made.scheduler.queued_rows == 0
