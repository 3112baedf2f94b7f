"""What a model's manifest declares.

A manifest is the file `manifest.json` beside the weights. It fixes the cell,
the columns of x and y with their units and scaling, and what the server
computes from time: calendar inputs and seasonal profiles.
"""

from __future__ import annotations

import enum
from datetime import UTC, datetime
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Version = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,17}$")]
Whole = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[int, Field(ge=1, strict=True)]
Number = Annotated[float, Field(strict=True)]


def _not_zero(value: float) -> float:
    if value == 0.0:
        raise ValueError("is 0, expected a number that values can be divided by")
    return value


def _in_utc(value: datetime) -> datetime:
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def _all_different(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) < len(values):
        raise ValueError("holds a number twice")
    return values


Scale = Annotated[Number, AfterValidator(_not_zero)]
Horizons = Annotated[
    tuple[Whole, ...],
    Field(min_length=1),
    AfterValidator(_all_different),
]


class _Part(BaseModel):
    # A misspelt key must not pass unseen, and a value is what it says it is.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CellKind(enum.Enum):
    """The recurrent networks that can be served, named as in PyTorch."""

    LSTM = "lstm"
    GRU = "gru"
    RNN_TANH = "rnn_tanh"
    RNN_RELU = "rnn_relu"


class CellSpec(_Part):
    """A stacked recurrent network of `num_layers` layers (L) of `hidden_size` units (H)."""

    kind: CellKind
    hidden_size: Positive
    num_layers: Positive
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


class Input(_Part):
    """A column of x: the network sees (x - profile[phase(t)] - mean) / scale."""

    name: Name
    unit: str = ""
    mean: Number = 0.0
    scale: Scale = 1.0
    profile: str | None = None


class Output(_Part):
    """A column of y for each horizon h: network * scale + mean + profile[phase(t + h)]."""

    name: Name
    unit: str = ""
    mean: Number = 0.0
    scale: Scale = 1.0
    profile: str | None = None
    horizons: Horizons = (0,)
    """In steps; 0 is the row itself."""


class Fourier(_Part):
    """Calendar input: sin and cos of 2 pi k s / period, k = 1 .. harmonics, s in Unix seconds."""

    kind: Literal["fourier"]
    period_seconds: Positive
    harmonics: Positive

    @property
    def width(self) -> int:
        """Columns that it adds to the network's input."""
        return 2 * self.harmonics


class DayOfWeek(_Part):
    """Calendar input: seven flags, Monday first."""

    kind: Literal["day_of_week"]

    @property
    def width(self) -> int:
        """Columns that it adds to the network's input."""
        return 7

    @property
    def period_seconds(self) -> int:
        """After this long the flags repeat."""
        return 7 * 86_400


Calendar = Annotated[Fourier | DayOfWeek, Field(discriminator="kind")]


class Profile(_Part):
    """A seasonal profile: value k is for the time origin + k * step interval, modulo period."""

    period_steps: Positive
    origin: Annotated[datetime, AfterValidator(_in_utc)]


class Manifest(_Part):
    """A model's manifest."""

    format: Literal["stepstate.model/1"]
    name: Name
    version: Version
    description: str = ""
    cell: CellSpec
    step_interval_seconds: Positive | None = None
    inputs: Annotated[tuple[Input, ...], Field(min_length=1)]
    calendar: tuple[Calendar, ...] = ()
    profiles: dict[Name, Profile] = {}
    outputs: Annotated[tuple[Output, ...], Field(min_length=1)]
    fingerprint: str = ""

    @property
    def input_width(self) -> int:
        """D, the columns of x."""
        return len(self.inputs)

    @property
    def network_width(self) -> int:
        """Columns of the network's input: those of x, then the calendar."""
        return self.input_width + sum(part.width for part in self.calendar)

    @property
    def output_width(self) -> int:
        """O, the columns of y."""
        return sum(len(output.horizons) for output in self.outputs)

    @property
    def needs_time(self) -> bool:
        """Whether a session must know the time of its rows."""
        return bool(self.calendar or self.profiles)

    @model_validator(mode="after")
    def _references_hold(self) -> Self:
        for name in self.profiles:
            if name.startswith(("cell.", "head.")):
                raise ValueError(f"profiles.{name}: names a tensor of the network")
        columns: list[Input | Output] = [*self.inputs, *self.outputs]
        for column in columns:
            if column.profile is not None and column.profile not in self.profiles:
                raise ValueError(f"{column.name}.profile: {column.profile!r} is not in profiles")
        if self.needs_time and self.step_interval_seconds is None:
            raise ValueError("step_interval_seconds: needed by calendar inputs and profiles")
        return self
