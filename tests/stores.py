"""Places where tests keep sessions, and short ways to fill them."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from stepstate.errors import StoreUnavailable
from stepstate.identity import SessionKey, split_key
from stepstate.stores import (
    Durability,
    EndReason,
    SaveRequest,
    SessionRecord,
    SessionStore,
    StoredSession,
    Tombstone,
    open_store,
)
from stepstate.uptime import HEARTBEAT_SECONDS
from tests.redis_process import RedisProcess

OPENED = datetime(2026, 1, 2, 3, 4, 5, 678_901, tzinfo=UTC)
STARTED = datetime(1969, 7, 20, tzinfo=UTC)
CLOSED = Tombstone(EndReason.CLOSED, 12, 60.0)
EXPIRED = Tombstone(EndReason.EXPIRED, 2**40, 0.1 + 0.2)
FINGERPRINT = "sha256:00"
SNAPSHOT = b"\x00snapshot\xff"


class WallClock:
    """Unix seconds that pass when a test says so, from now on: Redis has a clock of its own."""

    def __init__(self) -> None:
        self.now = float(int(time.time()))

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Home:
    """Where the stores of one test keep their sessions: each that is opened is a server more."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.clock = WallClock()
        self._opened: list[SessionStore] = []

    async def open(self) -> SessionStore:
        """One more store in the same place. In memory there is one only."""
        if self.url == "memory:" and self._opened:
            return self._opened[0]
        store = await open_store(self.url, clock=self.clock, unix_time=self.clock)
        self._opened.append(store)
        with suppress(StoreUnavailable):
            await store.heartbeat()  # as a server does when it starts
        return store

    async def pass_time(self, seconds: float) -> None:
        """Lets time pass while all servers are up."""
        while seconds > 0:
            self.clock.advance(min(seconds, HEARTBEAT_SECONDS))
            seconds -= HEARTBEAT_SECONDS
            for store in self._opened:
                await store.heartbeat()

    async def close(self) -> None:
        """Closes all stores."""
        for store in self._opened:
            await store.close()

    async def lose(self) -> SessionStore:
        """Loses everything; returns a store on what is left."""
        await self.close()
        self._opened = []
        await self._lose()
        return await self.open()

    async def _lose(self) -> None:
        """Empties the place."""


class FileHome(Home):
    """A file of SQLite."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"sqlite:{path}")
        self.path = path

    async def _lose(self) -> None:
        for part in self.path.parent.glob(f"{self.path.name}*"):
            part.unlink()


class RedisHome(Home):
    """A Redis, or the nodes of a cluster; empty at first."""

    def __init__(self, *servers: RedisProcess) -> None:
        cluster = "+cluster" if len(servers) > 1 else ""
        super().__init__(f"redis{cluster}://127.0.0.1:{servers[0].port}")
        self._servers = servers
        self.empty()

    def empty(self) -> None:
        for server in self._servers:
            server.command("FLUSHALL")

    async def _lose(self) -> None:
        self.empty()


def record(key: str, model: str = "lstm", start: datetime | None = STARTED) -> SessionRecord:
    tenant, session_id = split_key(SessionKey(key))
    how = (model, "1", FINGERPRINT, 60.0, start, OPENED, Durability.ASYNC)
    return SessionRecord(session_id, *how, tenant=tenant)


async def create(
    home: Home,
    store: SessionStore,
    key: str,
    model: str = "lstm",
    owner: str = "A",
    *,
    replacing: int = 0,
) -> int:
    """A session that is open for a minute; returns its epoch."""
    epoch = await store.create(
        record(key, model),
        owner=owner,
        t=0,
        expires_at=home.clock() + 60.0,
        snapshot=SNAPSHOT,
        replacing=replacing,
    )
    assert isinstance(epoch, int)
    return epoch


async def acquire(store: SessionStore, key: str, owner: str = "B") -> tuple[StoredSession, bytes]:
    """Takes a session that can be taken."""
    taken = await store.acquire(SessionKey(key), owner=owner, fingerprints={FINGERPRINT, "other"})
    assert isinstance(taken, tuple)
    return taken


def saving(
    home: Home, key: str, epoch: int, t: int = 1, snapshot: bytes | None = b"later"
) -> SaveRequest:
    """A save that is as good as its epoch."""
    return SaveRequest(SessionKey(key), epoch, "A", t, home.clock() + 60.0, snapshot)


async def listed(store: SessionStore, size: int = 100, **which: object) -> list[str]:
    """The keys of a whole listing, page by page."""
    keys: list[str] = []
    token, begun = "", False
    while token or not begun:
        entries, token = await store.page(token, size, **which)  # type: ignore[arg-type]
        assert len(entries) <= size
        keys += [entry.key for entry in entries]
        begun = True
    return keys
