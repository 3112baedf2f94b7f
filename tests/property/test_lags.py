"""Lagged inputs and stand-ins at every count of past rows, by every way a row can come.

Against `tests.reference.Series`, which knows no windows, rings, chunks or batches.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepstate.sessions import ForecastRequest, ResidentSession, Scenario
from tests.networks import Network, make_network
from tests.reference import Series
from tests.unit.rig import Rig, model_of

CLOSE = 3e-5  # of values of about 1
NAN = float("nan")
ORIGIN = datetime(2026, 11, 1, tzinfo=UTC)
START = 2  # steps from the profile's origin to a session's first row
REACH = {"lag": 4, "mean": 3, "min": 2, "max": 5}
WAYS = list(product(REACH, ("cell", "head"), ("level", "first"), ("impute", "hold")))


def sensor(kind: str, into: str, fallback: str) -> Network:
    """Forecasts a row of one of its two inputs, whose level follows a profile of three steps.

    x: flow, heat. y: flow one row ahead with its quantiles; heat as it is, without.
    """
    reach = REACH[kind]
    if kind == "lag":
        part: dict[str, Any] = {"kind": "lag", "steps": [1, reach]}
    else:
        part = {"kind": "rolling", "steps": reach + 1, "statistic": kind}
    lags = [{"input": name, "into": into, **part} for name in ("flow", "heat")]
    count = sum(len(part.get("steps", [])) if kind == "lag" else 1 for part in lags)
    network = make_network(
        "sensor", inputs=2 + (count if into == "cell" else 0), hidden=6, outputs=4, seed=reach
    )
    rng = np.random.default_rng(reach)
    network.manifest.update(
        step_interval_seconds=60,
        profiles={"daily": {"period_steps": 3, "origin": ORIGIN.isoformat()}},
        inputs=[
            {"name": "flow", "profile": "daily", "mean": 0.5, "scale": 0.8},
            {"name": "heat", "mean": -1.0, "scale": 0.5},
        ],
        lags=lags,
        fallback=fallback,
        outputs=[
            {
                "name": "flow",
                "profile": "daily",
                "mean": 0.5,
                "scale": 0.8,
                "horizons": [1],
                "quantiles": [0.1, 0.5, 0.9],
            },
            {"name": "warm"},
        ],
    )
    if kind in ("min", "max"):  # then a session keeps more rows than its lags need
        network.manifest["tracking"] = {"horizons": [1], "season_steps": 9}
    biases = [1.5, 0.0, -1.5] if kind == "min" else [-1.5, 0.0, 1.5]  # the one's quantiles cross
    network.head.bias.data[:3] = network.head.bias.data.new_tensor(biases)
    network.extra["daily"] = np.array([0.4, -0.3, 0.9], np.float32)
    if into == "head":
        network.extra["head.lags"] = rng.normal(0, 0.3, (4, count)).astype(np.float32)
    return network


SENSORS = {key: sensor(*key) for key in product(REACH, ("cell", "head"), ("level", "first"))}
MODELS = {key: model_of(network) for key, network in SENSORS.items()}


class Pair:
    """A session, and what it should be."""

    def __init__(self, rig: Rig, session: ResidentSession, series: Series) -> None:
        self.rig = rig
        self.session = session
        self.series = series

    @classmethod
    async def open(cls, rig: Rig, network: Network, name: str, policy: str) -> Pair:
        start = ORIGIN + START * timedelta(minutes=1)
        session = await rig.open(name, missing=policy, start=start)
        series = Series(network.manifest, network.tensors(), policy=policy, start=START)
        return cls(rig, session, series)

    async def apply(self, x: np.ndarray, *, packed: bool = False) -> None:
        """Rows [T, D] in one request, or as rows of packed messages."""
        wanted = np.array([self.series.step(row) for row in x])
        if packed and not np.isnan(x).any():
            found = np.concatenate([await self.pack(row[None]) for row in x])
        else:
            found = await self.rig.y(self.session, x)
        assert np.abs(found - wanted).max() < CLOSE

    async def pack(self, row: np.ndarray) -> np.ndarray:
        """y [1, O] of a row that goes straight."""
        pack = await self.rig.send_pack([self.session], row).outcome()
        assert not pack.errors
        return pack.y

    async def forecast(self) -> None:
        """Under a scenario of three rows that gives heat only; there is none before a row."""
        if not self.series.rows:
            return
        heat = np.array([[NAN, -1.5], [NAN, 0.0], [NAN, -0.5]], np.float32)
        scenario = Scenario("heat", heat.ravel())
        found = await self.rig.sessions.forecast(
            [self.session.session_id], ForecastRequest(4, (0.5,), (scenario,))
        )
        values = found[0][0].outputs[0].values[:, 0]
        assert np.abs(values - self.series.forecast("flow", heat)).max() < CLOSE


def rows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (count, 2)).astype(np.float32)


def holes(x: np.ndarray, which: str) -> np.ndarray:
    """The rows with one column missing, or both."""
    x = x.copy()
    x[:, {"flow": [0], "heat": [1], "both": [0, 1]}[which]] = NAN
    return x


@pytest.mark.parametrize(("kind", "into", "fallback", "policy"), WAYS)
def test_every_count_of_past_rows(kind, into, fallback, policy):
    """Missing after 0 … reach + 2 whole rows, then a whole row, then an advance, then a whole one.

    All sessions step at the same time: each is another's batch-mate at another count.
    """
    network, reach = SENSORS[kind, into, fallback], REACH[kind]

    async def one(pair: Pair, before: int, way: str) -> None:
        which = ("flow", "heat", "both")[(before + len(way)) % 3]
        whole, gap = rows(before + 2, seed=before), holes(rows(2, seed=9), which)
        advance = np.full((reach + 2, 2), NAN, np.float32)
        parts = [gap, whole[before : before + 1], advance, whole[before + 1 :]]
        if way == "prime":
            await pair.apply(np.concatenate([whole[:before], *parts]))
            await pair.forecast()
            return
        for part in (whole[:before], *parts):
            for row in part:
                await pair.apply(row[None], packed=way == "packed")
            await pair.forecast()

    async def story() -> None:
        cases = list(product(range(reach + 3), ("step", "packed", "prime")))
        rig = Rig(MODELS[kind, into, fallback], max_sessions=len(cases), chunk_rows=5)
        pairs = [await Pair.open(rig, network, f"{n}-{way}", policy) for n, way in cases]
        await asyncio.gather(*(one(pair, *case) for pair, case in zip(pairs, cases, strict=True)))

    asyncio.run(story())


values = st.one_of(st.floats(-3, 3, width=32), st.just(NAN))
requests = st.lists(
    st.one_of(
        st.lists(st.tuples(values, values), min_size=1, max_size=6),
        st.sampled_from(["advance", "forecast"]),
    ),
    min_size=1,
    max_size=10,
)


@given(
    st.sampled_from(WAYS), requests, st.sampled_from([1, 2, 5, 128]), st.booleans(), st.booleans()
)
def test_rows_with_holes_in_any_requests(way, sent, chunk_rows, packed, mate):
    """Beside another session that misses other values in the same chunks."""
    *key, policy = way
    network = SENSORS[tuple(key)]

    async def story() -> None:
        rig = Rig(MODELS[tuple(key)], chunk_rows=chunk_rows)
        pair = await Pair.open(rig, network, "a", policy)
        other = await Pair.open(rig, network, "b", policy)
        for number, request in enumerate(sent):
            if request == "forecast":
                await pair.forecast()
                continue
            x = np.full((3, 2), NAN, np.float32)
            if request != "advance":
                x = np.array(request, np.float32)
            beside = rows(len(x), seed=number)
            beside[number % len(beside)] = NAN
            asked = ((pair, x), (other, beside)) if mate else ((pair, x),)
            await asyncio.gather(*(one.apply(part, packed=packed) for one, part in asked))

    asyncio.run(story())
