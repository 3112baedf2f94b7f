"""Every Prometheus series of the server, as one table.

Labels are bounded: models, results, methods, codes; never a session id. A series whose labels are
known in advance has all its samples from the start, at 0: `increase()` would not see the first
event of a new one.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from stepstate import __version__
from stepstate.budget import MemoryBudget
from stepstate.engine.tracking.scores import Score
from stepstate.logging import AUDIT_DROPPED, DROPPED
from stepstate.metrics.counters import Histogram, Metrics, ModelMetrics, RpcMetrics
from stepstate.sessions import SessionService, StepScheduler
from stepstate.stores import DiskUsage
from stepstate.tenants import LIMITS, TenantTable, TenantTotals
from stepstate.tls import ServerTls

log = logging.getLogger(__name__)

Value = float | Histogram
Samples = Iterable[tuple[Sequence[str], Value]]
"""The values of the labels, and the value, of each sample."""
SeriesType = Literal["counter", "gauge", "histogram"]


class MetricsCollector(Collector):
    """Reads all series when Prometheus scrapes.

    Args:
        counters: what was counted.
        sessions: what is measured at each scrape.
        limits: the bounds that the server keeps, by what they bound.
        memory: what clients make the server hold.
        skipped_models: models in its folder that can't be served.
        tls: of its ports; None: plain text.
        tenants: what each of them uses.
    """

    def __init__(
        self,
        counters: Metrics,
        sessions: SessionService,
        *,
        limits: Mapping[str, float],
        memory: MemoryBudget,
        skipped_models: int = 0,
        tls: ServerTls | None = None,
        tenants: TenantTable | None = None,
    ) -> None:
        self.counters = counters
        self.sessions = sessions
        self.limits = limits
        self.memory = memory
        self.skipped_models = skipped_models
        self.tls = tls
        self.tenants = tenants or TenantTable()
        self.failures = 0
        """Series that could not be read."""

    def collect(self) -> Iterator[Metric]:
        """All series with their samples; those that can't be read now, without any."""
        for series in SERIES:
            try:
                family = _family(series, series.read(self))
            except Exception:
                log.exception("a series can't be read", extra={"series": series.name})
                self.failures += 1
                family = _family(series, ())
            yield family


Read = Callable[[MetricsCollector], Samples]


@dataclass(frozen=True, slots=True)
class Series:
    """One series: name, type, labels and help as Prometheus shows them, and how it is read."""

    name: str
    type: SeriesType
    labels: tuple[str, ...]
    read: Read
    help: str


def _family(series: Series, samples: Samples) -> Metric:
    histograms = HistogramMetricFamily(series.name, series.help, labels=series.labels)
    make = CounterMetricFamily if series.type == "counter" else GaugeMetricFamily
    numbers = make(series.name, series.help, labels=series.labels)
    for labels, value in samples:
        texts = [_encodable(label) for label in labels]
        if isinstance(value, Histogram):
            histograms.add_metric(texts, *value.samples())
        else:
            numbers.add_metric(texts, float(value))
    return histograms if series.type == "histogram" else numbers


def _encodable(label: str) -> str:
    """A label as text that can be encoded, whatever a damaged record had."""
    return str(label).encode("utf-8", "backslashreplace").decode()


def _one(value: Callable[[MetricsCollector], Value]) -> Read:
    """A series without labels."""
    return lambda source: [((), value(source))]


def _by(values: Callable[[MetricsCollector], Mapping[str, float]]) -> Read:
    """A series with one label."""
    return lambda source: [((label,), value) for label, value in list(values(source).items())]


def _model(value: Callable[[ModelMetrics], Value]) -> Read:
    """A series of each model."""
    return lambda source: [(key, value(one)) for key, one in list(source.counters.models.items())]


def _model_by(values: Callable[[ModelMetrics], Mapping[str, Value]]) -> Read:
    """A series of each model with one more label."""
    return lambda source: [
        ((*key, label), value)
        for key, model in list(source.counters.models.items())
        for label, value in list(values(model).items())
    ]


def _rpc(value: Callable[[RpcMetrics], Value]) -> Read:
    """A series of each RPC."""
    return lambda source: [(key, value(one)) for key, one in list(source.counters.rpcs.items())]


