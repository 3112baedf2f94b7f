"""The session table as the front doors see it: open, find, step, copy, close, expire, drain.

Rule 1: an id is free, open, or ending; the store decides it for every server that shares it.
Rule 2: a session that is gone is an error that says why; nothing restarts one silently.
Rule 3: every accepted step is counted until it is settled, so a drain knows when it is done.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from stepstate.errors import (
    Draining,
    InvalidField,
    QueueFull,
    SessionExists,
    SessionLimit,
    SessionLost,
    StaleOwner,
    StepstateError,
    StoreUnavailable,
)
from stepstate.models import Catalog, Manifest
from stepstate.sessions.census import Census
from stepstate.sessions.expiry import Expiry
from stepstate.sessions.forecaster import Forecaster, SessionForecast, Wish
from stepstate.sessions.lane import Lane
from stepstate.sessions.link import StoreLink
from stepstate.sessions.opening import (
    Copying,
    Limits,
    Opening,
    check_id,
    copy_record,
    default_idle_timeout,
    make_record,
)
from stepstate.sessions.packed import Columns, Seat, lane_of, seat_of
from stepstate.sessions.residency import Residency, ResidencyObserver, told
from stepstate.sessions.session import ReplyTo, Session, Step
from stepstate.sessions.snapshot import Snapshot, decode, encode
from stepstate.sessions.standing import Standing, Standings
from stepstate.sessions.table import Table
from stepstate.sessions.turn import Turn
from stepstate.stores import Durability, Ending, EndReason, Entry, Saved, SessionStore

log = logging.getLogger(__name__)

_SAVED_AT_ONCE = 500
_ENDED_AT_ONCE = 32  # about a millisecond of work in one turn of the loop
_PAGE_TOKEN = re.compile(r"[A-Za-z0-9._:-]{0,160}")


class Sessions:
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
        wall: Callable[[], float],
        observer: ResidencyObserver,
    ) -> None:
        self.catalog = catalog
        self.lanes: dict[str, Lane] = {}
        self.link = StoreLink(store, clock=clock)
        self._table = table
        self._store = store
        self._limits = limits
        self._owner = owner
        self._clock = clock
        self._wall = wall
        self._observer = observer
        self._standings = Standings(table, owner=owner, clock=clock, now=store.now)
        self._census = Census(self.link, clock=clock, observer=observer)
        self._expiry = Expiry(
            self.link,
            table,
            self._census,
            grace_seconds=limits.expired_grace_seconds,
            limit=limits.sessions,
            observer=observer,
        )
        self._residency = Residency(
            self.link,
            table,
            self.lanes,
            self._standings,
            owner=owner,
            clock=clock,
            wall=wall,
            observer=observer,
            expired=self._expiry.settle,
        )
        self.saver = self._residency.saver
        self._draining = False
        self._queued_requests = 0
        self._queued_rows = 0
        self._opening: dict[str, asyncio.Future[None]] = {}
        self._loading: dict[str, asyncio.Task[Session]] = {}
        self._settled_all = asyncio.Event()
        self._closings: set[asyncio.Future[int]] = set()
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
    def undurable_rows(self) -> int:
        """Rows of async sessions that are applied and not saved."""
        return self._table.undurable_rows()

    @property
    def expired(self) -> int:
        """Expired sessions that are kept, by a count that is some seconds old."""
        return self._census.expired

    def spilled(self, model_key: str) -> int:
        """Open sessions of a model that are in the store only, or on another server."""
        return max(0, self._census[model_key] - self.lanes[model_key].open_sessions)

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

    async def open(self, opening: Opening) -> Session:
        """Opens a session with zero state at t = 0.

        Raises:
            SessionExists, ModelUnknown, InvalidField, SessionLimit, Draining, StoreUnavailable.
        """
        if self._draining:
            raise Draining
        model = self.catalog.find(opening.model, opening.version)
        record = make_record(opening, model.manifest, self._limits)
        blank = self.lanes[model.key].blank(record, self._wall())
        return await self._adopt(blank)

    async def fork(self, session_id: str, copying: Copying) -> Session:
        """Opens a session that starts from a copy of another.

        Raises:
            as `get` for the source, and as `open` for the copy.
        """
        if self._draining:
            raise Draining
        source = decode((await self.export(session_id))[0])
        return await self._adopt_copy(source, copying)

    async def export(self, session_id: str) -> tuple[bytes, Standing]:
        """A session's snapshot after the steps accepted so far, and how it stood then.

        Raises:
            as `get`.
        """
        session = await self.get(session_id)
        turn = Turn(lambda: (self.saver.snapshot(session), self.standing(session)))
        if not self.refuse(session_id, turn.mark, turn):
            turn.now()
        return await turn.result()

    async def reset_accuracy(self, session_id: str) -> Standing:
        """Forgets how good a session's forecasts were, after the steps accepted so far.

        It is saved before it is answered, if the session's steps are saved.

        Raises:
            as `get`, StaleOwner.
        """
        session = await self.get(session_id)
        turn = Turn(lambda: self._reset_accuracy(session))
        if not self.refuse(session_id, turn.mark, turn):
            turn.now()
        standing = await turn.result()
        await self._changed_is_kept(session)
        return standing

    def _reset_accuracy(self, session: Session) -> Standing:
        session.lane.engine.reset_accuracy(session.slot)
        session.changed = True
        return self.standing(session)

    async def _changed_is_kept(self, session: Session) -> None:
        """Waits until a change without a row is in the store, if the session's rows are to be."""
        kept = session.record.durability is not Durability.NONE
        while kept and session.changed and self._table.get(session.session_id) is session:
            if session.leaving is not None:  # it is saved as it leaves
                await asyncio.shield(session.leaving)
            elif session.ending is not None:
                return
            else:
                await self.saver.save([session])
        if session.lost is not None:
            raise session.lost

    async def restore(self, data: bytes, copying: Copying) -> Session:
        """Opens a session from a snapshot; with an empty id in `copying`, under its own.

        Raises:
            SnapshotCorrupt, SnapshotForeign, and as `open`.
        """
        if self._draining:
            raise Draining
        snapshot = self._residency.fitted(decode(data))
        if not copying.session_id:
            copying = replace(copying, session_id=snapshot.record.session_id)
        return await self._adopt_copy(snapshot, copying)

    async def restore_expired(self, session_id: str) -> Session:
        """Opens an expired session again, as it was; its idle time begins anew.

        Raises:
            SessionExists: it is open.
            SessionUnknown, SessionExpired, SessionClosed: there is nothing to restore.
            SessionLimit; and as `get`.
        """
        check_id(session_id)
        if self._draining:
            raise Draining
        await self._free_id(session_id)
        entry = await self._expired_entry(session_id)
        if self._census.total + len(self._opening) >= self._limits.sessions:
            raise SessionLimit(self._limits.sessions)
        expires_at = self._store.now() + entry.record.idle_timeout_seconds
        opened = await self.link.ask(
            self._store.restore(session_id, entry.epoch, expires_at=expires_at)
        )
        if not opened:  # somebody was faster
            return await self.restore_expired(session_id)
        self._census.restored(entry.record.model_key)
        log.info("an expired session was restored", extra={"session_id": session_id})
        return await self.get(session_id)

    async def _expired_entry(self, session_id: str) -> Entry:
        """An expired session of a model that is loaded here, marked as such."""
        found = await self.link.ask(self._store.find(session_id))
        if isinstance(found, Entry) and self._standings.past(found):
            record = found.record
            if self._residency.loaded(record.model_key) == record.fingerprint:
                if found.delete_at is not None:
                    return found
                await self._expiry.settle(found)
                return await self._expired_entry(session_id)
        elif isinstance(found, Entry):
            raise SessionExists(session_id, found.t)
        raise await self._residency.untaken(found, session_id)

    def find(self, session_id: str) -> Session | None:
        """The resident session of this id if it takes steps now; else `get` finds out more."""
        session = self._table.get(session_id)
        if session is None or session.barred or self._overdue(session):
            return None
        return session

    async def get(self, session_id: str) -> Session:
        """The open session of this id, made resident if it is not.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost, InvalidField,
            SnapshotForeign, SnapshotCorrupt, Draining, QueueFull, StoreUnavailable.
        """
        while (session := self.find(session_id)) is None:
            check_id(session_id)
            if self._draining:
                raise Draining
            await self._settle_resident(session_id)
            if session_id in self._opening:
                await asyncio.shield(self._opening[session_id])
            elif self._table.get(session_id) is None:
                session = await self._load(session_id)
                session.wanted = False
                if not session.barred:
                    return session
        return session

    async def look(self, session_id: str) -> Standing:
        """Where a session stands; it stays where it is.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost, InvalidField,
            StoreUnavailable.
        """
        check_id(session_id)
        session = self.find(session_id)
        if session is None:
            coming = self._loading.get(session_id) or self._opening.get(session_id)
            if coming is not None:
                await asyncio.wait([coming])
            await self._settle_resident(session_id)
            session = self.find(session_id)
        if session is not None:
            return self.standing(session)
        found = await self.link.ask(self._store.find(session_id))
        if isinstance(found, Entry) and not self._standings.past(found):
            if self._standings.lost(found):
                raise SessionLost(session_id)
            return self._standings.stored(found)
        raise await self._residency.untaken(found, session_id)

    async def page(
        self, token: str, size: int, model: str, *, expired: bool = False
    ) -> tuple[list[Standing], str]:
        """Up to `size` open sessions, and the token to go on from; empty: these were the last.

        Args:
            token: empty for the first page.
            size: the most sessions wanted.
            model: of this only; empty: of all models.
            expired: whether expired sessions that are kept are wanted too.

        Raises:
            InvalidField, StoreUnavailable.
        """
        if not _PAGE_TOKEN.fullmatch(token):
            raise InvalidField("page_token", "is not a token of an earlier page; begin with none")
        models = [m.key for m in self.catalog if model in ("", m.manifest.name)]
        entries, following = await self.link.ask(
            self._store.page(token, size, models, expired=expired)
        )
        told_of: list[Standing] = []
        for entry in entries:
            session = self.find(entry.record.session_id)
            if session is not None:
                told_of.append(self.standing(session))
            elif self._open_elsewhere(entry) or (expired and entry.delete_at is not None):
                told_of.append(self._standings.stored(entry))
        return told_of, following

    def submit(self, step: Step) -> None:
        """Accepts a step; its outcome is delivered to its `reply_to`, now or later.

        Raises:
            Draining, QueueFull: nothing was accepted.
        """
        self.accept(1, step.rows)
        step.session.lane.submit(step)

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

    def seat(self, session: Session) -> Seat | None:
        """Where a resident session's packed rows go straight to; None: they can't for now."""
        return seat_of(session, self._table)

    def lane_of(self, columns: Columns) -> Lane | None:
        """The lane of the first packed row that can go straight as far as its seat tells."""
        return lane_of(columns, self._table)

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
        session.lane.submit(step)
        return True

    def settled(self, requests: int, rows: int) -> None:
        """Accepted requests have their outcome: lanes call this."""
        self._queued_requests -= requests
        self._queued_rows -= rows
        if self._draining and not self._queued_requests:
            self._settled_all.set()

    async def close(self, session_id: str) -> int:
        """Finishes a session's accepted steps and closes it; returns its last t.

        Raises:
            as `get`, and StaleOwner.
        """
        session = await self.get(session_id)
        session.ending = self._ending(session, EndReason.CLOSED)
        self._table.bar(session)
        closing = asyncio.ensure_future(self._close(session))
        self._closings.add(closing)
        closing.add_done_callback(self._closings.discard)
        # A caller that gives up does not leave a session half closed.
        return await asyncio.shield(closing)

    async def _close(self, session: Session) -> int:
        if self._table.queued_requests(session):
            await self._table.when_idle(session)
        ending = self._ending(session, EndReason.CLOSED)
        if not await self._end(session, ending):
            raise session.lost or StaleOwner(session.session_id, ending.t)
        return ending.t

    async def forecast(
        self, session_ids: Sequence[str], wish: Wish
    ) -> list[list[SessionForecast] | StepstateError]:
        """For each session its forecasts, one for each scenario, or why there are none.

        Raises:
            InvalidField: nobody could be given such a forecast.
            QueueFull.
        """
        return await self._forecaster.forecast(session_ids, wish)

    def t(self, session: Session) -> int:
        """Rows applied to a resident session."""
        return self._table.t[session.handle]

    def standing(self, session: Session) -> Standing:
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
            ended += await self._expire(overdue[first : first + _ENDED_AT_ONCE])
        if self._census.due:
            # What a store that does not last has is all here, and counted as it comes and goes.
            if self._store.durable:
                ended += await self._expiry.sweep()
                await self._census.count()
            await self._expiry.purge()
        return ended

    async def _expire(self, sessions: Sequence[Session]) -> int:
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
            if verdict is Saved.MISSING:
                _unended(session)
                missing.append(session)
            elif self._table.get(session.session_id) is session:
                self._residency.remove(session)
        await self.saver.save(missing)  # the store has lost them: they are kept again first
        expired = [
            s for (s, _), verdict in zip(saves, verdicts, strict=True) if verdict is Saved.DONE
        ]
        self._census.expired_here([s.record.model_key for s in expired])
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
        sessions = [session for session in self._table if not session.barred]
        try:
            for first in range(0, len(sessions), _SAVED_AT_ONCE):
                await self.saver.save(sessions[first : first + _SAVED_AT_ONCE], release=True)
        except StoreUnavailable as error:
            log.error(  # noqa: TRY400 - the cause is another's, and told
                "not every session could be saved: the store is away",
                extra={"problem": error.problem, "undurable_rows": self.undurable_rows},
            )

    async def _adopt_copy(self, source: Snapshot, copying: Copying) -> Session:
        manifest = self.lanes[source.record.model_key].model.manifest
        record = copy_record(source.record, copying, manifest, self._limits)
        return await self._adopt(replace(source, record=record, stepped_at=self._wall()))

    async def _adopt(self, snapshot: Snapshot) -> Session:
        """Opens a session that starts from a snapshot."""
        record = snapshot.record
        await self._free_id(record.session_id)
        if record.session_id in self._opening:
            raise SessionExists(record.session_id, 0)
        if self._census.total + len(self._opening) >= self._limits.sessions:
            raise SessionLimit(self._limits.sessions)
        opening = asyncio.get_running_loop().create_future()
        self._opening[record.session_id] = opening
        try:
            await self._residency.room.reserve()
            try:
                session = await self._create(snapshot)
            except BaseException:
                self._residency.room.release()
                raise
        finally:
            del self._opening[record.session_id]
            opening.set_result(None)
        self._census.opened(record.model_key)
        self._observer.opened(record.model, record.version)
        return session

    async def _create(self, snapshot: Snapshot) -> Session:
        record = snapshot.record
        expires_at = self._store.now() + record.idle_timeout_seconds
        epoch = await self._create_in_store(snapshot, expires_at, replacing=0)
        if isinstance(epoch, Entry) and self._standings.past(epoch):
            before = epoch
            epoch = await self._create_in_store(snapshot, expires_at, replacing=before.epoch)
            if not isinstance(epoch, Entry):
                self._expiry.replaced(before)
        if isinstance(epoch, Entry):
            raise SessionExists(record.session_id, epoch.t)
        if self._draining:  # began meanwhile: nobody would save it
            ending = Ending(EndReason.CLOSED, snapshot.t, record.idle_timeout_seconds)
            await self.link.ask(self._store.end(record.session_id, epoch, ending))
            raise Draining
        return self._residency.place(snapshot, epoch, expires_at=expires_at)

    async def _create_in_store(
        self, snapshot: Snapshot, expires_at: float, *, replacing: int
    ) -> int | Entry:
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
        if session_id in self._loading:
            await asyncio.wait([self._loading[session_id]])
        session = self._table.get(session_id)
        if session is None:
            return
        if not session.barred and self._overdue(session):
            await self._expire([session])
        elif session.leaving is None:
            raise SessionExists(session_id, self.t(session))

    async def _load(self, session_id: str) -> Session:
        """Loads a session once for all who want it."""
        loading = self._loading.get(session_id)
        if loading is None:
            loading = asyncio.ensure_future(self._residency.load(session_id))
            self._loading[session_id] = loading
            loading.add_done_callback(lambda _: self._loading.pop(session_id))
        try:
            return await asyncio.shield(loading)
        finally:
            del loading  # its error's traceback leads here: no circle

    async def _settle_resident(self, session_id: str) -> None:
        """Waits until a resident session that takes no steps has left, or takes them again.

        Raises:
            SessionExpired, SessionClosed: that is how it ends.
        """
        session = self._table.get(session_id)
        if session is None:
            return
        if session.leaving is not None:
            await asyncio.shield(session.leaving)
        elif session.ending is not None:
            if session.ending.reason is EndReason.EXPIRED:
                raise self._expiry.kept_error(session_id, session.ending)
            raise told(session_id, session.ending)
        elif self._overdue(session):
            await self._expire([session])  # the store tells of it from then on

    async def _end(self, session: Session, ending: Ending) -> bool:
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

    def _ending(self, session: Session, reason: EndReason) -> Ending:
        return Ending(reason, self.t(session), session.record.idle_timeout_seconds)

    def _open_elsewhere(self, entry: Entry) -> bool:
        session = self._table.get(entry.record.session_id)
        ending_here = session is not None and session.ending is not None
        return not (ending_here or self._standings.past(entry) or self._standings.lost(entry))

    def _overdue(self, session: Session) -> bool:
        return (
            self._table.expires_at[session.handle] <= self._clock()
            and not self._table.busy[session.handle]
        )


def _unended(session: Session) -> None:
    """A session whose end failed can be used, and ended, again."""
    session.ending = None
    session.barred = session.lost is not None
