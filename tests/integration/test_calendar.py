"""Calendars whose periods share no small multiple, over the wire: every way to apply rows."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from stepstate.client import Client
from stepstate.models import write_model
from tests.networks import Network, make_network
from tests.processes import server_process

START = datetime(2026, 11, 28, 12, 30, tzinfo=UTC)
"""On the grid of all intervals below: other times are taken down to it."""
CALENDARS = {
    "week-and-year": ([604_800, 31_557_600], 300.0),
    "tide": ([44_714.16, 86_400], 600.0),
    "tenths": ([3.7, 86_400], 0.1),
}


def networks() -> Iterator[Network]:
    for name, (periods, interval) in CALENDARS.items():
        network = make_network(name, inputs=1 + 2 * len(periods), outputs=1, seed=5)
        network.manifest.update(
            step_interval_seconds=interval,
            inputs=[{"name": "x"}],
            outputs=[{"name": "x", "horizons": [1]}],
            calendar=[
                {"kind": "fourier", "period_seconds": period, "harmonics": 1} for period in periods
            ],
        )
        yield network


def marked(networks: Iterator[Network]) -> list:
    """One of them is enough for every change."""
    first, *others = networks
    rest = (pytest.param(one, id=one.name, marks=pytest.mark.long) for one in others)
    return [pytest.param(first, id=first.name), *rest]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory):
    root: Path = tmp_path_factory.mktemp("models")
    for network in networks():
        write_model(root / network.name / "1", network.manifest, network.tensors())
    with server_process("--models", str(root)) as server, Client(server.address) as client:
        yield client


@pytest.mark.parametrize("network", marked(networks()))
def test_every_way_to_apply_rows_has_the_calendar_of_their_time(client: Client, network):
    periods, interval = CALENDARS[network.name]
    x = np.random.default_rng(2).normal(size=(3_000, 1)).astype(np.float32)
    seconds = START.timestamp() + np.arange(len(x)) * interval
    waves = [wave(2 * np.pi * seconds / p) for p in periods for wave in (np.sin, np.cos)]
    want = network.offline(np.column_stack([x, *waves]))
    session = client.open(network.name, start_time=START, history=x[:2_000])
    assert session.model.step_interval == timedelta(seconds=interval)
    y = [np.asarray(session.step(row)).reshape(1, -1) for row in x[2_000:2_050]]
    y += [np.asarray(one).reshape(1, -1) for one in session.stream(x[2_050:2_100])]
    with client.packed([session]) as packed:
        y += [packed.step(row[None]).y.reshape(1, -1) for row in x[2_100:2_150]]
    y.append(np.asarray(session.step(x[2_150:])))
    assert np.abs(np.concatenate(y) - want[2_000:]).max() <= 1e-5
    forecast = session.forecast(3)
    step = np.timedelta64(round(interval * 1e6), "us")
    first = np.datetime64(START.replace(tzinfo=None), "us") + len(x) * step
    assert (forecast.times == first + np.arange(3) * step).all()
    assert abs(float(forecast.median[0]) - want[-1, 0]) <= 1e-5
