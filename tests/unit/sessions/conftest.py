"""Fixtures of the tests of sessions."""

from __future__ import annotations

import pytest

from tests.offline import forecasting_network
from tests.unit.rig import (
    Rig,
)
from tests.unit.sessions.servers import Flaky


@pytest.fixture
def store(clock):
    return Flaky(clock)


@pytest.fixture
def start(make_rig, store, clock):
    """Starts a server on the store; the one before it is as dead as after kill -9."""

    def start(*models, **options):
        options = {"owner": f"server-{len(started)}", "replay_rows": 8} | options
        made = make_rig(*models, store=store, clock=clock, **options)
        started.append(made)
        return made

    started: list[Rig] = []
    return start


@pytest.fixture
def slow_rig(make_rig):
    """Applies one row of a long request in a turn."""
    return make_rig(chunk_rows=1)


@pytest.fixture(scope="module", params=["level", "first", "point"])
def sensor(request):
    if request.param == "point":
        return forecasting_network(quantiles=())
    return forecasting_network(fallback=request.param)
