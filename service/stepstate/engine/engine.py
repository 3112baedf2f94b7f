"""The micro-batcher: runs together whatever is queued, again and again.

Rule 1: only the engine touches the arena.
Rule 2: the engine has at most one work item of a slot.
Rule 3: an item changes its slot's state as a whole, in one scatter, or not at all.
Rule 4: nothing waits for a timer. A turn takes all that is queued, up to the
        batch limit, as soon as a round of the event loop brings no more, or
        a few have; what arrives while it computes is for the next turn.
Rule 5: what is more than the limit is taken from its sources in turn (see
        `tenants.fair`). So a source with 10,000 waiting rows delays the row of another
        by one micro-batch, and one with 100 long requests gets no more rows of
        a chunk than one with a single one.

A turn is one micro-batch of single rows, then one chunk of the requests with
many rows, so that neither holds up the other. It runs on the event loop:
`docs/decisions.md` has the measurement against a worker thread, and `_turn` is
the one place that decides it.

B rows of different slots, D inputs, O outputs, R the width of a state, K horizons.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from stepstate.engine.accelerator import place_states
from stepstate.engine.arena import Layout
from stepstate.engine.chunked import Chunk, ChunkedRequest, compute_chunk
from stepstate.engine.fair import RequestQueue
from stepstate.engine.forecast.intervals import quantiles_of
from stepstate.engine.forecast.rollout import ForecastOrigins, HorizonForecast, Plan, Rollout
from stepstate.engine.forward import Forward, ForwardResult
from stepstate.engine.imputation import Imputer
from stepstate.engine.linear import Precision
from stepstate.engine.network import Network
from stepstate.engine.runtimes import Runtime, make_stepper
from stepstate.engine.tracking.scores import ScoreTotals
from stepstate.engine.tracking.tracker import ForecastQuality, Tracker
from stepstate.engine.work import CompletionSink, Floats, MicroBatch, P, RowColumns, W, WorkItem
from stepstate.models import Model, Timeline
from stepstate.tenants import FairQueue

ROUNDS_TO_WAIT = 4
"""Most rounds of the event loop in which a turn waits for more singles: rows of a flood that come a
few in each round, as its share is, would have all others wait for a full batch of them."""
ROUNDS_TO_A_CHUNK = 4
"""Rounds of the event loop; one without work takes some ten microseconds."""
MAX_PLANS = 256
"""Horizons whose plans are kept: most clients ask for the same one again and again."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How much an engine runs together, and on what."""

    capacity: int
    """Slots of the arena."""
    batch_rows: int
    """Most single rows in one forward."""
    chunk_rows: int
    """Most rows of long requests in one turn."""
    precision: Precision = Precision.FLOAT32
    """What the weights are kept as."""
    runtime: Runtime = Runtime.ONNX_RUNTIME
    """What computes single rows on the host; those of other precisions are torch's."""
    accelerator: str | None = None
    """Where the cells' states are and single rows are stepped, as torch names it; None: the host.
    Long requests, `inspect`, forecasts and missing rows always run on the host, on copies of
    states, and so does everything of a model with lagged inputs."""

    @property
    def used_runtime(self) -> Runtime:
        """What computes single rows on the host."""
        return self.runtime if self.precision is Precision.FLOAT32 else Runtime.TORCH


class Observer(Protocol):
    """Gets a call for every forward."""

    def microbatch(self, queued_at: Sequence[float], started: float, finished: float) -> None:
        """Single rows were stepped together; `time.perf_counter` seconds."""
        ...