def _rpc_by_code(source: MetricsCollector) -> Samples:
    for key, rpc in list(source.counters.rpcs.items()):
        yield from (((*key, code), count) for code, count in list(rpc.handled.items()))


def _scheduler(value: Callable[[StepScheduler], float]) -> Read:
    """A series of each model, measured now."""
    return lambda source: [(_key(one), value(one)) for one in source.sessions.schedulers.values()]


def _key(scheduler: StepScheduler) -> tuple[str, str]:
    manifest = scheduler.model.manifest
    return manifest.name, manifest.version


def _sessions(source: MetricsCollector) -> Samples:
    for key, scheduler in source.sessions.schedulers.items():
        yield (*_key(scheduler), "resident"), scheduler.open_sessions
        yield (*_key(scheduler), "spilled"), source.sessions.spilled(key)


def _scores(value: Callable[[Score], float]) -> Read:
    """A series of each tracked output and horizon."""
    return lambda source: [
        ((*_key(scheduler), score.output, str(score.horizon)), value(score))
        for scheduler in source.sessions.schedulers.values()
        for score in scheduler.engine.score_totals.scores
    ]


def _alarms(source: MetricsCollector) -> Samples:
    for scheduler in source.sessions.schedulers.values():
        totals = scheduler.engine.score_totals
        if totals.scores:
            yield _key(scheduler), totals.alarms


def _disk(value: Callable[[DiskUsage], float]) -> Read:
    """A series of stores that have files."""

    def read(source: MetricsCollector) -> Samples:
        usage = source.sessions.disk_usage
        return [] if usage is None else [((), value(usage))]

    return read


def _files(source: MetricsCollector) -> Samples:
    usage = source.sessions.disk_usage
    if usage is not None:
        yield ("database",), usage.database
        yield ("wal",), usage.wal
        yield ("reserve",), usage.reserve


def _tls(value: Callable[[ServerTls], float]) -> Read:
    """A series of servers with TLS."""
    return lambda source: [] if source.tls is None else [((), value(source.tls))]


def _tenants(value: Callable[[TenantTotals], float]) -> Read:
    """A series of each tenant that has one of its own, and of all others together."""
    return lambda source: [((label,), value(one)) for label, one in source.tenants.totals().items()]


def _tenant_sessions(source: MetricsCollector) -> Samples:
    sessions = dict.fromkeys((tenant.label for tenant in source.tenants), 0)
    for name, count in source.sessions.open_by_tenant.items():
        label = source.tenants.peek(name).label
        sessions[label] = sessions.get(label, 0) + count
    return [((label,), count) for label, count in sessions.items()]


def _tenant_uses(limits: Sequence[str]) -> Read:
    """What the tenants have now, by the names of limits."""

    def read(source: MetricsCollector) -> Samples:
        uses = Counter[tuple[str, str]]()
        for tenant in source.tenants:
            for limit in limits:
                uses[tenant.label, limit] += int(tenant.used(limit))
        return list(uses.items())

    return read


def _tenant_refusals(source: MetricsCollector) -> Samples:
    for label, one in source.tenants.totals().items():
        yield from (((label, limit), one.refused[limit]) for limit in LIMITS)


COUNTER: SeriesType = "counter"
GAUGE: SeriesType = "gauge"
HISTOGRAM: SeriesType = "histogram"
MODEL = ("model", "version")
SCORE = (*MODEL, "output", "horizon")
RPC = ("grpc_type", "grpc_service", "grpc_method")

