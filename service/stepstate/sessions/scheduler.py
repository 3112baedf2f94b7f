"""One model's steps: checks t, hands steps to the engine, commits what it computed.

Rule 1: a session has at most one step in the engine; later ones wait in the session.
Rule 2: t is checked when a step's turn has come, against the rows applied by then.
Rule 3: state, t and the replay window advance together, between two turns of the loop.
Rule 4: a sync session stays busy until its step is saved, so that nothing is built on rows
        that the store may not have.

A `Step` is one request; a `PackedStep` is rows of many sessions that passed
`Table.fast_path_mask` together; rows of one-row messages that are ready take the fast path of
`rows`. They share what is done by columns (`RowCommitter`). Three things exist twice, side by side:
submit, refuse and finish, since a pack is there to avoid their loop over Python objects.
N rows of a message, B rows of a micro-batch, D inputs, O outputs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepstate.engine import Engine, Floats, Layers
from stepstate.errors import (
    NonFiniteResult,
    StepAhead,
    StepMismatch,
    StepPositionUnknown,
    StepstateError,
    StepTooOld,
    StoreUnavailable,
)
from stepstate.identity import SessionKey, id_of
from stepstate.models import Model, build_timeline
from stepstate.sessions.admission import Admission
from stepstate.sessions.context import SchedulerSettings, SessionContext
from stepstate.sessions.replay import ReplayWindow
from stepstate.sessions.rows import RowBatcher, RowCommitter
from stepstate.sessions.snapshots.writer import SnapshotWriter
from stepstate.sessions.types import (
    PackedReplyTo,
    PackedStep,
    ResidentSession,
    RowBatch,
    SessionBarrier,
    SingleRow,
    Step,
    Waiting,
    unexpected,
)


class StepScheduler:
    """The sessions of one model version.

    Args:
        model: the model.
        context: the table, the clock and the observer.
        settings: of the engine, the replay window and the backlog.
        number: of this scheduler, in the table.
        admission: counts accepted requests, of all schedulers.
        writer: saves sync sessions, and asks whether a lease is still held.
    """

    def __init__(
        self,
        model: Model,
        context: SessionContext,
        settings: SchedulerSettings,
        *,
        number: int,
        admission: Admission,
        writer: SnapshotWriter,
    ) -> None:
        manifest = model.manifest
        self.model = model
        self.timeline = build_timeline(model)
        self.number = number
        self._queued_rows = 0
        self._queued_requests = 0
        self._table = context.table
        self._busy = context.table.busy
        self._clock = context.clock
        self._observer = context.observer.model(manifest.name, manifest.version)
        self._admission = admission
        self._settled = admission.settled
        self._shared = context.store.backend.durable  # other servers may take sessions over
        self._writer = writer
        self._backlog_rows = settings.backlog_rows
        self._output_bytes = 4 * manifest.output_width
        self._tasks: set[asyncio.Task[None]] = set()
        self.engine: Engine[Step, PackedStep] = Engine(
            model, self.timeline, settings.engine, sink=self, observer=self._observer
        )
        self.window = ReplayWindow(
            settings.engine.capacity,
            input_width=manifest.input_width,
            output_width=manifest.output_width,
            rows=settings.replay_rows,
            long_bytes=settings.replay_bytes,
            memory=settings.replay_memory,
            tenants=context.tenants,
        )
        self._committer = RowCommitter(context, self.window)
        self._rows = RowBatcher(
            context,
            settings,
            self.engine,
            committer=self._committer,
            admission=admission,
            observer=self._observer,
            enqueue=self._enqueue,
            resume=self._resume,
        )
        self.add_row = self._rows.add  # called for every message: without a frame between

    @property
    def queued_rows(self) -> int:
        """Accepted rows that have no outcome yet."""
        return self._queued_rows + self._rows.accepted

    @property
    def queued_requests(self) -> int:
        """Accepted requests that have no outcome yet, barriers too."""
        return self._queued_requests + self._rows.accepted

    @property
    def open_sessions(self) -> int:
        """Sessions that hold a slot."""
        return self.engine.used_slots

    @property
    def state_bytes(self) -> int:
        """Bytes of their states."""
        return self.engine.state_bytes

    @property
    def replay_bytes(self) -> int:
        """Bytes of cached long replies."""
        return self.window.long_bytes

    @contextmanager
    def claimed(self) -> Iterator[int]:
        """A slot with zero state and an empty replay window; given back if the block raises."""
        slot = self.engine.claim()
        try:
            yield slot
        except BaseException:
            self.release(slot)
            raise

    def release(self, slot: int) -> None:
        """Gives a slot back."""
        self.window.clear(slot)
        self.engine.release(slot)

    # Submit

    def submit(self, step: Step) -> None:
        """Starts an accepted step, or queues it behind those of its session."""
        session = step.session
        self._queued_rows += step.rows
        self._queued_requests += 1
        if self._busy[session.handle]:
            self._enqueue(session, step)
        else:
            self._start(step)

    def submit_pack(self, rows: RowBatch, reply_to: PackedReplyTo) -> NDArray[np.bool_]:
        """Submits accepted rows that can take the fast path; returns which [N] they are.

        The others are still the caller's.
        """
        table = self._table
        mask = table.fast_path_mask(
            rows, scheduler=self.number, now=self._clock(), backlog_rows=self._backlog_rows
        )
        if not mask.any():
            return mask
        if not mask.all():
            rows = rows.some(np.flatnonzero(mask))
        at = table.t_array[rows.handles]
        slots, phase = table.slot_array[rows.handles], table.phase_array[rows.handles] + at
        pack = PackedStep(rows, slots, at, phase, reply_to=reply_to)
        table.busy_array[pack.handles] = True
        reply_to.source.running += len(pack)
        self._queued_rows += len(pack)
        self._queued_requests += len(pack)
        self.engine.submit_pack(pack)
        return mask

    def enqueue_barrier(self, session: ResidentSession, barrier: SessionBarrier[Any]) -> None:
        """Reaches a barrier after the steps that a session has accepted; it counts as a request."""
        if not self._busy[session.handle]:
            barrier.reach()
            return
        self._queued_requests += 1
        self._admission.count(1, 0, source=self._admission.own)
        self._enqueue(session, barrier)

    def _enqueue(self, session: ResidentSession, waiting: Waiting) -> None:
        self._table.awaited[session.handle] = True
        if session.waiting is None:
            session.waiting = deque((waiting,))
        else:
            session.waiting.append(waiting)

    # Start

    def _start(self, step: Step) -> None:
        session = step.session
        t = self._table.t[session.handle]
        step.slot = session.slot
        if session.lost is not None or step.error is not None:  # refused before it was queued
            step.error = session.lost or step.error
            self._settle(step)
        elif step.reply_to.cancelled:
            self._observer.ended("cancelled")
            self._settle(step)
        elif step.t is not None and step.t != t:
            self._answer_other_t(step, step.t, t)
        elif (error := self._refusal_now(step, t)) is not None:
            step.error = error
            self._observer.ended("refused")
            self._settle(step)
        else:
            step.phase = session.phase + t
            step.at = t
            step.reply_to.source.running += 1
            self._busy[session.handle] = True
            self.engine.submit(step)

    def _refusal_now(self, step: Step, t: int) -> StepPositionUnknown | StoreUnavailable | None:
        """Why a step that fits the session's t is refused all the same."""
        session = step.session
        if session.lease_in_doubt:
            return StoreUnavailable("the session's lease is being renewed")
        if session.position_unknown:
            if step.t is None:
                return StepPositionUnknown(session.session_id, t)
            session.position_unknown = False
        behind = t - self._table.durable_t[session.handle] if session.bounded else 0
        if behind < self._backlog_rows:
            return None
        self._writer.request_flush()
        return StoreUnavailable(f"{behind} rows of the session wait to be saved")

    def _answer_other_t(self, step: Step, sent_t: int, t: int) -> None:
        """Answers a step whose t is not the session's: from the replay window, or refused."""
        reply = self.window.find(step, sent_t) if sent_t < t else None
        if reply is not None:
            step.t_after = reply.t + reply.rows
            step.y, step.layers, step.replayed = reply.y, reply.layers, True
            step.durable_t = self._table.durable_t[step.session.handle]
            self._observer.ended("replayed")
            self._settle(step)
            return
        step.error = self._refusal(step, sent_t, t)
        if sent_t > t and self._shared:
            self._busy[step.session.handle] = True
            self._spawn(self._verify_lease(step))
            return
        self._observer.ended("refused")
        self._settle(step)

    def _refusal(self, step: Step, sent_t: int, t: int) -> StepAhead | StepMismatch | StepTooOld:
        session_id = step.session.session_id
        if sent_t > t:
            return StepAhead(session_id, sent_t, t)
        if self.window.covers(step.slot, sent_t):
            return StepMismatch(session_id, sent_t, t)
        return StepTooOld(session_id, sent_t, t)

    async def _verify_lease(self, step: Step) -> None:
        """Refuses a step that is ahead, once it is known whether its session is held here."""
        await self._writer.verify_lease(step)
        self._observer.ended("refused")
        self._finish(step)

    # Applied

    def stepped(self, works: Sequence[Step], x: Floats, y: Floats) -> None:
        """See `CompletionSink`: commits a micro-batch of single rows."""
        if len(works) == 1:
            self._stepped_one(works[0], x, y)
            return
        handles = np.array([step.session.handle for step in works])
        slots = np.array([step.slot for step in works])
        t = self._table.t_array[handles]
        self._committer.many(handles, slots, t, x, y)
        outputs, width = y.tobytes(), self._output_bytes
        unsaved: list[Step] = []
        for place, (step, before) in enumerate(zip(works, t.tolist(), strict=True)):
            step.t_after = before + 1
            step.y = outputs[place * width : (place + 1) * width]
            step.reply_to.source.finished(1)
            if step.session.sync:
                unsaved.append(step)
            else:
                self._finish(step)
        self._observer.applied(len(works) - len(unsaved))
        if unsaved:
            self._spawn(self._commit(unsaved))

    def stepped_pack(
        self,
        pack: PackedStep,
        y: Floats,
        finite: NDArray[np.bool_] | None,
        failed: Mapping[int, Exception],
    ) -> None:
        """See `CompletionSink`: commits rows of many sessions."""
        pack.reply_to.source.finished(len(pack))
        handles, slots, t, x = pack.handles, pack.slots, pack.at, pack.x
        pack.y = y
        if finite is not None:
            self._refuse_rows(pack, np.flatnonzero(~finite).tolist(), failed)
            handles, slots, t = handles[finite], slots[finite], t[finite]
            x, y = x[finite], y[finite]
        self._committer.many(handles, slots, t, x, y)
        self._observer.applied(len(handles))
        self._finish_pack(pack)

    def _stepped_one(self, step: Step, x: Floats, y: Floats) -> None:
        """`stepped` for one row."""
        step.reply_to.source.finished(1)
        self._committer.one(step.session, step.at, x[0], y[0])
        step.t_after = step.at + 1
        step.y = y.tobytes()
        if step.session.sync:
            self._spawn(self._commit([step]))
        else:
            self._finish(step)
            self._observer.applied(1)

    def finished(self, work: Step, y: Floats, layers: Layers | None) -> None:
        """See `CompletionSink`: commits a request with many rows, or with `inspect`."""
        work.reply_to.source.finished(1)
        session, table = work.session, self._table
        t = table.t[session.handle]
        work.t_after = table.t[session.handle] = t + work.rows
        table.expires_at[session.handle] = self._clock() + session.record.idle_timeout_seconds
        work.y, work.layers = y.tobytes(), layers
        self.window.add_long(work, t, work.y, layers, tenant=session.record.tenant)
        if session.sync:
            self._spawn(self._commit([work]))
            return
        self._observer.applied(work.rows)
        if session.bounded:
            behind = work.t_after - table.durable_t[session.handle]
            if behind > self._backlog_rows / 4:
                self._writer.request_flush()
        self._finish(work)

    async def _commit(self, steps: Sequence[Step]) -> None:
        """Saves applied steps of sync sessions, and then answers them."""
        await self._writer.commit(steps)
        for step in steps:
            if step.session.lost is None:
                self._observer.applied(step.rows)
            else:
                self._observer.ended("failed")
            self._finish(step)

    # Not applied

    def dropped(self, work: Step) -> None:
        """See `CompletionSink`: nobody waits for it."""
        work.reply_to.source.finished(1)
        self._observer.ended("cancelled")
        self._finish(work)

    def dropped_pack(self, pack: PackedStep) -> None:
        """See `CompletionSink`: nobody waits for it."""
        pack.reply_to.source.finished(len(pack))
        self._observer.ended("cancelled", len(pack))
        self._finish_pack(pack)

    def overflowed(self, work: Step) -> None:
        """See `CompletionSink`: refuses rows whose result float32 can't hold."""
        work.reply_to.source.finished(1)
        session = work.session
        work.error = NonFiniteResult(session.session_id, self._table.t[session.handle])
        self._observer.ended("refused")
        self._finish(work)

    def failed(self, work: Step, error: Exception) -> None:
        """See `CompletionSink`: the forward raised."""
        work.reply_to.source.finished(1)
        work.error = unexpected("a forward failed", error, work.session.key)
        self._observer.ended("failed")
        self._finish(work)

    def _refuse_rows(
        self, pack: PackedStep, rows: Sequence[int], failed: Mapping[int, Exception]
    ) -> None:
        """`overflowed` and `failed` for rows of a pack; those that raised alike share an error."""
        errors: dict[str, StepstateError] = {}
        for row in rows:
            session = self._table.at(int(pack.handles[row]))
            key = SessionKey("") if session is None else session.key
            error = failed.get(row)
            if error is None:
                pack.errors.append((row, NonFiniteResult(id_of(key), int(pack.at[row]))))
                continue
            kind = repr(error)
            if kind not in errors:
                errors[kind] = unexpected("a forward failed", error, key)
            pack.errors.append((row, errors[kind]))
        if failed:
            self._observer.ended("failed", len(failed))

    # Finish

    def _finish(self, step: Step) -> None:
        """Delivers the outcome of a step that the engine had, and starts those that waited."""
        session = step.session
        self._busy[session.handle] = False
        if session.lost is not None:
            step.error = session.lost
        step.durable_t = self._table.durable_t[session.handle]
        self._settle(step)
        if session.waiting or session.idle is not None:
            self._resume(session)

    def _settle(self, step: Step) -> None:
        """Delivers an outcome."""
        self._queued_rows -= step.rows
        self._queued_requests -= 1
        self._settled(1, step.rows, source=step.reply_to.source)
        step.reply_to.deliver(step)

    def _finish_pack(self, pack: PackedStep) -> None:
        """`_finish` for a pack; it starts what waited before it delivers."""
        table, handles = self._table, pack.handles
        table.busy_array[handles] = False
        pack.durable_t = table.durable_t_array[handles]
        for row in np.flatnonzero(~table.valid_refs(handles, pack.generations)).tolist():
            session = table.at(int(handles[row]))
            if session is not None and session.lost is not None:
                pack.errors.append((row, session.lost))
        self._queued_rows -= len(pack)
        self._queued_requests -= len(pack)
        self._settled(len(pack), len(pack), source=pack.reply_to.source)
        for handle in handles[table.awaited_array[handles]].tolist():
            session = table.at(handle)
            if session is not None:
                self._resume(session)
        pack.reply_to.deliver_pack(pack)

    def _resume(self, session: ResidentSession) -> None:
        """Starts what waited for a session that is no longer busy."""
        busy, handle, waiting = self._busy, session.handle, session.waiting
        self._table.awaited[handle] = False
        while waiting and not busy[handle]:
            head = waiting.popleft()
            if isinstance(head, SessionBarrier):
                self._reach(session, head)
            elif isinstance(head, SingleRow):
                self._rows.resume(head)
            else:
                self._start(head)
        if waiting:
            self._table.awaited[handle] = True
        if session.idle is None:
            return
        if busy[handle]:
            self._table.awaited[handle] = True
        elif not session.idle.done():
            session.idle.set_result(None)

    def _reach(self, session: ResidentSession, barrier: SessionBarrier[Any]) -> None:
        self._queued_requests -= 1
        self._settled(1, 0, source=self._admission.own)
        if session.lost is not None:
            barrier.fail(session.lost)
        else:
            barrier.reach()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
