"""The micro-batcher: runs together whatever is queued, again and again.

Rule 1: only the engine touches the arena.
Rule 2: at most one piece of work a slot is inside the engine.
Rule 3: a piece of work changes its slot's state wholly, in one scatter, or not at all.
Rule 4: nothing waits for a timer. A turn takes all that is queued, up to the
        batch limit, as soon as a round of the loop brings no more; what arrives
        while it computes is the next turn's.

A turn is one micro-batch of single rows, then one chunk of the requests with
many rows, so that neither holds up the other. It runs on the event loop:
`docs/decisions.md` has the measurement against a worker thread, and `_turn` is
the one place that decides it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepstate.engine.batch import MicroBatch, PackedWork
from stepstate.engine.chunked import Chunk, ChunkedRequest, traced
from stepstate.engine.device_forward import place_states
from stepstate.engine.forecast.intervals import quantiles_of
from stepstate.engine.forecast.rollout import ForecastOrigins, HorizonForecast, Plan, Rollout
from stepstate.engine.forward import Forward, ForwardResult
from stepstate.engine.imputation import Imputer
from stepstate.engine.isolation import isolated
from stepstate.engine.layout import Layout
from stepstate.engine.network import Network, RowHistory
from stepstate.engine.precision import Precision
from stepstate.engine.tracking.scores import ScoreTotals
from stepstate.engine.tracking.tracker import ForecastQuality, Tracker
from stepstate.engine.work import CompletionSink, Floats, WorkItem
from stepstate.models import Model, Timeline

W = TypeVar("W", bound=WorkItem)


ROUNDS_TO_A_CHUNK = 4
"""Rounds of the loop; one without work takes some ten microseconds."""
MAX_ROWS_ONE_BY_ONE = 16
"""Of a request in one chunk: rows that need the forecast of the row before; about a millisecond."""
MAX_PLANS = 256
"""Horizons whose plans are kept: most clients ask for one, again and again."""


class Observer(Protocol):
    """Is told of every forward."""

    def microbatch(self, queued_at: Sequence[float], started: float, finished: float) -> None:
        """Single rows were stepped together; `time.perf_counter` seconds."""
        ...


class Engine(Generic[W]):
    """One model's arena, queue and forward.

    Args:
        model: the verified model.
        timeline: what depends on the time of its rows.
        owner: told how each piece of work ended.
        observer: told of every forward.
        capacity: slots of the arena.
        batch_rows: most single rows in one forward.
        chunk_rows: most rows of long requests in one turn.
        precision: what the weights are kept as.
        accelerator: where the cells' states are and single rows are stepped, as torch names it;
            None: the host. Long requests, `inspect`, forecasts and missing rows are the host's
            in any case, on copies of states, and models with lagged inputs are altogether.
    """

    def __init__(
        self,
        model: Model,
        timeline: Timeline,
        *,
        owner: CompletionSink[W],
        observer: Observer,
        capacity: int,
        batch_rows: int,
        chunk_rows: int,
        precision: Precision = Precision.FLOAT32,
        accelerator: str | None = None,
    ) -> None:
        manifest = self._manifest = model.manifest
        self._plans: dict[int, Plan] = {}
        self._network = Network(model, timeline, precision)
        self._stand_ins = Imputer(manifest, self._network)
        self._tracker = Tracker(manifest, manifest.tracking) if manifest.tracking else None
        self.layout = Layout(
            cell=self._network.state_width,
            history=manifest.history_rows,
            inputs=manifest.input_width,
            tracked=self._tracker.width if self._tracker else 0,
        )
        self.tally = self._tracker.tally() if self._tracker else ScoreTotals()
        self._arena, self._on_device = place_states(
            self._network, self.layout, self.blank(), capacity, accelerator
        )
        if self._on_device is not None:
            self._on_device.make_ready(batch_rows)
        self._forward = Forward(
            self._arena,
            self._network,
            self._on_device,
            stand_ins=self._stand_ins,
            tracker=self._tracker,
            tally=self.tally,
        )
        self._owner = owner
        self._observer = observer
        self._batch_rows = batch_rows
        self._chunk_rows = chunk_rows
        self._queue: deque[W] = deque()
        self._packs: deque[PackedWork] = deque()
        self._jobs: deque[ChunkedRequest[W]] = deque()
        self._awake = False
        self._rounds = 0
        self._seen = 1  # singles queued when a turn was last due

    @property
    def state_bytes(self) -> int:
        """Bytes of state held for open sessions."""
        return self._arena.used_bytes

    @property
    def used_slots(self) -> int:
        """Slots that are claimed."""
        return self._arena.used

    def claim(self) -> int:
        """Takes a slot, with zero state."""
        return self._arena.claim()

    def release(self, slot: int) -> None:
        """Gives back a slot that no queued work uses."""
        self._arena.release(slot)

    def blank(self, level: float | None = None) -> Floats:
        """The state [R] of a session without rows; `level` of its intervals, if not the model's."""
        tracked = self._tracker.blank(level) if self._tracker else np.zeros(0, np.float32)
        return self.layout.blank(tracked)

    def quality(self, slot: int, t: int) -> ForecastQuality | None:
        """What is tracked of the forecasts of the session in a slot, at t."""
        if self._tracker is None:
            return None
        return self._tracker.quality(self._arena.tracked(np.array([slot]))[0], t)

    def reset_accuracy(self, slot: int) -> None:
        """Forgets how good the forecasts of the session in a slot were; its intervals go on.

        Called between two turns, as `read_states` is.
        """
        if self._tracker is None:
            return
        slots = np.array([slot])
        parts = self._arena.tracked(slots)
        self._tracker.reset(parts[0])
        self._arena.write_tracked(slots, parts)

    def upgraded(self, state: Floats) -> Floats:
        """A state [R], made of one as snapshots up to version 2 have it; itself if it is none."""
        tracked_from = self.layout.tracked_from
        if self._tracker is None or len(state) != tracked_from + self._tracker.width_before:
            return state
        part = self._tracker.upgraded(state[tracked_from:])
        return np.concatenate((state[:tracked_from], part))

    def sound(self, state: Floats) -> bool:
        """Whether what a state [R] tracks can have come from here."""
        return self._tracker is None or self._tracker.sound(state[self.layout.tracked_from :])

    def read_states(self, slots: NDArray[np.int64]) -> Floats:
        """Copies of the states [B, R] in slots [B].

        Called between two turns, so each is the state after a whole piece of work (rule 3).
        """
        return self._arena.read(slots)

    def write_state(self, slot: int, state: Floats) -> None:
        """Puts a saved state [R] into a slot that no queued work uses."""
        self._arena.write(slot, state)

    def plan(self, horizon: int, given: NDArray[np.bool_]) -> Plan:
        """How to forecast K horizons; `given` [P, D]: what a scenario gives of the rows to come.

        Raises:
            ForecastImpossible: the model can't.
        """
        if len(given):
            return Plan(self._manifest, horizon, given)
        plan = self._plans.get(horizon)
        if plan is None:
            plan = Plan(self._manifest, horizon, given)
            if len(self._plans) < MAX_PLANS:
                self._plans[horizon] = plan
        return plan

    async def forecast(
        self, origins: ForecastOrigins, plan: Plan, scenario: Floats
    ) -> Sequence[HorizonForecast]:
        """Forecasts from copies of states, in pieces between the turns.

        Args:
            origins: B states, and where they stand.
            plan: how far to look.
            scenario: the rows to come [B, P, D]; NaN where the model's own forecast is meant.
        """
        rollout = Rollout(plan, self._network, self.layout, origins, scenario)
        for _ in rollout.run(self._chunk_rows):
            for _ in range(ROUNDS_TO_A_CHUNK):
                await asyncio.sleep(0)
        return rollout.outlooks

    def quantiles(
        self, outlook: HorizonForecast, levels: Sequence[float], states: Floats
    ) -> Floats:
        """The quantiles [B, K, Q] of forecasts from states [B, R]; NaN where none is known."""
        return quantiles_of(outlook, levels, self._tracker, self._parts(states))

    def interval_level(self, state: Floats) -> float | None:
        """The share of truths that a session's intervals are to cover; None: it tracks none."""
        if self._tracker is None:
            return None
        return self._tracker.level(self._parts(state[None])[0])

    def _parts(self, states: Floats) -> Floats:
        return states[:, self.layout.tracked_from :]

    def submit(self, work: W) -> None:
        """Queues work for the next turn."""
        work.queued_at = time.perf_counter()
        if work.single:
            self._queue.append(work)
        else:
            self._jobs.append(ChunkedRequest(work, self.layout, self._tracker))
        self._wake()

    def submit_pack(self, pack: PackedWork) -> None:
        """Queues a pack for the next turn."""
        self._packs.append(pack)
        self._wake()

    def _wake(self) -> None:
        if not self._awake:
            self._awake = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        if self._still_arriving():
            asyncio.get_running_loop().call_soon(self._turn)
            return
        try:
            with torch.inference_mode():
                batch = self._take()
                if batch is not None:
                    self._step(batch)
                if self._jobs and self._rested():
                    self._advance()
        finally:  # whatever an owner raises, the next turn comes
            if self._queue or self._packs or self._jobs:
                asyncio.get_running_loop().call_soon(self._turn)
            else:
                self._awake = False

    def _rested(self) -> bool:
        """Whether the loop went round often enough since the last chunk.

        A step on a stream takes about ten rounds from its arrival to its reply; with a
        chunk in each of them it would wait for ten chunks.
        """
        self._rounds = (self._rounds or ROUNDS_TO_A_CHUNK) - 1
        return self._rounds == ROUNDS_TO_A_CHUNK - 1

    def _still_arriving(self) -> bool:
        """Whether the loop's last round brought more singles, and the batch has room for others.

        Then the turn lets one more round go by: at 64 sessions forwards get twice as
        large for the price of a poll, and a session alone is not kept waiting.
        """
        queued = len(self._queue)
        arriving = self._seen < queued < self._batch_rows
        self._seen = queued if arriving else 1
        return arriving

    def _take(self) -> MicroBatch[W] | None:
        """Singles up to the limit, then packs: at least one, whatever the singles left."""
        works: list[W] = []
        queue = self._queue
        while queue and len(works) < self._batch_rows:
            work = queue.popleft()
            if work.cancelled:
                self._owner.dropped(work)
            else:
                works.append(work)
        packs = self._take_packs(self._batch_rows - len(works)) if self._packs else ()
        return MicroBatch(works, packs) if works or packs else None

    def _take_packs(self, room: int) -> list[PackedWork]:
        packs: list[PackedWork] = []
        while self._packs and (not packs or len(self._packs[0]) <= room):
            pack = self._packs.popleft()
            if pack.cancelled:
                pack.dropped()
            else:
                packs.append(pack)
                room -= len(pack)
        return packs

    def _step(self, batch: MicroBatch[W]) -> None:
        started = time.perf_counter()
        failed: dict[int, Exception] = {}
        places: Sequence[int] = range(len(batch))
        parts = isolated(
            places,
            lambda some: self._forward.step(batch.rows(some[0], some[-1] + 1)),
            failed.__setitem__,
        )
        if parts:
            self._observer.microbatch(batch.queued_at(), started, time.perf_counter())
        if len(parts) == 1 and not failed:
            self._settle(batch, parts[0][1], failed)
        else:
            self._settle(batch, self._together(len(batch), parts), failed)

    def _together(
        self, rows: int, parts: Sequence[tuple[Sequence[int], ForwardResult]]
    ) -> ForwardResult:
        """What became of a batch that went in parts; rows that are in none of them are not fine."""
        manifest = self._manifest
        x = np.full((rows, manifest.input_width), np.nan, np.float32)
        y = np.full((rows, manifest.output_width), np.nan, np.float32)
        fine = np.zeros(rows, np.bool_)
        for places, stepped in parts:
            here = slice(places[0], places[-1] + 1)
            x[here], y[here] = stepped.x, stepped.y
            fine[here] = True if stepped.fine is None else stepped.fine
        return ForwardResult(x, y, fine)

    def _settle(
        self, batch: MicroBatch[W], stepped: ForwardResult, failed: Mapping[int, Exception]
    ) -> None:
        works, y, fine = batch.works, stepped.y, stepped.fine
        if works and fine is None:
            self._owner.stepped(works, stepped.x[: len(works)], y[: len(works)])
        elif works and fine is not None:
            self._settle_some(works, stepped, fine, failed)
        first = len(works)
        for pack in batch.packs:
            last = first + len(pack)
            its = {place - first: failed[place] for place in failed if first <= place < last}
            pack.stepped(y[first:last], None if fine is None else fine[first:last], its)
            first = last

    def _settle_some(
        self,
        works: list[W],
        stepped: ForwardResult,
        fine: NDArray[np.bool_],
        failed: Mapping[int, Exception],
    ) -> None:
        good = np.flatnonzero(fine[: len(works)])
        if len(good):
            applied = [works[place] for place in good.tolist()]
            self._owner.stepped(applied, stepped.x[good], stepped.y[good])
        for place in np.flatnonzero(~fine[: len(works)]).tolist():
            if place in failed:
                self._owner.failed(works[place], failed[place])
            else:
                self._owner.overflowed(works[place])

    def _advance(self) -> None:
        """Runs one chunk of the long requests at the head of the line."""
        jobs = self._take_jobs()
        if not jobs:
            return
        self._run_chunk(jobs)
        for job in jobs:
            self._settle_job(job)

    def _settle_job(self, job: ChunkedRequest[W]) -> None:
        """Tells the outcome of a request that has one; the others wait for their next chunk."""
        if job.left and not job.over:
            self._jobs.append(job)
            return
        if not job.over:
            try:
                results = job.results()
                self._arena.write(job.work.slot, job.whole_state)
            except Exception as error:  # noqa: BLE001 - a surprise must not stop the loop
                job.error = error
        if job.error is not None:
            self._owner.failed(job.work, job.error)
        elif job.overflowed:
            self._owner.overflowed(job.work)
        else:
            self.tally.add(job.tally)
            self._owner.finished(job.work, *results)

    def _take_jobs(self) -> list[ChunkedRequest[W]]:
        """Takes as many as give a chunk a row each, all of one kind, leaving the cancelled out."""
        jobs: list[ChunkedRequest[W]] = []
        kind = self._jobs[0].kind
        for job in list(islice(self._jobs, self._chunk_rows)):
            if job.work.cancelled:
                self._jobs.remove(job)
                self._owner.dropped(job.work)
            elif job.kind == kind:
                self._jobs.remove(job)
                jobs.append(job)
        return jobs

    def _run_chunk(self, jobs: list[ChunkedRequest[W]]) -> None:
        """Runs the next rows of requests of one kind, none of which is over, on copies of states.

        What raises is the end of the request that it raises for.
        """
        for some, parts in isolated(jobs, self._computed, ChunkedRequest.fail):
            for job, part in zip(some, parts, strict=True):
                try:
                    job.take(part)
                except Exception as error:  # noqa: BLE001 - a surprise must not stop the loop
                    job.fail(error)

    def _computed(self, jobs: Sequence[ChunkedRequest[W]]) -> list[Chunk]:
        """What the next rows of requests give; they themselves are as they were."""
        for job in jobs:
            if not job.begun:
                state = self._arena.read(np.array([job.work.slot]))[0]
                job.begin(state, self._stand_ins.one_by_one)
        inspect = jobs[0].work.inspect
        rows = max(1, self._chunk_rows // len(jobs)) if not inspect else 1
        rows = min(rows, *(job.takes(MAX_ROWS_ONE_BY_ONE) for job in jobs))
        x = torch.from_numpy(np.stack([job.x[job.done : job.done + rows] for job in jobs]))
        phase = torch.stack([job.phases(rows) for job in jobs])
        states = torch.from_numpy(np.stack([job.cell for job in jobs]))
        past = self._past_of(jobs)
        trace: list[dict[str, Tensor]] | None = [] if inspect else None
        if any(job.work.missing_rows for job in jobs) and past is not None:
            impute = torch.tensor([job.work.impute for job in jobs])
            x, y, states = self._stand_ins.apply(x, phase, states, past, impute=impute, trace=trace)
        elif inspect:
            y, states = self._network.step(x[:, 0], phase[:, 0], states, past, trace)
            y = y[:, None]
        else:
            y, states = self._network.sequence(x, phase, states, past)
        return [
            Chunk(
                x[place].numpy(),
                y[place].numpy(),
                states[place].numpy(),
                traced(trace or (), place),
            )
            for place in range(len(jobs))
        ]

    def _past_of(self, jobs: Sequence[ChunkedRequest[W]]) -> RowHistory | None:
        if not self._network.lagged and not any(job.work.missing_rows for job in jobs):
            return None
        rows = torch.from_numpy(np.stack([job.past for job in jobs]))
        return RowHistory(rows, torch.tensor([job.at for job in jobs]))


def use_one_thread() -> None:
    """Keeps torch to the calling thread.

    The products of a step are too small to gain from more, and threads that
    wait for work by spinning take the core from the transport.
    """
    torch.set_num_threads(1)
