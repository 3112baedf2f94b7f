"""The sessions layer wired by hand: real engine, fake clock, memory store, no sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from prometheus_client import CollectorRegistry

from stepstate.budget import MemoryAccount, MemoryBudget
from stepstate.engine import EngineSettings, use_one_thread
from stepstate.engine.tracking.tracker import Tracker
from stepstate.metrics import Metrics, MetricsCollector
from stepstate.models import Catalog, Manifest, Model
from stepstate.sessions import (
    Limits,
    OpenOptions,
    PackedStep,
    ResidentSession,
    RowBatch,
    SchedulerSettings,
    SessionService,
    Source,
    Step,
)
from stepstate.stores import Durability, MemoryStore, MissingPolicy, SessionStore, StoredSession
from tests.networks import Network, make_network

use_one_thread()  # as the server does

IDLE_SECONDS = 100.0
MAX_IDLE_SECONDS = 1000.0
GRACE_SECONDS = 10_000.0


class Clock:
    """Monotonic seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Caller:
    """A `ReplyTo`: keeps the one outcome it was given."""

    def __init__(self, source: Source | None = None) -> None:
        self.cancelled = False
        self.source = source or Source()
        self.deliveries = 0
        self._outcome: asyncio.Future[Step] = asyncio.get_running_loop().create_future()

    @property
    def answered(self) -> bool:
        return self._outcome.done()

    def deliver(self, step: Step) -> None:
        self.deliveries += 1
        if not self.answered:
            self._outcome.set_result(step)

    async def outcome(self) -> Step:
        """The step with its outcome; raises its error."""
        step = await asyncio.wait_for(self._outcome, 10)
        assert self.deliveries == 1
        if step.error is not None:
            raise step.error
        return step

    async def error(self) -> Exception | None:
        """The error of the outcome."""
        return (await asyncio.wait_for(self._outcome, 10)).error


class PackedCaller:
    """A `PackedReplyTo`: keeps the one outcome it was given."""

    def __init__(self, source: Source | None = None) -> None:
        self.cancelled = False
        self.source = source or Source()
        self._outcome: asyncio.Future[PackedStep] = asyncio.get_running_loop().create_future()

    def deliver_pack(self, pack: PackedStep) -> None:
        self._outcome.set_result(pack)

    async def outcome(self) -> PackedStep:
        """The rows with their outcome."""
        return await asyncio.wait_for(self._outcome, 10)


