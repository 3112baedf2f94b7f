"""One model's sessions: checks t, hands steps to the engine, commits what it computed.

Rule 1: a session has at most one step in the engine; later ones wait in the session.
Rule 2: t is checked when a step's turn has come, against the rows applied by then.
Rule 3: state, t and the replay window advance together, between two turns of the loop.
Rule 4: a step of a sync session stays the session's current one until it is saved, so
        nothing is built on rows that the store may not have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stepstate.engine import (
    Engine,
    EngineSettings,
    Floats,
    Layers,
    Observer,
    Precision,
    ScoreTotals,
)
from stepstate.errors import (
    NonFiniteResult,
    SnapshotCorrupt,
    StepAhead,
    StepMismatch,
    StepPositionUnknown,
    StepstateError,
    StepTooOld,
    StoreUnavailable,
)
from stepstate.models import Model, build_timeline
from stepstate.sessions.packed import PackedReplyTo, PackedStep, RowBatch, fast_path_mask
from stepstate.sessions.replay import CachedReply, ReplayState, ReplayWindow
from stepstate.sessions.snapshots.format import Snapshot, extended
from stepstate.sessions.surprise import surprise
from stepstate.sessions.table import Table
from stepstate.sessions.types import ResidentSession, Step
from stepstate.stores import SessionRecord


class SchedulerObserver(Observer, Protocol):
    """Is told of every forward and of how steps ended."""

    def applied(self, rows: int) -> None:
        """Rows were applied."""
        ...

    def ended(self, result: str, times: int = 1) -> None:
        """Requests ended otherwise: replayed, refused, cancelled, failed."""
        ...


class StepScheduler:
    """The sessions of one model version.

    Args:
        model: the model.
        table: holds t and expiry of every session.
        number: of this lane, in the table.
        clock: monotonic seconds.
        observer: told what happens.
        capacity: most sessions of the model.
        batch_rows: most single rows in one forward.
        chunk_rows: most rows of long requests in one turn.
        replay_rows: most single rows a session remembers the replies of.
        replay_bytes: bound for the remembered long replies of all sessions.
        backlog_rows: most rows of an async session that are applied and not saved.
        settled: told how many requests and rows have their outcome, before its delivery.
        commit: called with steps of sync sessions that were applied; calls `committed` for each.
        urge: called when much waits to be saved.
        doubt: called with a step that is ahead of its session, as another server may have taken
            the session over; calls `lease_verified`. None: there is no other server.
    """

    def __init__(
        self,
        model: Model,
        table: Table,
        *,
        number: int,
        clock: Callable[[], float],
        observer: SchedulerObserver,
        capacity: int,
        batch_rows: int,
        chunk_rows: int,
        replay_rows: int,
        replay_bytes: int,
        backlog_rows: int,
        precision: Precision = Precision.FLOAT32,
        accelerator: str | None = None,
        settled: Callable[[int, int], None],
        commit: Callable[[Sequence[Step]], None],
        request_flush: Callable[[], None],
        verify_lease: Callable[[Step], None] | None,
    ) -> None:
        self.model = model
        self.timeline = build_timeline(model)
        settings = EngineSettings(capacity, batch_rows, chunk_rows, precision, accelerator)
        self.engine: Engine[Step, PackedStep] = Engine(
            model, self.timeline, settings, sink=self, observer=observer
        )
        self.window = ReplayWindow(
            capacity,
            input_width=model.manifest.input_width,
            output_width=model.manifest.output_width,
            rows=replay_rows,
            long_bytes=replay_bytes,
        )
        self.number = number
        self._table = table
        self._busy = table.busy
        self._clock = clock
        self._observer = observer
        self._settled = settled
        self._commit = commit
        self._request_flush = request_flush
        self._verify_lease = verify_lease
        self._backlog_rows = backlog_rows
        self._output_bytes = 4 * model.manifest.output_width
        self.lag_rows = model.manifest.lag_rows
        self.queued_rows = 0
        self.queued_requests = 0

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
        """Bytes of remembered long replies."""
        return self.window.long_bytes

    @property
    def tally(self) -> ScoreTotals:
        """What was scored of the forecasts of its sessions."""
        return self.engine.score_totals

    @property
    def widths(self) -> tuple[int, int]:
        """R, the values of a state, and D + O, the columns of the replay window."""
        manifest = self.model.manifest
        return self.engine.layout.width, manifest.input_width + manifest.output_width

    def blank(self, record: SessionRecord, now: float) -> Snapshot:
        """A new session of the model: zero state, nothing remembered; `now` in Unix seconds."""
        window = ReplayState(np.zeros(0, np.int64), np.zeros((0, self.widths[1]), np.float32), ())
        return Snapshot(record, 0, now, self.engine.blank(record.interval_level), window)

    def adapt(self, snapshot: Snapshot) -> Snapshot | None:
        """A snapshot as the states of this model are; None if it can't be one of them.

        Raises:
            SnapshotCorrupt: its state is none that a session can have.
        """
        layout, state = self.engine.layout, self.engine.upgraded(snapshot.state)
        if snapshot.window.ring.shape[1] != self.widths[1]:
            return None
        if len(state) not in (layout.cell, layout.width):
            return None
        if not np.isfinite(state[: layout.cell]).all():
            raise SnapshotCorrupt("its state is not finite")
        snapshot = replace(snapshot, state=state)
        if len(state) < layout.width:  # of version 1
            blank = self.engine.blank(snapshot.record.interval_level)
            snapshot = extended(snapshot, layout, blank)
        if not self.engine.is_valid(snapshot.state):
            raise SnapshotCorrupt("what it tracks of forecasts can't be a session's")
        return snapshot

    def claim(self) -> int:
        """Takes a slot with zero state and an empty replay window."""
        slot = self.engine.claim()
        self.window.clear(slot)
        return slot

    def release(self, slot: int) -> None:
        """Gives a slot back."""
        self.window.clear(slot)
        self.engine.release(slot)

    def submit(self, step: Step) -> None:
        """Starts a step, or lets it wait for those of its session before it."""
        session = step.session
        self.queued_rows += step.rows
        self.queued_requests += 1
        if not self._busy[session.handle]:
            self._start(step)
            return
        self._table.awaited[session.handle] = True
        if session.waiting is None:
            session.waiting = deque((step,))
        else:
            session.waiting.append(step)

    def stepped(self, works: Sequence[Step], x: Floats, y: Floats) -> None:
        """See `CompletionSink`: commits a micro-batch of single rows."""
        if len(works) == 1:
            self._stepped_one(works[0], x, y)
            return
        handles = np.array([step.session.handle for step in works])
        slots = np.array([step.slot for step in works])
        table = self._table
        t = table.t_array[handles]
        table.t_array[handles] = t + 1
        table.expires_at_array[handles] = self._clock() + table.idle_timeout_array[handles]
        self.window.remember_rows(slots, t, x, y)
        outputs, width = y.tobytes(), self._output_bytes
        unsaved: list[Step] = []
        for place, (step, before) in enumerate(zip(works, t.tolist(), strict=True)):
            step.t_after = before + 1
            step.y = outputs[place * width : (place + 1) * width]
            if step.session.sync:
                unsaved.append(step)
            else:
                self._finish(step)
        self._observer.applied(len(works) - len(unsaved))
        if unsaved:
            self._commit(unsaved)

    def _stepped_one(self, step: Step, x: Floats, y: Floats) -> None:
        """The same for one row, by plain numbers: at one session arrays cost more than the cell."""
        table, handle, t = self._table, step.session.handle, step.at
        table.t[handle] = step.t_after = t + 1
        table.expires_at[handle] = self._clock() + step.session.record.idle_timeout_seconds
        self.window.remember_row(step.slot, t, x[0], y[0])
        step.y = y.tobytes()
        if step.session.sync:
            self._commit([step])
        else:
            self._finish(step)
            self._observer.applied(1)

    def finished(self, work: Step, y: Floats, layers: Layers | None) -> None:
        """See `CompletionSink`: commits a request with many rows, or with `inspect`."""
        session, table = work.session, self._table
        t = table.t[session.handle]
        work.t_after = table.t[session.handle] = t + work.rows
        table.expires_at[session.handle] = self._clock() + session.record.idle_timeout_seconds
        work.y, work.layers = y.tobytes(), layers
        self.window.remember_long(work, t, work.y, layers)
        if session.sync:
            self._commit([work])
            return
        self._observer.applied(work.rows)
        if (
            session.bounded
            and work.t_after - table.durable_t[session.handle] > self._backlog_rows / 4
        ):
            self._request_flush()
        self._finish(work)

    def submit_pack(self, columns: RowBatch, reply_to: PackedReplyTo) -> NDArray[np.bool_]:
        """Sends the rows that can go straight to the engine, and tells which [N] they are.

        They have been accepted, as `submit` expects of a step; the others are still the caller's.
        """
        table = self._table
        good = fast_path_mask(
            columns,
            table,
            scheduler=self.number,
            now=self._clock(),
            backlog_rows=self._backlog_rows,
        )
        if not good.any():
            return good
        if not good.all():
            columns = columns.some(np.flatnonzero(good))
        pack = PackedStep(columns, table, reply_to)
        table.busy_array[pack.handles] = True
        self.queued_rows += len(pack)
        self.queued_requests += len(pack)
        self.engine.submit_pack(pack)
        return good

    def stepped_pack(
        self,
        pack: PackedStep,
        y: Floats,
        finite: NDArray[np.bool_] | None,
        failed: Mapping[int, Exception],
    ) -> None:
        """See `CompletionSink`: commits rows of many sessions."""
        table, handles, slots, t, x = self._table, pack.handles, pack.slots, pack.at, pack.x
        pack.y = y
        if finite is not None:
            self._refuse_rows(pack, np.flatnonzero(~finite).tolist(), failed)
            handles, slots, t = handles[finite], slots[finite], t[finite]
            x, y = x[finite], y[finite]
        table.t_array[handles] = t + 1
        table.expires_at_array[handles] = self._clock() + table.idle_timeout_array[handles]
        self.window.remember_rows(slots, t, x, y)
        self._observer.applied(len(handles))
        self._finish_pack(pack)

    def _refuse_rows(
        self, pack: PackedStep, rows: Sequence[int], failed: Mapping[int, Exception]
    ) -> None:
        """Tells why rows of a pack were not applied; those that raised alike share an error."""
        surprises: dict[str, StepstateError] = {}
        for row in rows:
            session_id = self._id_at(pack.handles[row])
            error = failed.get(row)
            if error is None:
                pack.errors.append((row, NonFiniteResult(session_id, int(pack.at[row]))))
                continue
            kind = repr(error)
            if kind not in surprises:
                surprises[kind] = surprise("a forward failed", error, session_id)
            pack.errors.append((row, surprises[kind]))
        if failed:
            self._observer.ended("failed", len(failed))

    def dropped_pack(self, pack: PackedStep) -> None:
        """See `CompletionSink`: nobody waits for it."""
        self._observer.ended("cancelled", len(pack))
        self._finish_pack(pack)

    def _finish_pack(self, pack: PackedStep) -> None:
        """Delivers the outcome of a pack, after starting what waited for its sessions."""
        table, handles = self._table, pack.handles
        table.busy_array[handles] = False
        pack.durable_t = table.durable_t_array[handles]
        changed = table.generation_array[handles] != pack.generations
        for row in np.flatnonzero(changed).tolist():
            session = table.at(int(handles[row]))
            if session is not None and session.lost is not None:
                pack.errors.append((row, session.lost))
        self.queued_rows -= len(pack)
        self.queued_requests -= len(pack)
        self._settled(len(pack), len(pack))
        for handle in handles[table.awaited_array[handles]].tolist():
            session = table.at(handle)
            if session is not None:
                self._resume(session)
        pack.reply_to.deliver_pack(pack)

    def _id_at(self, handle: int) -> str:
        session = self._table.at(handle)
        return "" if session is None else session.session_id

    def committed(self, step: Step) -> None:
        """A step of a sync session was saved, or else its session is lost: see `commit`."""
        if step.session.lost is None:
            self._observer.applied(step.rows)
        else:
            self._observer.ended("failed")
        self._finish(step)

    def dropped(self, work: Step) -> None:
        """See `CompletionSink`: nobody waits for it."""
        self._observer.ended("cancelled")
        self._finish(work)

    def overflowed(self, work: Step) -> None:
        """See `CompletionSink`: refuses rows that float32 can't hold the result of."""
        session = work.session
        work.error = NonFiniteResult(session.session_id, self._table.t[session.handle])
        self._observer.ended("refused")
        self._finish(work)

    def failed(self, work: Step, error: Exception) -> None:
        """See `CompletionSink`: a surprise in the forward."""
        work.error = surprise("a forward failed", error, work.session.session_id)
        self._observer.ended("failed")
        self._finish(work)

    def lease_verified(self, step: Step) -> None:
        """It is known whether the session of a step that is ahead is still held here."""
        self._observer.ended("refused")
        self._finish(step)

    def _start(self, step: Step) -> None:
        session = step.session
        t = self._table.t[session.handle]
        step.slot = session.slot
        if session.lost is not None or step.error is not None:  # refused before, in its turn
            step.error = session.lost or step.error
            self._settle(step)
        elif step.cancelled:
            self._observer.ended("cancelled")
            self._settle(step)
        elif step.t is not None and step.t != t:
            self._answer_again(step, step.t, t)
        elif (error := self._not_now(step, t)) is not None:
            step.error = error
            self._observer.ended("refused")
            self._settle(step)
        else:
            step.phase = session.phase + t
            step.at = t
            self._busy[session.handle] = True
            self.engine.submit(step)

    def _not_now(self, step: Step, t: int) -> StepPositionUnknown | StoreUnavailable | None:
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
        self._request_flush()
        return StoreUnavailable(f"{behind} rows of the session wait to be saved")

    def _answer_again(self, step: Step, sent_t: int, t: int) -> None:
        """Answers a step whose t is not the session's: from the replay window, or refused."""
        remembered = self.window.find(step, sent_t) if sent_t < t else None
        if remembered is None:
            step.error = self._refusal(step, sent_t, t)
            if sent_t > t and self._verify_lease is not None:
                self._busy[step.session.handle] = True
                self._verify_lease(step)
                return
            self._observer.ended("refused")
        else:
            self._repeat(step, remembered)
            step.durable_t = self._table.durable_t[step.session.handle]
            self._observer.ended("replayed")
        self._settle(step)

    def _refusal(self, step: Step, sent_t: int, t: int) -> StepAhead | StepMismatch | StepTooOld:
        session_id = step.session.session_id
        if sent_t > t:
            return StepAhead(session_id, sent_t, t)
        if self.window.covers(step.slot, sent_t):
            return StepMismatch(session_id, sent_t, t)
        return StepTooOld(session_id, sent_t, t)

    @staticmethod
    def _repeat(step: Step, remembered: CachedReply) -> None:
        step.t_after = remembered.t + remembered.rows
        step.y, step.layers = remembered.y, remembered.layers
        step.replayed = True

    def _settle(self, step: Step) -> None:
        """Delivers an outcome."""
        self.queued_rows -= step.rows
        self.queued_requests -= 1
        self._settled(1, step.rows)
        step.reply_to.deliver(step)

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

    def _resume(self, session: ResidentSession) -> None:
        """Starts what waited for a session that is busy no more."""
        busy, handle, waiting = self._busy, session.handle, session.waiting
        self._table.awaited[handle] = False
        while waiting and not busy[handle]:
            self._start(waiting.popleft())
        if waiting:
            self._table.awaited[handle] = True
        if session.idle is None:
            return
        if busy[handle]:
            self._table.awaited[handle] = True
        elif not session.idle.done():
            session.idle.set_result(None)
