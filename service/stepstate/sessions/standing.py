"""Where a session stands, wherever its state is."""

from __future__ import annotations

from dataclasses import dataclass

from stepstate.stores import SessionRecord


@dataclass(frozen=True, slots=True)
class Standing:
    """What is told of an open session."""

    record: SessionRecord
    t: int
    durable_t: int
    seconds_left: float
    """Until it expires if no step comes."""
    queued_requests: int
    resident: bool
    owner: str
    """The server that holds its lease; empty: none."""
    epoch: int
