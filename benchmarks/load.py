"""What a client process is asked, and what it answers: plain values that go through a pipe."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.sessions import SessionOptions


class Kind(enum.Enum):
    """What is asked of a server."""

    ECHO = "echo"
    STEP = "step"


class CallPath(enum.Enum):
    """By which kind of call steps are sent."""

    STREAM = "stream"
    UNARY = "unary"
    PACKED = "packed"


@dataclass(frozen=True, slots=True)
class ArrivalSchedule:
    """Messages are sent at fixed times, whether or not earlier ones were answered."""

    interval: float
    """Seconds between two messages of the process."""
    phase: float
    """Seconds after the begin at which its first one is due."""


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


@dataclass(frozen=True, slots=True)
class Window:
    """From when to when replies count, by `time.monotonic`, the same clock in all processes."""

    begin: float
    """When sending begins: what comes before the start warms up."""
    start: float
    finish: float

    @property
    def seconds(self) -> float:
        """How long it is."""
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
    """How many of the messages had none, after all patience."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Why a process gave up."""

    detail: str


Question = Load | Window | OpenSessions | CloseSessions
Answer = Ready | Sample | Failed