class Rig:
    """Sessions of some models, and short words for what tests do with them."""

    accelerator: str | None = None
    """Where all rigs step that are not told otherwise."""

    def __init__(
        self,
        *models: Model,
        store: SessionStore | None = None,
        max_sessions: int = 8,
        batch_rows: int = 256,
        chunk_rows: int = 128,
        replay_rows: int = 4,
        replay_bytes: int = 2**20,
        queued_requests: int = 1000,
        queued_rows: int = 100_000,
        backlog_rows: int = 1000,
        stored_sessions: int = 1000,
        owner: str = "here",
        accelerator: str | None = None,
        clock: Clock | None = None,
        unix_time: Callable[[], float] | None = None,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self.clock = clock if clock is not None else Clock()
        self.store = store if store is not None else MemoryStore(self.clock)
        durable = self.store.durable
        self.registry = CollectorRegistry()
        self.metrics = Metrics()
        self.memory = MemoryBudget(2**30)
        self.sessions = SessionService(
            Catalog(models),
            self.store,
            SchedulerSettings(
                EngineSettings(
                    capacity=max_sessions,
                    batch_rows=batch_rows,
                    chunk_rows=chunk_rows,
                    accelerator=accelerator or self.accelerator,
                ),
                replay_rows=replay_rows,
                replay_bytes=replay_bytes,
                replay_memory=MemoryAccount(self.memory),
                backlog_rows=backlog_rows,
            ),
            limits=Limits(
                queued_requests=queued_requests,
                queued_rows=queued_rows,
                default_idle_seconds=IDLE_SECONDS,
                max_idle_seconds=MAX_IDLE_SECONDS,
                expired_grace_seconds=grace_seconds,
                sessions=stored_sessions if durable else max_sessions,
                durability=Durability.ASYNC,
                durable=durable,
            ),
            owner=owner,
            clock=self.clock,
            unix_time=unix_time or self.clock,
            observer=self.metrics,
        )
        self.table = self.sessions.table
        self.registry.register(
            MetricsCollector(self.metrics, self.sessions, limits={}, memory=self.memory)
        )
        self.scheduler = self.sessions.schedulers[models[0].key]

    async def settle(self, *session_ids: str) -> None:
        """Waits until all that is on its way to these sessions has had its turn."""
        for session_id in session_ids:
            async with self.sessions.hold(session_id):
                pass

    def left_over(self) -> dict[str, int]:
        """What is still taken, of all that must be given back though no caller can see it."""
        sessions = self.sessions
        counts = {
            "queues": len(sessions._queues._queues),  # noqa: SLF001 - see above
            "requests": sessions._admission.queued_requests,  # noqa: SLF001
            "sessions being opened": sessions._lifecycle._opening,  # noqa: SLF001
            "rows": sessions.queued_rows,
            "slots": self.table.promised,
            "deferred handles": int(self.table.deferred_array.any()),
            "leaked slots": self._leaked(),
        }
        return {what: count for what, count in counts.items() if count}

    def _leaked(self) -> int:
        """Slots of all models, and handles, that are neither free nor a session's, or both."""
        table = self.table
        taken = [("table", session.handle) for session in table]
        taken += [("table", handle) for handle in table._free]  # noqa: SLF001 - see above
        for key, scheduler in self.sessions.schedulers.items():
            taken += [(key, one.slot) for one in table if one.scheduler is scheduler]
            taken += [(key, slot) for slot in scheduler.engine._arena._free]  # noqa: SLF001
        places = {
            (name, place)
            for name in ("table", *self.sessions.schedulers)
            for place in range(table.limit)
        }
        return len(taken) - len(set(taken)) + len(places.symmetric_difference(taken))

    @property
    def tracker(self) -> Tracker:
        """One like the engine's: it says where in a state what is."""
        manifest = self.scheduler.model.manifest
        return Tracker(manifest, manifest.tracking)

    @property
    def results(self) -> dict[str, int]:
        """How the steps of the first model ended, by result; without those at 0."""
        manifest = self.scheduler.model.manifest
        steps = self.metrics.model(manifest.name, manifest.version).steps
        return {result: count for result, count in steps.items() if count}

    async def open(self, session_id: str = "a", **options: object) -> ResidentSession:
        """Opens a session of the first model, unless told otherwise."""
        return await self.sessions.open(opening(session_id, **options))

    def send(
        self,
        session: ResidentSession,
        x: object,
        t: int | None = None,
        *,
        inspect: bool = False,
        last_only: bool = False,
        source: Source | None = None,
    ) -> Caller:
        """Submits rows x [T, D], by default from a source of their own, and goes on at once."""
        caller = Caller(source)
        self.sessions.submit(request(session, x, t, caller, inspect=inspect, last_only=last_only))
        return caller

    def send_pack(
        self, sessions: Sequence[ResidentSession], x: np.ndarray, source: Source | None = None
    ) -> PackedCaller:
        """Submits a row of each session, x [N, D], which all must take the fast path."""
        caller = PackedCaller(source)
        handles = np.array([session.handle for session in sessions])
        batch = RowBatch(handles, self.table.generation_array[handles], None, x)
        self.sessions.accept(len(x), len(x), source=caller.source)
        assert self.scheduler.submit_pack(batch, caller).all()
        return caller

    async def step(
        self, session: ResidentSession, x: object, t: int | None = None, **options: bool
    ) -> Step:
        """Submits rows and waits for their outcome."""
        return await self.send(session, x, t, **options).outcome()

    async def y(
        self, session: ResidentSession, x: object, t: int | None = None, **options: bool
    ) -> np.ndarray:
        """The outputs [T, O] of rows."""
        return outputs(await self.step(session, x, t, **options))


def request(
    session: ResidentSession,
    x: object,
    t: int | None,
    caller: Caller,
    *,
    inspect: bool = False,
    last_only: bool = False,
) -> Step:
    """A step as the transport makes it: a list where values are few, else an array."""
    array = np.atleast_2d(np.asarray(x, np.float32))
    flat = array.ravel()
    values = flat.tolist() if flat.size <= 64 else flat
    rows = len(array)
    step = Step(values, rows, inspect, last_only and rows > 1, caller, session, t, 0)
    step.missing_rows = int(np.isnan(array).any(axis=1).sum())
    step.impute = session is not None and session.record.missing is MissingPolicy.IMPUTE
    return step


def opening(
    session_id: str = "a",
    *,
    model: str = "",
    version: str = "",
    idle: float | None = None,
    start: object = None,
    durability: Durability | None = None,
    missing: str = "reject",
    level: float | None = None,
) -> OpenOptions:
    policy = MissingPolicy(missing)
    return OpenOptions(session_id, model, version, idle, start, durability, policy, level)


class Lasting(MemoryStore):
    """A store that outlives the rigs that share it, as a file would."""

    durable = True

    def stored(self, session_id: str) -> StoredSession | None:
        """What it has of a session; None where there is none, or it expired."""
        kept = self._sessions.get(session_id)
        return None if kept is None else kept.session

    def snapshot(self, session_id: str) -> bytes:
        return self._sessions[session_id].snapshot

    def overwrite(self, session_id: str, snapshot: bytes) -> None:
        """Puts bytes in the place of a session's snapshot, as damage would."""
        self._sessions[session_id].snapshot = snapshot

    def lose_all(self) -> None:
        self._sessions.clear()


def outputs(step: Step) -> np.ndarray:
    """y [T, O] of an outcome."""
    width = step.session.scheduler.model.manifest.output_width
    return np.frombuffer(step.y, "<f4").reshape(-1, width)


def model_of(network: Network, profiles: Mapping[str, np.ndarray] | None = None) -> Model:
    """A network as a loaded model, without files."""
    tensors = {name: np.ascontiguousarray(value) for name, value in network.tensors().items()}
    return Model(Manifest.model_validate(network.manifest), tensors | dict(profiles or {}))


def overflowing_network() -> Network:
    """A network whose state is infinite after x = HUGE, and finite after usual values."""
    network = make_network("overflowing", "rnn_relu", seed=7)
    network.manifest["inputs"][0]["scale"] = 1e-3
    return network


HUGE = [3e38, 0.0, 0.0]


def timed_network() -> tuple[Network, dict[str, np.ndarray]]:
    """A network with scaling, calendar, profiles and horizons, and the profiles' values."""
    network = make_network("timed", inputs=2 + 4 + 7, outputs=3, seed=8)
    rng = np.random.default_rng(8)
    profiles = {
        "day": rng.normal(100, 20, size=24).astype(np.float32),
        "five": rng.normal(-3, 1, size=5).astype(np.float32),
    }
    network.manifest.update(
        step_interval_seconds=3600,
        inputs=[
            {"name": "load", "profile": "day", "mean": 2.0, "scale": 20.0},
            {"name": "heat", "mean": -1.0, "scale": 0.5},
        ],
        calendar=[
            {"kind": "fourier", "period_seconds": 86_400, "harmonics": 2},
            {"kind": "day_of_week"},
        ],
        profiles={
            "day": {"period_steps": 24, "origin": "2024-03-01T05:00:00Z"},
            "five": {"period_steps": 5, "origin": "1969-12-31T22:00:00Z"},
        },
        outputs=[
            {"name": "load", "profile": "day", "mean": 1.0, "scale": 20.0, "horizons": [0, 3]},
            {"name": "odd", "profile": "five", "scale": -2.0, "horizons": [7]},
        ],
    )
    return network, profiles


def rows_of(network: Network, count: int, seed: int = 0) -> np.ndarray:
    """Random rows x [T, D] for a network."""
    width = len(network.manifest["inputs"])
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


async def rounds(count: int) -> None:
    """Lets the loop go round."""
    for _ in range(count):
        await asyncio.sleep(0)
