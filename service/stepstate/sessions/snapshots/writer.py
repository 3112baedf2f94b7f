"""Writes snapshots: of async sessions in the background, of sync ones before their replies.

Rule 1: a snapshot is taken between two turns of the engine, so it is whole.
Rule 2: durable_t advances only when the store has said that the snapshot is kept.
Rule 3: when the store refuses an epoch, or it is unknown whether a step of a sync session was
        saved, the copy here is no longer valid: the session is lost, and the store decides.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np

from stepstate.errors import SessionUnreadable, StaleOwner, StoreUnavailable
from stepstate.sessions.context import SessionContext
from stepstate.sessions.snapshots.format import Snapshot, encode
from stepstate.sessions.table import NEVER
from stepstate.sessions.types import ResidentSession, SessionState, Step, unexpected
from stepstate.stores import (
    Durability,
    SaveRequest,
    SaveResult,
    StoredSession,
    Tombstone,
    UnreadableSession,
)

log = logging.getLogger(__name__)

SAVED_AT_ONCE = 128
"""A few milliseconds of work between two turns of the loop."""
CLOCKS_APART_SECONDS = 0.01
"""Within it the clocks count as one, so that saving twice gives the same bytes."""
IDLE_SHARE = 4
"""The background takes at most a fifth of the loop: it rests this much longer than it worked."""


class SnapshotWriter:
    """Saves resident sessions."""

    def __init__(self, context: SessionContext) -> None:
        self._store = context.store
        self._table = context.table
        self._owner = context.owner
        self._clock = context.clock
        self._unix_time = context.unix_time
        self._observer = context.observer
        self._flush_requested = asyncio.Event()
        self._stopped = False
        self._offset = context.unix_time() - context.clock()

    def expires_at(self, session: ResidentSession) -> float:
        """When a session expires, by the store's clock."""
        left = self._table.expires_at[session.handle] - self._clock()
        return self._store.backend.now() + left

    def last_saves(
        self, sessions: Iterable[ResidentSession]
    ) -> list[tuple[ResidentSession, SaveRequest]]:
        """What is to be saved of sessions that leave for good; what the store has is left out."""
        whole, clean = _divided(sessions, self._is_clean)
        saves = [self._request(*pair, release=True) for pair in self._snapshots(whole)]
        return saves + [self._request(session, None, release=True) for session in clean]

    def snapshot(self, session: ResidentSession) -> bytes:
        """A session's snapshot as it is now."""
        return next(self._snapshots([session]))[1]

    async def save(self, sessions: Iterable[ResidentSession], *, release: bool = False) -> None:
        """Saves sessions together; with `release` their leases are given up.

        Sessions that another server has taken over are lost.

        Raises:
            StoreUnavailable: whether they were saved is not known.
        """
        whole, clean = _divided(sessions, lambda session: release and self._is_clean(session))
        saves = [self._request(*pair, release=release) for pair in self._snapshots(whole)]
        saves += [self._request(session, None, release=release) for session in clean]
        if not saves:
            return
        changes = [session.changes for session, _ in saves]  # that these snapshots have
        started = time.perf_counter()
        try:
            verdicts = await self._store.ask(self._store.backend.save([save for _, save in saves]))
        except StoreUnavailable:
            self._observer.not_saved("failed", len(saves))
            raise
        size = sum(len(save.snapshot or b"") for _, save in saves)
        self._observer.saved(len(saves), size, time.perf_counter() - started)
        settled = list(zip(saves, verdicts, strict=True))
        for ((session, save), verdict), changed in zip(settled, changes, strict=True):
            if verdict is SaveResult.DONE:
                self._advance_durable(session, save.t)
                session.saved_changes = max(session.saved_changes, changed)
                session.lease_in_doubt = release
                if release:
                    self._table.revoke(session)
        for (session, save), verdict in settled:
            if verdict is not SaveResult.DONE and session.state is not SessionState.GONE:
                await self._refused(session, save, verdict)

    def renew(self, session: ResidentSession) -> None:
        """Refuses a session's steps until its next save: its lease may have been given up."""
        if session.state is not SessionState.GONE:
            session.lease_in_doubt = True
            self._table.revoke(session)
            self._table.touch_at[session.handle] = self._clock()
            self.request_flush()

    async def commit(self, steps: Sequence[Step]) -> None:
        """Saves the sessions of steps that were just applied; those that are not saved are lost."""
        try:
            await self.save([step.session for step in steps])
        except Exception as error:  # noqa: BLE001 - it is logged, and the steps are answered
            failure = unexpected("a commit failed", error, steps[0].session.key)
            for step in steps:
                self._table.lose(step.session, failure)

    async def verify_lease(self, step: Step) -> None:
        """Finds out whether a session is still held here whose client is ahead of it.

        If not, it is lost; if nobody can say, the step gets that as its error.
        """
        session = step.session
        found: StoredSession | UnreadableSession | Tombstone | None = None
        try:
            found = await self._store.ask(self._store.backend.find(session.key))
        except Exception as error:  # noqa: BLE001 - it is logged, and the step is answered
            # To ask the client for rows that may be saved elsewhere would be wrong.
            step.error = unexpected("a look for a session failed", error, session.key)
        if isinstance(found, StoredSession) and found.epoch > session.epoch:
            self._table.lose(session, StaleOwner(session.session_id, found.t))

    def stop(self) -> None:
        """Begins no more rounds: a drain saves everything once more, and gives the leases up."""
        self._stopped = True

    def request_flush(self) -> None:
        """Begins the next background round at once."""
        self._flush_requested.set()

    async def run(self, interval_seconds: float) -> None:
        """Saves in the background, again and again, what is not durable."""
        while True:
            try:
                async with asyncio.timeout(interval_seconds):
                    await self._flush_requested.wait()
            except TimeoutError:
                pass
            self._flush_requested.clear()
            try:
                await self.save_round()
            except StoreUnavailable:
                await asyncio.sleep(interval_seconds)  # noted where it was asked
            except Exception:
                log.exception("a round of snapshots failed; the next one tries again")

    async def save_round(self) -> None:
        """Saves every async session that has rows to save, and the due ones of durability none.

        Raises:
            StoreUnavailable.
        """
        due = self._table.undurable() + self._table.untouched(self._clock())
        for first in range(0, len(due), SAVED_AT_ONCE):
            began = time.perf_counter()
            await self.save(filter(self._stays, due[first : first + SAVED_AT_ONCE]))
            if len(due) > SAVED_AT_ONCE:
                await asyncio.sleep(IDLE_SHARE * (time.perf_counter() - began))

    def _to_unix_time(self) -> float:
        """What to add to this server's clock to have Unix seconds."""
        offset = self._unix_time() - self._clock()
        if abs(offset - self._offset) > CLOCKS_APART_SECONDS:
            self._offset = offset
        return self._offset

    def _snapshots(
        self, sessions: Iterable[ResidentSession]
    ) -> Iterator[tuple[ResidentSession, bytes]]:
        """Each session with its snapshot; states of one model are copied together."""
        offset = self._to_unix_time()
        table = self._table
        for scheduler, group in groupby(sessions, key=lambda session: session.scheduler):
            some = list(group)
            states = scheduler.engine.read_states(np.array([session.slot for session in some]))
            for session, state in zip(some, states, strict=True):
                handle = session.handle
                used_at = table.expires_at[handle] - session.record.idle_timeout_seconds + offset
                window = scheduler.window.read(session.slot)
                snapshot = Snapshot(
                    session.record, table.t[handle], used_at, state, window, epoch=session.epoch
                )
                yield session, encode(snapshot, session.identity)

    def _is_clean(self, session: ResidentSession) -> bool:
        """Whether the store has all of it."""
        kept = session.record.durability is not Durability.NONE
        durable = self._table.durable_t[session.handle] == self._table.t[session.handle]
        return kept and durable and not session.changed

    def _request(
        self, session: ResidentSession, snapshot: bytes | None, *, release: bool
    ) -> tuple[ResidentSession, SaveRequest]:
        owner = "" if release else self._owner
        t = self._table.t[session.handle]
        expires_at = self.expires_at(session)
        self._touch_later(session)
        key = session.key
        return session, SaveRequest(key, session.epoch, owner, t, expires_at, snapshot)

    def _touch_later(self, session: ResidentSession) -> None:
        """A session that is not saved for its rows is saved now and then for its expiry."""
        at = NEVER
        if session.record.durability is Durability.NONE:
            at = self._clock() + session.record.idle_timeout_seconds / 2
        self._table.touch_at[session.handle] = at

    def _advance_durable(self, session: ResidentSession, t: int) -> None:
        durable = session.record.durability is not Durability.NONE
        if (
            durable
            and session.state is not SessionState.GONE
            and t > self._table.durable_t[session.handle]
        ):
            self._table.durable_t[session.handle] = t

    async def _refused(
        self, session: ResidentSession, save: SaveRequest, verdict: SaveResult
    ) -> None:
        if verdict is SaveResult.MISSING and await self._recreate(session, save):
            return
        self._observer.not_saved("fenced", 1)
        found = await self._store.ask(self._store.backend.find(session.key))
        if isinstance(found, UnreadableSession):  # nobody can tell any more who holds it
            self._table.lose(session, SessionUnreadable(session.session_id, found.problem))
            return
        self._table.lose(
            session, StaleOwner(session.session_id, found.t if found is not None else 0)
        )

    async def _recreate(self, session: ResidentSession, save: SaveRequest) -> bool:
        """Creates a session again that the store has lost; False if somebody else has it."""
        extra = {"tenant": session.record.tenant, "session_id": session.session_id}
        log.warning("the store had lost a session", extra=extra)
        kept = await self._store.ask(
            self._store.backend.create(
                session.record,
                owner=save.owner,
                t=save.t,
                expires_at=save.expires_at,
                snapshot=save.snapshot or self.snapshot(session),
            )
        )
        if not isinstance(kept, int):
            return False
        session.epoch = kept
        self._advance_durable(session, save.t)
        return True

    def _stays(self, session: ResidentSession) -> bool:
        """Whether a round saves it: the last save of one that leaves gives up its lease."""
        return session.open and not self._stopped


def _divided(
    sessions: Iterable[ResidentSession], test: Callable[[ResidentSession], bool]
) -> tuple[list[ResidentSession], list[ResidentSession]]:
    """Those that fail a test, and those that pass it."""
    parts: tuple[list[ResidentSession], list[ResidentSession]] = ([], [])
    for session in sessions:
        parts[test(session)].append(session)
    return parts
