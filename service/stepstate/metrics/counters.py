"""What is counted, by plain integers.

Counting must cost well under a microsecond a step, so the hot path adds to plain integers, once
a micro-batch where it can. The event loop counts and the thread of a scrape reads: a scrape may see
a micro-batch half counted, never a wrong total later.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, product

from stepstate.errors import AUTH_CAUSES, REASONS

# From a single row on an idle server (about 0.1 ms) to a client's usual deadline.
SECONDS = (
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0,
)  # fmt: skip
# Below a millisecond the loop's own timers are not exact.
LAG_SECONDS = (0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
STAGES = ("queue", "compute", "total")
# Series exist from the start, at 0: `increase()` would not see the first event of a new one.
RESULTS = ("applied", "replayed", "refused", "cancelled", "failed")
END_REASONS = ("closed", "expired", "lost")
DELETION_REASONS = ("grace_over", "limit", "replaced")
NOT_SAVED = ("failed", "fenced")
RELOADS = ("applied", "refused")
# google.golang.org/grpc/codes, Code.String, as go-grpc-middleware labels them.
GRPC_CODES = (
    "OK", "Canceled", "Unknown", "InvalidArgument", "DeadlineExceeded", "NotFound",
    "AlreadyExists", "PermissionDenied", "ResourceExhausted", "FailedPrecondition", "Aborted",
    "OutOfRange", "Unimplemented", "Internal", "Unavailable", "DataLoss", "Unauthenticated",
)  # fmt: skip


CALL_KINDS = ("short", "long", "stream")
CALL_STATES = ("open", "waiting")


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


class ModelMetrics:
    """What happened to the steps and sessions of one model; the observer of its scheduler."""

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


class Metrics:
    """What happened in a server. It is the observer of its sessions and of its RPCs."""

    def __init__(self) -> None:
        self.models = defaultdict[tuple[str, str], ModelMetrics](ModelMetrics)
        """By name and version."""
        self.rpcs = defaultdict[tuple[str, str, str], RpcMetrics](RpcMetrics)
        """By kind, service and method."""
        self.peers = 0
        """Clients that have calls now."""
        self.calls = dict.fromkeys(product(CALL_KINDS, CALL_STATES), 0)
        """Calls now, by kind: open, and those of them that wait for their turn."""
        self.refusals = dict.fromkeys(REASONS, 0)
        self.auth_failures = dict.fromkeys(AUTH_CAUSES, 0)
        """Calls refused for their credential, by cause."""
        self.stale_credentials: Callable[[], Mapping[str, bool]] = dict
        """By source: whether it could not be read again, and what it was before is still used."""
        self.ends = dict.fromkeys(END_REASONS, 0)
        self.deletions = dict.fromkeys(DELETION_REASONS, 0)
        self.restorations = 0
        self.snapshots = 0
        self.snapshot_bytes = 0
        self.snapshot_seconds = Histogram(SECONDS)
        self.snapshot_failures = dict.fromkeys(NOT_SAVED, 0)
        self.reloads = dict.fromkeys(RELOADS, 0)
        self.reloaded_at = time.time()
        """Of the configuration in use, in Unix seconds; at first, when the server started."""
        self.loop_lag = Histogram(LAG_SECONDS)

    def model(self, name: str, version: str) -> ModelMetrics:
        """The counters of one model."""
        return self.models[name, version]

    def rpc(self, kind: str, service: str, method: str) -> RpcMetrics:
        """The counters of one RPC; kind as in go-grpc-middleware, "unary" to "bidi_stream"."""
        return self.rpcs[kind, service, method]

    def opened(self, model: str, version: str) -> None:
        """A session was opened."""
        self.model(model, version).opened += 1

    def refused(self, reason: str) -> None:
        """A request was answered with an error of Stepstate's."""
        self.refusals[reason] += 1

    def closed(self, reason: str) -> None:
        """A session ended."""
        self.ends[reason] += 1

    def deleted(self, reason: str, count: int) -> None:
        """Expired sessions were deleted."""
        self.deletions[reason] += count

    def expired_restored(self) -> None:
        """An expired session was restored."""
        self.restorations += 1

    def restarted(self, model: str, version: str) -> None:
        """A client of the Triton API restarted a sequence before it had ended."""
        self.model(model, version).sequences_restarted += 1

    def restored(self, model: str, version: str, *, taken_over: bool) -> None:
        """A session was loaded from the store; `taken_over`: from another server."""
        counters = self.model(model, version)
        counters.restores += 1
        counters.takeovers += taken_over

    def spilled(self, model: str, version: str) -> None:
        """A session left the arena for the store."""
        self.model(model, version).spills += 1

    def saved(self, count: int, size: int, seconds: float) -> None:
        """One group of snapshots was written: how many, and their bytes together."""
        self.snapshots += count
        self.snapshot_bytes += size
        self.snapshot_seconds.observe(seconds)

    def not_saved(self, reason: str, count: int) -> None:
        """Snapshots were not written: "fenced" or "failed"."""
        self.snapshot_failures[reason] += count

    def reloaded(self, result: str) -> None:
        """A reload of the configuration was "applied" or "refused"."""
        self.reloads[result] += 1
        if result == "applied":
            self.reloaded_at = time.time()
