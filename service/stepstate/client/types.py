"""The values that the clients take and return, without gRPC or protobuf in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepstate.errors import InvalidField, StepstateError

if TYPE_CHECKING:
    from pandas import DataFrame

S = TypeVar("S")

Floats = NDArray[np.float32]
Durability = Literal["none", "async", "sync"]
"""How much of a session survives the end of its server: the argument of `Client.open`."""
MissingPolicy = Literal["reject", "impute", "hold"]
"""What a NaN in a row means to a session: the argument of `Client.open`."""


@dataclass(frozen=True, slots=True)
class Output:
    """One output of a model: its columns of y.

    For each of `horizons`, in steps ahead of its row, there is one column, or one for each of
    `quantiles`, which are levels in rising order.
    """

    name: str
    unit: str
    horizons: tuple[int, ...]
    quantiles: tuple[float, ...] = ()

    @property
    def width(self) -> int:
        """Columns of y."""
        return len(self.horizons) * max(1, len(self.quantiles))

    @property
    def shape(self) -> tuple[int, ...]:
        """Those columns as [K], or [K, Q] with quantiles."""
        horizons, levels = len(self.horizons), len(self.quantiles)
        return (horizons, levels) if levels else (horizons,)

    @property
    def columns(self) -> tuple[str, ...]:
        """Their names: "demand" of the row itself, "demand+2" two steps ahead, "demand+2@0.5"."""
        return tuple(
            (f"{self.name}+{horizon}" if horizon else self.name) + quantile
            for horizon in self.horizons
            for quantile in [f"@{level:g}" for level in self.quantiles] or [""]
        )


@dataclass(frozen=True, slots=True)
class LimitUsage:
    """A limit of a tenant, and what it uses of it.

    `value`: None if there is no limit. `used`: what the tenant has now, of open sessions on all
    servers of a store; of a rate, all that it asked for since the server knows it. `refused`:
    requests, since then.
    """

    value: float | None
    used: float
    refused: int


@dataclass(frozen=True, slots=True)
class TenantUsage:
    """A tenant of a server: its share of the server when that is busy, and its limits by name."""

    name: str
    weight: float
    limits: Mapping[str, LimitUsage]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that the server has loaded.

    `inputs` are the D columns of x, each with its unit. `outputs` together are the O columns of y:
    for each output, for each of its horizons, for each of its quantiles. `lag_rows`: how many rows
    its lagged inputs reach back; until a session has so many, the model's fallback is used.
    `tracked_horizons`: those at which forecasts are scored and intervals calibrated.
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
    lag_rows: int = 0
    tracked_horizons: tuple[int, ...] = ()

    @property
    def input_width(self) -> int:
        """D."""
        return len(self.inputs)

    @property
    def output_width(self) -> int:
        """O."""
        return sum(output.width for output in self.outputs)

    @property
    def output_columns(self) -> tuple[str, ...]:
        """The names of the O columns of y, such as "demand+1@0.5": see `Output.columns`."""
        return tuple(name for output in self.outputs for name in output.columns)

    def rows(self, x: ArrayLike, field: str = "x") -> tuple[Floats, bool]:
        """x as rows [T, D], and whether it was given as a single row.

        One row is a number (where D = 1) or D of them; many rows are [T, D], or [T] where D = 1. A
        pandas DataFrame has the inputs' names as columns, in any order. NaN is a missing value.
        Errors name `field`.

        Raises:
            InvalidField: x has another shape or other columns, or is not numbers.
        """
        array = self._array(x, field)
        width = self.input_width
        if array.ndim == 0 or array.shape == (width,):
            single, rows = True, array.reshape(1, -1)
        else:
            single, rows = False, array.reshape(-1, 1) if array.ndim == width == 1 else array
        if rows.ndim != 2 or rows.shape[1] != width or not len(rows):
            raise InvalidField(
                field,
                f"has shape {list(array.shape)}; {self.name}/{self.version} takes one row "
                f"[{width}] or many [T, {width}] of {', '.join(self.inputs)}",
            )
        return rows, single

    def _array(self, x: ArrayLike, field: str) -> Floats:
        columns = getattr(x, "columns", None)
        if columns is None and self.input_width > 1:
            columns = _labels(x)
        if columns is not None:
            if set(columns) != set(self.inputs):
                raise InvalidField(
                    field,
                    f"has the columns {', '.join(map(str, columns))}; {self.name}/{self.version} "
                    f"takes {', '.join(self.inputs)}{_time_hint(x, columns)}",
                )
            frame: Any = x
            x = frame[list(self.inputs)]
        return floats(x, field)


def _time_hint(x: Any, columns: Iterable[str]) -> str:
    """A hint for a table with a column of times: they have to be its index."""
    for name in columns if getattr(x, "ndim", 0) == 2 else ():
        if getattr(getattr(x[name], "dtype", None), "kind", "") == "M":
            return f": make the times its index, x.set_index({name!r})"
    return ""


def _labels(x: Any) -> Sequence[str] | None:
    """The names of a row's values, if any: of a Series of pandas, a row of a DataFrame."""
    index = getattr(x, "index", None)
    if index is None or callable(index) or getattr(x, "ndim", 0) != 1:
        return None
    return list(index) if isinstance(next(iter(index), None), str) else None


