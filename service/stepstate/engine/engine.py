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
import math
import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepstate.engine.arena import Arena
from stepstate.engine.jobs import Job
from stepstate.engine.network import Network
from stepstate.engine.work import Floats, Owner, Work
from stepstate.models import Model, Timeline

W = TypeVar("W", bound=Work)


class Observer(Protocol):
    """Is told of every forward."""

    def microbatch(self, queued_at: Sequence[float], started: float, finished: float) -> None:
        """Single rows were stepped together; `time.perf_counter` seconds."""
        ...


class Engine(Generic[W]):
    """One model's arena, queue and forward.

    Args:
        model: the verified model.
        timeline: its table of phases.
        owner: told how each piece of work ended.
        observer: told of every forward.
        capacity: slots of the arena.
        batch_rows: most single rows in one forward.
        chunk_rows: most rows of long requests in one turn.
    """

    def __init__(
        self,
        model: Model,
        timeline: Timeline,
        *,
        owner: Owner[W],
        observer: Observer,
        capacity: int,
        batch_rows: int,
        chunk_rows: int,
    ) -> None:
        self._network = Network(model, timeline)
        self._arena = Arena(capacity, self._network.state_width)
        self._phases = timeline.phases
        self._owner = owner
        self._observer = observer
        self._batch_rows = batch_rows
        self._chunk_rows = chunk_rows
        self._queue: deque[W] = deque()
        self._jobs: deque[Job[W]] = deque()
        self._awake = False
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

    @property
    def state_width(self) -> int:
        """R, the values of one state."""
        return self._network.state_width

    def read_states(self, slots: NDArray[np.int64]) -> Floats:
        """Copies of the states [B, R] in slots [B].

        Called between two turns, so each is the state after a whole piece of work (rule 3).
        """
        return self._arena.read(slots)

    def write_state(self, slot: int, state: Floats) -> None:
        """Puts a saved state [R] into a slot that no queued work uses."""
        self._arena.write(slot, state)

    def submit(self, work: W) -> None:
        """Queues work for the next turn."""
        work.queued_at = time.perf_counter()
        if work.single:
            self._queue.append(work)
        else:
            self._jobs.append(Job(work, self._phases))
        if not self._awake:
            self._awake = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        if self._still_arriving():
            asyncio.get_running_loop().call_soon(self._turn)
            return
        try:
            with torch.inference_mode():
                if batch := self._take():
                    self._step(batch)
                if self._jobs:
                    self._advance()
        finally:  # whatever an owner raises, the next turn comes
            if self._queue or self._jobs:
                asyncio.get_running_loop().call_soon(self._turn)
            else:
                self._awake = False

    def _still_arriving(self) -> bool:
        """Whether the loop's last round brought more singles, and the batch has room for others.

        Then the turn lets one more round go by: at 64 sessions forwards get twice as
        large for the price of a poll, and a session alone is not kept waiting.
        """
        queued = len(self._queue)
        arriving = self._seen < queued < self._batch_rows
        self._seen = queued if arriving else 1
        return arriving

    def _take(self) -> list[W]:
        batch: list[W] = []
        queue = self._queue
        while queue and len(batch) < self._batch_rows:
            work = queue.popleft()
            if work.cancelled:
                self._owner.dropped(work)
            else:
                batch.append(work)
        return batch

    def _step(self, batch: list[W]) -> None:
        started = time.perf_counter()
        try:
            rows = np.array([work.x for work in batch], np.float32)
            y = self._forward(batch, torch.from_numpy(rows))
        except Exception as error:  # noqa: BLE001 - a surprise must not stop the loop
            self._fail(batch, error)
            return
        finished = time.perf_counter()
        self._observer.microbatch([work.queued_at for work in batch], started, finished)
        if _finite(y):
            self._owner.stepped(batch, rows, y.numpy())
        else:
            self._settle_some(batch, rows, y)

    def _forward(self, batch: list[W], x: Tensor) -> Tensor:
        """Steps the batch; y's row is NaN where the state was not changed."""
        slots = torch.from_numpy(np.array([work.slot for work in batch]))
        phase = torch.from_numpy(np.array([work.phase for work in batch]))
        y, states = self._network.step(x, phase, self._arena.gather(slots))
        if _finite(y, states):
            self._arena.scatter(slots, states)
            return y
        good = y.isfinite().all(dim=1) & states.isfinite().all(dim=1)
        self._arena.scatter(slots[good], states[good])
        y[~good] = math.nan
        return y

    def _settle_some(self, batch: list[W], x: np.ndarray, y: Tensor) -> None:
        good = y.isfinite().all(dim=1).numpy()
        stepped = [work for work, fine in zip(batch, good, strict=True) if fine]
        if stepped:
            self._owner.stepped(stepped, x[good], y.numpy()[good])
        for work, fine in zip(batch, good, strict=True):
            if not fine:
                self._owner.overflowed(work)

    def _advance(self) -> None:
        """Runs one chunk of the long requests at the head of the line."""
        jobs = self._take_jobs()
        if not jobs:
            return
        try:
            self._run_chunk(jobs)
        except Exception as error:  # noqa: BLE001 - a surprise must not stop the loop
            self._fail([job.work for job in jobs], error)
            return
        for job in jobs:
            if job.overflowed:
                self._owner.overflowed(job.work)
            elif job.left:
                self._jobs.append(job)
            else:
                self._owner.finished(job.work, *job.results())

    def _take_jobs(self) -> list[Job[W]]:
        """Takes as many as give a chunk a row each, all of one kind, leaving the cancelled out."""
        jobs: list[Job[W]] = []
        inspect = self._jobs[0].work.inspect
        for job in list(islice(self._jobs, self._chunk_rows)):
            if job.work.cancelled:
                self._jobs.remove(job)
                self._owner.dropped(job.work)
            elif job.work.inspect == inspect:
                self._jobs.remove(job)
                jobs.append(job)
        return jobs

    def _run_chunk(self, jobs: list[Job[W]]) -> None:
        for job in jobs:
            if job.state is None:
                job.state = self._arena.gather(torch.tensor([job.work.slot]))[0]
        rows = min(max(1, self._chunk_rows // len(jobs)), *(job.left for job in jobs))
        x = torch.stack([job.x[job.done : job.done + rows] for job in jobs])
        phase = torch.stack([job.phases(rows) for job in jobs])
        states = torch.stack([job.state for job in jobs if job.state is not None])
        if jobs[0].work.inspect:
            rows, x, phase = 1, x[:, 0], phase[:, 0]
            trace: list[dict[str, Tensor]] = []
            y, states = self._network.step(x, phase, states, trace)
            y = y[:, None]
        else:
            trace = []
            y, states = self._network.sequence(x, phase, states)
        for place, job in enumerate(jobs):
            job.take(rows, y[place], states[place], trace, place)
            if not job.left and not job.overflowed:
                self._arena.scatter(torch.tensor([job.work.slot]), states[place : place + 1])

    def _fail(self, works: list[W], error: Exception) -> None:
        for work in works:
            self._owner.failed(work, error)


def use_one_thread() -> None:
    """Keeps torch to the calling thread.

    The products of a step are too small to gain from more, and threads that
    wait for work by spinning take the core from the transport.
    """
    torch.set_num_threads(1)


def _finite(*tensors: Tensor) -> bool:
    """Whether all values are finite: a sum is NaN or infinite as soon as one value is.

    A sum of finite values may overflow too; the exact look that follows then finds nothing.
    """
    return all(math.isfinite(tensor.sum().item()) for tensor in tensors)
