"""The sessions of a server, as everything above this layer sees them.

Rule 1: a session that is gone is an error that says why; nothing restarts one silently.
Rule 2: every accepted step is counted until it is settled, so a drain knows when it is done.
Rule 3: what arrives first for a session is served first (see `queues`), whatever it asks for, from
        whichever API, and whatever state the session is in. So every public coroutine takes its
        place before it waits for anything.

This is the one owner of the parts below; each of them uses only those that are made before it.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from stepstate.errors import (
    InvalidField,
    SessionLost,
    StepstateError,
    StoreUnavailable,
    without_frames,
)
from stepstate.identity import SessionKey, id_of
from stepstate.models import Catalog, Manifest, Model
from stepstate.sessions.admission import Admission
from stepstate.sessions.context import Limits, SchedulerSettings, SessionContext
from stepstate.sessions.counts import SessionCounts, StoreSurvey
from stepstate.sessions.forecasting.forecaster import Forecaster, SessionForecast
from stepstate.sessions.forecasting.scenarios import ForecastRequest
from stepstate.sessions.lifecycle import SessionLifecycle
from stepstate.sessions.loader import SessionLoader
from stepstate.sessions.monitored_store import MonitoredStore
from stepstate.sessions.options import CopyOptions, OpenOptions, default_idle_timeout
from stepstate.sessions.queues import Hold, RequestQueues
from stepstate.sessions.scheduler import StepScheduler
from stepstate.sessions.slots import SlotAllocator
from stepstate.sessions.snapshots.writer import SnapshotWriter
from stepstate.sessions.status import SessionSummaries, SessionSummary
from stepstate.sessions.sweeper import ExpirySweeper
from stepstate.sessions.table import Table
from stepstate.sessions.types import (
    PackedReplyTo,
    Pause,
    ReplyTo,
    ResidentSession,
    RowBatch,
    SessionObserver,
    SessionRef,
    SessionState,
    Step,
    next_round,
)
from stepstate.stores import (
    DiskUsage,
    Durability,
    SessionStore,
    StoredSession,
    UnreadableSession,
)

log = logging.getLogger(__name__)

_SAVED_AT_ONCE = 500
_LISTED_AT_ONCE = 128
_EXPIRED_AT_ONCE = 32  # about a millisecond of work in one turn of the loop
_PAGE_TOKEN = re.compile(r"[A-Za-z0-9._:/~-]{0,2048}")
"""What a store makes of the longest tenant and id, in hexadecimal digits, has 700; more has one
that is damaged."""


class SessionService:
    """All sessions of a server.

    Args:
        catalog: the loaded models.
        store: keeps sessions beyond the arena.
        settings: how steps are scheduled.
        limits: the bounds.
        owner: the name under which this process, and no other, holds leases.
        clock: monotonic seconds.
        unix_time: Unix seconds.
        observer: counts what happens.
    """

    def __init__(
        self,
        catalog: Catalog,
        store: SessionStore,
        settings: SchedulerSettings,
        *,
        limits: Limits,
        owner: str,
        clock: Callable[[], float],
        unix_time: Callable[[], float],
        observer: SessionObserver,
    ) -> None:
        self.catalog = catalog
        self.store = MonitoredStore(store, clock=clock)
        self.table = Table(settings.engine.capacity)
        self._limits = limits
        self._clock = clock
        self._admission = Admission(limits)
        context = SessionContext(
            catalog, self.store, self.table, owner, clock, unix_time, observer, limits.tenants
        )
        self._summaries = SessionSummaries(context)
        self._counts = SessionCounts(context)
        self.survey = StoreSurvey(context, self._summaries)
        self.writer = SnapshotWriter(context)
        self.schedulers: Mapping[str, StepScheduler] = {
            model.key: StepScheduler(
                model,
                context,
                settings,
                number=number,
                admission=self._admission,
                writer=self.writer,
            )
            for number, model in enumerate(catalog)
        }
        self._sweeper = ExpirySweeper(context, limits, self.writer, self._counts)
        self._loader = SessionLoader(
            context,
            self.schedulers,
            slots=SlotAllocator(context, self.writer),
            sweeper=self._sweeper,
            survey=self.survey,
            admission=self._admission,
        )
        self._queues = RequestQueues(context, self._loader, self._admission)
        self._lifecycle = SessionLifecycle(
            context,
            limits,
            loader=self._loader,
            queues=self._queues,
            sweeper=self._sweeper,
            writer=self.writer,
            admission=self._admission,
        )
        self._forecaster = Forecaster(self._queues, self.table)
        self._leaked_slots = 0
        # Called for every request: without a frame of this class between.
        self.find = self._queues.find
        self.submit = self._queues.submit
        self.wait = self._queues.wait
        self.drop = self._queues.drop
        self.hold = self._queues.hold
        self.get = self._queues.get
        self.in_turn = self._queues.in_turn
        self.accept = self._admission.accept
        self.settled = self._admission.settled
        self.defer = self._queues.defer
        self.undefer = self._queues.undefer
        self.valid_refs = self.table.valid_refs

    def __len__(self) -> int:
        """Resident sessions."""
        return len(self.table)

    # Measured

    @property
    def queued_rows(self) -> int:
        """Rows accepted and not yet answered."""
        return self._admission.queued_rows

    @property
    def store_up(self) -> bool:
        """Whether the store can be written."""
        return self.store.up

    @property
    def store_failures(self) -> Mapping[str, int]:
        """Calls of the store that failed, by cause."""
        return self.store.failures

    @property
    def disk_usage(self) -> DiskUsage | None:
        """What the store takes of a disk of this machine; None: it has none."""
        return self.store.backend.disk_usage()

    @property
    def undurable_rows(self) -> int:
        """Rows of async sessions that are applied and not saved."""
        return self.table.undurable_rows()

    @property
    def expired(self) -> int:
        """Expired sessions that are kept, by a count that is some seconds old."""
        return self._counts.expired

    @property
    def open_by_tenant(self) -> Mapping[str, int]:
        """Open sessions of each tenant, by a count that is some seconds old."""
        return self._counts.by_tenant

    def spilled(self, model_key: str) -> int:
        """Open sessions of a model that are in the store only, or on another server."""
        return max(0, self._counts[model_key] - self.schedulers[model_key].open_sessions)

    @property
    def orphaned_sessions(self) -> int:
        """Sessions in the store whose model is not loaded here, when it was last read."""
        return self.survey.orphaned.total()

    @property
    def unreadable_sessions(self) -> int:
        """Sessions in the store that can't be read, as far as they were met."""
        return len(self.survey.unreadable)

    @property
    def leaked_slots(self) -> int:
        """Slots that are neither free nor a session's, at the last sweep: 0, but for a fault."""
        return self._leaked_slots

    def default_idle_timeout(self, manifest: Manifest) -> float:
        """Seconds without a step after which a session of a model expires, if it asks for none."""
        return default_idle_timeout(manifest, self._limits)

    # Steps

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

    def refuse(
        self, key: SessionKey, error: StepstateError, reply_to: ReplyTo, *, held_bytes: int
    ) -> bool:
        """Queues a refusal behind the session's steps, so that replies keep their order.

        `held_bytes` is what its reply takes.

        Returns:
            False if there are none: the caller delivers it at once.
        """
        session = self.table.get(key)
        if session is None or not self.table.busy[session.handle]:
            return False
        step = Step((), 0, False, False, reply_to, session, None, held_bytes)  # noqa: FBT003 - a hot constructor
        step.error = without_frames(error)
        self._admission.count(1, 0, source=reply_to.source)
        session.scheduler.submit(step)
        return True

    def ref_of(self, session: ResidentSession) -> SessionRef | None:
        """A reference for a session's packed rows; None: they can't take the fast path for now."""
        return None if session.key in self._queues else self.table.ref_of(session)

    def packed_model(self, rows: RowBatch) -> Model | None:
        """The model of the first packed row whose reference is valid."""
        session = self.table.first_valid(rows)
        return None if session is None else session.model

    def t(self, session: ResidentSession) -> int:
        """Rows applied to a resident session."""
        return self.table.t[session.handle]

    async def forecast(
        self,
        keys: Sequence[SessionKey],
        request: ForecastRequest,
        *,
        admit: Callable[[int], None] = lambda _: None,
        reserve: Callable[[int], None] = lambda _: None,
    ) -> list[list[SessionForecast] | StepstateError]:
        """For each session its forecasts, one for each scenario, or why there are none.

        Args:
            keys: of the sessions.
            request: what is asked for.
            admit: called with the number of forecasts, before anything else is done.
            reserve: called with the bytes of what is made, before it is.

        Raises:
            InvalidField: no session could be forecast like that; and what `admit` and `reserve`
                raise.
        """
        return await self._forecaster.forecast(keys, request, admit, reserve)

    # The life of sessions

    async def open(self, options: OpenOptions, *, hold: Hold | None = None) -> ResidentSession:
        """Opens a session with zero state at t = 0.

        Args:
            options: what is asked for.
            hold: the caller's place in the queue of its id, if it has one.

        Raises:
            SessionExists, ModelUnknown, InvalidField, SessionLimit, Draining, StoreUnavailable.
        """
        return await self._lifecycle.open(options, hold=hold)

    async def fork(self, key: SessionKey, options: CopyOptions) -> ResidentSession:
        """Opens a session that starts from a copy of another.

        Raises:
            as `get` for the source, and as `open` for the copy.
        """
        return await self._lifecycle.fork(key, options)

    async def restore(self, data: bytes, options: CopyOptions) -> ResidentSession:
        """Opens a session from a snapshot; with an empty id in `options`, under its own.

        Raises:
            SnapshotCorrupt, SnapshotModelMismatch, and as `open`.
        """
        return await self._lifecycle.restore(data, options)

    async def restore_expired(self, key: SessionKey) -> ResidentSession:
        """Opens an expired session again, as it was; its idle time begins anew.

        Raises:
            SessionExists: it is open.
            SessionUnknown, SessionExpired, SessionClosed: there is nothing to restore.
            SessionLimit; and as `get`.
        """
        return await self._lifecycle.restore_expired(key)

    async def close(self, key: SessionKey, *, hold: Hold | None = None) -> int:
        """Finishes a session's accepted steps and closes it; returns its last t.

        Args:
            key: of the session.
            hold: the caller's place in its queue, if it has one.

        Raises:
            as `get`, and StaleOwner.
        """
        return await self._lifecycle.close(key, hold=hold)

    async def close_stored(self, key: SessionKey) -> SessionSummary | UnreadableSession:
        """Closes a session that can't be loaded here; returns its last status.

        Raises:
            as `look`, and StaleOwner: it changed meanwhile.
        """
        found = await self._lifecycle.close_stored(key)
        return found if isinstance(found, UnreadableSession) else self._summaries.stored(found)

    async def export(
        self, key: SessionKey, *, reserve: Callable[[int], None] = lambda _: None
    ) -> tuple[bytes, SessionSummary]:
        """A session's snapshot after the steps accepted so far, and its status then.

        Args:
            key: of the session.
            reserve: called with the size of the snapshot, before anything else is done.

        Raises:
            as `get`, and what `reserve` raises.
        """

        def snapshot(session: ResidentSession) -> tuple[bytes, SessionSummary]:
            data = self.writer.snapshot(session)
            reserve(len(data))
            return data, self.summary(session)

        return await self._queues.after_steps(key, snapshot)

    async def reset_accuracy(self, key: SessionKey) -> SessionSummary:
        """Resets the scores of a session's forecasts, after the steps accepted so far.

        It is saved before it is answered, if the session's steps are saved.

        Raises:
            as `get`, StaleOwner.
        """

        def reset(session: ResidentSession) -> tuple[ResidentSession, SessionSummary]:
            session.scheduler.engine.reset_accuracy(session.slot)
            session.changes += 1
            return session, self.summary(session)

        self._admission.check_open()
        session, summary = await self._queues.after_steps(key, reset)
        await self._save_changes(session)
        return summary

    async def _save_changes(self, session: ResidentSession) -> None:
        """Waits until changes without a row are in the store, if the session's rows are to be."""
        kept = session.record.durability is not Durability.NONE
        while kept and session.changed and session.state is not SessionState.GONE:
            if session.left is not None:  # it is saved as it leaves
                await asyncio.shield(session.left)
            elif session.state is SessionState.ENDING:
                return
            else:  # while draining, that would take back the lease that is given up
                self._admission.check_open()
                await self.writer.save([session])
        if session.lost is not None:
            raise session.lost

    # Status

    def summary(self, session: ResidentSession) -> SessionSummary:
        """The status of a resident session."""
        return self._summaries.resident(session)

    async def look(self, key: SessionKey) -> SessionSummary:
        """The status of a session, which stays where it is.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost, InvalidField,
            StoreUnavailable.
        """
        session = self.find(key)
        if session is not None:
            return self.summary(session)
        async with self.hold(key) as hold:
            await hold.finish(self._loader.settle_resident(key))
            session = self.table.usable(key, self._clock())
            if session is not None:
                return self.summary(session)
            found = await self.store.ask(self.store.backend.find(key))
            if isinstance(found, StoredSession) and not self._sweeper.is_past(found):
                if self._summaries.lost(found):
                    raise SessionLost(id_of(key))
                return self._summaries.stored(found)
            raise await self._loader.missing_reason(found, key)

    async def page(
        self,
        token: str,
        size: int,
        model: str,
        *,
        tenant: str,
        expired: bool = False,
        pause: Pause = next_round,
    ) -> tuple[list[SessionSummary | UnreadableSession], str]:
        """Up to `size` open sessions of a tenant, and the token of the next page, if there is one.

        Args:
            token: empty for the first page, else that of the page before.
            size: the most sessions wanted.
            model: of the model of this name only; empty: of all, loaded or not.
            tenant: whose they are.
            expired: whether expired sessions that are kept are wanted too.
            pause: lets others have their turn in the midst of a long page.

        Raises:
            InvalidField, StoreUnavailable.
        """
        if not _PAGE_TOKEN.fullmatch(token):
            raise InvalidField("page_token", "is not a token of an earlier page; begin with none")
        page = self.store.backend.page(token, size, model, tenant=tenant, expired=expired)
        entries, following = await self.store.ask(page)
        listed: list[SessionSummary | UnreadableSession] = []
        for place, entry in enumerate(entries):
            if place % _LISTED_AT_ONCE == 0:
                await pause()
            session = self.table.usable(entry.key, self._clock())
            if session is not None:
                listed.append(self.summary(session))
            elif isinstance(entry, UnreadableSession):
                self.survey.met(entry)
                listed.append(entry)
            elif self._open_elsewhere(entry) or (expired and entry.delete_at is not None):
                listed.append(self._summaries.stored(entry))
        return listed, following

    def _open_elsewhere(self, entry: StoredSession) -> bool:
        session = self.table.get(entry.key)
        ending_here = session is not None and session.state is SessionState.ENDING
        return not (ending_here or self._sweeper.is_past(entry) or self._summaries.lost(entry))

    # The life of the server

    async def start(self) -> None:
        """Asks the store how many sessions it has; one that is away may come back later."""
        with suppress(StoreUnavailable):
            await self.heartbeat()
            await self._counts.count()

    async def heartbeat(self) -> None:
        """Moves the store's clock on; to be called every `HEARTBEAT_SECONDS`.

        Raises:
            StoreUnavailable.
        """
        await self.store.ask(self.store.backend.heartbeat())

    async def sweep(self) -> int:
        """Expires every session whose time is up, a few at a time; returns how many.

        Raises:
            StoreUnavailable.
        """
        # Here and not for a scrape, which reads while the loop changes the numbers.
        claimed = sum(one.engine.used_slots for one in self.schedulers.values())
        self._leaked_slots = self.table.leaked(claimed)
        ended = 0
        overdue = self.table.overdue(self._clock())
        for first in range(0, len(overdue), _EXPIRED_AT_ONCE):
            ended += await self._expire_unused(overdue[first : first + _EXPIRED_AT_ONCE])
        if self._counts.due:
            # What a store that does not last has is all here, and counted as it comes and goes.
            if self.store.backend.durable:
                ended += await self._sweeper.sweep()
                await self._counts.count()
            else:
                await self._counts.count_tenants()
            await self._sweeper.purge()
        return ended

    async def _expire_unused(self, sessions: Sequence[ResidentSession]) -> int:
        """Expires those of some overdue sessions that nobody waits for."""
        unused = [session for session in sessions if session.key not in self._queues]
        holds = [self.hold(session.key) for session in unused]
        try:
            return await self._sweeper.expire_resident(unused)
        finally:
            for hold in holds:
                hold.release()

    async def drain(self) -> None:
        """Takes no new sessions and steps, waits for the accepted ones, and saves every session."""
        await self._admission.drain()
        if self.store.backend.durable:
            await self._release_all()
            with suppress(StoreUnavailable):
                await self.heartbeat()

    async def _release_all(self) -> None:
        self.writer.stop()
        released = [session for session in self.table if session.open]
        try:
            await self._release(released)
            await self._queues.wait_served()  # some may have been on their way here
            await self._release(set(self.table).difference(released))
        except StoreUnavailable as error:
            log.error(  # noqa: TRY400 - the store's error is logged where it was asked
                "not every session could be saved: the store is away",
                extra={"problem": error.problem, "undurable_rows": self.undurable_rows},
            )

    async def _release(self, sessions: Iterable[ResidentSession]) -> None:
        staying = [session for session in sessions if session.open]
        for first in range(0, len(staying), _SAVED_AT_ONCE):
            await self.writer.save(staying[first : first + _SAVED_AT_ONCE], release=True)