# fmt: off
SERIES = (
    Series("stepstate_build_info", GAUGE, ("version",), lambda _: [((__version__,), 1)],
           "1, labelled with the version of the server."),
    Series("stepstate_limit", GAUGE, ("of",), _by(lambda s: s.limits),
           "Limits of the server, as configured."),
    Series("stepstate_memory_bytes", GAUGE, ("use",), _by(lambda s: s.memory.by_use),
           "Bytes that clients make the server hold, by what they are for; all together at most "
           'stepstate_limit{of="memory_bytes"}.'),
    Series("stepstate_peers", GAUGE, (), _one(lambda s: s.counters.peers),
           "Clients that have calls now: connections, and addresses behind trusted proxies."),
    Series("stepstate_calls", GAUGE, ("kind", "state"),
           lambda s: list(s.counters.calls.items()),
           "Calls now, by kind (short, long, stream): open, and those of them that wait for their "
           "turn."),
    Series("stepstate_tenant_sessions", GAUGE, ("tenant",), _tenant_sessions,
           "Open sessions of tenants, on all servers of the store; the count may be some seconds "
           "old. Here and below: the first 100 tenants, and those with limits of their own, have "
           'series of their own; the others are "other" together.'),
    Series("stepstate_tenant_calls", GAUGE, ("tenant", "limit"), _tenant_uses(("streams", "calls")),
           "Calls of tenants now, by the limit that they count for."),
    Series("stepstate_tenant_bytes", GAUGE, ("tenant", "limit"),
           _tenant_uses(("replay_bytes", "snapshot_bytes", "memory_bytes")),
           "Bytes that tenants make the server keep, by the limit that they count for."),
    Series("stepstate_tenant_rows_total", COUNTER, ("tenant",), _tenants(lambda t: t.rows),
           "Rows that tenants asked for and that their rates allowed."),
    Series("stepstate_tenant_forecasts_total", COUNTER, ("tenant",),
           _tenants(lambda t: t.forecasts),
           "Forecasts that tenants asked for and that their rates allowed."),
    Series("stepstate_tenant_refused_total", COUNTER, ("tenant", "limit"), _tenant_refusals,
           "Requests that were refused because of a limit of their tenant, or of all together."),
    Series("stepstate_models", GAUGE, ("state",),
           _by(lambda s: {"loaded": len(s.counters.models), "skipped": s.skipped_models}),
           "Models in the server's folder: loaded, or skipped because they can't be served."),
    Series("stepstate_steps_total", COUNTER, (*MODEL, "result"), _model_by(lambda m: m.steps),
           "Rows applied (result=applied), and requests that ended in another way: replayed "
           "(answered from the replay window), refused (wrong t, or a result beyond float32), "
           "cancelled, failed. Requests refused earlier are only in "
           "stepstate_requests_refused_total."),
    Series("stepstate_step_seconds", HISTOGRAM, (*MODEL, "stage"), _model_by(lambda m: m.seconds),
           "Time of single-row steps: in the queue, in the forward pass, and in total."),
    Series("stepstate_microbatch_rows", HISTOGRAM, MODEL, _model(lambda m: m.rows),
           "Single rows stepped in one forward pass."),
    Series("stepstate_forecasts_scored_total", COUNTER, SCORE, _scores(lambda s: s.scored),
           "Forecasts whose actual value has arrived, including primed rows."),
    Series("stepstate_forecast_absolute_error_total", COUNTER, SCORE,
           _scores(lambda s: s.absolute_error),
           "Sum of the absolute errors of scored forecasts, in the output's unit."),
    Series("stepstate_forecasts_scaled_total", COUNTER, SCORE, _scores(lambda s: s.scaled),
           "Scored forecasts whose error could be scaled by that of the naive forecast."),
    Series("stepstate_forecast_scaled_error_total", COUNTER, SCORE,
           _scores(lambda s: s.scaled_error),
           "Sum of absolute errors, each divided by the mean error of the (seasonal) naive "
           "forecast."),
    Series("stepstate_forecasts_with_interval_total", COUNTER, SCORE,
           _scores(lambda s: s.with_interval),
           "Scored forecasts that had an interval."),
    Series("stepstate_forecasts_outliers_total", COUNTER, SCORE, _scores(lambda s: s.outliers),
           "Scored forecasts whose error counts in the sums as only 20 times the typical error of "
           "the session."),
    Series("stepstate_forecasts_covered_total", COUNTER, SCORE, _scores(lambda s: s.covered),
           "Scored forecasts whose actual value was within the interval."),
    Series("stepstate_drift_alarms_total", COUNTER, MODEL, _alarms,
           "Alarms of the model's drift test: the forecasts of a session have become worse."),
    Series("stepstate_expired_sessions", GAUGE, (), _one(lambda s: s.sessions.expired),
           "Expired sessions that can be restored; the count may be some seconds old."),
    Series("stepstate_expired_sessions_deleted_total", COUNTER, ("reason",),
           _by(lambda s: s.counters.deletions),
           "Expired sessions that were deleted: --expired-grace is over (grace_over), "
           "--max-sessions was reached (limit), or the id was opened again (replaced)."),
    Series("stepstate_expired_sessions_restored_total", COUNTER, (),
           _one(lambda s: s.counters.restorations),
           "Expired sessions that were restored on request."),
    Series("stepstate_sessions_opened_total", COUNTER, MODEL, _model(lambda m: m.opened),
           "Sessions opened."),
    Series("stepstate_sessions_closed_total", COUNTER, ("reason",), _by(lambda s: s.counters.ends),
           "Sessions that ended, by reason."),
    Series("stepstate_requests_refused_total", COUNTER, ("reason",),
           _by(lambda s: s.counters.refusals),
           "Requests answered with an error, also within a stream, by reason."),
    Series("stepstate_auth_failures_total", COUNTER, ("reason",),
           _by(lambda s: s.counters.auth_failures),
           "Calls refused because of their credential, by reason: it is missing, malformed, "
           "unknown, expired or revoked, lacks a scope, or too many of its address were refused "
           "(limited)."),
    Series("stepstate_credentials_stale", GAUGE, ("source",),
           _by(lambda s: s.counters.stale_credentials()),
           "1 if a source of credentials (tokens, jwks) could not be read again: what it was "
           "before is still used."),
    Series("stepstate_sessions", GAUGE, (*MODEL, "residency"), _sessions,
           "Open sessions, by the place of their state: resident (in memory) or spilled (in the "
           "store, or on another server; the count may be some seconds old)."),
    Series("stepstate_slots_leaked", GAUGE, (), _one(lambda s: s.sessions.leaked_slots),
           "Slots that are neither free nor a session's, checked every second: 0, or there is a "
           "fault in the server."),
    Series("stepstate_queue_rows", GAUGE, MODEL, _scheduler(lambda s: s.queued_rows),
           "Rows accepted and not yet answered."),
    Series("stepstate_queue_requests", GAUGE, MODEL, _scheduler(lambda s: s.queued_requests),
           "Requests accepted and not yet answered."),
    Series("stepstate_state_bytes", GAUGE, MODEL, _scheduler(lambda s: s.state_bytes),
           "Bytes of state of resident sessions: h, c, past rows and tracked statistics."),
    Series("stepstate_replay_bytes", GAUGE, MODEL, _scheduler(lambda s: s.replay_bytes),
           "Bytes of remembered replies with many rows or layers; --replay-bytes is the limit."),
    Series("stepstate_session_spills_total", COUNTER, MODEL, _model(lambda m: m.spills),
           "Sessions moved from memory to the store."),
    Series("stepstate_session_restores_total", COUNTER, MODEL, _model(lambda m: m.restores),
           "Sessions loaded from the store: after a spill, a restart, or from another server."),
    Series("stepstate_session_takeovers_total", COUNTER, MODEL, _model(lambda m: m.takeovers),
           "Loaded sessions whose lease was held by another server, or by this one before it "
           "crashed."),
    Series("stepstate_sequences_restarted_total", COUNTER, MODEL,
           _model(lambda m: m.sequences_restarted),
           "Sessions closed because a client of the Triton API started their sequence again."),
    Series("stepstate_snapshots_total", COUNTER, (), _one(lambda s: s.counters.snapshots),
           "Snapshots written to the store."),
    Series("stepstate_snapshot_bytes_total", COUNTER, (), _one(lambda s: s.counters.snapshot_bytes),
           "Bytes of snapshots written."),
    Series("stepstate_snapshot_seconds", HISTOGRAM, (), _one(lambda s: s.counters.snapshot_seconds),
           "Time to write a group of snapshots."),
    Series("stepstate_snapshot_failures_total", COUNTER, ("reason",),
           _by(lambda s: s.counters.snapshot_failures),
           "Snapshots not written: the store was away (failed), or another server had the session "
           "(fenced)."),
    Series("stepstate_snapshot_backlog_rows", GAUGE, (), _one(lambda s: s.sessions.undurable_rows),
           "Rows of async sessions that are applied and not saved."),
    Series("stepstate_sessions_orphaned", GAUGE, (), _one(lambda s: s.sessions.orphaned_sessions),
           "Sessions in the store whose model is not loaded here, or has changed; counted at start "
           "and every ten minutes. They can be closed."),
    Series("stepstate_sessions_unreadable", GAUGE, (),
           _one(lambda s: s.sessions.unreadable_sessions),
           "Damaged sessions that were found in the store. They can be closed."),
    Series("stepstate_store_up", GAUGE, (), _one(lambda s: s.sessions.store_up),
           "1 if the store can be written, 0 if it is away, full or a replica."),
    Series("stepstate_store_failures_total", COUNTER, ("cause",),
           _by(lambda s: s.sessions.store_failures),
           "Failed calls of the store, by cause: an error code of Redis, SQLite or the network."),
    Series("stepstate_store_file_bytes", GAUGE, ("file",), _files,
           "Size of the files of the sqlite store: database, wal (not yet copied into it), and "
           "reserve (space kept to copy it when the disk is full)."),
    Series("stepstate_store_free_bytes", GAUGE, (), _disk(lambda u: u.free),
           "Free bytes on the volume of the sqlite store."),
    Series("stepstate_store_volume_bytes", GAUGE, (), _disk(lambda u: u.volume),
           "Size of the volume of the sqlite store."),
    Series("stepstate_config_reloads_total", COUNTER, ("result",),
           _by(lambda s: s.counters.reloads),
           "Reloads of the configuration file: applied, or refused because it can't be used, so "
           "that the one before stays in use."),
    Series("stepstate_config_last_reload_success_timestamp_seconds", GAUGE, (),
           _one(lambda s: s.counters.reloaded_at),
           "When the configuration in use was read, in Unix seconds."),
    Series("stepstate_tls_certificate_expiry_timestamp_seconds", GAUGE, (),
           _tls(lambda t: t.current.expires_at),
           "When the certificate that new connections get expires, or the first one of its chain: "
           "Unix seconds."),
    Series("stepstate_tls_reload_failed", GAUGE, (), _tls(lambda t: t.reload_failed),
           "1 if the TLS files that are there now can't be used, so that those before stay in use; "
           "the log says why."),
    Series("stepstate_event_loop_lag_seconds", HISTOGRAM, (), _one(lambda s: s.counters.loop_lag),
           "How late timers of the event loop are, measured 20 times a second. Nobody is answered "
           "while something holds the loop."),
    Series("stepstate_log_lines_dropped_total", COUNTER, ("cause",), _by(lambda _: DROPPED),
           "Log lines that were not written: nobody reads standard error (queue_full), a place in "
           "the code logged more than 10 in a second (rate_limit), or an error (failed)."),
    Series("stepstate_audit_lines_dropped_total", COUNTER, ("cause",), _by(lambda _: AUDIT_DROPPED),
           "Lines of --audit-log that were not written: the disk is too slow (queue_full), more "
           "than 10 acts a second were refused for one reason (rate_limit), or an error (failed)."),
    Series("stepstate_metrics_failures_total", COUNTER, (), _one(lambda s: s.failures),
           "Series that could not be read for a scrape, and had no samples in it; see the log."),
    Series("grpc_server_started_total", COUNTER, RPC, _rpc(lambda r: r.started),
           "RPCs started."),
    Series("grpc_server_handled_total", COUNTER, (*RPC, "grpc_code"), _rpc_by_code,
           "RPCs completed, by code."),
    Series("grpc_server_msg_received_total", COUNTER, RPC, _rpc(lambda r: r.received),
           "Messages received from clients."),
    Series("grpc_server_msg_sent_total", COUNTER, RPC, _rpc(lambda r: r.sent),
           "Messages sent to clients."),
    Series("grpc_server_handling_seconds", HISTOGRAM, RPC, _rpc(lambda r: r.seconds),
           "Time from start to end of an RPC."),
)
# fmt: on
"""In the order of the exposition; a table, so it is laid out as one."""
