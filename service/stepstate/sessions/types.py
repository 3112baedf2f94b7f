"""A session, its steps, and who takes their outcomes.

Of this layer it imports `replay` only; no torch, no grpc, no clock.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from stepstate.engine import Engine, Floats, Layers, Observer, PackedWork, WorkItem
from stepstate.errors import Internal, StepstateError, without_frames
from stepstate.identity import SessionKey, split_key
from stepstate.models import Model
from stepstate.sessions.replay import ReplayWindow
from stepstate.stores import Durability, SessionRecord
from stepstate.tenants import Share, Tenant

log = logging.getLogger(__name__)

T = TypeVar("T")

Pause = Callable[[], Awaitable[object]]
"""Lets others have their turn of the event loop in the midst of long work."""
next_round: Pause = partial(asyncio.sleep, 0)

MAX_SOURCE_RUNNING = 1024
"""Requests of a source: four of the largest forwards. Its streams are not read beyond that, so that
what it sends waits at its side."""


@dataclass(slots=True, eq=False)
class Source:
    """Where requests come from, a client: queues serve sources in turn, see `tenants.fair`."""

    share: Share = field(default_factory=Share)
    """Of the queues."""
    running: int = 0
    """Requests of it that the engine has."""
    tenant: Tenant = field(init=False)
    """Whose limits its requests keep."""
    _readers: deque[asyncio.Future[None]] | None = None  # made when it is needed: most are not

    def __post_init__(self) -> None:
        self.tenant = self.share.tenant

    async def wait_for_room(self) -> None:
        """Waits while the engine has so many of its requests that one more would only wait."""
        while self.running >= MAX_SOURCE_RUNNING:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            if self._readers is None:
                self._readers = deque()
            self._readers.append(future)
            try:
                await future
            finally:
                self._wake_one()  # in its turn: it may have nothing to read, or be cancelled

    def finished(self, requests: int) -> None:
        """The engine is done with requests of it."""
        self.running -= requests
        if self._readers:
            self._wake_one()

    def _wake_one(self) -> None:
        """Wakes one reader if there is room: 1,000 at once would hold up others."""
        while self._readers and self.running < MAX_SOURCE_RUNNING:
            future = self._readers.popleft()
            if not future.done():
                future.set_result(None)
                return


class ReplyTo(Protocol):
    """Where a step's outcome goes: a waiting call or a stream."""

    @property
    def cancelled(self) -> bool:
        """Nobody waits any more."""
        ...

    @property
    def source(self) -> Source:
        """Whose steps these are."""
        ...

    def deliver(self, step: Step) -> None:
        """Takes a step that has its outcome; called once, on the event loop."""
        ...


class PackedReplyTo(Protocol):
    """Where the outcome of packed rows goes."""

    @property
    def cancelled(self) -> bool:
        """Nobody waits any more."""
        ...

    @property
    def source(self) -> Source:
        """Whose rows these are."""
        ...

    def deliver_pack(self, pack: PackedStep) -> None:
        """Takes rows that have their outcome; called once, on the event loop."""
        ...


class RowReplyTo(Protocol):
    """Where the outcome of a `SingleRow` goes."""

    @property
    def cancelled(self) -> bool:
        """Nobody waits any more."""
        ...

    @property
    def source(self) -> Source:
        """Whose rows these are."""
        ...

    def deliver_row(self, row: SingleRow, y: bytes, durable_t: int) -> None:
        """Takes the outputs of an applied row, float32 [O], little-endian."""
        ...

    def step_of(self, row: SingleRow) -> Step | None:
        """The step that a row's message asks for, of its session; None: it was refused."""
        ...

    def hold_row(self, row: SingleRow) -> None:
        """A row waits longer than this round of the event loop: it has to be counted."""
        ...


class DeferredRows(Protocol):
    """Packed rows that wait for earlier rows of the same sessions."""

    def flush(self, handle: int) -> None:
        """Submits the rows of one session as steps of their own, in order."""
        ...


class StepObserver(Observer, Protocol):
    """Counts what happens to the steps of one model."""

    def applied(self, rows: int) -> None:
        """Rows were applied."""
        ...

    def ended(self, result: str, times: int = 1) -> None:
        """Requests ended otherwise: replayed, refused, cancelled, failed."""
        ...


