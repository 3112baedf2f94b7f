"""The seam behind which sessions are kept beyond the arena.

Rule 1: whoever creates or acquires a session gets a higher epoch than anyone had
        before; `save` and `end` with an older one change nothing. So of two
        servers at most one can commit a session's steps.
Rule 2: every operation is atomic for one session, and durable when it returns.
Rule 3: a store that can't do what it is asked raises `StoreUnavailable`; then
        it may or may not have been done, and only the store knows.
Rule 4: times are those of the store's own clock, `now`: seconds in which at least one of
        its servers was up. It stands still while none is, and knows nothing of wall clocks,
        so neither an outage nor a clock that is set ends a session.
Rule 5: a session whose time is up is kept, marked as expired, until it is restored,
        replaced or deleted; nothing else can be done with it.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, ClassVar, Protocol

from pydantic import AfterValidator, AwareDatetime, ConfigDict, Field, TypeAdapter

ENDING_SECONDS = 3600.0
"""How a session ended is remembered for an hour: longer than any client goes on retrying."""


MAX_T = 2**53
"""No session has applied so many rows; every number below it is exact in Lua and in a float."""
MAX_IDLE_SECONDS = 1e11
"""Some 3,000 years: with it every time of expiry can be told."""


class Durability(enum.Enum):
    """What of a session survives the end of its server."""

    NONE = "none"
    """Saved when it is spilled and when its server drains, and lost otherwise."""
    ASYNC = "async"
    """Saved in the background."""
    SYNC = "sync"
    """Saved before a step is answered."""


class MissingPolicy(enum.Enum):
    """What a NaN in a row means to a session."""

    REJECT = "reject"
    """The request is refused."""
    IMPUTE = "impute"
    """A missing value; the model's own forecast stands in, or the row before."""
    HOLD = "hold"
    """A missing value; that of the row before stands in, and before the first one a level."""


class EndReason(enum.Enum):
    """Why a session is gone."""

    EXPIRED = "expired"
    CLOSED = "closed"
    LOST = "lost"


def _utc(moment: datetime) -> datetime:
    """A time in UTC, where all arithmetic with it is done.

    Raises:
        ValueError: in UTC it is before the year 1 or after 9999.
    """
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("is before the year 1 or after 9999") from None


Id = Annotated[str, Field(min_length=1, max_length=256)]
Name = Annotated[str, Field(max_length=256)]
Seconds = Annotated[float, Field(gt=0, le=MAX_IDLE_SECONDS, allow_inf_nan=False)]
Moment = Annotated[AwareDatetime, AfterValidator(_utc)]
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """What is fixed about a session when it is opened.

    The types say what `from_json` takes; the constructor checks nothing.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="ignore")

    session_id: Id
    model: Name
    version: Name
    fingerprint: Name
    idle_timeout_seconds: Seconds
    start_time: Moment | None
    open_time: Moment
    durability: Durability
    missing: MissingPolicy = MissingPolicy.REJECT
    interval_level: Share | None = None
    """The share of truths that its intervals are to cover; None: the model's own."""

    @property
    def model_key(self) -> str:
        """Its model, "name/version"."""
        return f"{self.model}/{self.version}"

    def to_json(self) -> str:
        """The record as text; `from_json` reads it."""
        values = {
            "session_id": self.session_id,
            "model": self.model,
            "version": self.version,
            "fingerprint": self.fingerprint,
            "idle_timeout_seconds": self.idle_timeout_seconds,
            "start_time": self.start_time.isoformat() if self.start_time else None,
            "open_time": self.open_time.isoformat(),
            "durability": self.durability.value,
            "missing": self.missing.value,
            "interval_level": self.interval_level,
        }
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> SessionRecord:
        """The record that `to_json` wrote. Unknown fields, of a later version, are skipped.

        Raises:
            ValueError: it is not such a text.
        """
        return _RECORDS.validate_json(text)


_RECORDS = TypeAdapter(SessionRecord)


@dataclass(frozen=True, slots=True)
class Tombstone:
    """How a session ended, remembered for a while so that its clients can be told."""

    reason: EndReason
    t: int
    idle_timeout_seconds: float


@dataclass(frozen=True, slots=True)
class StoredSession:
    """An open or expired session as a store knows it, without its snapshot."""

    record: SessionRecord
    t: int
    """Rows in its snapshot."""
    expires_at: float
    """By the store's clock."""
    epoch: int
    owner: str
    """The server that holds its lease; empty: none, the snapshot is the whole session."""
    delete_at: float | None = None
    """When it may be deleted, by the store's clock, if it is marked as expired."""

    @property
    def session_id(self) -> str:
        """Its id."""
        return self.record.session_id


@dataclass(frozen=True, slots=True)
class UnreadableSession:
    """A session whose record in the store can't be read. It can be told of, and discarded."""

    session_id: str
    problem: str
    """What is wrong with the record, for a person."""


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """One session to save."""

    session_id: str
    epoch: int
    owner: str
    """Empty: the lease is given up with it."""
    t: int
    expires_at: float
    snapshot: bytes | None
    """None: the one that is stored is still good."""


