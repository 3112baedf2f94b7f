"""What a model's manifest declares.

A manifest is the file `manifest.json` beside the weights. It has the cell, the columns of x and y
with their units and scaling, and what the server computes itself: calendar inputs and seasonal
profiles from the time, lagged inputs from past rows. It also says what is tracked of the forecasts.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

MANIFEST = "manifest.json"
MAX_LAG = 100_000
"""Rows that a session keeps: 400 KB a column, as much as many thousands of hidden units."""
MAX_LAYERS = 256
MAX_UNITS = 65_536
"""Of a layer: its weights alone are 64 GiB there."""
MAX_STATE_BYTES = 64 * 2**20
"""Of one session: the cell's state and past rows. No machine has memory for 10,000 such slots."""
MAX_COLUMNS = 65_536
"""Of y, and of the input of the cell or the head; 256 KiB a row."""
MAX_NAMED = 4_096
"""Inputs, or outputs."""
MAX_PARTS = 1_000
"""Calendar parts, profiles, or lagged inputs."""
MAX_PROFILE_STEPS = 10_000_000
"""A year at intervals of 3 seconds; 40 MB."""
MAX_SECONDS = 100 * 366 * 86_400.0
"""A century, as an interval or a period: beyond it times overflow."""
MAX_NUMBER = 1e30
"""Of means and scales: with a larger one, or a scale below its inverse, float32 overflows."""
MAX_TEXTS = 2_000_000
"""Bytes of all names and units: a model's description fits into a reply of 4 MB."""
MAX_TRACKED = 10_000
"""Outputs times tracked horizons: a session's accuracy fits into a reply of 4 MB."""
MAX_TEXT = 10_000
"""Characters of a description or a unit."""


def _not_zero(value: float) -> float:
    if abs(value) < 1 / MAX_NUMBER:
        raise ValueError(f"is {value:g}, expected a number that values can be divided by")
    return value


def _whole_microseconds(value: float) -> float:
    if Fraction(str(value)) * 1_000_000 % 1:
        raise ValueError(f"is {value} s, expected whole microseconds: times can't tell less")
    return value


def _as_text(value: object) -> object:
    """A version that is a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _in_utc(value: datetime) -> datetime:
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def _all_different(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) < len(values):
        raise ValueError("holds a number twice")
    return values


def _rising(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(low >= high for low, high in pairwise(values)):
        raise ValueError("must rise from one level to the next")
    return values


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Version = Annotated[str, BeforeValidator(_as_text), Field(pattern=r"^[1-9][0-9]{0,17}$")]
Whole = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[int, Field(ge=1, strict=True)]
Number = Annotated[float, Field(strict=True, ge=-MAX_NUMBER, le=MAX_NUMBER)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Scale = Annotated[Number, AfterValidator(_not_zero)]
Period = Annotated[float, Field(strict=True, ge=1e-6, le=MAX_SECONDS)]
Interval = Annotated[Period, AfterValidator(_whole_microseconds)]
Horizons = Annotated[
    tuple[Annotated[Whole, Field(le=MAX_LAG)], ...],
    Field(min_length=1, max_length=MAX_COLUMNS),
    AfterValidator(_all_different),
]
Level = Annotated[float, Field(strict=True, gt=0.0, lt=1.0)]
MIN_LEVEL, MAX_LEVEL = 0.01, 0.999
"""Of intervals: beyond these, a session has too few truths to check the coverage."""
Quantiles = Annotated[tuple[Level, ...], Field(max_length=MAX_PARTS), AfterValidator(_rising)]
Lags = Annotated[
    tuple[Annotated[int, Field(ge=0, le=MAX_LAG, strict=True)], ...],
    Field(min_length=1, max_length=MAX_COLUMNS),
    AfterValidator(_all_different),
]


class _Section(BaseModel):
    # A misspelt key is an error, and values are not converted.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CellKind(enum.Enum):
    """The recurrent networks that can be served, with PyTorch's names."""

    LSTM = "lstm"
    GRU = "gru"
    RNN_TANH = "rnn_tanh"
    RNN_RELU = "rnn_relu"