class SessionObserver(Protocol):
    """Counts sessions that come and go.

    The steps of each model have a `StepObserver` of their own: the hot path does not look it up.
    """

    def model(self, name: str, version: str) -> StepObserver:
        """The observer of one model's steps."""
        ...

    def opened(self, model: str, version: str) -> None:
        """A session was opened."""
        ...

    def restored(self, model: str, version: str, *, taken_over: bool) -> None:
        """A session was loaded from the store; `taken_over`: from another server."""
        ...

    def spilled(self, model: str, version: str) -> None:
        """A session left the arena for the store."""
        ...

    def closed(self, reason: str) -> None:
        """A session ended."""
        ...

    def expired_restored(self) -> None:
        """An expired session was restored."""
        ...

    def deleted(self, reason: str, count: int) -> None:
        """Expired sessions were deleted: grace_over, limit (of sessions), or replaced."""
        ...

    def saved(self, count: int, size: int, seconds: float) -> None:
        """Snapshots of `count` sessions, `size` bytes together, were written at once."""
        ...

    def not_saved(self, reason: str, count: int) -> None:
        """Snapshots were refused (fenced), or could not be written (failed)."""
        ...


class Scheduler(Protocol):
    """What a session knows of the `StepScheduler` that steps it."""

    model: Model
    engine: Engine[Step, PackedStep]
    window: ReplayWindow
    number: int

    def submit(self, step: Step) -> None:
        """Starts an accepted step, or queues it."""
        ...

    def add_row(self, row: SingleRow) -> bool:
        """Takes a row to the fast path; False: it has to go the ordinary way."""
        ...

    def enqueue_barrier(self, session: ResidentSession, barrier: SessionBarrier[Any]) -> None:
        """Calls a barrier after the steps that a session has accepted."""
        ...

    def release(self, slot: int) -> None:
        """Gives a slot back."""
        ...


@dataclass(slots=True, eq=False)
class Step(WorkItem):
    """One request to apply rows, from its arrival to its reply. It carries its own outcome."""

    reply_to: ReplyTo
    session: ResidentSession
    t: int | None
    """Rows applied before it, as its client counts; None: the session's own t."""
    held_bytes: int
    """About what it takes in memory, with its reply, until that has left."""
    t_after: int = field(init=False, default=0)
    durable_t: int = field(init=False, default=0)
    y: bytes = field(init=False, default=b"")
    """Outputs, row-major float32, little-endian."""
    layers: Layers | None = field(init=False, default=None)
    replayed: bool = field(init=False, default=False)
    error: StepstateError | None = field(init=False, default=None)


@dataclass(slots=True, eq=False)
class SingleRow:
    """One row of one session on the fast path: see `rows`."""

    reply_to: RowReplyTo
    session: ResidentSession
    generation: int
    """Of the session's reference: once another is valid, the row is given back."""
    t: int | None
    """Rows applied before it, as its client counts; None: the session's own t."""
    x: bytes
    """Float32 [D], little-endian."""
    message: bytes
    """As it came; for `reply_to`."""
    reply_head: bytes
    """What its reply begins with; for `reply_to`."""
    at: int = field(init=False, default=0)
    """Rows applied to the session before it."""
    held_bytes: int = field(init=False, default=0)
    """What `reply_to` has counted for it."""
    accepted: bool = field(init=False, default=False)
    """It had to wait, and is one of the accepted requests that have no outcome yet."""


@dataclass(frozen=True, slots=True)
class SessionRef:
    """A session's place in the table; it is valid as long as its generation is the table's."""

    handle: int
    generation: int


@dataclass(frozen=True, slots=True)
class RowBatch:
    """N rows: references (generation 0: none), the t of each if the client sends it, and x."""

    handles: NDArray[np.int64]
    generations: NDArray[np.int64]
    t: NDArray[np.int64] | None
    x: Floats

    def __len__(self) -> int:
        return len(self.handles)

    def some(self, rows: NDArray[np.int64]) -> RowBatch:
        """Some of the rows."""
        t = None if self.t is None else self.t[rows]
        return RowBatch(self.handles[rows], self.generations[rows], t, self.x[rows])


class PackedStep(PackedWork):
    """Rows [B] on the fast path through the engine, and their outcome."""

    reply_to: PackedReplyTo

    def __init__(
        self,
        rows: RowBatch,
        slots: NDArray[np.int64],
        at: NDArray[np.int64],
        phase: NDArray[np.int64],
        *,
        reply_to: PackedReplyTo,
    ) -> None:
        super().__init__(rows.x, slots, at, phase, reply_to=reply_to)
        self.handles = rows.handles
        self.generations = rows.generations
        self.y: Floats = np.zeros((0, 0), np.float32)
        """Outputs [B, O]; those of refused rows mean nothing."""
        self.durable_t: NDArray[np.int64] = np.zeros(0, np.int64)
        self.errors: list[tuple[int, StepstateError]] = []
        """Rows that were not applied, and why."""


class SessionState(enum.Enum):
    """The life of a resident session; only `OPEN` takes steps. `Table` makes all transitions."""

    OPEN = "open"
    ENDING = "ending"
    """It is being closed, or expires: then it is gone, or open again if the store is away."""
    SPILLING = "spilling"
    """It is saved to make room: then it is gone, or open again if the store is away."""
    LOST = "lost"
    """Its copy here is no longer valid; it leaves when its accepted steps are answered."""
    GONE = "gone"
    """It has left the arena."""


