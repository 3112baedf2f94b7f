"""A session and a step, as the sessions layer sees them. No torch, no grpc, no clock."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from stepstate.engine.work import Layers, WorkItem
from stepstate.errors import StepstateError
from stepstate.models import Model
from stepstate.stores import Durability, SessionRecord, Tombstone

if TYPE_CHECKING:
    from stepstate.sessions.scheduler import StepScheduler


class ReplyTo(Protocol):
    """Where a step's outcome goes: a waiting call or a stream."""

    @property
    def cancelled(self) -> bool:
        """Nobody waits any more."""
        ...

    def deliver(self, step: Step) -> None:
        """Takes a step that has its outcome; called once, on the event loop."""
        ...


@dataclass(slots=True, eq=False)
class Step(WorkItem):
    """One request to apply rows, from the front door to its reply. It carries its own outcome."""

    session: ResidentSession
    t: int | None
    """Rows applied before it, as its client counts; None: whatever the session stands at."""
    reply_to: ReplyTo
    reply_bytes: int
    """About what its outcome takes in memory."""
    t_after: int = field(init=False, default=0)
    durable_t: int = field(init=False, default=0)
    y: bytes = field(init=False, default=b"")
    """Outputs, row-major float32, little-endian."""
    layers: Layers | None = field(init=False, default=None)
    replayed: bool = field(init=False, default=False)
    error: StepstateError | None = field(init=False, default=None)

    @property
    def cancelled(self) -> bool:
        """Nobody waits for it any more."""
        return self.reply_to.cancelled


@dataclass(slots=True, eq=False)
class ResidentSession:
    """A client's ongoing sequence. Its numbers (t, expiry) are in the table's arrays."""

    record: SessionRecord
    scheduler: StepScheduler
    slot: int
    phase: int
    """Step of row 0 in the model's timeline; 0 for a session without a time."""
    handle: int = field(init=False, default=-1)
    """Its place in the table's arrays."""
    epoch: int = field(init=False, default=0)
    """What proves to the store that its lease is held here."""
    identity: bytes = field(init=False, default=b"")
    """The part of its snapshots that stays the same."""
    sync: bool = field(init=False, default=False)
    """Its steps are answered when they are saved."""
    bounded: bool = field(init=False, default=False)
    """It is saved in the background, so its rows that are not saved are bounded."""
    position_unknown: bool = field(init=False, default=False)
    """It may have been set back: a request must say its t."""
    waiting: deque[Step] | None = field(init=False, default=None)
    """Steps that came meanwhile, in order; made when first needed."""
    changes: int = field(init=False, default=0)
    """Changes of its state without a row, which its t does not tell."""
    saved_changes: int = field(init=False, default=0)
    """How many of them the store has."""
    barred: bool = field(init=False, default=False)
    """It takes no new steps: it is ending, spilling, or lost to another server."""
    ending: Tombstone | None = field(init=False, default=None)
    """How it ends."""
    lease_in_doubt: bool = field(init=False, default=False)
    """Its lease was to be given up, and it is not known whether it was: it waits to be renewed."""
    lost: StepstateError | None = field(init=False, default=None)
    """Why its copy here is worth nothing any more: the answer to whatever it still has."""
    leaving: asyncio.Future[None] | None = field(init=False, default=None)
    """Resolved when a session that is spilled or lost has left the arena, or stays after all."""
    idle: asyncio.Future[None] | None = field(init=False, default=None)
    """Resolved when a barred session has finished its steps."""

    def __post_init__(self) -> None:
        self.sync = self.record.durability is Durability.SYNC
        self.bounded = self.record.durability is Durability.ASYNC

    @property
    def session_id(self) -> str:
        """Its id."""
        return self.record.session_id

    @property
    def model(self) -> Model:
        """Its model."""
        return self.scheduler.model

    @property
    def changed(self) -> bool:
        """Whether its state changed without a row since it was saved."""
        return self.changes > self.saved_changes