class CellSpec(_Section):
    """A stacked recurrent network of `num_layers` layers (L) of `hidden_size` units (H)."""

    kind: CellKind
    hidden_size: Annotated[Positive, Field(le=MAX_UNITS)]
    num_layers: Annotated[Positive, Field(le=MAX_LAYERS)]
    proj_size: Whole = 0
    """Units of an LSTM's projected h (P); 0 for none."""

    @property
    def output_size(self) -> int:
        """Width of a layer's h."""
        return self.proj_size or self.hidden_size

    @model_validator(mode="after")
    def _projection_fits(self) -> Self:
        if self.proj_size and self.kind is not CellKind.LSTM:
            raise ValueError("proj_size: only an lstm has a projection")
        if self.proj_size >= self.hidden_size:
            raise ValueError("proj_size: must be smaller than hidden_size")
        return self


class InputSpec(_Section):
    """A column of x: the network sees (x - profile[phase(t)] - mean) / scale."""

    name: Name
    unit: Text = ""
    mean: Number = 0.0
    scale: Scale = 1.0
    profile: str | None = None


class OutputSpec(_Section):
    """A column of y for each horizon h: network * scale + mean + profile[phase(t + h)].

    With `quantiles` there is one for each horizon and quantile level; the server sorts those of a
    horizon, in raw units.
    """

    name: Name
    unit: Text = ""
    mean: Number = 0.0
    scale: Scale = 1.0
    profile: str | None = None
    horizons: Horizons = (0,)
    """In steps; 0 is the row itself."""
    quantiles: Quantiles = ()
    """Levels, rising; 0.5, the point forecast, is one of them. Empty: one column a horizon."""

    @property
    def columns(self) -> int:
        """Columns at each horizon."""
        return len(self.quantiles) or 1

    @property
    def median(self) -> int:
        """Which of them is the point forecast."""
        return self.quantiles.index(0.5) if self.quantiles else 0

    @property
    def width(self) -> int:
        """Columns of y."""
        return len(self.horizons) * self.columns

    def column(self, horizon: int) -> int:
        """The first of the columns of a horizon, among its own."""
        return self.horizons.index(horizon) * self.columns

    @model_validator(mode="after")
    def _has_median(self) -> Self:
        if self.quantiles and not self.quantiles[0] < 0.5 < self.quantiles[-1]:
            raise ValueError("quantiles: need levels on either side of 0.5")
        if self.quantiles and 0.5 not in self.quantiles:
            raise ValueError("quantiles: 0.5 is missing; its column is the forecast itself")
        return self


class Fourier(_Section):
    """Calendar input: sin and cos of 2 pi k s / period, k = 1 .. harmonics, s in Unix seconds."""

    kind: Literal["fourier"]
    period_seconds: Period
    harmonics: Annotated[Positive, Field(le=MAX_COLUMNS)]

    @property
    def width(self) -> int:
        """Columns that it adds to the network's input."""
        return 2 * self.harmonics


class DayOfWeek(_Section):
    """Calendar input: seven flags, Monday first."""

    kind: Literal["day_of_week"]

    @property
    def width(self) -> int:
        """Columns that it adds to the network's input."""
        return 7


Calendar = Annotated[Fourier | DayOfWeek, Field(discriminator="kind")]


class Lag(_Section):
    """Lagged inputs: a column of x as the network saw it some rows ago, one for each lag.

    0 is the row itself. `into` is where they go: into the cell, as further inputs after the
    calendar, or into the head, as further features beside h (tensor `head.lags`).
    """

    kind: Literal["lag"]
    input: str
    steps: Lags
    into: Literal["cell", "head"] = "cell"

    @property
    def width(self) -> int:
        """Columns that it adds."""
        return len(self.steps)

    @property
    def reach(self) -> int:
        """Rows before the current one that it needs."""
        return max(self.steps)


class Rolling(_Section):
    """A lagged input: a statistic of a column, as the network saw it, over the last `steps` rows.

    The current row is one of them.
    """

    kind: Literal["rolling"]
    input: str
    steps: Annotated[int, Field(ge=2, le=MAX_LAG, strict=True)]
    statistic: Literal["mean", "min", "max"]
    into: Literal["cell", "head"] = "cell"

    @property
    def width(self) -> int:
        """Columns that it adds."""
        return 1

    @property
    def reach(self) -> int:
        """Rows before the current one that it needs."""
        return self.steps - 1


LaggedInput = Annotated[Lag | Rolling, Field(discriminator="kind")]


