"""Writes snapshots: of async sessions in the background, of sync ones before their replies.

Rule 1: a snapshot is taken between two turns of the engine, so it is whole.
Rule 2: durable_t advances only when the store has said that the snapshot is kept.
Rule 3: when the store refuses an epoch, or it is unknown whether a sync step was
        committed, the copy here is worth nothing: it is forgotten, and the store decides.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Protocol

import numpy as np

from stepstate.errors import SessionUnreadable, StaleOwner, StepstateError, StoreUnavailable
from stepstate.sessions.monitored_store import MonitoredStore
from stepstate.sessions.snapshots.format import Snapshot, encode
from stepstate.sessions.surprise import surprise
from stepstate.sessions.table import NEVER, Table
from stepstate.sessions.types import ResidentSession, Step
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


class WriterObserver(Protocol):
    """Is told of snapshots."""

    def saved(self, count: int, size: int, seconds: float) -> None:
        """Snapshots of so many sessions, of so many bytes, were written together."""
        ...

    def not_saved(self, reason: str, count: int) -> None:
        """Snapshots were refused (fenced), or could not be written (failed)."""
        ...


class SnapshotWriter:
    """Saves resident sessions.

    Args:
        link: the store.
        table: the resident sessions.
        owner: the name under which this server holds leases.
        clock: monotonic seconds.
        wall: Unix seconds.
        observer: told of snapshots.
        forget: called with a session whose copy here is worth nothing any more, and why.
    """

    def __init__(
        self,
        link: MonitoredStore,
        table: Table,
        *,
        owner: str,
        clock: Callable[[], float],
        unix_time: Callable[[], float],
        observer: WriterObserver,
        forget: Callable[[ResidentSession, StepstateError], None],
    ) -> None:
        self._link = link
        self._table = table
        self._owner = owner
        self._clock = clock
        self._unix_time = unix_time
        self._observer = observer
        self._forget = forget
        self._tasks: set[asyncio.Task[None]] = set()
        self._urged = asyncio.Event()
        self._stopped = False
        self._offset = unix_time() - clock()

    def expires_at(self, session: ResidentSession) -> float:
        """When a session expires, by the store's clock."""
        left = self._table.expires_at[session.handle] - self._clock()
        return self._link.store.now() + left

    def last_saves(
        self, sessions: Iterable[ResidentSession]
    ) -> list[tuple[ResidentSession, SaveRequest]]:
        """What is to be saved of sessions that leave for good; what the store has is left out."""
        whole, clean = _divided(sessions, self._is_clean)
        saves = [self._save(*pair, release=True) for pair in self._snapshots(whole)]
        return saves + [self._save(session, None, release=True) for session in clean]

    def snapshot(self, session: ResidentSession) -> bytes:
        """A session's snapshot as it stands."""
        return next(self._snapshots([session]))[1]

    async def save(self, sessions: Iterable[ResidentSession], *, release: bool = False) -> None:
        """Saves sessions together; with `release` their leases are given up.

        Sessions that another server has taken over are forgotten.

        Raises:
            StoreUnavailable: whether they were saved is not known.
        """
        whole, clean = _divided(sessions, lambda session: release and self._is_clean(session))
        saves = [self._save(*pair, release=release) for pair in self._snapshots(whole)]
        saves += [self._save(session, None, release=release) for session in clean]
        if not saves:
            return
        changes = [session.changes for session, _ in saves]  # that these snapshots have
        started = time.perf_counter()
        try:
            verdicts = await self._link.ask(self._link.store.save([save for _, save in saves]))
        except StoreUnavailable:
            self._observer.not_saved("failed", len(saves))
            raise
        size = sum(len(save.snapshot or b"") for _, save in saves)
        self._observer.saved(len(saves), size, time.perf_counter() - started)
        settled = list(zip(saves, verdicts, strict=True))
        for ((session, save), verdict), changed in zip(settled, changes, strict=True):
            if verdict is SaveResult.DONE:
                self._now_durable(session, save.t)
                session.saved_changes = max(session.saved_changes, changed)
                session.lease_in_doubt = release
                if release:
                    self._table.revoke(session)
        for (session, save), verdict in settled:
            if verdict is not SaveResult.DONE and self._here(session):
                await self._not_kept(session, save, verdict)

    def renew(self, session: ResidentSession) -> None:
        """Lets a session wait for its next save, as nobody knows whether its lease is given up."""
        if self._here(session):
            session.lease_in_doubt = True
            self._table.revoke(session)
            self._table.touch(session, self._clock())
            self.request_flush()

    def commit(self, steps: Sequence[Step]) -> None:
        """Saves the sessions of steps that were just applied, and then lets them be answered."""
        task = asyncio.create_task(self._commit(steps))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def verify_lease(self, step: Step) -> None:
        """Finds out whether a session is still held here that a client believes to be further."""
        task = asyncio.create_task(self._verify_lease(step))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stop(self) -> None:
        """Begins no more rounds: whoever drains saves for the last time, and gives leases up."""
        self._stopped = True

    def request_flush(self) -> None:
        """Begins the next round in the background at once."""
        self._urged.set()

    async def run(self, interval_seconds: float) -> None:
        """Saves in the background, for ever, what is not durable."""
        while True:
            try:
                async with asyncio.timeout(interval_seconds):
                    await self._urged.wait()
            except TimeoutError:
                pass
            self._urged.clear()
            try:
                await self.save_round()
            except StoreUnavailable:
                await asyncio.sleep(interval_seconds)  # the link has noted it
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

    async def _commit(self, steps: Sequence[Step]) -> None:
        failure: StepstateError | None = None
        try:
            await self.save([step.session for step in steps])
        except Exception as error:  # noqa: BLE001 - a surprise is logged, and the steps answered
            failure = surprise("a commit failed", error, steps[0].session.session_id)
        for step in steps:
            if failure is not None:
                self._forget(step.session, failure)
            step.session.scheduler.committed(step)

    async def _verify_lease(self, step: Step) -> None:
        session = step.session
        found: StoredSession | UnreadableSession | Tombstone | None = None
        try:
            found = await self._link.ask(self._link.store.find(session.session_id))
        except Exception as error:  # noqa: BLE001 - a surprise is logged, and the step answered
            # To ask for rows that may be saved elsewhere would be wrong.
            step.error = surprise("a look for a session failed", error, session.session_id)
        if isinstance(found, StoredSession) and found.epoch > session.epoch:
            self._forget(session, StaleOwner(session.session_id, found.t))
        session.scheduler.lease_verified(step)

    def _to_unix_time(self) -> float:
        """What to add to this server's clock to have Unix seconds."""
        offset = self._unix_time() - self._clock()
        if abs(offset - self._offset) > CLOCKS_APART_SECONDS:
            self._offset = offset
        return self._offset

    def _snapshots(
        self, sessions: Iterable[ResidentSession]
    ) -> Iterator[tuple[ResidentSession, bytes]]:
        """Each session with its snapshot; states are copied out of a lane together."""
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

    def _save(
        self, session: ResidentSession, snapshot: bytes | None, *, release: bool
    ) -> tuple[ResidentSession, SaveRequest]:
        owner = "" if release else self._owner
        t = self._table.t[session.handle]
        expires_at = self.expires_at(session)
        self._touch_later(session)
        return session, SaveRequest(
            session.session_id, session.epoch, owner, t, expires_at, snapshot
        )

    def _touch_later(self, session: ResidentSession) -> None:
        """A session that is not saved for its rows is saved now and then for its expiry."""
        at = NEVER
        if session.record.durability is Durability.NONE:
            at = self._clock() + session.record.idle_timeout_seconds / 2
        self._table.touch(session, at)

    def _now_durable(self, session: ResidentSession, t: int) -> None:
        durable = session.record.durability is not Durability.NONE
        if durable and self._here(session) and t > self._table.durable_t[session.handle]:
            self._table.durable_t[session.handle] = t

    async def _not_kept(
        self, session: ResidentSession, save: SaveRequest, verdict: SaveResult
    ) -> None:
        if verdict is SaveResult.MISSING and await self._keep_again(session, save):
            return
        self._observer.not_saved("fenced", 1)
        found = await self._link.ask(self._link.store.find(session.session_id))
        if isinstance(found, UnreadableSession):  # nobody can tell any more who holds it
            self._forget(session, SessionUnreadable(session.session_id, found.problem))
            return
        self._forget(session, StaleOwner(session.session_id, found.t if found is not None else 0))

    async def _keep_again(self, session: ResidentSession, save: SaveRequest) -> bool:
        """Gives a store that lost a session what it should have; False if somebody else has it."""
        log.warning("the store had lost a session", extra={"session_id": session.session_id})
        kept = await self._link.ask(
            self._link.store.create(
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
        self._now_durable(session, save.t)
        return True

    def _here(self, session: ResidentSession) -> bool:
        return self._table.get(session.session_id) is session

    def _stays(self, session: ResidentSession) -> bool:
        """Whether a round saves it: the last save of one that leaves gives up its lease."""
        return self._here(session) and not session.barred and not self._stopped


def _divided(
    sessions: Iterable[ResidentSession], test: Callable[[ResidentSession], bool]
) -> tuple[list[ResidentSession], list[ResidentSession]]:
    """Those that fail a test, and those that pass it."""
    parts: tuple[list[ResidentSession], list[ResidentSession]] = ([], [])
    for session in sessions:
        parts[test(session)].append(session)
    return parts
