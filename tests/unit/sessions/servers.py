"""Servers that share one store, one after another or together, and what tests do with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stepstate.errors import (
    StoreUnavailable,
)
from stepstate.models import Model
from tests.networks import Network
from tests.unit.rig import (
    Clock,
    Lasting,
    Rig,
    model_of,
    outputs,
)

CLOSE = 1e-5


class Flaky(Lasting):
    """A store that is away when a test says so; `late` still does what it is asked."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.away = False
        self.late = False

    async def save(self, saves):
        if self.away and not self.late:
            raise StoreUnavailable("it is away")
        verdicts = await super().save(saves)
        if self.away:
            raise StoreUnavailable("no answer in time")
        return verdicts

    async def acquire(self, session_id, **options):
        if self.away and not self.late:
            raise StoreUnavailable("it is away")
        found = await super().acquire(session_id, **options)
        if self.away:
            raise StoreUnavailable("no answer in time")
        return found

    async def find(self, session_id):
        if self.away:
            raise StoreUnavailable("it is away")
        return await super().find(session_id)


async def play(rig: Rig, session_id: str, x: np.ndarray, t: int) -> np.ndarray:
    """Steps rows one by one from t on; outputs [T, O]."""
    y = []
    for place, row in enumerate(x):
        session = await rig.sessions.get(session_id)
        y.append(outputs(await rig.step(session, row, t + place)))
    return np.concatenate(y)


def printed(network: Network, digits: str) -> Model:
    """A network as a model with a fingerprint."""
    manifest = network.manifest | {"fingerprint": f"sha256:{digits * 32}"}
    return model_of(replace(network, manifest=manifest))


def count(rig: Rig, name: str) -> float:
    """A counter of the LSTM's."""
    return rig.registry.get_sample_value(name, {"model": "lstm", "version": "1"})