class SaveResult(enum.Enum):
    """What became of a `SaveRequest`."""

    DONE = "done"
    FENCED = "fenced"
    """Another server has a higher epoch, or the session has ended."""
    MISSING = "missing"
    """The store has lost the session: it knows neither it nor how it ended."""


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """What a store's files take of the volume that they are on, in bytes."""

    database: int
    wal: int
    """Written and not yet copied into the database."""
    reserve: int
    """Kept so that it can be copied when the disk is full."""
    free: int
    volume: int


class SessionStore(Protocol):
    """Keeps sessions and their endings.

    Every method raises `StoreUnavailable` when the store can't be reached or can't write.
    What is stored may be damaged: a record that can't be read is `UnreadableSession`,
    an ending that can't be is forgotten, and neither touches another session.
    """

    durable: bool
    """Whether it outlives the process."""

    def now(self) -> float:
        """The time by the store's clock, in seconds.

        Raises:
            StoreUnavailable: the store was never reached, so that it is not known.
        """
        ...

    async def beat(self) -> None:
        """Moves the store's clock on, and forgets endings whose time is over.

        Every server calls it every `BEAT_SECONDS`. Servers that are up together move the clock
        on once, and what is longer than `MAX_BEAT_SECONDS` since a server's last beat does not
        count: it was paused, or the store was away.
        """
        ...

    async def create(
        self,
        record: SessionRecord,
        *,
        owner: str,
        t: int,
        expires_at: float,
        snapshot: bytes,
        replacing: int = 0,
    ) -> int | StoredSession | UnreadableSession:
        """Keeps a new session, and forgets how an older one of its id ended.

        Args:
            record: what is fixed about it.
            owner: who holds its lease.
            t: rows in the snapshot.
            expires_at: by the store's clock.
            snapshot: its state.
            replacing: the epoch of a session of this id that is to be deleted for it, if that
                one's time is up.

        Returns:
            Its epoch; or, with nothing changed, the session that has its id, open or expired.
        """
        ...

    async def acquire(
        self, session_id: str, *, owner: str, fingerprints: Collection[str]
    ) -> tuple[StoredSession, bytes] | StoredSession | UnreadableSession | Tombstone | None:
        """Takes a session's lease, whoever held it: its epoch rises.

        Args:
            session_id: its id.
            owner: who takes it.
            fingerprints: of the models that the taker has; of others nothing is taken.

        Returns:
            The entry, with the new epoch and the *previous* owner, and the snapshot; or only
            the entry, unchanged, of a session that is of another model, or whose time is up;
            or how the session ended; or None.
        """
        ...

    async def find(self, session_id: str) -> StoredSession | UnreadableSession | Tombstone | None:
        """What is known of an id. It takes nothing."""
        ...

    async def save(self, saves: Sequence[SaveRequest]) -> list[SaveResult]:
        """Saves sessions together, each if its epoch is still the newest.

        Returns:
            What became of each, in order.
        """
        ...

    async def expire(self, saves: Sequence[SaveRequest], *, delete_at: float) -> list[SaveResult]:
        """Saves sessions for the last time, and marks them as expired.

        Their epochs rise, so that who held them can't save them any more.

        Args:
            saves: the sessions; `expires_at` does not matter.
            delete_at: until when they are to be kept, by the store's clock.

        Returns:
            What became of each, in order.
        """
        ...

    async def restore(self, session_id: str, epoch: int, *, expires_at: float) -> bool:
        """Opens an expired session again, if the epoch is still the newest; the epoch rises.

        Returns:
            Whether it was so.
        """
        ...

    async def end(self, session_id: str, epoch: int, ending: Tombstone) -> bool:
        """Forgets a session, if the epoch is still the newest, and remembers how it ended.

        Returns:
            Whether it was so.
        """
        ...

    async def discard(self, session_id: str, ending: Tombstone) -> bool:
        """Forgets a session that is `UnreadableSession`, and remembers how it ended.

        Returns:
            Whether it was so; False: it is not there, or can be read.
        """
        ...

    async def overdue(self, before: float, limit: int) -> list[StoredSession]:
        """Up to `limit` open sessions with `expires_at` before a time; none that is unreadable."""
        ...

    async def expired(self, before: float, limit: int) -> list[StoredSession]:
        """Up to `limit` expired sessions with `delete_at` before a time, about the oldest.

        None that is unreadable.
        """
        ...

    async def page(
        self, token: str, size: int, model: str = "", *, expired: bool = False
    ) -> tuple[list[StoredSession | UnreadableSession], str]:
        """Some of the sessions.

        A session that is open during the whole listing is in exactly one page.

        Args:
            token: empty for the first page, then what the page before returned.
            size: the most entries wanted.
            model: of the model of this name only; empty: of all.
            expired: whether those marked as expired are wanted too.

        Returns:
            The entries, and the token of the next page; empty: there is none.

        Raises:
            InvalidField: page_token is not a token of this store.
        """
        ...

    async def count(self) -> Mapping[str, int]:
        """Open sessions by model "name/version"; those that are past their time may be in it."""
        ...

    async def count_expired(self) -> int:
        """Sessions that are marked as expired."""
        ...

    async def probe(self) -> None:
        """Writes something small wherever sessions are written, to see whether that is possible.

        A store that can be read but not written (a replica, a full disk) raises.
        """
        ...

    def disk_usage(self) -> DiskUsage | None:
        """What it takes of a disk of this machine; None: it has none. Any thread may ask."""
        ...

    async def close(self) -> None:
        """Lets go of files and connections; further calls are harmless."""
        ...
