"""The seam behind which sessions are remembered beyond the arena."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol


class EndReason(enum.Enum):
    """Why a session is gone."""

    EXPIRED = "expired"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """What is fixed about a session when it is opened."""

    session_id: str
    model: str
    version: str
    fingerprint: str
    idle_timeout_seconds: float
    start_time: datetime | None
    open_time: datetime


@dataclass(frozen=True, slots=True)
class Ending:
    """How a session ended, remembered for a while so that its clients can be told."""

    reason: EndReason
    t: int
    idle_timeout_seconds: float


class SessionStore(Protocol):
    """Remembers sessions and their endings.

    Calls for one id never overlap: the sessions layer sees to it.
    """

    async def create(self, record: SessionRecord) -> None:
        """Remembers a new session, and forgets the ending of an older one of this id."""
        ...

    async def end(self, session_id: str, ending: Ending) -> None:
        """Forgets a session and remembers for a while how it ended."""
        ...

    async def find(self, session_id: str) -> SessionRecord | Ending | None:
        """What is known of an id."""
        ...

    async def close(self) -> None:
        """Lets go of files and connections."""
        ...
