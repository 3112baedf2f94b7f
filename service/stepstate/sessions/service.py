"""The session table as the front doors see it: open, find, step, copy, close, expire, drain.

Rule 1: an id is free, open, or ending; the store decides it for every server that shares it.
Rule 2: a session that is gone is an error that says why; nothing restarts one silently.
Rule 3: every accepted step is counted until it is settled, so a drain knows when it is done.
Rule 4: what arrives first for a session is first in its line (see `arrivals`), whatever it asks
        for, whichever door it comes by, and whatever state the session is in. So every public
        coroutine takes its place before it waits for anything.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from stepstate.errors import (
    Draining,
    InvalidField,
    QueueFull,
    SessionExists,
    SessionLimit,
    SessionLost,
    SessionUnreadable,
    StaleOwner,
    StepstateError,
    StoreUnavailable,
)
from stepstate.models import Catalog, Manifest, Model
from stepstate.sessions.arrivals import RETRY_SECONDS, Arrivals, Call, Hold, Waiter, served
from stepstate.sessions.barrier import SessionBarrier
from stepstate.sessions.counts import SessionCounts
from stepstate.sessions.forecasting.forecaster import Forecaster, SessionForecast
from stepstate.sessions.forecasting.scenarios import ForecastRequest
from stepstate.sessions.loader import LoaderObserver, SessionLoader
from stepstate.sessions.monitored_store import MonitoredStore
from stepstate.sessions.options import (
    CopyOptions,
    Limits,
    OpenOptions,
    check_id,
    copy_record,
    default_idle_timeout,
    make_record,
)
from stepstate.sessions.packed import (
    DeferredRows,
    PackedReplyTo,
    RowBatch,
    SessionRef,
    lane_of,
    seat_of,
)
from stepstate.sessions.scheduler import StepScheduler
from stepstate.sessions.snapshots.format import Snapshot, decode, encode
from stepstate.sessions.status import SessionSummaries, SessionSummary
from stepstate.sessions.survey import Survey
from stepstate.sessions.sweeper import ExpirySweeper
from stepstate.sessions.table import Table
from stepstate.sessions.types import ReplyTo, ResidentSession, Step
from stepstate.stores import (
    DiskUsage,
    Durability,
    EndReason,
    SaveResult,
    SessionRecord,
    SessionStore,
    StoredSession,
    Tombstone,
    UnreadableSession,
)

log = logging.getLogger(__name__)

_SAVED_AT_ONCE = 500
_ENDED_AT_ONCE = 32  # about a millisecond of work in one turn of the loop
_PAGE_TOKEN = re.compile(r"[A-Za-z0-9._:-]{0,160}|~([0-9A-F]{2}){1,600}")

T = TypeVar("T")


class SessionService:
    """All sessions of a server.

    Args:
        catalog: the loaded models.
        table: shared with the lanes.
        store: keeps sessions beyond the arena.
        limits: the bounds.
        owner: the name under which this process, and no other, holds leases.
        clock: monotonic seconds.
        wall: Unix seconds.
        observer: told of sessions that come and go.
    """

    def __init__(
        self,
        catalog: Catalog,
        table: Table,
        store: SessionStore,
        *,
        limits: Limits,
        owner: str,
        clock: Callable[[], float],
        unix_time: Callable[[], float],
        observer: LoaderObserver,
    ) -> None:
        self.catalog = catalog
        self.schedulers: dict[str, StepScheduler] = {}
        self.link = MonitoredStore(store, clock=clock)
        self._table = table
        self._store = store
        self._limits = limits
        self._owner = owner
        self._clock = clock
        self._unix_time = unix_time
        self._observer = observer
        self._standings = SessionSummaries(
            table, served=self._served, owner=owner, clock=clock, now=store.now
        )
        self.survey = Survey(self.link, self._standings)
        self._arrivals = Arrivals(self._usable, self._make_ready)
        self._lines = self._arrivals.lines
        self._census = SessionCounts(self.link, clock=clock, observer=observer)
        self._expiry = ExpirySweeper(
            self.link,
            table,
            self._census,
            grace_seconds=limits.expired_grace_seconds,
            limit=limits.sessions,
            observer=observer,
        )
        self._residency = SessionLoader(
            self.link,
            table,
            self.schedulers,
            self.survey,
            self._standings,
            owner=owner,
            clock=clock,
            unix_time=unix_time,
            observer=observer,
            awaited=lambda session: session.session_id in self._lines,
            expired=self._expiry.settle,
        )
        self.saver = self._residency.saver
        self._draining = False
        self._queued_requests = 0
        self._queued_rows = 0
        self._openings = 0  # under way
        self._settled_all = asyncio.Event()
        self._deferred: set[DeferredRows] = set()
        self._forecaster = Forecaster(self, table)

    def __len__(self) -> int:
        """Resident sessions."""
        return len(self._table)

    @property
    def queued_rows(self) -> int:
        """Rows accepted and not yet answered."""
        return self._queued_rows

    @property
    def store_up(self) -> bool:
        """Whether the store can be written."""
        return self.link.up

    @property
    def store_failures(self) -> Mapping[str, int]:
        """Calls of the store that failed, by cause."""
        return self.link.failures

    @property
    def disk_usage(self) -> DiskUsage | None:
        """What the store takes of a disk of this machine; None: it has none."""
        return self._store.disk_usage()

    @property
    def undurable_rows(self) -> int:
        """Rows of async sessions that are applied and not saved."""
        return self._table.undurable_rows()

    @property
    def expired(self) -> int:
        """Expired sessions that are kept, by a count that is some seconds old."""
        return self._census.expired

    def spilled(self, model_key: str) -> int:
        """Open sessions of a model that are in the store only, or on another server."""
        return max(0, self._census[model_key] - self.schedulers[model_key].open_sessions)

    @property
    def orphaned_sessions(self) -> int:
        """Sessions in the store whose very model is not loaded here, when it was last looked."""
        return self.survey.orphaned.total()

    @property
    def unreadable_sessions(self) -> int:
        """Sessions in the store that can't be read, as far as they were met."""
        return len(self.survey.unreadable)

    async def start(self) -> None:
        """Asks the store how many sessions it has; one that is away may come back later."""
        with suppress(StoreUnavailable):
            await self.beat()
            await self._census.count()

    async def beat(self) -> None:
        """Moves the store's clock on; to be called every `BEAT_SECONDS`.

        Raises:
            StoreUnavailable.
        """
        await self.link.ask(self._store.beat())

    def default_idle_timeout(self, manifest: Manifest) -> float:
        """Seconds without a step after which a session of a model expires, if it asks for none."""
        return default_idle_timeout(manifest, self._limits)

    async def open(self, opening: OpenOptions, *, hold: Hold | None = None) -> ResidentSession:
        """Opens a session with zero state at t = 0.

        Args:
            opening: what is asked for.
            hold: the caller's place in the line of its id, if it has one.

        Raises:
            SessionExists, ModelUnknown, InvalidField, SessionLimit, Draining, StoreUnavailable.
        """
        if self._draining:
            raise Draining
        model = self.catalog.find(opening.model, opening.version)
        record = make_record(opening, model.manifest, self._limits)
        blank = self.schedulers[model.key].blank(record, self._unix_time())
        if hold is not None:
            return await self._adopt(blank, hold)
        async with self.hold(record.session_id) as mine:
            return await self._adopt(blank, mine)

    async def fork(self, session_id: str, copying: CopyOptions) -> ResidentSession:
        """Opens a session that starts from a copy of another.

        Raises:
            as `get` for the source, and as `open` for the copy.
        """
        if self._draining:
            raise Draining
        check_id(copying.session_id)
        exporting = self._export(session_id)  # its place in the source's line
        try:
            async with self.hold(copying.session_id) as hold:
                source = decode((await (await exporting.result).result())[0])
                return await self._adopt_copy(source, copying, hold)
        finally:
            self.drop(session_id, exporting)
            del exporting  # its error's traceback leads here: no circle

    async def export(self, session_id: str) -> tuple[bytes, SessionSummary]:
        """A session's snapshot after the steps accepted so far, and how it stood then.

        Raises:
            as `get`.
        """
        exporting = self._export(session_id)
        try:
            return await (await exporting.result).result()
        finally:
            self.drop(session_id, exporting)
            del exporting  # its error's traceback leads here: no circle

    async def reset_accuracy(self, session_id: str) -> SessionSummary:
        """Forgets how good a session's forecasts were, after the steps accepted so far.

        It is saved before it is answered, if the session's steps are saved.

        Raises:
            as `get`, StaleOwner.
        """
        if self._draining:
            raise Draining
        session, turn = await self.in_turn(
            session_id,
            lambda found: (found, self.turn(found, lambda: self._reset_accuracy(found))),
        )
        try:
            standing = await turn.result()
        finally:
            del turn  # its error's traceback leads here: no circle
        await self._changed_is_kept(session)
        return standing

    def _reset_accuracy(self, session: ResidentSession) -> SessionSummary:
        session.scheduler.engine.reset_accuracy(session.slot)
        session.changes += 1
        return self.standing(session)

    async def _changed_is_kept(self, session: ResidentSession) -> None:
        """Waits until a change without a row is in the store, if the session's rows are to be."""
        kept = session.record.durability is not Durability.NONE
        while kept and session.changed and self._table.get(session.session_id) is session:
            if session.leaving is not None:  # it is saved as it leaves
                await asyncio.shield(session.leaving)
            elif session.ending is not None:
                return
            elif self._draining:  # it would take back the lease that the drain gives up
                raise Draining
            else:
                await self.saver.save([session])
        if session.lost is not None:
            raise session.lost

    async def restore(self, data: bytes, copying: CopyOptions) -> ResidentSession:
        """Opens a session from a snapshot; with an empty id in `copying`, under its own.

        Raises:
            SnapshotCorrupt, SnapshotModelMismatch, and as `open`.
        """
        if self._draining:
            raise Draining
        snapshot = self._residency.adapt(decode(data))
        if not copying.session_id:
            copying = replace(copying, session_id=snapshot.record.session_id)
        async with self.hold(copying.session_id) as hold:
            return await self._adopt_copy(snapshot, copying, hold)

    async def restore_expired(self, session_id: str) -> ResidentSession:
        """Opens an expired session again, as it was; its idle time begins anew.

        Raises:
            SessionExists: it is open.
            SessionUnknown, SessionExpired, SessionClosed: there is nothing to restore.
            SessionLimit; and as `get`.
        """
        if self._draining:
            raise Draining
        async with self.hold(session_id) as hold:
            while not await hold.finish(self._reopen(session_id)):
                pass  # somebody was faster
            return await self.get(session_id, hold=hold)

    async def _reopen(self, session_id: str) -> bool:
        """Lets the store have an expired session open again; False if somebody was faster."""
        await self._free_id(session_id)
        entry = await self._expired_entry(session_id)
        with self._counted_opening():
            expires_at = self._store.now() + entry.record.idle_timeout_seconds
            opened = await self.link.ask(
                self._store.restore(session_id, entry.epoch, expires_at=expires_at)
            )
            if opened:
                self._census.restored(entry.record.model_key)
                log.info("an expired session was restored", extra={"session_id": session_id})
            return opened

    @contextmanager
    def _counted_opening(self) -> Iterator[None]:
        """Counts a session as open before the census does.

        Raises:
            SessionLimit.
        """
        if self._census.total + self._openings >= self._limits.sessions:
            raise SessionLimit(self._limits.sessions)
        self._openings += 1
        try:
            yield
        finally:
            self._openings -= 1

    async def _expired_entry(self, session_id: str) -> StoredSession:
        """An expired session of a model that is loaded here, marked as such."""
        found = await self.link.ask(self._store.find(session_id))
        if not isinstance(found, StoredSession):
            raise await self._residency.missing_reason(found, session_id)
        if not self._standings.past(found):
            raise SessionExists(session_id, found.t)
        record = found.record
        scheduler = self.schedulers.get(record.model_key)
        if scheduler is None or record.fingerprint not in scheduler.model.fingerprints:
            raise self._residency.foreign(record)
        if found.delete_at is not None:
            return found
        await self._expiry.settle(found)
        return await self._expired_entry(session_id)

    def find(self, session_id: str) -> ResidentSession | None:
        """The resident session of this id if it takes steps now, and nobody waits for it."""
        session = self._table.get(session_id)
        if session is None or session.barred or session_id in self._lines or self._overdue(session):
            return None
        if self._table.deferred[session.handle]:
            self._flush(session)
        return session

    def arrive(self, session_id: str, waiter: Waiter) -> None:
        """Serves a request at once, or lets it wait in its session's line."""
        session = self.find(session_id)
        if session is None or not served(waiter, session):
            self.wait(session_id, waiter)

    def wait(self, session_id: str, waiter: Waiter, *, start: bool = True) -> None:
        """Lets a request stand in the line of a session that `find` does not give.

        Args:
            session_id: of the session.
            waiter: is told the session, or why there is none, when its turn has come.
            start: makes the session resident; else that waits for `load`, or for others.
        """
        try:
            check_id(session_id)
            if self._draining and session_id not in self._lines:
                raise Draining
        except StepstateError as error:
            waiter.failed(error.with_traceback(None))
        else:
            self._stop_packed(session_id)
            self._arrivals.wait(session_id, waiter, start=start)

    def load(self, session_id: str) -> None:
        """Makes the session resident that requests wait for without `start`."""
        self._arrivals.start(session_id)

    def drop(self, session_id: str, waiter: Waiter) -> None:
        """Takes a request out of its line whose caller has given up."""
        self._arrivals.drop(session_id, waiter)

    def hold(self, session_id: str) -> Hold:
        """Takes a place in a session's line that nobody comes past until it is released.

        Raises:
            InvalidField: no session can have that id.
        """
        check_id(session_id)
        self._stop_packed(session_id)
        return self._arrivals.hold(session_id)

    async def in_turn(
        self,
        session_id: str,
        act: Callable[[ResidentSession], T],
        *,
        patience_seconds: float = 0.0,
        hold: Hold | None = None,
    ) -> T:
        """Uses a session as soon as it can be used, after all who came before.

        Args:
            session_id: of the session, which is made resident if it is not.
            act: called with it, without a wait between; returns what is returned.
            patience_seconds: how long to wait for room in the queue, in its place in the line.
            hold: the caller's place in the line, if it has one.

        Raises:
            as `get`, and what `act` raises.
        """
        deadline = asyncio.get_running_loop().time() + patience_seconds
        if hold is not None:
            return await self._use_held(session_id, act, deadline, hold)
        if not patience_seconds and (session := self.find(session_id)) is not None:
            return act(session)
        call = Call(act, deadline)
        self.arrive(session_id, call)
        try:
            return await call.result
        finally:
            self.drop(session_id, call)
            del call  # its error's traceback leads here: no circle

    async def get(self, session_id: str, *, hold: Hold | None = None) -> ResidentSession:
        """The open session of this id, made resident if it is not.

        Only with a `hold` it is sure that nobody else has used it before the caller does.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost, InvalidField,
            SnapshotModelMismatch, SnapshotCorrupt, Draining, QueueFull, StoreUnavailable.
        """
        if hold is None:
            return await self.in_turn(session_id, lambda session: session)
        while (session := self._usable(session_id)) is None:
            await hold.finish(self._make_ready(session_id))
        return session

    async def look(self, session_id: str) -> SessionSummary:
        """Where a session stands; it stays where it is.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost, InvalidField,
            StoreUnavailable.
        """
        session = self.find(session_id)
        if session is not None:
            return self.standing(session)
        async with self.hold(session_id) as hold:
            await hold.finish(self._settle_resident(session_id))
            session = self._usable(session_id)
            if session is not None:
                return self.standing(session)
            found = await self.link.ask(self._store.find(session_id))
            if isinstance(found, StoredSession) and not self._standings.past(found):
                if self._standings.lost(found):
                    raise SessionLost(session_id)
                return self._standings.stored(found)
            raise await self._residency.missing_reason(found, session_id)

    async def page(
        self, token: str, size: int, model: str, *, expired: bool = False
    ) -> tuple[list[SessionSummary | UnreadableSession], str]:
        """Up to `size` open sessions, and the token to go on from; empty: these were the last.

        Args:
            token: empty for the first page, else that of the page before.
            size: the most sessions wanted.
            model: of the model of this name only; empty: of all, loaded or not.
            expired: whether expired sessions that are kept are wanted too.

        Raises:
            InvalidField, StoreUnavailable.
        """
        if not _PAGE_TOKEN.fullmatch(token):
            raise InvalidField("page_token", "is not a token of an earlier page; begin with none")
        page = self._store.page(token, size, model, expired=expired)
        entries, following = await self.link.ask(page)
        told_of: list[SessionSummary | UnreadableSession] = []
        for entry in entries:
            session = self._usable(entry.session_id)
            if session is not None:
                told_of.append(self.standing(session))
            elif isinstance(entry, UnreadableSession):
                self.survey.met(entry)
                told_of.append(entry)
            elif self._open_elsewhere(entry) or (expired and entry.delete_at is not None):
                told_of.append(self._standings.stored(entry))
        return told_of, following

    def submit(self, step: Step) -> None:
        """Accepts a step; its outcome is delivered to its `reply_to`, now or later.

        Raises:
            Draining, QueueFull: nothing was accepted.
        """
        self.accept(1, step.rows)
        step.session.scheduler.submit(step)

    def accept(self, requests: int, rows: int) -> None:
        """Accepts requests that come to their lanes later, or have their outcome by `settled`.

        Raises:
            Draining, QueueFull: nothing was accepted.
        """
        if self._draining:
            raise Draining
        limits = self._limits
        if self._queued_requests >= limits.queued_requests:
            raise QueueFull("requests waiting on this server", limits.queued_requests)
        if self._queued_rows and self._queued_rows + rows > limits.queued_rows:
            raise QueueFull("rows waiting on this server", limits.queued_rows)
        self._queued_requests += requests
        self._queued_rows += rows

    def submit_accepted(self, step: Step) -> None:
        """Submits a step that was accepted by `accept`."""
        step.session.scheduler.submit(step)

    def submit_packed(
        self, rows: RowBatch, model: Model, reply_to: PackedReplyTo
    ) -> NDArray[np.bool_]:
        """Submits the accepted rows [N] that can take the fast path; returns which these are.

        The others are still the caller's.
        """
        return self.schedulers[model.key].submit_pack(rows, reply_to)

    def packed_model(self, rows: RowBatch) -> Model | None:
        """The model of the first packed row whose reference is valid."""
        scheduler = lane_of(rows, self._table)
        return None if scheduler is None else scheduler.model

    def ref_of(self, session: ResidentSession) -> SessionRef | None:
        """A reference for the fast path; None: the session's rows can't take it for now."""
        if session.session_id in self._lines:
            return None
        return seat_of(session, self._table)

    def valid_refs(
        self, handles: NDArray[np.int64], generations: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Which references [N] are valid."""
        valid: NDArray[np.bool_] = self._table.generation_array[handles] == generations
        return valid

    def defer(self, rows: DeferredRows, handles: NDArray[np.int64]) -> None:
        """Notes that packed rows wait until their sessions [N] are no longer busy.

        `rows` is flushed for each session that something else arrives for, which goes after them.
        """
        self._table.deferred_array[handles] = True
        self._deferred.add(rows)

    def undefer(self, rows: DeferredRows, handles: NDArray[np.int64]) -> None:
        """None of the packed rows waits any more; their sessions were these [N]."""
        self._table.deferred_array[handles] = False
        self._deferred.discard(rows)

    def refuse(self, session_id: str, error: StepstateError, reply_to: ReplyTo) -> bool:
        """Lets a refusal wait for the session's steps before it, so that replies keep their order.

        Returns:
            False if no step is before it: the caller delivers it at once.
        """
        session = self._table.get(session_id)
        if session is None or not self._table.busy[session.handle]:
            return False
        step = Step((), 0, False, False, session, None, reply_to, 0)  # noqa: FBT003 - a hot constructor
        step.error = error
        self._queued_requests += 1
        session.scheduler.submit(step)
        return True

    def settled(self, requests: int, rows: int) -> None:
        """Accepted requests have their outcome: lanes call this."""
        self._queued_requests -= requests
        self._queued_rows -= rows
        if self._draining and not self._queued_requests:
            self._settled_all.set()

    async def close(self, session_id: str, *, hold: Hold | None = None) -> int:
        """Finishes a session's accepted steps and closes it; returns its last t.

        Args:
            session_id: of the session.
            hold: the caller's place in its line, if it has one.

        Raises:
            as `get`, and StaleOwner.
        """
        if hold is None:
            async with self.hold(session_id) as mine:
                return await self.close(session_id, hold=mine)
        session = await self.get(session_id, hold=hold)
        session.ending = self._ending(session, EndReason.CLOSED)
        self._table.bar(session)
        # A caller that gives up does not leave a session half closed.
        return await hold.finish(self._close(session))

    async def _close(self, session: ResidentSession) -> int:
        if self._table.queued_requests(session):
            await self._table.when_idle(session)
        ending = self._ending(session, EndReason.CLOSED)
        if not await self._end(session, ending):
            raise session.lost or StaleOwner(session.session_id, ending.t)
        return ending.t

    async def close_stored(self, session_id: str) -> SessionSummary | UnreadableSession:
        """Closes a session that can't be loaded here; returns how it stood.

        Raises:
            as `look`, and StaleOwner: it changed meanwhile.
        """
        found = await self.link.ask(self._store.find(session_id))
        if isinstance(found, UnreadableSession):
            ended = await self.link.ask(
                self._store.discard(session_id, Tombstone(EndReason.CLOSED, 0, 0.0))
            )
        elif isinstance(found, StoredSession) and not self._standings.past(found):
            ending = Tombstone(EndReason.CLOSED, found.t, found.record.idle_timeout_seconds)
            ended = await self.link.ask(self._store.end(session_id, found.epoch, ending))
        else:
            raise await self._residency.missing_reason(found, session_id)
        if not ended:
            raise StaleOwner(session_id, 0)
        self.survey.ended(found)
        if isinstance(found, UnreadableSession):
            self._observer.closed(EndReason.CLOSED.value)  # it is counted by no model
            return found
        self._census.ended(found.record.model_key, ending)
        return self._standings.stored(found)

    async def forecast(
        self, session_ids: Sequence[str], wish: ForecastRequest
    ) -> list[list[SessionForecast] | StepstateError]:
        """For each session its forecasts, one for each scenario, or why there are none.

        Raises:
            InvalidField: nobody could be given such a forecast.
            QueueFull.
        """
        return await self._forecaster.forecast(session_ids, wish)

    def t(self, session: ResidentSession) -> int:
        """Rows applied to a resident session."""
        return self._table.t[session.handle]

    def standing(self, session: ResidentSession) -> SessionSummary:
        """Where a resident session stands."""
        return self._standings.resident(session)

    async def sweep(self) -> int:
        """Expires every session whose time is up, a few at a time; returns how many.

        Raises:
            StoreUnavailable.
        """
        ended = 0
        overdue = self._table.overdue(self._clock())
        for first in range(0, len(overdue), _ENDED_AT_ONCE):
            ended += await self._expire_unused(overdue[first : first + _ENDED_AT_ONCE])
        if self._census.due:
            # What a store that does not last has is all here, and counted as it comes and goes.
            if self._store.durable:
                ended += await self._expiry.sweep()
                await self._census.count()
            await self._expiry.purge()
        return ended

    async def _expire_unused(self, sessions: Sequence[ResidentSession]) -> int:
        """Expires those of some resident sessions that nobody waits for."""
        unused = [session for session in sessions if session.session_id not in self._lines]
        holds = [self.hold(session.session_id) for session in unused]
        try:
            return await self._expire(unused)
        finally:
            for hold in holds:
                hold.release()

    async def _expire(self, sessions: Sequence[ResidentSession]) -> int:
        """Expires those of some resident sessions whose time is up now; returns how many."""
        some = [s for s in sessions if not s.barred and self._overdue(s)]
        for session in some:
            session.ending = self._ending(session, EndReason.EXPIRED)
            self._table.bar(session)
        saves = self.saver.last_saves(some)
        try:
            verdicts = await self._expiry.expire([save for _, save in saves])
        except BaseException:
            for session in some:
                _unended(session)
            raise
        missing = []
        for (session, _), verdict in zip(saves, verdicts, strict=True):
            if verdict is SaveResult.MISSING:
                _unended(session)
                missing.append(session)
            elif self._table.get(session.session_id) is session:
                self._residency.remove(session)
        expired = [
            s for (s, _), verdict in zip(saves, verdicts, strict=True) if verdict is SaveResult.DONE
        ]
        self._census.expired_here([s.record.model_key for s in expired])
        await self.saver.save(missing)  # the store has lost them: they are kept again first
        return len(expired)

    async def drain(self) -> None:
        """Takes no new sessions and steps, waits for the accepted ones, and saves every session."""
        self._draining = True
        if self._queued_requests:
            await self._settled_all.wait()
        if self._store.durable:
            await self._release_all()
            with suppress(StoreUnavailable):
                await self.beat()

    async def _release_all(self) -> None:
        self.saver.stop()
        released = [session for session in self._table if not session.barred]
        try:
            await self._release(released)
            await self._arrivals.wait_served()  # some may have been on their way here
            await self._release(set(self._table).difference(released))
        except StoreUnavailable as error:
            log.error(  # noqa: TRY400 - the cause is another's, and told
                "not every session could be saved: the store is away",
                extra={"problem": error.problem, "undurable_rows": self.undurable_rows},
            )

    async def _release(self, sessions: Iterable[ResidentSession]) -> None:
        staying = [session for session in sessions if not session.barred]
        for first in range(0, len(staying), _SAVED_AT_ONCE):
            await self.saver.save(staying[first : first + _SAVED_AT_ONCE], release=True)

    async def _adopt_copy(
        self, source: Snapshot, copying: CopyOptions, hold: Hold
    ) -> ResidentSession:
        manifest = self.schedulers[source.record.model_key].model.manifest
        record = copy_record(source.record, copying, manifest, self._limits)
        return await self._adopt(replace(source, record=record, stepped_at=self._unix_time()), hold)

    async def _adopt(self, snapshot: Snapshot, hold: Hold) -> ResidentSession:
        """Opens a session that starts from a snapshot."""
        record = snapshot.record
        if self._table.get(record.session_id) is not None:
            await hold.finish(self._free_id(record.session_id))
        with ExitStack() as counted:
            counted.enter_context(self._counted_opening())
            await self._residency.room.reserve()
            creating = self._create(snapshot, counted.pop_all())
        # A caller that gives up does not leave a session half open.
        return await hold.finish(creating)

    async def _create(self, snapshot: Snapshot, counted: ExitStack) -> ResidentSession:
        """Creates a session in the store, and in the place that was reserved.

        Args:
            snapshot: what it starts from.
            counted: closed when the census counts it, so that it never counts twice.
        """
        record = snapshot.record
        expires_at = self._store.now() + record.idle_timeout_seconds
        with counted:
            try:
                epoch = await self._store_new(snapshot, expires_at)
            except BaseException:
                self._residency.room.release()
                raise
            session = self._residency.place(snapshot, epoch, expires_at=expires_at)
            self._census.opened(record.model_key)
        self._observer.opened(record.model, record.version)
        return session

    async def _store_new(self, snapshot: Snapshot, expires_at: float) -> int:
        """Takes an id that is free in the store, and the first lease; returns its epoch."""
        record = snapshot.record
        epoch = await self._create_in_store(snapshot, expires_at, replacing=0)
        if isinstance(epoch, StoredSession) and self._standings.past(epoch):
            before = epoch
            epoch = await self._create_in_store(snapshot, expires_at, replacing=before.epoch)
            if not isinstance(epoch, StoredSession):
                self._expiry.replaced(before)
        if isinstance(epoch, StoredSession):
            raise SessionExists(record.session_id, epoch.t)
        if isinstance(epoch, UnreadableSession):
            raise SessionUnreadable(record.session_id, epoch.problem)
        if self._draining:  # began meanwhile: nobody would save it
            ending = Tombstone(EndReason.CLOSED, snapshot.t, record.idle_timeout_seconds)
            await self.link.ask(self._store.end(record.session_id, epoch, ending))
            raise Draining
        return epoch

    async def _create_in_store(
        self, snapshot: Snapshot, expires_at: float, *, replacing: int
    ) -> int | StoredSession | UnreadableSession:
        # A store that does not last gives no session back but one that expired.
        lasts = self._store.durable
        data = encode(replace(snapshot, owner=self._owner, epoch=0)) if lasts else b""
        return await self.link.ask(
            self._store.create(
                snapshot.record,
                owner=self._owner,
                t=snapshot.t,
                expires_at=expires_at,
                snapshot=data,
                replacing=replacing,
            )
        )

    async def _free_id(self, session_id: str) -> None:
        """Ends a resident session of this id if its time is up.

        Raises:
            SessionExists: it is open.
        """
        session = self._table.get(session_id)
        if session is None:
            return
        if not session.barred and self._overdue(session):
            await self._expire([session])
        elif session.leaving is None:
            raise SessionExists(session_id, self.t(session))

    def _usable(self, session_id: str) -> ResidentSession | None:
        """The resident session of this id if it takes steps now, whoever waits for it."""
        session = self._table.get(session_id)
        if session is None or session.barred or self._overdue(session):
            return None
        return session

    async def _make_ready(self, session_id: str) -> None:
        """Makes the session of an id usable.

        Raises:
            as `get`.
        """
        while self._usable(session_id) is None:
            if self._draining:
                raise Draining
            await self._settle_resident(session_id)
            if self._table.get(session_id) is None:
                await self._residency.load(session_id)

    async def _settle_resident(self, session_id: str) -> None:
        """Waits until a resident session that takes no steps has left, or takes them again."""
        session = self._table.get(session_id)
        if session is None:
            return
        if session.leaving is not None:
            await asyncio.shield(session.leaving)
        elif not session.barred and self._overdue(session):
            await self._expire([session])  # the store tells of it from then on

    async def _use_held(
        self, session_id: str, act: Callable[[ResidentSession], T], deadline: float, hold: Hold
    ) -> T:
        """See `in_turn`; the session is looked up again after every wait, as it may have ended."""
        while True:
            session = await self.get(session_id, hold=hold)
            try:
                return act(session)
            except QueueFull:
                if asyncio.get_running_loop().time() >= deadline:
                    raise
            await asyncio.sleep(RETRY_SECONDS)

    def _export(self, session_id: str) -> Call[SessionBarrier[tuple[bytes, SessionSummary]]]:
        """Takes a place in a session's line, and then one among its steps, for a snapshot."""
        call = Call(
            lambda session: self.turn(
                session, lambda: (self.saver.snapshot(session), self.standing(session))
            )
        )
        self.arrive(session_id, call)
        return call

    def turn(self, session: ResidentSession, act: Callable[[], T]) -> SessionBarrier[T]:
        """Calls a function after the steps that a session has accepted, before those to come."""
        turn = SessionBarrier(act)
        if not self.refuse(session.session_id, turn.mark, turn):
            turn.now()
        return turn

    def _stop_packed(self, session_id: str) -> None:
        """Lets packed rows of a session go into its line too."""
        session = self._table.get(session_id)
        if session is not None:
            self._table.revoke(session)
            if self._table.deferred[session.handle]:
                self._flush(session)

    def _flush(self, session: ResidentSession) -> None:
        """Lets packed rows that were deferred go before what arrives now."""
        self._table.deferred[session.handle] = False
        for rows in list(self._deferred):
            rows.flush(session.handle)

    async def _end(self, session: ResidentSession, ending: Tombstone) -> bool:
        """Ends a resident session; False if another server has taken it over."""
        session.ending = ending
        self._table.bar(session)
        try:
            ended = await self.link.ask(self._store.end(session.session_id, session.epoch, ending))
        except BaseException:
            _unended(session)
            raise
        if self._table.get(session.session_id) is session:
            self._residency.remove(session)
            if ended:
                self._census.ended(session.record.model_key, ending)
        return ended

    def _served(self, record: SessionRecord) -> bool:
        scheduler = self.schedulers.get(record.model_key)
        return scheduler is not None and record.fingerprint in scheduler.model.fingerprints

    def _ending(self, session: ResidentSession, reason: EndReason) -> Tombstone:
        return Tombstone(reason, self.t(session), session.record.idle_timeout_seconds)

    def _open_elsewhere(self, entry: StoredSession) -> bool:
        session = self._table.get(entry.record.session_id)
        ending_here = session is not None and session.ending is not None
        return not (ending_here or self._standings.past(entry) or self._standings.lost(entry))

    def _overdue(self, session: ResidentSession) -> bool:
        return (
            self._table.expires_at[session.handle] <= self._clock()
            and not self._table.busy[session.handle]
        )


def _unended(session: ResidentSession) -> None:
    """A session whose end failed can be used, and ended, again."""
    session.ending = None
    session.barred = session.lost is not None
