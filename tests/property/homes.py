"""Stores in which one session's record is damaged, and servers on them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np

from stepstate.models import Model
from stepstate.stores import SessionStore, open_store
from stepstate.stores.redis import keys
from stepstate.transport import StepstateServicer
from stepstate.v1 import stepstate_pb2 as pb
from tests.redis_process import RedisProcess
from tests.unit.rig import Clock, Lasting, Rig, outputs
from tests.unit.transport.contexts import called

ODD = "m"
"""The id of the session that is damaged."""


class Door:
    """A server of some models on a store, without sockets."""

    def __init__(self, *models: Model, store: SessionStore, clock: Clock, owner: str) -> None:
        self.rig = Rig(*models, store=store, clock=clock, owner=owner)
        self.native = StepstateServicer(called(self.rig))

    async def step(self, session_id: str, x: np.ndarray, t: int) -> np.ndarray:
        session = await self.rig.sessions.get(session_id)
        return outputs(await self.rig.step(session, x, t))

    async def listed(self) -> dict[str, int]:
        found, token, pages = [], "", 0
        while token or not pages:
            page = await self.native.ListSessions(
                pb.ListSessionsRequest(page_size=2, page_token=token), None
            )
            pb.ListSessionsResponse.FromString(page.SerializeToString())
            found += page.sessions
            token, pages = page.next_page_token, pages + 1
            assert pages < 20
        names = [session.session_id for session in found]
        assert len(set(names)) == len(names)
        return {session.session_id: session.status for session in found}

    async def close(self, session_id: str) -> None:
        await self.native.CloseSession(pb.CloseSessionRequest(session_id=session_id), None)


class FileHome:
    """A file of SQLite."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "sessions.db"

    async def open(self, clock: Clock) -> SessionStore:
        return await open_store(f"sqlite:{self.path}", clock=clock, unix_time=clock)

    def damage(self, columns: dict[str, object]) -> None:
        with closing(sqlite3.connect(self.path, isolation_level=None)) as file:
            for name, value in columns.items():
                # A text that is no UTF-8 can only be written so.
                cast = "CAST(? AS TEXT)" if isinstance(value, bytearray) else "?"
                given = bytes(value) if isinstance(value, bytearray) else value
                file.execute(
                    f"UPDATE sessions SET {name} = {cast} WHERE session_id = ?", [given, ODD]
                )

    def put(self, snapshot: bytes) -> None:
        """Replaces the snapshot."""
        self.damage({"snapshot": snapshot})


class RedisHome:
    """A Redis."""

    def __init__(self, server: RedisProcess) -> None:
        self.server = server
        server.command("FLUSHALL")

    async def open(self, clock: Clock) -> SessionStore:
        return await open_store(self.server.url, clock=clock, unix_time=clock)

    def damage(self, fields: dict[str, bytes | None] | bytes) -> None:
        key = keys.session(ODD)
        with self.server.client() as client:
            if isinstance(fields, bytes):
                client.delete(key)
                client.set(key, fields)
                return
            for name, value in fields.items():
                if value is None:
                    client.hdel(key, name)
                else:
                    client.hset(key, name, value)

    def put(self, snapshot: bytes) -> None:
        """Replaces the snapshot."""
        self.damage({"s": snapshot})


class MemoryHome:
    """A store in memory that outlives its servers: of it only the snapshot is bytes."""

    async def open(self, clock: Clock) -> SessionStore:
        self._store = Lasting(clock)
        return self._store

    def damage(self, snapshot: bytes) -> None:
        self._store.overwrite(ODD, snapshot)

    def put(self, snapshot: bytes) -> None:
        """Replaces the snapshot."""
        self.damage(snapshot)