def data_frame(
    columns: Mapping[str, Any], *, times: Any, index: Any, index_name: str, needed_by: str
) -> DataFrame:
    """A table of pandas, indexed by time (UTC), or by `index` if the times are None.

    Raises:
        ModuleNotFoundError: pandas is not installed.
    """
    try:
        import pandas as pd  # noqa: PLC0415 - the client does without it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{needed_by} needs pandas: pip install pandas", name="pandas"
        ) from error
    if times is None:
        return pd.DataFrame(columns, index=pd.Index(index, name=index_name))
    return pd.DataFrame(columns, index=pd.DatetimeIndex(times, name="time"))


def floats(x: ArrayLike, field: str) -> Floats:
    """x as an array.

    Raises:
        InvalidField: it is not numbers.
    """
    try:
        with np.errstate(over="ignore"):  # beyond float32 it becomes infinite, and is refused
            return np.asarray(x, np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidField(field, f"is not an array of numbers: {error}") from error


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How good the forecasts of one output were at one horizon.

    `scored`, `mean_absolute_error`, `mean_absolute_scaled_error` and `coverage` are over all
    forecasts that were scored since the session was opened, or its accuracy reset; a single outlier
    affects them for long. The `recent_` ones are over the last `recent_scored` forecasts: one to
    two blocks, each as long as the model's season but at least 250 rows. The recent median is over
    the last complete block, or over the first one so far.

    Errors and `offset` are in the output's unit. The scaled error is below 1 if the forecasts are
    better than the seasonal naive forecast. Coverage is the share of true values within the
    interval; `offset` is added to both sides of the model's interval now, so that it keeps its
    level. Values that are not known yet are NaN.
    """

    output: str
    horizon: int
    scored: int
    mean_absolute_error: float
    mean_absolute_scaled_error: float
    coverage: float
    offset: float
    recent_scored: int = 0
    recent_mean_absolute_error: float = math.nan
    recent_mean_absolute_scaled_error: float = math.nan
    recent_coverage: float = math.nan
    recent_median_absolute_error: float = math.nan


@dataclass(frozen=True, slots=True)
class Drift:
    """Whether forecasts have become worse.

    `drifting`: there was an alarm within the model's last season, or within as many rows as the
    test needs at least. `alarms`: how many so far. `last_t`: rows that were applied before the row
    of the last alarm. `learning`: the test does not know yet which errors are usual, and raises no
    alarm. `score`: how near it is to an alarm, as a share of the limit; NaN while it learns.
    """

    drifting: bool = False
    alarms: int = 0
    last_t: int | None = None
    learning: bool = False
    score: float = math.nan


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """The status of a session, as the server reported it.

    `durable_t`: rows that survive the end of the server, 0 with durability none. `residency`:
    "resident": in the memory of the server that answered; "spilled": its state is in the store or
    with another server, and t is the saved one. `owner`: the server that holds its lease, empty if
    none does. `epoch`: how often a server has taken it. `missing`: what a NaN in a row means.
    `interval_level`: the share of true values that its intervals are to cover, 0 if the model
    tracks no horizon. `accuracy` and `drift`: how good its forecasts were, if it is resident and
    its model tracks them. `status`: "open"; "expired": it was idle for too long, is kept until
    `purge_time`, and `Client.restore_expired` opens it again; "model_missing": the server has not
    loaded its model, or another one under this name; "unreadable": its data in the store is
    damaged, and only its id is known. All but open sessions take no steps, and can be closed.
    `tenant`: whose it is; ids are unique within a tenant.
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
    missing: str = ""
    interval_level: float = 0.0
    accuracy: tuple[Accuracy, ...] = ()
    drift: Drift = Drift()
    status: str = "open"
    purge_time: datetime | None = None
    tenant: str = "default"

    @property
    def resumable(self) -> bool:
        """Whether a server that is rolled back can continue it, if it is sent the rows again."""
        return self.durability in ("async", "sync")


@dataclass(frozen=True, slots=True)
class Inspection:
    """Outputs [T, O] of some rows, and what every layer computed for them.

    `layers` has a mapping for each layer, the lowest first: the gates and states [T, H] of the
    model's cell by name; for an LSTM i, f, g, o, c, m = tanh(c) and h.
    """

    y: Floats
    layers: tuple[Mapping[str, Floats], ...]


@dataclass(frozen=True, slots=True)
class Result(Generic[S]):
    """The result of one item of a stream of many sessions.

    `outputs` [O] of the item's last row, or None and the `error` that ended its session's part of
    the stream. `imputed_rows`: rows of the item in which a missing value was replaced.
    `fallback_rows`: those for which the model's lagged inputs would have been before the session's
    first row. `t`: rows applied to the session up to the item. `time`: of the item's last row, in
    UTC; None if not known.
    """

    session: S
    outputs: Floats | None
    error: StepstateError | None
    imputed_rows: int = 0
    fallback_rows: int = 0
    t: int = 0
    time: datetime | None = None

    @property
    def y(self) -> Floats:
        """The outputs [O].

        Raises:
            StepstateError: the item's error, if it has one.
        """
        if self.outputs is None:
            raise self.error or StepstateError()
        return self.outputs
