"""Every Prometheus series of the server.

Counting must cost well under a microsecond a step, so the hot path adds to
plain integers, once a micro-batch where it can, and a collector turns them into
samples when Prometheus asks. Labels are bounded: models, results, methods and
codes; never a session id. The event loop counts and the scrape thread reads:
a scrape may see a micro-batch half counted, never a wrong total later.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from stepstate import __version__
from stepstate.errors import REASONS

# From a single row on an idle server (about 0.1 ms) to a client's usual deadline.
SECONDS = (
    0.000_1,
    0.000_25,
    0.000_5,
    0.001,
    0.002_5,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
STAGES = ("queue", "compute", "total")
# Series exist from the start, at 0: `increase()` would not see the first event of a new one.
RESULTS = ("applied", "replayed", "refused", "cancelled", "failed")
END_REASONS = ("closed", "expired", "lost")
DELETION_REASONS = ("grace_over", "limit", "replaced")
NOT_SAVED = ("failed", "fenced")
SCORES = (
    ("scored", "s_scored", "Forecasts whose truth has come, primed rows too."),
    ("absolute_error", "_absolute_error", "Sum of their absolute errors, in the output's unit."),
    (
        "scaled",
        "s_scaled",
        "Those of them whose error could be scaled by that of the naive forecast.",
    ),
    (
        "scaled_error",
        "_scaled_error",
        "Sum of their absolute errors over the mean error of the (seasonal) naive forecast.",
    ),
    ("with_interval", "s_with_interval", "Those of them that had an interval."),
    (
        "outliers",
        "s_outliers",
        "Those of them whose error counts in the sums as 20 times the session's typical one only.",
    ),
    ("covered", "s_covered", "Those of them whose truth was in the interval."),
)
# google.golang.org/grpc/codes, Code.String, as go-grpc-middleware labels them.
GRPC_CODES = (
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
)


class Histogram:
    """Counts values by bucket; the last bucket has no upper bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts one value, as often as it came."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def observe_ages(self, since: Sequence[float], now: float) -> None:
        """Counts how long ago each of some moments was."""
        if len(since) == 1:
            self.observe(now - since[0])
            return
        bucket = bisect_left(self._bounds, now - max(since))
        if bucket == bisect_left(self._bounds, now - min(since)):
            self._counts[bucket] += len(since)
            self._sum += now * len(since) - sum(since)
            return
        for moment in since:  # they lie in several buckets
            self.observe(now - moment)

    @property
    def count(self) -> int:
        """Values counted."""
        return sum(self._counts)

    @property
    def total(self) -> float:
        """Their sum."""
        return self._sum

    def samples(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative buckets by upper bound, and the sum."""
        bounds = [*map(str, map(float, self._bounds)), "+Inf"]
        return list(zip(bounds, accumulate(self._counts), strict=True)), self._sum


class SchedulerGauges(Protocol):
    """What is read of a model's lane at each scrape."""

    @property
    def open_sessions(self) -> int:
        """Sessions that hold a slot."""
        ...

    @property
    def queued_rows(self) -> int:
        """Rows accepted and not yet answered."""
        ...

    @property
    def queued_requests(self) -> int:
        """Requests accepted and not yet answered."""
        ...

    @property
    def state_bytes(self) -> int:
        """Bytes of state."""
        ...

    @property
    def replay_bytes(self) -> int:
        """Bytes of remembered long replies."""
        ...

    @property
    def tally(self) -> ScoreTotalsView:
        """What was scored of the model's forecasts."""
        ...


class ScoreCounts(Protocol):
    """Sums over the scored forecasts of one output at one horizon."""

    output: str
    horizon: int
    scored: int
    absolute_error: float
    scaled: int
    scaled_error: float
    with_interval: int
    covered: int
    outliers: int


class ScoreTotalsView(Protocol):
    """What was scored of a model's forecasts."""

    alarms: int

    @property
    def scores(self) -> Sequence[ScoreCounts]:
        """By output and horizon; empty where the model tracks none."""
        ...


class DiskCounts(Protocol):
    """What a store's files take of their volume, in bytes."""

    @property
    def database(self) -> int:
        """The database."""
        ...

    @property
    def wal(self) -> int:
        """Its WAL."""
        ...

    @property
    def reserve(self) -> int:
        """Room that is kept."""
        ...

    @property
    def free(self) -> int:
        """Free."""
        ...

    @property
    def volume(self) -> int:
        """All of the volume."""
        ...


class StoreGauges(Protocol):
    """What is read of the sessions and their store at each scrape."""

    @property
    def store_up(self) -> bool:
        """Whether the store can be written."""
        ...

    @property
    def store_failures(self) -> Mapping[str, int]:
        """Calls of the store that failed, by cause."""
        ...

    @property
    def disk_usage(self) -> DiskCounts | None:
        """What the store takes of a disk of this machine; None: it has none."""
        ...

    @property
    def undurable_rows(self) -> int:
        """Rows of async sessions that are applied and not saved."""
        ...

    @property
    def expired(self) -> int:
        """Expired sessions that are kept."""
        ...

    @property
    def orphaned_sessions(self) -> int:
        """Stored sessions whose model is not loaded here."""
        ...

    @property
    def unreadable_sessions(self) -> int:
        """Stored sessions that can't be read."""
        ...

    def spilled(self, model_key: str) -> int:
        """Open sessions of a model that are not resident here."""
        ...


class ModelMetrics:
    """What happened to the steps of one model; a `SchedulerObserver`."""

    def __init__(self) -> None:
        self.steps = dict.fromkeys(RESULTS, 0)
        self.seconds = {stage: Histogram(SECONDS) for stage in STAGES}
        self.rows = Histogram(ROWS)
        self.opened = 0
        self.spills = 0
        self.restores = 0
        self.takeovers = 0
        self.sequences_restarted = 0
        self.last_applied_at = 0.0
        """Unix seconds; 0: never."""
        self.scheduler: SchedulerGauges | None = None

    def microbatch(self, queued_at: Sequence[float], started: float, finished: float) -> None:
        """Single rows were stepped together; `time.perf_counter` seconds."""
        self.rows.observe(len(queued_at))
        self.seconds["compute"].observe(finished - started, len(queued_at))
        self.seconds["queue"].observe_ages(queued_at, started)
        self.seconds["total"].observe_ages(queued_at, finished)

    def applied(self, rows: int) -> None:
        """Rows were applied."""
        self.steps["applied"] += rows
        self.last_applied_at = time.time()

    def ended(self, result: str, times: int = 1) -> None:
        """Requests ended otherwise."""
        self.steps[result] += times


class RpcMetrics:
    """What happened to the calls of one RPC."""

    def __init__(self) -> None:
        self.started = 0
        self.received = 0
        self.sent = 0
        self.handled = dict.fromkeys(GRPC_CODES, 0)
        self.seconds = Histogram(SECONDS)


class Metrics(Collector):
    """All series of a server, in one registry.

    Args:
        registry: where they are registered.
        limits: the bounds that the server keeps, by what they bound.
    """

    def __init__(self, registry: CollectorRegistry, *, limits: Mapping[str, float]) -> None:
        self._limits = limits
        self.skipped_models = 0
        self._models: dict[tuple[str, str], ModelMetrics] = {}
        self._rpcs: dict[tuple[str, str, str], RpcMetrics] = {}
        self._closed = dict.fromkeys(END_REASONS, 0)
        self._deleted = dict.fromkeys(DELETION_REASONS, 0)
        self._expired_restored = 0
        self._not_saved = dict.fromkeys(NOT_SAVED, 0)
        self._saved = 0
        self._saved_bytes = 0
        self._save_seconds = Histogram(SECONDS)
        self.store: StoreGauges | None = None
        self._refused = dict.fromkeys(REASONS, 0)
        registry.register(self)

    def model(self, name: str, version: str) -> ModelMetrics:
        """The counters of one model."""
        return self._models.setdefault((name, version), ModelMetrics())

    def rpc(self, kind: str, service: str, method: str) -> RpcMetrics:
        """The counters of one RPC; kind as in go-grpc-middleware, "unary" to "bidi_stream"."""
        return self._rpcs.setdefault((kind, service, method), RpcMetrics())

    def opened(self, model: str, version: str) -> None:
        """A session was opened."""
        self.model(model, version).opened += 1

    def refused(self, reason: str) -> None:
        """A request was answered with an error of Stepstate's."""
        self._refused[reason] += 1

    def closed(self, reason: str) -> None:
        """A session ended."""
        self._closed[reason] += 1

    def deleted(self, reason: str, count: int) -> None:
        """Expired sessions were deleted."""
        self._deleted[reason] += count

    def expired_restored(self) -> None:
        """An expired session was restored."""
        self._expired_restored += 1

    def restarted(self, model: str, version: str) -> None:
        """A client of the Triton door began a sequence anew before it had ended."""
        self.model(model, version).sequences_restarted += 1

    def restored(self, model: str, version: str, *, taken_over: bool) -> None:
        """A session came from the store; perhaps from another server."""
        counters = self.model(model, version)
        counters.restores += 1
        counters.takeovers += taken_over

    def spilled(self, model: str, version: str) -> None:
        """A session left the arena for the store."""
        self.model(model, version).spills += 1

    def saved(self, count: int, size: int, seconds: float) -> None:
        """Snapshots of so many sessions, of so many bytes, were written together."""
        self._saved += count
        self._saved_bytes += size
        self._save_seconds.observe(seconds)

    def not_saved(self, reason: str, count: int) -> None:
        """Snapshots were refused (fenced), or could not be written (failed)."""
        self._not_saved[reason] += count

    def collect(self) -> Iterable[Metric]:
        """All samples, for a scrape."""
        yield from self._of_build()
        yield from self._of_catalog()
        yield from self._of_models()
        yield from self._of_forecasts()
        yield from self._of_sessions()
        yield from self._of_residency()
        yield from self._of_snapshots()
        yield from self._of_rpcs()

    def _of_build(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "stepstate_build_info", "1, with the server's version.", labels=["version"]
        )
        family.add_metric([__version__], 1)
        yield family
        limits = GaugeMetricFamily(
            "stepstate_limit", "The server's bounds, as it was started.", labels=["of"]
        )
        for name, value in self._limits.items():
            limits.add_metric([name], value)
        yield limits

    def _of_catalog(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "stepstate_models",
            "Models in the server's folder: loaded, or skipped because they can't be served.",
            labels=["state"],
        )
        family.add_metric(["loaded"], len(self._models))
        family.add_metric(["skipped"], self.skipped_models)
        yield family

    def _of_models(self) -> Iterator[Metric]:
        labels = ["model", "version"]
        steps = CounterMetricFamily(
            "stepstate_steps",
            "Rows applied (result=applied), and requests that ended otherwise: replayed (answered "
            "again from the replay window), refused (its t, or a result beyond float32), "
            "cancelled, failed. Requests that never got so far are in "
            "stepstate_requests_refused_total only.",
            labels=[*labels, "result"],
        )
        seconds = HistogramMetricFamily(
            "stepstate_step_seconds",
            "Time of single-row steps: waiting for a micro-batch, in its forward, and both.",
            labels=[*labels, "stage"],
        )
        rows = HistogramMetricFamily(
            "stepstate_microbatch_rows", "Single rows stepped in one forward.", labels=labels
        )
        for key, model in list(self._models.items()):
            for result, count in list(model.steps.items()):
                steps.add_metric([*key, result], count)
            for stage, histogram in model.seconds.items():
                seconds.add_metric([*key, stage], *histogram.samples())
            rows.add_metric(key, *model.rows.samples())
        yield from (steps, seconds, rows)

    def _of_forecasts(self) -> Iterator[Metric]:
        labels = ["model", "version", "output", "horizon"]
        families = [
            (attribute, CounterMetricFamily(f"stepstate_forecast{name}", text, labels=labels))
            for attribute, name, text in SCORES
        ]
        alarms = CounterMetricFamily(
            "stepstate_drift_alarms",
            "Alarms that a session's forecasts have become worse, by its model's drift test.",
            labels=labels[:2],
        )
        for key, model in list(self._models.items()):
            tally = model.scheduler.tally if model.scheduler is not None else None
            for score in tally.scores if tally is not None else ():
                for attribute, family in families:
                    where = [*key, score.output, str(score.horizon)]
                    family.add_metric(where, getattr(score, attribute))
            if tally is not None and tally.scores:
                alarms.add_metric(key, tally.alarms)
        yield from (family for _, family in families)
        yield alarms

    def _of_sessions(self) -> Iterator[Metric]:
        labels = ["model", "version"]
        opened = CounterMetricFamily("stepstate_sessions_opened", "Sessions opened.", labels=labels)
        for key, model in list(self._models.items()):
            opened.add_metric(key, model.opened)
        closed = CounterMetricFamily(
            "stepstate_sessions_closed", "Sessions that ended, by reason.", labels=["reason"]
        )
        for reason, count in list(self._closed.items()):
            closed.add_metric([reason], count)
        yield from self._of_expired()
        refused = CounterMetricFamily(
            "stepstate_requests_refused",
            "Requests answered with an error, in band ones too, by ErrorInfo reason.",
            labels=["reason"],
        )
        for reason, count in list(self._refused.items()):
            refused.add_metric([reason], count)
        yield from (opened, closed, refused)
        sessions = GaugeMetricFamily(
            "stepstate_sessions",
            "Open sessions, by where their state is; spilled: in the store, or on another server, "
            "by a count that is some seconds old.",
            labels=[*labels, "residency"],
        )
        queue = GaugeMetricFamily(
            "stepstate_queue_rows", "Rows accepted and not yet answered.", labels=labels
        )
        requests = GaugeMetricFamily(
            "stepstate_queue_requests", "Requests accepted and not yet answered.", labels=labels
        )
        state = GaugeMetricFamily(
            "stepstate_state_bytes",
            "Bytes of state of resident sessions: h, c, past rows and what is tracked.",
            labels=labels,
        )
        replay = GaugeMetricFamily(
            "stepstate_replay_bytes",
            "Bytes of remembered replies with many rows or layers, bounded by --replay-bytes.",
            labels=labels,
        )
        for key, model in list(self._models.items()):
            if model.scheduler is not None:
                sessions.add_metric([*key, "resident"], model.scheduler.open_sessions)
                if self.store is not None:
                    sessions.add_metric([*key, "spilled"], self.store.spilled("/".join(key)))
                queue.add_metric(key, model.scheduler.queued_rows)
                requests.add_metric(key, model.scheduler.queued_requests)
                state.add_metric(key, model.scheduler.state_bytes)
                replay.add_metric(key, model.scheduler.replay_bytes)
        yield from (sessions, queue, requests, state, replay)

    def _of_expired(self) -> Iterator[Metric]:
        if self.store is not None:
            yield GaugeMetricFamily(
                "stepstate_expired_sessions",
                "Expired sessions that are kept and can be restored, by a count that is some "
                "seconds old.",
                value=self.store.expired,
            )
        deleted = CounterMetricFamily(
            "stepstate_expired_sessions_deleted",
            "Expired sessions that were deleted: --expired-grace was over (grace_over), "
            "--max-sessions were kept (limit), or the id was opened anew (replaced).",
            labels=["reason"],
        )
        for reason, count in list(self._deleted.items()):
            deleted.add_metric([reason], count)
        yield deleted
        yield CounterMetricFamily(
            "stepstate_expired_sessions_restored",
            "Expired sessions that were restored on request.",
            value=self._expired_restored,
        )

    def _of_residency(self) -> Iterator[Metric]:
        labels = ["model", "version"]
        spills = CounterMetricFamily(
            "stepstate_session_spills", "Sessions sent from memory to the store.", labels=labels
        )
        restores = CounterMetricFamily(
            "stepstate_session_restores",
            "Sessions loaded from the store: after a spill, a restart, or from another server.",
            labels=labels,
        )
        takeovers = CounterMetricFamily(
            "stepstate_session_takeovers",
            "Restored sessions whose lease another server held, or this one before it crashed.",
            labels=labels,
        )
        restarted = CounterMetricFamily(
            "stepstate_sequences_restarted",
            "Sessions closed because a client of the Triton API began their sequence anew.",
            labels=labels,
        )
        for key, model in list(self._models.items()):
            restarted.add_metric(key, model.sequences_restarted)
            spills.add_metric(key, model.spills)
            restores.add_metric(key, model.restores)
            takeovers.add_metric(key, model.takeovers)
        yield from (spills, restores, takeovers, restarted)

    def _of_snapshots(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "stepstate_snapshots", "Snapshots written to the store.", value=self._saved
        )
        yield CounterMetricFamily(
            "stepstate_snapshot_bytes", "Bytes of snapshots written.", value=self._saved_bytes
        )
        seconds = HistogramMetricFamily(
            "stepstate_snapshot_seconds", "Time to write a group of snapshots."
        )
        seconds.add_metric([], *self._save_seconds.samples())
        yield seconds
        failures = CounterMetricFamily(
            "stepstate_snapshot_failures",
            "Snapshots not written: the store was away (failed), or another server had the "
            "session (fenced).",
            labels=["reason"],
        )
        for reason, count in list(self._not_saved.items()):
            failures.add_metric([reason], count)
        yield failures
        if self.store is not None:
            yield GaugeMetricFamily(
                "stepstate_snapshot_backlog_rows",
                "Rows of async sessions that are applied and not saved.",
                value=self.store.undurable_rows,
            )
            yield GaugeMetricFamily(
                "stepstate_sessions_orphaned",
                "Sessions in the store whose model is not loaded here, or is another one by now; "
                "counted at start and every ten minutes. They can be closed.",
                value=self.store.orphaned_sessions,
            )
            yield GaugeMetricFamily(
                "stepstate_sessions_unreadable",
                "Sessions in the store that can't be read, as far as they were met. "
                "They can be closed.",
                value=self.store.unreadable_sessions,
            )
            yield GaugeMetricFamily(
                "stepstate_store_up",
                "1 if the store can be written, 0 if it is away, full or a replica.",
                value=self.store.store_up,
            )
            away = CounterMetricFamily(
                "stepstate_store_failures",
                "Calls of the store that failed, by cause: Redis's error codes, SQLite's or the "
                "network's.",
                labels=["cause"],
            )
            for cause, count in list(self.store.store_failures.items()):
                away.add_metric([cause], count)
            yield away
            yield from self._of_disk(self.store.disk_usage)

    def _of_disk(self, usage: DiskCounts | None) -> Iterator[Metric]:
        files = GaugeMetricFamily(
            "stepstate_store_file_bytes",
            "Files of the sqlite store: database, wal (written and not yet copied into it), and "
            "reserve (room kept to copy it when the disk is full).",
            labels=["file"],
        )
        free = GaugeMetricFamily(
            "stepstate_store_free_bytes", "Free on the volume of the sqlite store.", labels=[]
        )
        volume = GaugeMetricFamily(
            "stepstate_store_volume_bytes", "Size of the volume of the sqlite store.", labels=[]
        )
        if usage is not None:
            files.add_metric(["database"], usage.database)
            files.add_metric(["wal"], usage.wal)
            files.add_metric(["reserve"], usage.reserve)
            free.add_metric([], usage.free)
            volume.add_metric([], usage.volume)
        yield from (files, free, volume)

    def _of_rpcs(self) -> Iterator[Metric]:
        labels = ["grpc_type", "grpc_service", "grpc_method"]
        started = CounterMetricFamily("grpc_server_started", "RPCs started.", labels=labels)
        handled = CounterMetricFamily(
            "grpc_server_handled", "RPCs completed, by code.", labels=[*labels, "grpc_code"]
        )
        received = CounterMetricFamily(
            "grpc_server_msg_received", "Messages received from clients.", labels=labels
        )
        sent = CounterMetricFamily(
            "grpc_server_msg_sent", "Messages sent to clients.", labels=labels
        )
        seconds = HistogramMetricFamily(
            "grpc_server_handling_seconds", "Time from start to end of an RPC.", labels=labels
        )
        for key, rpc in list(self._rpcs.items()):
            started.add_metric(key, rpc.started)
            for code, count in list(rpc.handled.items()):
                handled.add_metric([*key, code], count)
            received.add_metric(key, rpc.received)
            sent.add_metric(key, rpc.sent)
            seconds.add_metric(key, *rpc.seconds.samples())
        yield from (started, handled, received, sent, seconds)
