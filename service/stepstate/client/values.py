"""What the client takes and gives: values without gRPC or protobuf in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepstate.errors import InvalidField, StepstateError

S = TypeVar("S")

Floats = NDArray[np.float32]
Durability = Literal["none", "async", "sync"]
"""What of a session survives the end of its server: see `AsyncClient.open`."""


@dataclass(frozen=True, slots=True)
class Output:
    """One output of a model: its column of y for each horizon, in steps ahead of its row."""

    name: str
    unit: str
    horizons: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that the server has loaded.

    `inputs` are the D columns of x, each with its unit; `outputs` together the
    O columns of y.
    """

    name: str
    version: str
    description: str
    fingerprint: str
    cell: str
    hidden_size: int
    num_layers: int
    inputs: Mapping[str, str]
    outputs: tuple[Output, ...]
    step_interval: timedelta | None
    needs_start_time: bool

    @property
    def input_width(self) -> int:
        """D."""
        return len(self.inputs)

    @property
    def output_width(self) -> int:
        """O."""
        return sum(len(output.horizons) for output in self.outputs)

    def rows(self, x: ArrayLike) -> tuple[Floats, bool]:
        """x as rows [T, D], and whether it was given as one row.

        One row is a number (where D = 1) or D of them; many rows are [T, D], or
        [T] where D = 1. A pandas DataFrame has the inputs' names as columns, in
        any order.

        Raises:
            InvalidField: x has another shape or other columns, or is not numbers.
        """
        array = self._array(x)
        width = self.input_width
        if array.ndim == 0 or array.shape == (width,):
            alone, rows = True, array.reshape(1, -1)
        else:
            alone, rows = False, array.reshape(-1, 1) if array.ndim == width == 1 else array
        if rows.ndim != 2 or rows.shape[1] != width or not len(rows):
            raise InvalidField(
                "x",
                f"has shape {list(array.shape)}; {self.name}/{self.version} takes one row "
                f"[{width}] or many [T, {width}] of {', '.join(self.inputs)}",
            )
        return rows, alone

    def _array(self, x: ArrayLike) -> Floats:
        columns = getattr(x, "columns", None)
        if columns is not None:
            if set(columns) != set(self.inputs):
                raise InvalidField(
                    "x",
                    f"has the columns {', '.join(map(str, columns))}; {self.name}/{self.version} "
                    f"takes {', '.join(self.inputs)}",
                )
            frame: Any = x
            x = frame[list(self.inputs)]
        try:
            return np.asarray(x, np.float32)
        except (TypeError, ValueError) as error:
            raise InvalidField("x", f"is not an array of numbers: {error}") from error


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """Where a session stands, by the server's word.

    `durable_t`: rows that survive the end of the server, 0 with durability none.
    `residency`: "resident" in the memory of the server that answered, or
    "spilled": its state is in the store, or with another server; t is what is
    saved then. `owner`: the server that holds its lease, empty where none does.
    `epoch`: how often a server has taken it.
    """

    session_id: str
    model: str
    version: str
    fingerprint: str
    t: int
    idle_timeout: timedelta
    start_time: datetime | None
    open_time: datetime
    expire_time: datetime
    durable_t: int = 0
    durability: str = ""
    residency: str = ""
    owner: str = ""
    epoch: int = 0

    @property
    def resumable(self) -> bool:
        """Whether a server can be set back in it, and go on if it is sent the rows again."""
        return self.durability in ("async", "sync")


@dataclass(frozen=True, slots=True)
class Inspection:
    """Outputs [T, O] of some rows, and what every layer computed for them.

    `layers` has a mapping for each layer, the lowest first: the gates and
    states [T, H] of the model's cell by name, for an LSTM i, f, g, o, c,
    m = tanh(c) and h.
    """

    y: Floats
    layers: tuple[Mapping[str, Floats], ...]


@dataclass(frozen=True, slots=True)
class Result(Generic[S]):
    """What became of one item of a stream of many sessions.

    `outputs` [O] of the item's last row, or None and the `error` that ended its
    session's part of the stream.
    """

    session: S
    outputs: Floats | None
    error: StepstateError | None

    @property
    def y(self) -> Floats:
        """The outputs [O].

        Raises:
            StepstateError: the item's error, if it has one.
        """
        if self.outputs is None:
            raise self.error or StepstateError()
        return self.outputs
