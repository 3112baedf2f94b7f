"""Outputs of steps by their names, with the times of their rows.

O outputs a row, T rows, K horizons, Q quantiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stepstate.client.times import to_datetime
from stepstate.client.types import Floats, ModelInfo, Output, data_frame
from stepstate.errors import InvalidField

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """The outputs of a step, by name.

    `outputs["demand+1@0.5"]` is a column of y, as named in `columns`, and `outputs["demand"]` all
    the columns of an output.

    `y` is [O] of one row, or [T, O], in raw units. `ts` [T] are the indices of these rows in the
    session, `times` [T] their times in UTC; None if the model knows no time, or the session's start
    is not known.
    """

    model: ModelInfo
    y: Floats
    ts: NDArray[np.int64]
    times: NDArray[np.datetime64] | None

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the O columns of y: output, "+" and horizon, "@" and quantile."""
        return self.model.output_columns

    @property
    def t(self) -> int:
        """Rows applied to the session after the last of these."""
        return int(self.ts[-1]) + 1

    @property
    def time(self) -> datetime | None:
        """The time of the last row, in UTC."""
        return None if self.times is None else to_datetime(self.times[-1].astype(np.int64))

    def __getitem__(self, name: str) -> Any:
        """A column by its name: a number or [T]; or an output: [K] or [T, K], or [..., K, Q].

        Raises:
            KeyError: there is no such column or output.
        """
        if name in self.columns:
            return self.y[..., self.columns.index(name)]
        first = 0
        for output in self.model.outputs:
            if output.name == name:
                block = self.y[..., first : first + output.width]
                return block.reshape(*self.y.shape[:-1], *output.shape)
            first += output.width
        raise KeyError(f"{name!r}: expected one of {', '.join(self.columns)}, or an output's name")

    def at(self, name: str, *, horizon: int | None = None, quantile: float | None = None) -> Any:
        """The column of an output at a horizon and a quantile, a number or [T].

        Args:
            name: the output's.
            horizon: in steps; may be left out if it has only one.
            quantile: may be left out if it has at most one.

        Raises:
            InvalidField: the output has none of that name, horizon or quantile.
        """
        first = 0
        for output in self.model.outputs:
            if output.name == name:
                return self.y[..., first + _place(output, horizon, quantile)]
            first += output.width
        known = ", ".join(output.name for output in self.model.outputs)
        raise InvalidField("name", f"is {name!r}, expected one of {known}")

    def to_dict(self) -> dict[str, Any]:
        """The columns by their names: numbers, or [T] each."""
        return {name: self.y[..., place] for place, name in enumerate(self.columns)}

    def to_pandas(self) -> DataFrame:
        """A table of the rows, indexed by time (UTC), or by t if it is not known.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        return data_frame(
            self.to_dict(),
            times=self.times,
            index=self.ts,
            index_name="t",
            needed_by="Outputs.to_pandas",
        )


def _place(output: Output, horizon: int | None, quantile: float | None) -> int:
    """The place of a column among those of its output."""
    row = _index("horizon", horizon, output.horizons)
    if not output.quantiles and quantile is None:
        return row
    return row * len(output.quantiles) + _index("quantile", quantile, output.quantiles)


def _index(field: str, wanted: float | None, known: tuple[float, ...]) -> int:
    if wanted is None and len(known) == 1:
        return 0
    if wanted in known:
        return known.index(wanted)
    expected = ", ".join(f"{one:g}" for one in known) or "none"
    raise InvalidField(field, f"is {wanted}, expected one of {expected}")
