"""How sessions begin and end: open, fork, restore; close.

Rule 1: an id is free, open, or ending; the store decides it for every server that shares it.
Rule 2: whatever begins or ends a session holds its queue meanwhile.
Rule 3: a caller that gives up does not leave a session half open or half closed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import NoReturn

from stepstate.errors import (
    Draining,
    SessionExists,
    SessionLimit,
    SessionUnreadable,
    StaleOwner,
)
from stepstate.identity import SessionKey, id_of
from stepstate.sessions.admission import Admission
from stepstate.sessions.context import Limits, SessionContext
from stepstate.sessions.loader import SessionLoader, blank_snapshot
from stepstate.sessions.options import (
    CopyOptions,
    OpenOptions,
    check_id,
    copy_record,
    make_record,
)
from stepstate.sessions.queues import Hold, RequestQueues
from stepstate.sessions.snapshots.checks import check_import
from stepstate.sessions.snapshots.format import Snapshot, decode, encode
from stepstate.sessions.snapshots.writer import SnapshotWriter
from stepstate.sessions.sweeper import ExpirySweeper
from stepstate.sessions.types import ResidentSession
from stepstate.stores import (
    EndReason,
    SessionRecord,
    StoredSession,
    TenantFull,
    Tombstone,
    UnreadableSession,
)
from stepstate.tenants import SESSIONS_RETRY_SECONDS

log = logging.getLogger(__name__)


class SessionLifecycle:
    """Opens and closes sessions.

    Args:
        context: the store and the table.
        limits: what sessions may ask for, and how many there may be.
        loader: makes them resident.
        queues: holds their queues.
        sweeper: expires overdue ones, and counts all.
        writer: takes the snapshots that copies start from.
        admission: says whether the server drains.
    """

    def __init__(
        self,
        context: SessionContext,
        limits: Limits,
        *,
        loader: SessionLoader,
        queues: RequestQueues,
        sweeper: ExpirySweeper,
        writer: SnapshotWriter,
        admission: Admission,
    ) -> None:
        self._catalog = context.catalog
        self._store = context.store
        self._table = context.table
        self._admission = admission
        self._owner = context.owner
        self._clock = context.clock
        self._unix_time = context.unix_time
        self._observer = context.observer
        self._limits = limits
        self._loader = loader
        self._queues = queues
        self._sweeper = sweeper
        self._counts = sweeper.counts
        self._writer = writer
        self._opening = 0  # sessions that are being opened

    async def open(self, options: OpenOptions, *, hold: Hold | None = None) -> ResidentSession:
        """See `SessionService.open`."""
        self._admission.check_open()
        model = self._catalog.of(options.tenant).find(options.model, options.version)
        record = make_record(options, model.manifest, self._limits)
        scheduler = self._loader.schedulers[model.key]
        blank = blank_snapshot(record, scheduler, self._unix_time())
        if hold is not None:
            return await self._create(blank, hold)
        async with self._queues.hold(record.key) as mine:
            return await self._create(blank, mine)

    async def fork(self, key: SessionKey, options: CopyOptions) -> ResidentSession:
        """See `SessionService.fork`."""
        self._admission.check_open()
        check_id(options.session_id)
        call = self._queues.enqueue(key, self._writer.snapshot)  # first in its queue
        try:
            async with self._queues.hold(options.key) as hold:
                source = decode(await (await call.result).result())
                return await self._create_copy(source, options, hold)
        finally:
            self._queues.drop(key, call)
            del call  # its error's traceback leads here: no circle

    async def restore(self, data: bytes, options: CopyOptions) -> ResidentSession:
        """See `SessionService.restore`."""
        self._admission.check_open()
        snapshot = self._loader.adapt(decode(data), options.tenant)
        check_import(snapshot)
        if not options.session_id:
            options = replace(options, session_id=snapshot.record.session_id)
        async with self._queues.hold(options.key) as hold:
            return await self._create_copy(snapshot, options, hold)

    async def restore_expired(self, key: SessionKey) -> ResidentSession:
        """See `SessionService.restore_expired`."""
        self._admission.check_open()
        async with self._queues.hold(key) as hold:
            while not await hold.finish(self._reopen(key)):
                pass  # somebody was faster
            return await self._queues.get(key, hold=hold)

    async def close(self, key: SessionKey, *, hold: Hold | None = None) -> int:
        """See `SessionService.close`."""
        if hold is None:
            async with self._queues.hold(key) as mine:
                return await self.close(key, hold=mine)
        session = await self._queues.get(key, hold=hold)
        self._table.begin_end(session)
        return await hold.finish(self._end(session))

    async def close_stored(self, key: SessionKey) -> StoredSession | UnreadableSession:
        """See `SessionService.close_stored`."""
        backend = self._store.backend
        found = await self._store.ask(backend.find(key))
        if isinstance(found, UnreadableSession):
            ending = Tombstone(EndReason.CLOSED, 0, 0.0)
            ended = await self._store.ask(backend.discard(key, ending))
        elif isinstance(found, StoredSession) and not self._sweeper.is_past(found):
            ending = Tombstone(EndReason.CLOSED, found.t, found.record.idle_timeout_seconds)
            ended = await self._store.ask(backend.end(key, found.epoch, ending))
        else:
            raise await self._loader.missing_reason(found, key)
        if not ended:
            raise StaleOwner(id_of(key), 0)
        self._loader.survey.ended(found)
        if isinstance(found, UnreadableSession):
            self._observer.closed(ending.reason.value)  # no model counts it
        else:
            self._counts.ended(found.record.model_key, ending)
        return found

    async def _end(self, session: ResidentSession) -> int:
        """Ends a session after its accepted steps; returns its last t.

        Raises:
            StaleOwner, or why it was lost: another server has taken it over.
            StoreUnavailable: it is open as before.
        """
        if self._table.queued_requests(session):
            await self._table.when_idle(session)
        t = self._table.t[session.handle]
        ending = Tombstone(EndReason.CLOSED, t, session.record.idle_timeout_seconds)
        end = self._store.backend.end(session.key, session.epoch, ending)
        try:
            ended = await self._store.ask(end)
        except BaseException:
            self._table.reopen(session)
            raise
        if self._table.get(session.key) is session:
            self._table.remove(session)
            if ended:
                self._counts.ended(session.record.model_key, ending)
        if not ended:
            raise session.lost or StaleOwner(session.session_id, t)
        extra = {"tenant": session.record.tenant, "session_id": session.session_id, "t": t}
        log.debug("a session was closed", extra=extra)
        return t

    async def _reopen(self, key: SessionKey) -> bool:
        """Makes an expired session open again in the store; False if somebody was faster."""
        await self._free_id(key)
        entry = await self._expired_entry(key)
        with self._counted_opening():
            expires_at = self._store.backend.now() + entry.record.idle_timeout_seconds
            opened = await self._store.ask(
                self._store.backend.restore(
                    key,
                    entry.epoch,
                    expires_at=expires_at,
                    max_open_sessions=self._max_open_sessions(entry.record),
                )
            )
            if isinstance(opened, TenantFull):
                self._refuse_tenant(entry.record)
            if opened:
                self._counts.restored(entry.record.model_key)
                log.info(
                    "an expired session was restored",
                    extra={"tenant": entry.record.tenant, "session_id": id_of(key)},
                )
            return opened

    async def _expired_entry(self, key: SessionKey) -> StoredSession:
        """An expired session of a model that is loaded here, marked as such."""
        found = await self._store.ask(self._store.backend.find(key))
        if not isinstance(found, StoredSession):
            raise await self._loader.missing_reason(found, key)
        if not self._sweeper.is_past(found):
            raise SessionExists(id_of(key), found.t)
        if self._loader.scheduler_of(found.record, found.record.tenant) is None:
            raise self._loader.model_mismatch(found.record, found.record.tenant)
        if found.delete_at is not None:
            return found
        await self._sweeper.settle(found)
        return await self._expired_entry(key)

    @contextmanager
    def _counted_opening(self) -> Iterator[None]:
        """Counts a session as open until the counts do.

        Raises:
            SessionLimit.
        """
        if self._counts.total + self._opening >= self._limits.sessions:
            raise SessionLimit(self._limits.sessions)
        self._opening += 1
        try:
            yield
        finally:
            self._opening -= 1

    async def _create_copy(
        self, source: Snapshot, options: CopyOptions, hold: Hold
    ) -> ResidentSession:
        scheduler = self._loader.scheduler_of(source.record, options.tenant)
        if scheduler is None:  # its tenant may not use the model any more
            raise self._loader.model_mismatch(source.record, options.tenant)
        record = copy_record(source.record, options, scheduler.model.manifest, self._limits)
        copy = replace(source, record=record, stepped_at=self._unix_time())
        return await self._create(copy, hold)

    async def _create(self, snapshot: Snapshot, hold: Hold) -> ResidentSession:
        """Opens a session that starts from a snapshot."""
        key = snapshot.record.key
        if self._table.get(key) is not None:
            await hold.finish(self._free_id(key))
        with ExitStack() as held:
            held.enter_context(self._counted_opening())
            held.enter_context(await self._loader.slots.reserve())
            placing = self._store_and_place(snapshot, held.pop_all())
        return await hold.finish(placing)

    async def _free_id(self, key: SessionKey) -> None:
        """Ends a resident session of this id if its time is up.

        Raises:
            SessionExists: it is open.
        """
        session = self._table.get(key)
        if session is None:
            return
        if session.open and self._table.is_overdue(session, self._clock()):
            await self._sweeper.expire_resident([session])
        elif session.left is None:
            raise SessionExists(id_of(key), self._table.t[session.handle])

    async def _store_and_place(self, snapshot: Snapshot, held: ExitStack) -> ResidentSession:
        """Creates a session in the store, and in the reserved slot.

        Args:
            snapshot: what it starts from.
            held: its slot, and its place in the count; given back when it has them itself.
        """
        record = snapshot.record
        expires_at = self._store.backend.now() + record.idle_timeout_seconds
        with held:
            epoch = await self._store_new(snapshot, expires_at)
            session = self._loader.place(snapshot, epoch, expires_at=expires_at)
            self._counts.opened(record.model_key)
        self._observer.opened(record.model, record.version)
        extra = {"tenant": record.tenant, "session_id": record.session_id}
        log.debug("a session was opened", extra=extra | {"model": record.model_key})
        return session

    async def _store_new(self, snapshot: Snapshot, expires_at: float) -> int:
        """Takes an id that is free in the store, and the first lease; returns its epoch."""
        record = snapshot.record
        created = await self._create_in_store(snapshot, expires_at, replacing=0)
        if isinstance(created, StoredSession) and self._sweeper.is_past(created):
            before = created
            created = await self._create_in_store(snapshot, expires_at, replacing=before.epoch)
            if isinstance(created, int):
                self._sweeper.replaced(before)
        if isinstance(created, TenantFull):
            self._refuse_tenant(record)
        if isinstance(created, StoredSession):
            raise SessionExists(record.session_id, created.t)
        if isinstance(created, UnreadableSession):
            raise SessionUnreadable(record.session_id, created.problem)
        if self._admission.draining:  # began meanwhile: nobody would save it
            ending = Tombstone(EndReason.CLOSED, snapshot.t, record.idle_timeout_seconds)
            await self._store.ask(self._store.backend.end(record.key, created, ending))
            raise Draining
        return created

    async def _create_in_store(
        self, snapshot: Snapshot, expires_at: float, *, replacing: int
    ) -> int | StoredSession | UnreadableSession | TenantFull:
        backend = self._store.backend
        data = b""
        if backend.durable:  # another one gives no session back but one that expired
            data = encode(replace(snapshot, owner=self._owner, epoch=0))
        return await self._store.ask(
            backend.create(
                snapshot.record,
                owner=self._owner,
                t=snapshot.t,
                expires_at=expires_at,
                snapshot=data,
                replacing=replacing,
                max_open_sessions=self._max_open_sessions(snapshot.record),
            )
        )

    def _max_open_sessions(self, record: SessionRecord) -> int | None:
        return self._limits.tenants.limits.of(record.tenant).open_sessions

    def _refuse_tenant(self, record: SessionRecord) -> NoReturn:
        tenant = self._limits.tenants.get(record.tenant)
        tenant.refuse("open_sessions", SESSIONS_RETRY_SECONDS)