class CusumSpec(_Section):
    """The default drift test: a CUSUM chart with a limit from the autocorrelation of the errors.

    It raises an alarm when the errors at the first tracked horizon have risen lastingly by more
    than a share `rise` over their earlier level; then it learns the level again, from at least
    `min_rows` rows. In theory a stable series has one alarm in `average_run_length` rows;
    docs/forecasts.md has what was measured.
    """

    test: Literal["cusum"] = "cusum"
    rise: Annotated[float, Field(strict=True, ge=0.01, le=10.0)] = 0.25
    min_rows: Positive = 256
    average_run_length: Annotated[float, Field(strict=True, ge=100.0, le=1e12)] = 2_000_000.0


class PageHinkleySpec(_Section):
    """The Page-Hinkley test on the scaled error at the first tracked horizon.

    It raises an alarm when the running sum of (error - mean - delta) is more than `threshold` above
    its minimum, after at least `min_rows` rows; then the test restarts. `forget` fades the sum. The
    threshold must be chosen for the series: the defaults, river's, raise tens of alarms on many
    stable ones.
    """

    test: Literal["page_hinkley"] = "page_hinkley"
    delta: Number = 0.005
    threshold: Annotated[float, Field(strict=True, gt=0.0)] = 50.0
    min_rows: Positive = 30
    forget: Annotated[float, Field(strict=True, gt=0.0, le=1.0)] = 0.9999


def _drift_test(value: object) -> str:
    """The test; manifests without `test` but with Page-Hinkley's parameters mean that."""
    if isinstance(value, Mapping):
        older = value.keys() & {"delta", "threshold", "forget"}
        return str(value.get("test", "page_hinkley" if older else "cusum"))
    return str(getattr(value, "test", None))


DriftSpec = Annotated[
    Annotated[CusumSpec, Tag("cusum")] | Annotated[PageHinkleySpec, Tag("page_hinkley")],
    Discriminator(
        _drift_test,
        custom_error_type="drift_test",
        custom_error_message="its `test` is cusum or page_hinkley",
    ),
]


class Tracking(_Section):
    """What is tracked of the forecasts of every output that has an input's name.

    At each of `horizons`: the error, and an interval that adapts to cover a share `level` of the
    truths, at the rate `rate` (eta in Gibbs and Candes 2021). Errors are scaled by those of the
    seasonal naive forecast, `season_steps` rows back; 1 is the plain naive forecast.
    """

    horizons: Annotated[
        tuple[Positive, ...],
        Field(min_length=1, max_length=MAX_COLUMNS),
        AfterValidator(_all_different),
    ]
    level: Annotated[Level, Field(ge=MIN_LEVEL, le=MAX_LEVEL)] = 0.9
    rate: Annotated[float, Field(strict=True, gt=0.0, lt=1.0)] = 0.05
    season_steps: Annotated[int, Field(ge=1, le=MAX_LAG, strict=True)] = 1
    drift: DriftSpec = CusumSpec()


class Profile(_Section):
    """A seasonal profile: value k is for the time origin + k * step interval, modulo its period."""

    period_steps: Annotated[Positive, Field(le=MAX_PROFILE_STEPS)]
    origin: Annotated[datetime, AfterValidator(_in_utc)]


