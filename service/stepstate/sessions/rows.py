"""The fast path of single rows: what a round of the event loop brings is stepped at its end.

A message with one row of a session that is ready for it needs no `Step`, no queue and no future:
its row waits until all that can be read has been read, and then such rows of a model are columns of
one forward. Whatever is not as simple goes the ordinary way, as a `Step`, from the message as it
came; so what is refused, replayed, imputed or saved first is decided in one place.

    rule                                        fast path              ordinary way
    ------------------------------------------  ---------------------  -------------------------
    the session takes steps, and t is its own   RowBatcher._enter      RequestQueues.find,
                                                                       StepScheduler._start
    one at a time of a session, as they came    ResidentSession.waiting, of both
    a row that waits is accepted, or refused    Admission, of both
    its tenant may have so many a second        RowBatcher._pay        Admission.accept
    at most a micro-batch; sources take turns   RowBatcher._take       Engine._take
    nobody waits any more: it is not applied    RowBatcher._take       Engine._take
    the forward                                 Forward.step, of both
    t, expiry, replay window                    RowCommitter, of both
    a row that raises or overflows              RowBatcher._give_back  Engine._step, _report
    t is another, missing values, sync, ...     RowBatcher._give_back  StepScheduler

Packed rows are checked by `Table.fast_path_mask`, which is `_enter` by columns, and share the rest.

Rule 1: a session with a row here is busy, as with a step in the engine: what comes for it meanwhile
        waits in the session.
Rule 2: a row that is given back has changed nothing, and becomes a step in its place: what came
        after it waits in the session.

B rows of different sessions, D inputs, O outputs.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from stepstate.engine import Engine, Floats, RowColumns
from stepstate.errors import Draining, StepstateError, without_frames
from stepstate.sessions.admission import Admission
from stepstate.sessions.context import SchedulerSettings, SessionContext
from stepstate.sessions.replay import ReplayWindow
from stepstate.sessions.types import (
    PackedStep,
    ResidentSession,
    SingleRow,
    Step,
    StepObserver,
    Waiting,
)
from stepstate.tenants import FairQueue


class RowCommitter:
    """Takes applied single rows into their sessions' numbers and the replay window.

    Args:
        context: the table and the clock.
        window: of the model.
    """

    def __init__(self, context: SessionContext, window: ReplayWindow) -> None:
        self._table = context.table
        self._clock = context.clock
        self._window = window

    def many(
        self,
        handles: NDArray[np.int64],
        slots: NDArray[np.int64],
        t: NDArray[np.int64],
        x: Floats,
        y: Floats,
    ) -> None:
        """Commits rows [B] of different sessions: x [B, D], y [B, O]."""
        table = self._table
        table.t_array[handles] = t + 1
        table.expires_at_array[handles] = self._clock() + table.idle_timeout_array[handles]
        self._window.add_rows(slots, t, x, y)

    def one(self, session: ResidentSession, t: int, x: Floats, y: Floats) -> None:
        """Commits one row by plain numbers, as arrays cost more: x [D], y [O]."""
        table, handle = self._table, session.handle
        table.t[handle] = t + 1
        table.expires_at[handle] = self._clock() + session.record.idle_timeout_seconds
        self._window.add_row(session.slot, t, x, y)


class RowBatcher:
    """Steps the single rows of one model's sessions.

    Args:
        context: the table and the clock.
        settings: of the engine, and the backlog.
        engine: of the model.
        committer: of the model.
        admission: accepts rows that have to wait.
        observer: counts what happens.
        enqueue: lets something wait in a session that is busy.
        resume: starts what waits in a session that is not.
    """

    def __init__(
        self,
        context: SessionContext,
        settings: SchedulerSettings,
        engine: Engine[Step, PackedStep],
        *,
        committer: RowCommitter,
        admission: Admission,
        observer: StepObserver,
        enqueue: Callable[[ResidentSession, Waiting], None],
        resume: Callable[[ResidentSession], None],
    ) -> None:
        self._table = table = context.table
        # Looked up for every row: once, here.
        self._generation, self._busy, self._t = table.generation, table.busy, table.t
        self._expires_at, self._durable_t = table.expires_at, table.durable_t
        self._saved_behind = table.saved_behind
        self._clock = context.clock
        self._now = 0.0  # by that clock, as of the beginning of the round
        self._backlog_rows = settings.backlog_rows
        self._batch_rows = settings.engine.batch_rows
        self._engine = engine
        self._committer = committer
        self._admission = admission
        self._observer = observer
        self._enqueue = enqueue
        self._resume = resume
        self.accepted = 0
        """Rows that wait."""
        self._arrived: list[SingleRow] = []
        self._backlog: FairQueue[SingleRow] = FairQueue()
        self._awake = False
        self._arrived_at = 0.0  # when this round began; seconds of `time.perf_counter`

    def add(self, row: SingleRow) -> bool:
        """Takes a row; False: it has to go the ordinary way, and nothing was done."""
        handle = row.session.handle
        if not self._busy[handle]:
            return self._enter(row)
        valid = self._generation[handle] == row.generation
        if not valid or self._table.deferred[handle] or not self._accept(row):
            return False
        self._enqueue(row.session, row)
        return True

    def resume(self, row: SingleRow) -> None:
        """The turn of a row has come that has waited in its session."""
        if row.reply_to.cancelled:
            self._drop(row)
        elif not self._enter(row):
            self._give_back(row, self._pay_one(row))

    def _accept(self, row: SingleRow) -> bool:
        """Lets a row wait, unless there is no room."""
        if not row.accepted:
            source = row.reply_to.source
            try:
                self._admission.check(1, source=source)
            except StepstateError:
                return False
            self._admission.count(1, 1, source=source)
            row.accepted = True
            self.accepted += 1
            row.reply_to.hold_row(row)
        return True

    def _enter(self, row: SingleRow) -> bool:
        """Puts a row into the next forward, if its session takes steps and it is the next row."""
        handle, t = row.session.handle, row.t
        if not self._awake:
            self._now = self._clock()
        row.at = at = self._t[handle]
        if (
            (t is not None and t != at)
            or self._generation[handle] != row.generation
            or self._expires_at[handle] <= self._now
            or (at - self._durable_t[handle] >= self._backlog_rows and self._saved_behind[handle])
            or (self._admission.draining and not row.accepted)
        ):
            return False
        self._busy[handle] = True
        self._arrived.append(row)
        if not self._awake:
            self._awake = True
            self._arrived_at = time.perf_counter()
            asyncio.get_running_loop().call_soon(self._run)
        return True

    def _run(self) -> None:
        """One forward, at the end of a round of the event loop."""
        try:
            rows = self._take()
            if rows:
                self._step(rows)
        finally:  # the next round comes whatever a delivery raises
            self._awake = bool(self._arrived or self._backlog.turns)
            if self._awake:
                self._arrived_at, self._now = time.perf_counter(), self._clock()
                asyncio.get_running_loop().call_soon(self._run)

    def _take(self) -> list[SingleRow]:
        """The rows of the next forward; those whose caller or session is gone leave here."""
        arrived, self._arrived = self._arrived, []
        rows = self._pay(arrived)
        if self._backlog.turns or len(rows) > self._batch_rows:
            rows = self._in_turn(rows)
        generation, draining = self._generation, self._admission.draining
        taken = []
        for row in rows:
            gone = row.reply_to.cancelled or generation[row.session.handle] != row.generation
            if gone or (draining and not row.accepted):
                self._leave(row)
            else:
                taken.append(row)
        return taken

    def _pay(self, rows: list[SingleRow]) -> list[SingleRow]:
        """The rows that their tenants may have by now; the others are refused in their place.

        Once for all rows of a tenant: most often one has sent them all.
        """
        if not rows:
            return rows
        tenants = [row.reply_to.source.tenant for row in rows]
        first = tenants[0]
        if tenants.count(first) == len(rows):
            granted = {first: first.rows.take_some(len(rows))}
            if granted[first] == len(rows):
                return rows
        else:
            counts = Counter(tenants)
            granted = {tenant: tenant.rows.take_some(count) for tenant, count in counts.items()}
        if sum(granted.values()) == len(rows):
            return rows
        paid: list[SingleRow] = []
        for row, tenant in zip(rows, tenants, strict=True):
            granted[tenant] -= 1
            error = None if granted[tenant] >= 0 else self._pay_one(row)
            if error is None:
                paid.append(row)
            else:
                self._leave(row, error)
        return paid

    def _pay_one(self, row: SingleRow) -> StepstateError | None:
        """Takes a row out of what its tenant may have; returns why it can't."""
        try:
            row.reply_to.source.tenant.rows.take(1)
        except StepstateError as error:
            return without_frames(error)
        return None

    def _in_turn(self, rows: Sequence[SingleRow]) -> list[SingleRow]:
        """As many rows as one forward takes, of their sources in turn; the others wait."""
        backlog = self._backlog
        for row in rows:
            if self._accept(row):
                row.reply_to.source.running += 1
                backlog.put(row.reply_to.source, row, 1)
            else:
                self._leave(row)
        taken: list[SingleRow] = []
        while backlog.turns and len(taken) < self._batch_rows:
            row, _ = backlog.first()
            row.reply_to.source.finished(1)
            taken.append(row)
            backlog.take()
        return taken

    def _step(self, rows: list[SingleRow]) -> None:
        """Applies rows of different sessions in one forward, and answers them."""
        x = np.frombuffer(bytearray().join([row.x for row in rows]), "<f4").reshape(len(rows), -1)
        if not math.isfinite(np.vdot(x, x)):
            finite = np.isfinite(x).all(axis=1)
            rows, x = self._only(rows, finite), x[finite]
            if not rows:
                return
        table, count = self._table, len(rows)
        handles = np.array([row.session.handle for row in rows])
        t = np.array([row.at for row in rows])
        slots, phase = table.slot_array[handles], table.phase_array[handles] + t
        started = time.perf_counter()
        try:
            result = self._engine.step_rows(RowColumns(x, slots, t, phase, None))
        except Exception:  # noqa: BLE001 - the ordinary way finds the row that raises, and logs it
            self._only(rows, np.zeros(count, np.bool_))
            return
        self._observer.microbatch([self._arrived_at] * count, started, time.perf_counter())
        y, finite = result.y, result.finite
        if finite is not None:
            rows, x, y = self._only(rows, finite), x[finite], y[finite]
            handles, slots, t = handles[finite], slots[finite], t[finite]
        if len(rows) == 1:
            self._committer.one(rows[0].session, rows[0].at, x[0], y[0])
        else:
            self._committer.many(handles, slots, t, x, y)
        self._answer(rows, handles, y)

    def _only(self, rows: Sequence[SingleRow], kept: NDArray[np.bool_]) -> list[SingleRow]:
        """Some of the rows [B]; the others go the ordinary way."""
        for place in np.flatnonzero(~kept).tolist():
            self._leave(rows[place])
        return [rows[place] for place in np.flatnonzero(kept).tolist()]

    def _answer(self, rows: Sequence[SingleRow], handles: NDArray[np.int64], y: Floats) -> None:
        """Delivers the outputs y [B, O] of applied rows, and starts what waits behind them."""
        table = self._table
        self._observer.applied(len(rows))
        table.busy_array[handles] = False
        durable = table.durable_t_array[handles].tolist()
        outputs, width, awaited = y.tobytes(), y.shape[1] * y.itemsize, table.awaited
        first = 0
        for row, durable_t in zip(rows, durable, strict=True):
            if row.accepted:
                self._settle(row)
            row.reply_to.deliver_row(row, outputs[first : first + width], durable_t)
            first += width
            if awaited[row.session.handle]:
                self._resume(row.session)

    def _leave(self, row: SingleRow, error: StepstateError | None = None) -> None:
        """A row that was to be in a forward is in none; `error`: why it is refused."""
        self._busy[row.session.handle] = False
        if row.reply_to.cancelled:
            self._drop(row)
        else:
            self._give_back(row, error)
        self._resume(row.session)

    def _drop(self, row: SingleRow) -> None:
        """Nobody waits for it: it is never applied."""
        if row.accepted:
            self._settle(row)
        self._observer.ended("cancelled")

    def _give_back(self, row: SingleRow, error: StepstateError | None = None) -> None:
        """Lets a row of a session that is not busy go the ordinary way, as a step in its place."""
        step = row.reply_to.step_of(row)
        if step is not None:
            step.error = error
            if self._admission.draining and not row.accepted:
                step.error = Draining()
            self._admission.count(1, 1, source=row.reply_to.source)
        if row.accepted:
            self._settle(row)
        if step is not None:
            row.session.scheduler.submit(step)

    def _settle(self, row: SingleRow) -> None:
        """A row that has waited is here no more; its outcome is delivered next."""
        self.accepted -= 1
        self._admission.settled(1, 1, source=row.reply_to.source)