class Engine(Generic[W, P]):
    """One model's arena, queue and forward.

    Args:
        model: the verified model.
        timeline: what depends on the time of its rows.
        settings: how much it runs together, and on what.
        sink: gets the outcome of each work item and pack.
        observer: gets the times of every forward.
    """

    def __init__(
        self,
        model: Model,
        timeline: Timeline,
        settings: EngineSettings,
        *,
        sink: CompletionSink[W, P],
        observer: Observer,
    ) -> None:
        manifest = self._manifest = model.manifest
        self._plans: dict[int, Plan] = {}
        self._network = Network(model, timeline, settings.precision)
        self._imputer = Imputer(manifest, self._network)
        self._tracker = Tracker(manifest, manifest.tracking) if manifest.tracking else None
        self.layout = Layout(
            cell=self._network.state_width,
            history=manifest.history_rows,
            inputs=manifest.input_width,
            tracked=self._tracker.width if self._tracker else 0,
        )
        self.score_totals = self._tracker.new_totals() if self._tracker else ScoreTotals()
        self._arena, self._on_device = place_states(
            self._network, self.layout, self.blank(), settings.capacity, settings.accelerator
        )
        if self._on_device is not None:
            self._on_device.make_ready(settings.batch_rows)
        self._forward = Forward(
            self._arena,
            self._network,
            make_stepper(model, self._network, settings.used_runtime),
            on_device=self._on_device,
            imputer=self._imputer,
            tracker=self._tracker,
            totals=self.score_totals,
        )
        self._sink = sink
        self._observer = observer
        self._batch_rows = settings.batch_rows
        self._chunk_rows = settings.chunk_rows
        self._queue: deque[W] = deque()
        self._packs: deque[P] = deque()
        self._backlog: FairQueue[W | P] = FairQueue()
        self._requests: RequestQueue[W] = RequestQueue()
        self._awake = False
        self._rounds = 0
        self._seen = 1  # singles queued when a turn was last due
        self._waited = 0  # rounds, for more singles

    @property
    def state_bytes(self) -> int:
        """Bytes of state held for open sessions."""
        return self._arena.used_bytes

    @property
    def used_slots(self) -> int:
        """Slots that are claimed."""
        return self._arena.used

    def claim(self) -> int:
        """Takes a free slot, with a blank state."""
        return self._arena.claim()

    def release(self, slot: int) -> None:
        """Gives back a slot that no queued work uses."""
        self._arena.release(slot)

    def blank(self, level: float | None = None) -> Floats:
        """The state [R] of a session without rows; `level` of its intervals, if not the model's."""
        tracked = self._tracker.blank(level) if self._tracker else np.zeros(0, np.float32)
        return self.layout.blank(tracked)

    def quality(self, slot: int, t: int) -> ForecastQuality | None:
        """The quality of the forecasts of the session in a slot, at t; None: not tracked."""
        if self._tracker is None:
            return None
        return self._tracker.quality(self._arena.tracked(np.array([slot]))[0], t)

    def reset_accuracy(self, slot: int) -> None:
        """Deletes the scores of the session in a slot; its interval widths stay.

        Called between two turns, as `read_states` is.
        """
        if self._tracker is None:
            return
        slots = np.array([slot])
        parts = self._arena.tracked(slots)
        self._tracker.reset(parts[0])
        self._arena.write_tracked(slots, parts)

    def upgraded(self, state: Floats) -> Floats:
        """Converts a state of a snapshot up to version 2 to [R]; returns any other unchanged."""
        tracked_from = self.layout.tracked_from
        if self._tracker is None or len(state) != tracked_from + self._tracker.old_width:
            return state
        part = self._tracker.upgraded(state[tracked_from:])
        return np.concatenate((state[:tracked_from], part))

    def is_valid(self, state: Floats, t: int) -> bool:
        """Whether the tracked part of a state [R] is one that the tracker writes in t rows."""
        part = state[self.layout.tracked_from :]
        return self._tracker is None or self._tracker.is_valid(part, t)

    def read_states(self, slots: NDArray[np.int64]) -> Floats:
        """Copies of the states [B, R] in slots [B].

        Called between two turns, so each is the state after a whole piece of work (rule 3).
        """
        return self._arena.read(slots)

    def write_state(self, slot: int, state: Floats) -> None:
        """Puts a saved state [R] into a slot that no queued work uses."""
        self._arena.write(slot, state)

    def plan(self, horizon: int, given: NDArray[np.bool_]) -> Plan:
        """How to forecast K horizons; `given` [P, D]: which values of future rows a scenario gives.

        Raises:
            ForecastImpossible: the model can't forecast so far.
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
            origins: B states, and their rows applied.
            plan: how far to forecast.
            scenario: the future rows [B, P, D]; NaN where the model's own forecast is used.

        Returns:
            One forecast for each output that the plan can reach.
        """
        rollout = Rollout(plan, self._network, self.layout, origins, scenario)
        for _ in rollout.run(self._chunk_rows):
            for _ in range(ROUNDS_TO_A_CHUNK):
                await asyncio.sleep(0)
        return rollout.forecasts

    def quantiles(
        self, forecast: HorizonForecast, levels: Sequence[float], states: Floats
    ) -> Floats:
        """The quantiles [B, K, Q] of forecasts from states [B, R]; NaN where they are unknown."""
        return quantiles_of(forecast, levels, self._tracker, self._tracked_parts(states))

    def interval_level(self, state: Floats) -> float | None:
        """The share of truths that a session's intervals should cover; None: not tracked."""
        if self._tracker is None:
            return None
        return self._tracker.level(self._tracked_parts(state[None])[0])

    def _tracked_parts(self, states: Floats) -> Floats:
        return states[:, self.layout.tracked_from :]

    def submit(self, work: W) -> None:
        """Queues work for the next turn."""
        work.queued_at = time.perf_counter()
        if work.single:
            self._queue.append(work)
        else:
            self._requests.put(ChunkedRequest(work, self.layout, self._tracker))
        self._wake()

    def step_rows(self, rows: RowColumns) -> ForwardResult:
        """Applies single rows of different slots now, in one forward without the queue.

        No other work of these slots may be in the engine (rule 2). A forward that raises has
        changed no state, and no other row is tried in its place: that is the caller's choice.
        """
        return self._forward.step(rows)

    def submit_pack(self, pack: P) -> None:
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
                if self._requests.kinds and self._chunk_due():
                    self._advance()
        finally:  # the next turn comes whatever the sink raises
            if self._queue or self._packs or self._backlog.turns or self._requests.kinds:
                asyncio.get_running_loop().call_soon(self._turn)
            else:
                self._awake = False

    def _chunk_due(self) -> bool:
        """Whether the event loop made enough rounds since the last chunk.

        A step on a stream takes about ten rounds from its arrival to its reply; with a
        chunk in each of them it would wait for ten chunks.
        """
        self._rounds = (self._rounds or ROUNDS_TO_A_CHUNK) - 1
        return self._rounds == ROUNDS_TO_A_CHUNK - 1

    def _still_arriving(self) -> bool:
        """Whether the loop's last round brought more singles, and the batch has room for others.

        Then the turn waits for one more round, a few times at most: at 64 sessions forwards get
        twice as large for the price of a poll, and a session alone never waits.
        """
        queued = len(self._queue)
        arriving = (
            self._seen < queued < self._batch_rows
            and not self._backlog.turns
            and self._waited < ROUNDS_TO_WAIT
        )
        self._seen = queued if arriving else 1
        self._waited = self._waited + 1 if arriving else 0
        return arriving

    def _take(self) -> MicroBatch[W, P] | None:
        """All singles and one pack, if that is all there is; else up to the limit, in turn."""
        if self._backlog.turns or len(self._queue) > self._batch_rows or len(self._packs) > 1:
            singles, packed = self._take_in_turn()
        else:
            singles, packed = list(self._queue), list(self._packs)
            self._queue.clear()
            self._packs.clear()
        works: list[W] = []
        for work in singles:
            if work.reply_to.cancelled:
                self._sink.dropped(work)
            else:
                works.append(work)
        packs: list[P] = []
        for pack in packed:
            if pack.reply_to.cancelled:
                self._sink.dropped_pack(pack)
            else:
                packs.append(pack)
        return MicroBatch(works, packs) if works or packs else None

    def _take_in_turn(self) -> tuple[list[W], list[P]]:
        """Singles and packs up to the limit; the first pack is taken however little room is left.

        What its caller does not wait for any more counts, so that a turn does not drop 10,000 rows.
        """
        backlog = self._backlog
        while self._queue:
            work = self._queue.popleft()
            backlog.put(work.reply_to.source, work, 1)
        while self._packs:
            pack = self._packs.popleft()
            backlog.put(pack.reply_to.source, pack, len(pack))
        works: list[W] = []
        packs: list[P] = []
        room = self._batch_rows
        while room > 0 and backlog.turns:
            item, rows = backlog.first()
            if isinstance(item, WorkItem):
                works.append(item)
            elif rows <= room or not packs:
                packs.append(item)
            else:
                break
            room -= rows
            backlog.take()
        return works, packs

    def _step(self, batch: MicroBatch[W, P]) -> None:
        started = time.perf_counter()
        failed: dict[int, Exception] = {}
        places: Sequence[int] = range(batch.size)
        parts = isolated(
            places,
            lambda some: self._forward.step(batch.rows(some[0], some[-1] + 1)),
            failed.__setitem__,
        )
        if parts:
            self._observer.microbatch(batch.queued_at, started, time.perf_counter())
        if len(parts) == 1 and not failed:
            self._report(batch, parts[0][1], failed)
        else:
            self._report(batch, self._joined(batch.size, parts), failed)

    def _joined(
        self, rows: int, parts: Sequence[tuple[Sequence[int], ForwardResult]]
    ) -> ForwardResult:
        """One result of a batch that ran in parts; rows that are in none of them are not finite."""
        manifest = self._manifest
        x = np.full((rows, manifest.input_width), np.nan, np.float32)
        y = np.full((rows, manifest.output_width), np.nan, np.float32)
        finite = np.zeros(rows, np.bool_)
        for places, result in parts:
            here = slice(places[0], places[-1] + 1)
            x[here], y[here] = result.x, result.y
            finite[here] = True if result.finite is None else result.finite
        return ForwardResult(x, y, finite)

    def _report(
        self, batch: MicroBatch[W, P], result: ForwardResult, failed: Mapping[int, Exception]
    ) -> None:
        """Gives the sink the outcome of a batch."""
        works, y, finite = batch.works, result.y, result.finite
        first = len(works)
        if works and finite is None:
            self._sink.stepped(works, result.x[:first], y[:first])
        elif works and finite is not None:
            self._report_some(works, result, finite[:first], failed)
        for pack in batch.packs:
            last = first + len(pack)
            errors = {place - first: failed[place] for place in failed if first <= place < last}
            here = None if finite is None else finite[first:last]
            self._sink.stepped_pack(pack, y[first:last], here, errors)
            first = last

    def _report_some(
        self,
        works: list[W],
        result: ForwardResult,
        finite: NDArray[np.bool_],
        failed: Mapping[int, Exception],
    ) -> None:
        applied = np.flatnonzero(finite)
        if len(applied):
            done = [works[place] for place in applied.tolist()]
            self._sink.stepped(done, result.x[applied], result.y[applied])
        for place in np.flatnonzero(~finite).tolist():
            if place in failed:
                self._sink.failed(works[place], failed[place])
            else:
                self._sink.overflowed(works[place])

    def _advance(self) -> None:
        """Runs one chunk of long requests.

        If some end early, the others go on with the rows that are left, once: requests with two
        rows must not keep others at two rows a chunk.
        """
        requests = self._take_requests()
        if not requests:
            return
        room = self._chunk_rows - self._run_chunk(requests, self._chunk_rows)
        going = [request for request in requests if not request.ended]
        if len(going) <= room and 0 < len(going) < len(requests):
            self._run_chunk(going, room)
        for request in requests:
            if not request.ended:
                self._requests.put(request)  # for its next chunk
        for request in requests:
            if request.ended:
                self._report_request(request)

    def _take_requests(self) -> list[ChunkedRequest[W]]:
        """Takes the requests of the next chunk, and drops the cancelled ones."""
        requests = []
        for request in self._requests.take(self._chunk_rows):
            if request.work.reply_to.cancelled:
                self._sink.dropped(request.work)
            else:
                requests.append(request)
        return requests

    def _run_chunk(self, requests: list[ChunkedRequest[W]], rows: int) -> int:
        """Runs the next rows of requests of one kind, on copies of their states.

        An exception ends the request that it is raised for.

        Args:
            requests: at least one.
            rows: most rows of all of them together, if that is one for each.

        Returns:
            How many rows it ran.
        """
        before = sum(request.done for request in requests)

        def compute(some: Sequence[ChunkedRequest[W]]) -> list[Chunk]:
            return self._compute(some, rows)

        for some, chunks in isolated(requests, compute, ChunkedRequest.fail):
            for request, chunk in zip(some, chunks, strict=True):
                try:
                    request.take(chunk)
                except Exception as error:  # noqa: BLE001 - a surprise must not stop the loop
                    request.fail(error)
        return sum(request.done for request in requests) - before

    def _compute(self, requests: Sequence[ChunkedRequest[W]], rows: int) -> list[Chunk]:
        for request in requests:
            if not request.begun:
                state = self._arena.read(np.array([request.work.slot]))[0]
                request.begin(state, self._imputer)
        return compute_chunk(requests, self._network, self._imputer, rows)

    def _report_request(self, request: ChunkedRequest[W]) -> None:
        """Writes the state of a request that is done, and gives the sink its outcome."""
        if not request.over:
            try:
                results = request.results()
                self._arena.write(request.work.slot, request.whole_state)
            except Exception as error:  # noqa: BLE001 - a surprise must not stop the loop
                request.fail(error)
        if request.error is not None:
            self._sink.failed(request.work, request.error)
        elif request.overflowed:
            self._sink.overflowed(request.work)
        else:
            self.score_totals.add(request.totals)
            self._sink.finished(request.work, *results)


def isolated(
    items: Sequence[T],
    run: Callable[[Sequence[T]], R],
    failed: Callable[[T, Exception], object],
) -> list[tuple[Sequence[T], R]]:
    """Runs items together; if that raises, each half of them, down to the single item that raises.

    So an exception of one item never reaches another one.

    Args:
        items: at least one.
        run: changes nothing when it raises.
        failed: called with each item that raises when it runs alone, and what it raised.

    Returns:
        The items that ran together, and what `run` returned for them.
    """
    try:
        return [(items, run(items))]
    except Exception as error:  # noqa: BLE001 - it is reported to the sender of the item
        if len(items) == 1:
            failed(items[0], error)
            return []
    middle = len(items) // 2
    return isolated(items[:middle], run, failed) + isolated(items[middle:], run, failed)


def use_one_thread() -> None:
    """Keeps torch to the calling thread.

    The products of a step are too small to gain from more, and threads that
    spin while they wait for work take the core from the transport.
    """
    torch.set_num_threads(1)