class Manifest(_Section):
    """A model's manifest."""

    format: Literal["stepstate.model/1"]
    name: Name
    version: Version
    description: Text = ""
    """For people: it is not in the fingerprint."""
    cell: CellSpec
    step_interval_seconds: Interval | None = None
    inputs: Annotated[tuple[InputSpec, ...], Field(min_length=1, max_length=MAX_NAMED)]
    calendar: Annotated[tuple[Calendar, ...], Field(max_length=MAX_PARTS)] = ()
    profiles: Annotated[dict[Name, Profile], Field(max_length=MAX_PARTS)] = {}
    lags: Annotated[tuple[LaggedInput, ...], Field(max_length=MAX_PARTS)] = ()
    fallback: Literal["level", "first"] = "level"
    """Lagged inputs before a session's first row: of rows at the level of their columns (mean and
    profile), or equal to the first row."""
    outputs: Annotated[tuple[OutputSpec, ...], Field(min_length=1, max_length=MAX_NAMED)]
    tracking: Tracking | None = None
    fingerprint: str = ""

    @cached_property  # used by each step
    def input_width(self) -> int:
        """D, the columns of x."""
        return len(self.inputs)

    @cached_property
    def step_interval(self) -> timedelta | None:
        """The time from one row to the next."""
        seconds = self.step_interval_seconds
        return None if seconds is None else timedelta(seconds=seconds)

    @property
    def network_width(self) -> int:
        """Columns of the cell's input: those of x, the calendar, then the lagged inputs."""
        return (
            self.input_width
            + sum(part.width for part in self.calendar)
            + sum(part.width for part in self.lags if part.into == "cell")
        )

    @property
    def head_lags(self) -> int:
        """Lagged inputs that the head takes."""
        return sum(part.width for part in self.lags if part.into == "head")

    @cached_property  # used by each reply
    def lag_rows(self) -> int:
        """Rows before the current one that the lagged inputs need."""
        return max((part.reach for part in self.lags), default=0)

    @property
    def history_rows(self) -> int:
        """Past rows that a session keeps: for lagged inputs, the naive forecast, and `hold`.

        One more than the longest lag, because a forecast looks back from the last row.
        """
        season = self.tracking.season_steps if self.tracking else 1
        return max(self.lag_rows + 1, season)

    @cached_property
    def output_width(self) -> int:
        """O, the columns of y."""
        return sum(output.width for output in self.outputs)

    def placed_outputs(self) -> Iterator[tuple[OutputSpec, int, int | None]]:
        """Each output, its first column of y, and the index of the input with its name, if any.

        Such an output forecasts that input, so its truth arrives with later rows.
        """
        names = [column.name for column in self.inputs]
        first = 0
        for output in self.outputs:
            yield output, first, names.index(output.name) if output.name in names else None
            first += output.width

    @property
    def needs_time(self) -> bool:
        """Whether a session must know the time of its rows."""
        return bool(self.calendar or self.profiles)

    @model_validator(mode="after")
    def _references_hold(self) -> Self:
        for name in self.profiles:
            if name.startswith(("cell.", "head.")):
                raise ValueError(f"profiles.{name}: names a tensor of the network")
        columns: list[InputSpec | OutputSpec] = [*self.inputs, *self.outputs]
        for column in columns:
            if column.profile is not None and column.profile not in self.profiles:
                raise ValueError(f"{column.name}.profile: {column.profile!r} is not in profiles")
        names = [column.name for column in self.inputs]
        for index, lagged in enumerate(self.lags):
            if lagged.input not in names:
                raise ValueError(f"lags.{index}.input: {lagged.input!r} is not an input")
        self._check_tracking()
        self._check_sizes()
        if self.needs_time and self.step_interval_seconds is None:
            raise ValueError("step_interval_seconds: needed by calendar inputs and profiles")
        return self

    def _check_sizes(self) -> None:
        widths = {
            "outputs: y": self.output_width,
            "calendar and lags: the cell's input": self.network_width,
            "lags: the head's input": self.head_lags,
        }
        for what, width in widths.items():
            if width > MAX_COLUMNS:
                raise ValueError(f"{what} has {width} columns, at most {MAX_COLUMNS}")
        texts = sum(len(one.name) + len(one.unit.encode()) for one in self.inputs)
        texts += sum(len(one.name) + len(one.unit.encode()) for one in self.outputs)
        if texts > MAX_TEXTS:
            raise ValueError(
                f"inputs and outputs: names and units take {texts} bytes, at most {MAX_TEXTS}"
            )
        tracked = len(self.outputs) * len(self.tracking.horizons) if self.tracking else 0
        if tracked > MAX_TRACKED:
            raise ValueError(f"tracking: {tracked} horizons of all outputs, at most {MAX_TRACKED}")
        cell = 2 * self.cell.num_layers * self.cell.hidden_size
        state = 4 * (cell + self.history_rows * self.input_width)
        if state > MAX_STATE_BYTES:
            raise ValueError(
                f"a session's state takes {state} bytes (layers, units and past rows), at most "
                f"{MAX_STATE_BYTES}"
            )

    def _check_tracking(self) -> None:
        if self.tracking is None:
            return
        tracked = [output for output, _, fed in self.placed_outputs() if fed is not None]
        if not tracked:
            raise ValueError("tracking: no output has the name of an input, so no truth ever comes")
        for output in tracked:
            missing = set(self.tracking.horizons) - set(output.horizons)
            if missing:
                raise ValueError(
                    f"tracking.horizons: {output.name} has no horizon {sorted(missing)}"
                )
