"""The messages between the benchmark and its client processes: plain values for a pipe."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.access import OPEN, Access
from benchmarks.sessions import SessionOptions


class Kind(enum.Enum):
    """What is requested from a server."""

    ECHO = "echo"
    STEP = "step"


class CallPath(enum.Enum):
    """How steps are sent."""

    STREAM = "stream"
    UNARY = "unary"
    PACKED = "packed"


@dataclass(frozen=True, slots=True)
class ArrivalSchedule:
    """Messages are sent at fixed times, with or without replies to earlier ones."""

    interval: float
    """Seconds between two messages of the process."""
    phase: float
    """Seconds from the begin until the first one is due."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one process sends."""

    kind: Kind
    path: CallPath
    target: str
    names: Sequence[str]
    """Its sessions, each at t = 0."""
    x: NDArray[np.float32]
    """[N, D], the row that each of them is sent again and again."""
    schedule: ArrivalSchedule | None = None
    """None: closed loop, a message follows the reply to the one before it."""
    rows: int = 1
    """Of a message, each of another session; more than 1 on the packed path only."""
    in_flight: int = 1
    """Packed messages that are unanswered at once in closed loop."""
    connections: int = 1
    """That its calls are shared between."""
    access: Access = OPEN


@dataclass(frozen=True, slots=True)
class Window:
    """When replies count, by `time.monotonic`, which is the same clock in all processes."""

    begin: float
    """When sending begins; the time until the start is the warm-up."""
    start: float
    finish: float

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.finish - self.start


@dataclass(frozen=True, slots=True)
class OpenSessions:
    """Sessions that are to be opened, many calls at once."""

    target: str
    names: Sequence[str]
    options: SessionOptions


@dataclass(frozen=True, slots=True)
class CloseSessions:
    """Sessions that are to be closed, many calls at once."""

    target: str
    names: Sequence[str]


@dataclass(frozen=True, slots=True)
class Ready:
    """Every session of a load was answered once; or all sessions are opened, or closed."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The messages that count.

    In closed loop those whose reply came within the window. At a fixed rate those that
    were due within it, so that none is left out for being late.
    """

    since: NDArray[np.float64]
    """When each was sent, or was due, by `time.monotonic`."""
    latencies: NDArray[np.float64]
    """Seconds until its reply came; until now, where none did."""
    replies: int
    """Those that came within the window."""
    unanswered: int
    """Messages without a reply after the grace period."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Why a process gave up."""

    detail: str


Question = Load | Window | OpenSessions | CloseSessions
Answer = Ready | Sample | Failed