OPEN = SessionState.OPEN
"""Compared with on every request: a module's name is faster than an enum's member."""
_LEAVES = frozenset({SessionState.LOST, SessionState.GONE})
TRANSITIONS: Mapping[SessionState, frozenset[SessionState]] = {
    SessionState.OPEN: _LEAVES | {SessionState.ENDING, SessionState.SPILLING},
    SessionState.ENDING: _LEAVES | {SessionState.OPEN},
    SessionState.SPILLING: _LEAVES | {SessionState.OPEN},
    SessionState.LOST: frozenset({SessionState.GONE}),
    SessionState.GONE: frozenset(),
}


@dataclass(slots=True, eq=False)
class ResidentSession:
    """A client's ongoing sequence. Its numbers (t, expiry) are in the table's arrays."""

    record: SessionRecord
    scheduler: Scheduler
    slot: int
    phase: int
    """Step of row 0 in the model's timeline; 0 for a session without a time."""
    key: SessionKey = field(init=False)
    """Its name among all sessions of the server."""
    model: Model = field(init=False)
    handle: int = field(init=False, default=-1)
    """Its place in the table's arrays."""
    epoch: int = field(init=False, default=0)
    """Proves to the store that its lease is held here."""
    identity: bytes = field(init=False, default=b"")
    """The constant part of its snapshots."""
    sync: bool = field(init=False)
    """Its steps are answered when they are saved."""
    bounded: bool = field(init=False)
    """It is saved in the background, so its rows that are not saved are bounded."""
    waiting: deque[Waiting] | None = field(init=False, default=None)
    """What was submitted while it was busy, in order; made when first needed."""
    changes: int = field(init=False, default=0)
    """Changes of its state without a row, which its t does not show."""
    saved_changes: int = field(init=False, default=0)
    """How many of them the store has."""
    state: SessionState = field(init=False, default=SessionState.OPEN)
    lost: StepstateError | None = field(init=False, default=None)
    """Why it is `LOST`: the answer to its steps."""
    left: asyncio.Future[None] | None = field(init=False, default=None)
    """Resolved when a session that is spilling or lost is gone, or open again."""
    idle: asyncio.Future[None] | None = field(init=False, default=None)
    """Resolved when it has finished its steps, if somebody waits for that."""
    # The next two are not states: each only refuses steps, and they can hold together, also while
    # the session ends.
    lease_in_doubt: bool = field(init=False, default=False)
    """Its lease may have been given up: steps are refused until a save renews it."""
    position_unknown: bool = field(init=False, default=False)
    """It may have been rolled back: a step must say its t."""

    def __post_init__(self) -> None:
        self.key = self.record.key
        self.model = self.scheduler.model
        self.sync = self.record.durability is Durability.SYNC
        self.bounded = self.record.durability is Durability.ASYNC

    @property
    def session_id(self) -> str:
        """Its id: what its clients call it."""
        return self.record.session_id

    @property
    def open(self) -> bool:
        """Whether it takes steps."""
        return self.state is SessionState.OPEN

    @property
    def changed(self) -> bool:
        """Whether its state changed without a row since it was saved."""
        return self.changes > self.saved_changes


class SessionBarrier(Generic[T]):
    """Calls a function between two steps of a session, and keeps what it returned.

    Args:
        act: called when all steps before the barrier have their outcome.
    """

    def __init__(self, act: Callable[[], T]) -> None:
        self._act = act
        self._done: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def reach(self) -> None:
        """Calls the function; what it raises is the waiter's."""
        if self._done.cancelled():
            return
        try:
            self._done.set_result(self._act())
        except Exception as error:  # noqa: BLE001 - it is the waiter's, not the engine's
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """The function can't be called, or raised."""
        if not self._done.done():
            self._done.set_exception(error)
            self._done.exception()  # its waiter may have given up: nothing is lost

    async def result(self) -> T:
        """What the function returned.

        Raises:
            StepstateError: the session was lost first; and what the function raised.
        """
        try:
            return await self._done
        finally:
            del self  # its error's traceback leads here: no circle


Waiting = Step | SingleRow | SessionBarrier[Any]
"""What waits in a session until it is no longer busy."""


def unexpected(what: str, error: Exception, key: SessionKey) -> StepstateError:
    """What a client is told of an exception that nobody expected.

    It has an id, and the log has all of it under that id. A `StepstateError` is returned as it is.
    """
    if isinstance(error, StepstateError):
        return without_frames(error)
    internal = Internal(secrets.token_hex(8))
    tenant, session_id = split_key(key)
    extra = {"error_id": internal.error_id, "tenant": tenant, "session_id": session_id}
    log.error(what, exc_info=error, extra=extra)
    return internal
