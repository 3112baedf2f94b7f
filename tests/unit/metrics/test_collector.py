from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from grpc import StatusCode
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as PrometheusHistogram
from prometheus_client.parser import text_string_to_metric_families

from stepstate.budget import MemoryBudget
from stepstate.errors import StoreUnavailable
from stepstate.metrics import SERIES, Histogram, Metrics, MetricsCollector
from stepstate.metrics.counters import ROWS, SECONDS
from stepstate.sessions.monitored_store import STEADY_SECONDS
from tests.offline import forecasting_network, outputs, track
from tests.unit.rig import Lasting, model_of, rows_of

LABELS = {
    "state",
    "version",
    "model",
    "result",
    "stage",
    "reason",
    "cause",
    "file",
    "of",
    "use",
    "kind",
    "residency",
    "output",
    "horizon",
    "le",
    "grpc_type",
    "grpc_service",
    "grpc_method",
    "grpc_code",
    "tenant",
    "limit",
}


def exposed(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """Every sample, parsed from the text that Prometheus is given."""
    text = generate_latest(registry).decode()
    return {
        (sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


NO_SESSIONS = SimpleNamespace(
    schedulers={},
    expired=0,
    undurable_rows=0,
    orphaned_sessions=0,
    unreadable_sessions=0,
    leaked_slots=0,
    store_up=True,
    store_failures={},
    disk_usage=None,
    open_by_tenant={},
)
"""What is read of a `SessionService` without models."""


@pytest.fixture
def metrics(registry) -> Metrics:
    metrics = Metrics()
    limits = {"sessions": 7, "queue_rows": 100}
    registry.register(MetricsCollector(metrics, NO_SESSIONS, limits=limits, memory=MemoryBudget(1)))
    return metrics


@pytest.mark.parametrize("bounds", [SECONDS, ROWS])
def test_a_histogram_counts_as_prometheus_clients_does(registry, bounds):
    theirs = PrometheusHistogram("x", "x", buckets=bounds, registry=registry)
    ours = Histogram(bounds)
    values = [*bounds, *np.random.default_rng(1).lognormal(-5, 4, 500), 0.0, 1e9]
    for place, value in enumerate(values):
        times = 1 + place % 3
        ours.observe(value, times)
        for _ in range(times):
            theirs.observe(value)
    buckets, total = ours.samples()
    for bound, count in buckets:
        assert registry.get_sample_value("x_bucket", {"le": bound}) == count
    assert registry.get_sample_value("x_sum") == pytest.approx(total)
    assert registry.get_sample_value("x_count") == buckets[-1][1]


def test_a_micro_batch_is_counted_by_stage(metrics, registry):
    metrics.model("m", "1").microbatch([1.0, 1.5], 2.0, 2.25)
    found = exposed(registry)
    for stage, seconds in (("queue", 1.5), ("compute", 0.5), ("total", 2.0)):
        key = ("model=m", f"stage={stage}", "version=1")
        assert found["stepstate_step_seconds_sum", *key] == seconds
        assert found["stepstate_step_seconds_count", *key] == 2
    assert found["stepstate_microbatch_rows_count", "model=m", "version=1"] == 1
    assert found["stepstate_microbatch_rows_sum", "model=m", "version=1"] == 2


def test_each_call_is_its_own_series(metrics, registry):
    rpc = metrics.rpc("unary", "stepstate.v1.StepstateService", "Step")
    rpc.started += 3
    rpc.handled["OK"] += 2
    rpc.handled["NotFound"] += 1
    rpc.received += 3
    rpc.sent += 2
    rpc.seconds.observe(0.2)
    key = ("grpc_method=Step", "grpc_service=stepstate.v1.StepstateService", "grpc_type=unary")
    found = exposed(registry)
    assert found["grpc_server_started_total", *key] == 3
    assert found["grpc_server_handled_total", "grpc_code=NotFound", *key] == 1
    assert found["grpc_server_handled_total", "grpc_code=OK", *key] == 2
    assert found["grpc_server_msg_received_total", *key] == 3
    assert found["grpc_server_msg_sent_total", *key] == 2
    assert found["grpc_server_handling_seconds_count", *key] == 1


def test_series_are_there_at_0_before_anything_happens(metrics, registry):
    metrics.model("m", "1")
    metrics.rpc("unary", "s", "m")
    found = exposed(registry)
    for result in ("applied", "replayed", "refused", "cancelled", "failed"):
        assert found["stepstate_steps_total", "model=m", f"result={result}", "version=1"] == 0
    for reason in ("closed", "expired"):
        assert found["stepstate_sessions_closed_total", f"reason={reason}"] == 0
    told = {key[1] for key in found if key[0] == "stepstate_requests_refused_total"}
    assert {"reason=INTERNAL", "reason=STEP_AHEAD", "reason=QUEUE_FULL"} <= told
    assert "reason=SERVER_UNREACHABLE" not in told
    for code in StatusCode:
        name = "Canceled" if code is StatusCode.CANCELLED else code.name.title().replace("_", "")
        name = "OK" if code is StatusCode.OK else name
        key = (f"grpc_code={name}", "grpc_method=m", "grpc_service=s", "grpc_type=unary")
        assert found["grpc_server_handled_total", *key] == 0


def test_a_series_is_in_the_table_once_and_only_counters_end_in_total():
    names = [one.name for one in SERIES]
    assert len(set(names)) == len(names)
    assert [name.endswith("_total") for name in names] == [one.type == "counter" for one in SERIES]


def test_the_bounds_of_the_server_are_told(metrics, registry):
    found = exposed(registry)
    assert found["stepstate_limit", "of=sessions"] == 7
    assert found["stepstate_limit", "of=queue_rows"] == 100


def test_the_same_model_and_the_same_rpc_are_counted_together(metrics):
    assert metrics.model("m", "1") is metrics.model("m", "1")
    assert metrics.model("m", "1") is not metrics.model("m", "2")
    assert metrics.rpc("unary", "s", "m") is metrics.rpc("unary", "s", "m")


def test_refused_requests_and_ended_sessions_are_counted_by_reason(metrics, registry):
    metrics.refused("STEP_AHEAD")
    metrics.closed("expired")
    metrics.closed("expired")
    metrics.opened("m", "1")
    found = exposed(registry)
    assert found["stepstate_requests_refused_total", "reason=STEP_AHEAD"] == 1
    assert found["stepstate_sessions_closed_total", "reason=expired"] == 2
    assert found["stepstate_sessions_opened_total", "model=m", "version=1"] == 1


class Broken:
    """Sessions of which nothing can be read."""

    def __getattr__(self, name: str) -> object:
        raise ValueError(name)


def test_a_series_that_can_not_be_read_takes_no_other_with_it(metrics, registry, caplog):
    broken = CollectorRegistry()
    broken.register(MetricsCollector(metrics, Broken(), limits={}, memory=MemoryBudget(1)))
    metrics.model("m", "1").opened += 2
    found, whole = exposed(broken), exposed(registry)
    assert found["stepstate_sessions_opened_total", "model=m", "version=1"] == 2
    missing = {key[0] for key in whole.keys() - found.keys()}
    assert {"stepstate_expired_sessions", "stepstate_store_up"} <= missing
    assert found["stepstate_metrics_failures_total",] == len(caplog.records) > 0
    assert {record.series for record in caplog.records} >= missing - {"stepstate_limit"}


@pytest.mark.parametrize("version", [1, None, "\ud800", "a\nb", '"} 1', b"x"])
def test_a_label_of_any_kind_leaves_the_page_whole(metrics, registry, version):
    """As a damaged record may have it."""
    before = exposed(registry)
    metrics.restored("m", version, taken_over=False)
    found = exposed(registry)
    assert before.items() <= {**found, **dict.fromkeys(_counts_of_models(found), 0)}.items()
    restores = {key for key in found if key[0] == "stepstate_session_restores_total"}
    assert [found[key] for key in restores] == [1]
    assert found["stepstate_metrics_failures_total",] == 0


def _counts_of_models(found: dict[tuple[str, ...], float]) -> list[tuple[str, ...]]:
    return [key for key in found if key[0] == "stepstate_models"]


async def test_the_gauges_are_those_of_the_lane(rig, network):
    session = await rig.open()
    await rig.step(session, rows_of(network, 3))
    found = exposed(rig.registry)
    key = ("model=lstm", "version=1")
    assert found["stepstate_sessions", "model=lstm", "residency=resident", "version=1"] == 1
    assert found["stepstate_state_bytes", *key] == 4 * (64 + 3)
    assert found["stepstate_replay_bytes", *key] == 3 * 2 * 4
    assert found["stepstate_queue_rows", *key] == 0
    assert found["stepstate_queue_requests", *key] == 0
    assert found["stepstate_steps_total", "model=lstm", "result=applied", "version=1"] == 3


def test_snapshots_are_counted_by_group_and_by_session(metrics, registry):
    metrics.saved(64, 200_000, 0.004)
    metrics.saved(1, 3_000, 0.3)
    found = exposed(registry)
    assert found["stepstate_snapshots_total",] == 65
    assert found["stepstate_snapshot_bytes_total",] == 203_000
    assert found["stepstate_snapshot_seconds_count",] == 2
    assert found["stepstate_snapshot_seconds_sum",] == pytest.approx(0.304)
    assert found["stepstate_snapshot_seconds_bucket", "le=0.005"] == 1


def test_snapshots_that_were_not_written_are_counted_by_reason(metrics, registry):
    metrics.not_saved("failed", 128)
    metrics.not_saved("fenced", 1)
    metrics.not_saved("fenced", 1)
    found = exposed(registry)
    assert found["stepstate_snapshot_failures_total", "reason=failed"] == 128
    assert found["stepstate_snapshot_failures_total", "reason=fenced"] == 2


def test_sessions_that_come_from_the_store_and_go_there_are_counted_by_model(metrics, registry):
    metrics.spilled("m", "1")
    metrics.restored("m", "1", taken_over=False)
    metrics.restored("m", "1", taken_over=True)
    metrics.restored("m", "2", taken_over=True)
    found = exposed(registry)
    assert found["stepstate_session_spills_total", "model=m", "version=1"] == 1
    assert found["stepstate_session_restores_total", "model=m", "version=1"] == 2
    assert found["stepstate_session_takeovers_total", "model=m", "version=1"] == 1
    assert found["stepstate_session_takeovers_total", "model=m", "version=2"] == 1


def test_series_of_the_store_are_there_at_0_before_anything_happens(metrics, registry):
    metrics.model("m", "1")
    found = exposed(registry)
    for name in ("spills", "restores", "takeovers"):
        assert found[f"stepstate_session_{name}_total", "model=m", "version=1"] == 0
    for reason in ("failed", "fenced"):
        assert found["stepstate_snapshot_failures_total", f"reason={reason}"] == 0
    for name in ("snapshots_total", "snapshot_bytes_total", "snapshot_seconds_count"):
        assert found[f"stepstate_{name}",] == 0


class Away(Lasting):
    """A store that saves nothing when a test says so."""

    away = False

    async def save(self, saves):
        if self.away:
            raise StoreUnavailable("it is away", cause="full")
        return await super().save(saves)


async def test_the_gauges_are_those_of_the_store(make_rig, network, clock):
    store = Away(clock)
    rig = make_rig(store=store, clock=clock)
    await rig.step(await rig.open(), rows_of(network, 3))
    assert exposed(rig.registry)["stepstate_snapshot_backlog_rows",] == 3
    assert exposed(rig.registry)["stepstate_store_up",] == 1

    store.away = True
    with pytest.raises(StoreUnavailable):
        await rig.sessions.writer.save_round()
    found = exposed(rig.registry)
    assert found["stepstate_snapshot_backlog_rows",] == 3
    assert found["stepstate_store_up",] == 0
    assert found["stepstate_snapshot_failures_total", "reason=failed"] == 1
    assert found["stepstate_snapshots_total",] == 0

    assert found["stepstate_store_failures_total", "cause=full"] == 1
    assert found["stepstate_store_failures_total", "cause=other"] == 0

    store.away = False
    await rig.sessions.writer.save_round()
    clock.advance(STEADY_SECONDS)
    await rig.sessions.store.check()
    found = exposed(rig.registry)
    assert found["stepstate_snapshot_backlog_rows",] == 0
    assert found["stepstate_store_up",] == 1
    assert found["stepstate_snapshots_total",] == 1
    assert found["stepstate_snapshot_bytes_total",] > 4 * 64  # the state and what is around it


async def test_sessions_are_counted_where_they_are(make_rig, clock):
    rig = make_rig(store=Lasting(clock), max_sessions=2, clock=clock)
    for name in "abcde":
        await rig.open(name)
    key = ("model=lstm", "version=1")

    def counted() -> list[float]:
        found = exposed(rig.registry)
        return [
            found["stepstate_sessions", key[0], f"residency={residency}", key[1]]
            for residency in ("resident", "spilled")
        ]

    resident, spilled = counted()
    assert 1 <= resident <= 2
    assert resident + spilled == 5
    assert exposed(rig.registry)["stepstate_session_spills_total", *key] == spilled

    await rig.sessions.get("a")
    assert sum(counted()) == 5
    assert exposed(rig.registry)["stepstate_session_restores_total", *key] == 1
    assert exposed(rig.registry)["stepstate_session_takeovers_total", *key] == 0

    await rig.sessions.close("a")
    assert sum(counted()) == 4


async def test_a_memory_store_is_up_and_spills_nothing(make_rig, network):
    rig = make_rig()
    await rig.step(await rig.open(), rows_of(network, 1))
    found = exposed(rig.registry)
    assert found["stepstate_store_up",] == 1
    assert found["stepstate_sessions", "model=lstm", "residency=spilled", "version=1"] == 0
    assert not [name for name, *_ in found if "_file_bytes" in name or "_free_bytes" in name]


FORECASTS = (
    "stepstate_forecasts_scored",
    "stepstate_forecast_absolute_error",
    "stepstate_forecasts_scaled",
    "stepstate_forecast_scaled_error",
    "stepstate_forecasts_with_interval",
    "stepstate_forecasts_covered",
    "stepstate_forecasts_outliers",
)
ALARMS = "stepstate_drift_alarms"


@pytest.fixture
def sensor():
    """A network that tracks its output "level" at horizons 1 and 3."""
    return forecasting_network()


@pytest.fixture
def watching(make_rig, model, sensor):
    """A rig of a model that tracks, and of one that does not."""
    return make_rig(model_of(sensor), model)


def of_forecasts(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """The samples of forecasts and their drift."""
    found = exposed(registry)
    return {key: found[key] for key in found if key[0].startswith(("stepstate_forecast", ALARMS))}


def test_series_of_forecasts_are_there_at_0_and_only_for_models_that_track(watching):
    where = ("model=sensor1", "output=level", "version=1")
    keys = {(f"{name}_total", f"horizon={h}", *where) for name in FORECASTS for h in (1, 3)}
    keys.add((f"{ALARMS}_total", "model=sensor1", "version=1"))
    assert of_forecasts(watching.registry) == dict.fromkeys(keys, 0)


@pytest.mark.parametrize("tracking", [True, False])
def test_series_of_forecasts_have_help_whether_a_model_tracks_or_not(
    make_rig, model, sensor, tracking
):
    rig = make_rig(model_of(sensor)) if tracking else make_rig(model)
    text = generate_latest(rig.registry).decode()
    found = {
        family.name: family
        for family in text_string_to_metric_families(text)
        if family.name in (*FORECASTS, ALARMS)
    }
    assert found.keys() == {*FORECASTS, ALARMS}
    assert all(family.type == "counter" for family in found.values())
    assert len({family.documentation for family in found.values() if family.documentation}) == 8
    assert "in the output's unit" in found["stepstate_forecast_absolute_error"].documentation
    assert [bool(family.samples) for family in found.values()] == [tracking] * 8


@pytest.mark.parametrize("primed", [True, False])
async def test_forecasts_are_counted_by_output_and_horizon_over_sessions(watching, sensor, primed):
    """As the definitions have it, whether rows come at once or one by one."""
    spots = []
    for name, count in (("a", 40), ("b", 25)):
        session = await watching.open(name, model="sensor1")
        x = rows_of(sensor, count, seed=count) + np.array([5, -1])
        for part in [x] if primed else x:
            await watching.step(session, part)
        spots.append(track(sensor, x, outputs(sensor, x)))
    found = of_forecasts(watching.registry)
    for first, second in zip(*spots, strict=True):
        key = (f"horizon={first.horizon}", "model=sensor1", "output=level", "version=1")
        lists = [first.errors + second.errors, first.scaled + second.scaled]
        held = first.held + second.held
        wanted = [value for values in lists for value in (len(values), sum(values))]
        told = [found[f"{name}_total", *key] for name in FORECASTS]
        assert told == pytest.approx([*wanted, len(held), sum(held), 0], rel=1e-3)


async def test_alarms_of_drift_are_counted_and_those_of_all_sessions(watching, sensor):
    sessions = [await watching.open(name, model="sensor1") for name in "ab"]
    x = rows_of(sensor, 40) * 0.1 + np.array([5, -1])
    key = (f"{ALARMS}_total", "model=sensor1", "version=1")
    counted = []
    for shift in (0, 30):
        for session in sessions:
            await watching.step(session, x + np.array([shift, 0]))
        counted.append(exposed(watching.registry)[key])
    told = [watching.sessions.summary(session).quality.drift.alarms for session in sessions]
    assert counted[1] - counted[0] >= 2
    assert counted[1] == sum(told)


async def test_more_sessions_make_no_more_series(rig, network):
    async def use(name: str) -> int:
        session = await rig.open(name)
        await rig.step(session, rows_of(network, 1))
        await rig.step(session, rows_of(network, 2))
        await rig.sessions.close(name)
        return len(exposed(rig.registry))

    assert len({await use(f"session-{place}") for place in range(5)}) == 1
    assert "session-" not in generate_latest(rig.registry).decode()


async def test_more_sessions_of_a_model_that_tracks_make_no_more_series(watching, sensor):
    async def use(name: str) -> int:
        session = await watching.open(name, model="sensor1")
        await watching.step(session, rows_of(sensor, 12))
        await watching.sessions.close(name)
        return len(exposed(watching.registry))

    assert len({await use(f"session-{place}") for place in range(5)}) == 1
    assert "session-" not in generate_latest(watching.registry).decode()


async def test_labels_are_the_known_ones_and_series_have_help_and_base_units(watching, sensor):
    watching.metrics.rpc("unary", "s", "m").handled["OK"] += 1
    await watching.step(await watching.open(model="sensor1"), rows_of(sensor, 1))
    for family in text_string_to_metric_families(generate_latest(watching.registry).decode()):
        assert family.documentation
        assert family.name.startswith(("stepstate_", "grpc_server_"))
        assert {label for sample in family.samples for label in sample.labels} <= LABELS
