"""Servers that a test kills and starts again, and sessions on them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import numpy as np

from tests.chaos.restartable import RestartableServer
from tests.integration.clients import AnySession
from tests.integration.wire import (
    largest_difference,
)
from tests.networks import Network

StartRestartable = Callable[..., Awaitable[RestartableServer]]
"""Starts a server with so many seconds between snapshots, and further options."""
SELDOM, OFTEN = "600", "0.1"
"""Seconds between snapshots: nothing but what is urged is saved, or nearly everything."""


def difference(got: list[np.ndarray], network: Network, x: np.ndarray) -> float:
    return largest_difference(np.array(got), network.offline(x))


async def collect(session: AnySession, xs: np.ndarray) -> list[np.ndarray]:
    return [y async for y in session.stream(xs)]


async def kill_and_restart(server: RestartableServer) -> None:
    """kill -9, and a start in the same place."""
    server.kill()
    await server.start()
