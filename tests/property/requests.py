"""Requests of a session as clients send them, right ones and others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stepstate.models import write_model
from stepstate.v1 import stepstate_pb2 as pb
from tests.networks import make_network
from tests.offline import forecasting_network
from tests.unit.rig import timed_network

INPUTS = {"lstm": 3, "gru": 3, "projected": 3, "timed": 2, "sensor1": 2, "steep": 3}
"""Values of a row of each model."""
UNKNOWN_FIELD = b"\xc0\x3e\x01"
"""Number 1000: a varint, 1."""
REPLAY_ROWS = 4
MANY_ROWS = 16


def write_models(root: Path) -> None:
    """Plain ones; with calendar and profiles; with lags and tracking; one that overflows soon."""
    timed, profiles = timed_network()
    write_model(root / "timed" / "1", timed.manifest, timed.tensors() | profiles)
    steep = make_network("steep", "rnn_relu", seed=7)
    steep.manifest["inputs"][0]["scale"] = 1e-3
    for network in (
        make_network("lstm", seed=1),
        make_network("gru", "gru", seed=4),
        make_network("projected", hidden=12, projection=5, seed=3),
        forecasting_network(),
        steep,
    ):
        network.write(root)


@dataclass(slots=True)
class SessionClient:
    """Makes the requests of a session.

    Args:
        name: the session's id.
        model: its model.
        seed: of its rows.
        tolerant: NaN is a missing value to it.
        t: rows that it has, as far as its client knows.
    """

    name: str
    model: str
    seed: int
    tolerant: bool
    t: int = 0

    def row(
        self, *values: tuple[int, float], at: int | None = None, variant: int = 0
    ) -> np.ndarray:
        """A row, always the same one of its place, but for some values."""
        rng = np.random.default_rng((self.seed, self.t if at is None else at, variant))
        row = rng.standard_normal(INPUTS[self.model]).astype(np.float32)
        if self.model == "sensor1":
            row += np.float32([5.0, -1.0])
        for place, value in values:
            row[place] = value
        return row

    def rows(self, count: int) -> np.ndarray:
        return np.concatenate([self.row(at=self.t + more) for more in range(count)])

    def before(self, rows: int) -> int:
        return max(self.t - rows, 0)

    def request(self, x: np.ndarray, *, applied: int = 1, **more: object) -> bytes:
        """A request, of which so many rows are applied if all is well."""
        fields = {"session_id": self.name, "t": self.t, "x": x} | more
        self.t += applied
        return pb.StepRequest(**fields).SerializeToString()

    def backwards(self) -> bytes:
        """The next row, its fields from the last to the first."""
        parts = [pb.StepRequest(x=self.row()), pb.StepRequest(t=self.t)]
        parts.append(pb.StepRequest(session_id=self.name))
        self.t += 1
        return b"".join(part.SerializeToString() for part in parts)

    def again(self, rows: int, variant: int = 0) -> bytes:
        """A row that was sent so many rows before; or another one in its place."""
        t = self.before(rows)
        return self.request(self.row(at=t, variant=variant), applied=0, t=t)


WAYS: dict[str, Callable[[SessionClient], bytes]] = {
    "row": lambda one: one.request(one.row()),
    "again": lambda one: one.again(1),
    "another in its place": lambda one: one.again(1, variant=1),
    "too old": lambda one: one.again(REPLAY_ROWS + 1),
    "ahead": lambda one: one.request(one.row(at=one.t + 1), applied=0, t=one.t + 1),
    "without t": lambda one: one.request(one.row(), t=None),
    "nan": lambda one: one.request(one.row((-1, np.nan)), applied=one.tolerant),
    "infinite": lambda one: one.request(one.row((0, -np.inf)), applied=0),
    "huge": lambda one: one.request(one.row((0, 3e38)), applied=0),
    "too wide": lambda one: one.request(np.append(one.row(), 1.0), applied=0),
    "empty": lambda one: one.request(one.row()[:0], applied=0),
    "two rows": lambda one: one.request(one.rows(2), applied=2),
    "many rows": lambda one: one.request(one.rows(MANY_ROWS), applied=MANY_ROWS, last_only=True),
    "inspected": lambda one: one.request(one.row(), inspect=True),
    "last only": lambda one: one.request(one.row(), last_only=True),
    "missing": lambda one: one.request(one.row()[:0], applied=one.tolerant, advance=1),
    "unknown field": lambda one: one.request(one.row()) + UNKNOWN_FIELD,
    "backwards": SessionClient.backwards,
    "nobody": lambda one: one.request(one.row(), applied=0, session_id="nobody"),
    "garbage": lambda _: b"\xff\xff\xff\xff",
}
"""Each in the shortest bytes, as far as it can."""
