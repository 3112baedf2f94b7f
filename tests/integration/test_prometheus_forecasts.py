"""What a real Prometheus sees of forecasts equals what the sessions tell of theirs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import grpc
import numpy as np
import pytest

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.prometheus import (
    Labels,
    Prometheus,
    eventually,
    filled,
    panels,
    running_prometheus,
)
from tests.networks import Network
from tests.offline import forecasting_network, outputs, track
from tests.processes import ServerProcess, server_process

pytestmark = pytest.mark.long  # a real Prometheus watches two servers

MARK = "sid-in-no-label"
"""The beginning of every session id here."""

ALARMS = 'sum(stepstate_drift_alarms_total{model="sensor1"})'

SEASON = 4
"""Of the models; both track the output "level" at horizons 1 and 3."""

MEANS = {
    "Mean scaled error by horizon, 1 h": (
        "stepstate_forecast_scaled_error_total",
        "stepstate_forecasts_scaled_total",
    ),
    "Mean absolute error, 1 h": (
        "stepstate_forecast_absolute_error_total",
        "stepstate_forecasts_scored_total",
    ),
    "Interval coverage by horizon, 1 h": (
        "stepstate_forecasts_covered_total",
        "stepstate_forecasts_with_interval_total",
    ),
}
"""The panels of means: the sum, and of how many."""
SCALED, ABSOLUTE, COVERAGE = MEANS


@dataclass(frozen=True, slots=True)
class Use:
    """A session to be stepped, of "sensor1" (quantiles) or "sensor2" (none)."""

    model: str
    rows: int
    single: int
    """How many of the rows come one by one."""
    noise: float
    period: float
    """Of the rows' cycle; with that of the season the naive forecast is hard to beat."""


FIRST = (
    Use("sensor1", 90, 20, 0.2, SEASON),
    Use("sensor1", 40, 40, 0.4, SEASON),
    Use("sensor2", 70, 10, 0.5, 4 * np.pi),
)
SECOND = (Use("sensor1", 30, 0, 6.0, SEASON), Use("sensor2", 60, 60, 8.0, 9.0))
"""On another server: fewer, and much worse. The mean of the servers' means is another one."""


SENSORS = {
    "sensor1": forecasting_network,
    "sensor2": partial(forecasting_network, quantiles=(), version="2"),
}


@dataclass(frozen=True, slots=True)
class Seen:
    """Servers that were used, as Prometheus and as their sessions tell of it."""

    prometheus: Prometheus
    before: dict[str, dict[Labels, float]]
    """What each panel of a mean gave when nothing had been stepped."""
    sessions: list[pb.Session]


def rows(use: Use, seed: int) -> np.ndarray:
    """x [T, 2] of a session: level, heat."""
    rng = np.random.default_rng(seed)
    cycle = np.sin(2 * np.pi * (np.arange(use.rows) + 0.3) / use.period)
    level = 5 + 2 * cycle + rng.normal(0, use.noise, use.rows)
    return np.stack([level, rng.normal(-1, 0.5, use.rows)], axis=1)


def step(stub: StepstateServiceStub, session_id: str, x: np.ndarray) -> None:
    stub.Step(pb.StepRequest(session_id=session_id, x=x.ravel().tolist()))


def told(stub: StepstateServiceStub, session_id: str) -> pb.Session:
    return stub.GetSession(pb.GetSessionRequest(session_id=session_id)).session


def use_server(server: ServerProcess, uses: tuple[Use, ...], name: str) -> Iterator[pb.Session]:
    with grpc.insecure_channel(server.address) as channel:
        stub = StepstateServiceStub(channel)
        for number, use in enumerate(uses):
            session_id = f"{MARK}-{name}-{number}"
            stub.OpenSession(pb.OpenSessionRequest(session_id=session_id, model=use.model))
            x = rows(use, number)
            primed = use.rows - use.single
            if primed:
                step(stub, session_id, x[:primed])
            for row in x[primed:]:
                step(stub, session_id, row)
            yield told(stub, session_id)


def expression(title: str) -> str:
    """What the panel of that title shows."""
    (panel,) = [panel for panel in panels() if panel["title"] == title]
    (target,) = panel["targets"]
    return filled(target["expr"])


@pytest.fixture(scope="module")
def sensors(networks: dict[str, Network], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that track, one with quantiles and one without; and one that does not."""
    root = tmp_path_factory.mktemp("sensors")
    for network in (*(make() for make in SENSORS.values()), networks["lstm"]):
        network.write(root)
    return root


@pytest.fixture(scope="module")
def seen(sensors: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """Two servers, scraped before and after their sessions were stepped."""
    with ExitStack() as stack:
        servers = [stack.enter_context(server_process("--models", str(sensors))) for _ in range(2)]
        folder = tmp_path_factory.mktemp("prometheus")
        prometheus = stack.enter_context(running_prometheus(folder, *servers))
        for _ in range(2):  # the least that `increase` takes
            prometheus.scrape()
        before = {title: prometheus.samples(expression(title)) for title in MEANS}
        sessions = [
            session
            for server, uses, name in zip(servers, (FIRST, SECOND), "ab", strict=True)
            for session in use_server(server, uses, name)
        ]
        prometheus.scrape()
        yield Seen(prometheus, before, sessions)


@cache
def scaled_errors(session_id: str) -> dict[int, list[float]]:
    """Those of a session by horizon, by their definition: a session tells its mean otherwise."""
    name, number = session_id.removeprefix(f"{MARK}-").split("-")
    use = {"a": FIRST, "b": SECOND}[name][int(number)]
    network, x = SENSORS[use.model](), rows(use, int(number))
    spots = track(network, x, outputs(network, x))
    return {spot.horizon: spot.scaled for spot in spots}


def weighed(title: str, session: pb.Session, accuracy: pb.Accuracy) -> tuple[float, int]:
    """What a session tells of a horizon, and of how many forecasts that is the mean."""
    if title == ABSOLUTE:
        return accuracy.mean_absolute_error, accuracy.scored
    if title == SCALED:  # from the row on that follows one with one a season before it
        errors = scaled_errors(session.session_id)[accuracy.horizon]
        return float(np.mean(errors)), len(errors)
    if session.model == "sensor1":
        return accuracy.coverage, accuracy.scored
    # Without quantiles there is no interval before the first error is known.
    return accuracy.coverage, accuracy.scored - accuracy.horizon


def expected(title: str, sessions: list[pb.Session]) -> dict[Labels, tuple[float, int]]:
    """The mean over sessions, weighted, and the sum of the weights; by the panel's labels."""
    found: dict[Labels, list[tuple[float, int]]] = defaultdict(list)
    for session in sessions:
        for accuracy in session.accuracy:
            labels = {
                "model": session.model,
                "version": session.version,
                "horizon": str(accuracy.horizon),
            }
            if title == ABSOLUTE:
                labels["output"] = accuracy.output
            found[frozenset(labels.items())].append(weighed(title, session, accuracy))
    return {
        labels: (sum(value * count for value, count in parts) / total, total)
        for labels, parts in found.items()
        if (total := sum(count for _, count in parts))
    }


def means(title: str, sessions: list[pb.Session]) -> dict[Labels, float]:
    return {labels: mean for labels, (mean, _) in expected(title, sessions).items()}


@pytest.mark.parametrize("title", MEANS)
def test_the_sums_over_sessions_and_servers_are_those_that_the_sessions_tell(
    seen: Seen, title: str
) -> None:
    by = "model, version, output, horizon" if title == ABSOLUTE else "model, version, horizon"
    total, count = (seen.prometheus.samples(f"sum by ({by}) ({name})") for name in MEANS[title])
    wanted = expected(title, seen.sessions)
    assert len(wanted) == 4
    assert count == {labels: weight for labels, (_, weight) in wanted.items()}
    assert {labels: total[labels] / count[labels] for labels in count} == pytest.approx(
        means(title, seen.sessions), rel=1e-4
    )


@pytest.mark.parametrize("title", MEANS)
def test_a_panel_shows_the_mean_over_all_sessions_not_of_means(seen: Seen, title: str) -> None:
    """Exact without `increase`, which guesses what came before and after so few samples."""
    shown = expression(title)
    totals = re.sub(r"increase\((\w+\{[^}]*\})\[1h\]\)", r"\1", shown)
    assert "increase" not in totals
    wanted = means(title, seen.sessions)
    assert seen.prometheus.samples(totals) == pytest.approx(wanted, rel=1e-4)
    assert seen.prometheus.samples(shown).keys() == wanted.keys()
    parts = [means(title, seen.sessions[:3]), means(title, seen.sessions[3:])]
    mean_of_means = {labels: (parts[0][labels] + parts[1][labels]) / 2 for labels in wanted}
    assert mean_of_means != pytest.approx(wanted, rel=0.01)


def test_panels_of_means_are_empty_while_no_truth_has_come(seen: Seen) -> None:
    """Not NaN, which a plain division by 0 gives."""
    assert seen.before == {title: {} for title in MEANS}


def test_only_models_that_track_have_series(seen: Seen) -> None:
    names = {name for pair in MEANS.values() for name in pair} | {"stepstate_drift_alarms_total"}
    for name in names:
        assert set(seen.prometheus.by("model", f"sum by (model) ({name})")) == {
            "sensor1",
            "sensor2",
        }


def test_alarms_of_drift_are_those_that_the_sessions_tell(seen: Seen) -> None:
    alarms: dict[str, int] = defaultdict(int)
    for session in seen.sessions:
        alarms[session.model] += session.drift.alarms
    assert sum(alarms.values()) > 0
    assert seen.prometheus.by("model", "sum by (model) (stepstate_drift_alarms_total)") == alarms


def test_the_alert_names_horizons_with_enough_forecasts_worse_than_naive_ones(seen: Seen) -> None:
    wanted = {
        (dict(labels)["model"], dict(labels)["horizon"])
        for labels, (mean, count) in expected(SCALED, seen.sessions).items()
        if mean > 1 and count >= 100
    }
    assert {model for model, _ in wanted} == {"sensor1"}  # sensor2 beats them

    def alerted() -> set[tuple[str, str]]:
        alerts = seen.prometheus.samples('ALERTS{alertname="StepstateForecastsWorseThanNaive"}')
        return {(dict(labels)["model"], dict(labels)["horizon"]) for labels in alerts}

    eventually(lambda: alerted() == wanted)


def test_no_label_of_a_forecast_holds_a_session_id(seen: Seen) -> None:
    found = seen.prometheus.get("series", **{"match[]": '{job="stepstate"}'})
    assert {"stepstate_forecasts_scored_total"} <= {series["__name__"] for series in found}
    for series in found:
        assert not any(MARK in value for value in series.values()), series


def test_alarms_rise_when_the_level_of_a_session_shifts(sensors: Path, tmp_path: Path) -> None:
    steady, shifted = f"{MARK}-steady", f"{MARK}-shifted"
    x = rows(Use("sensor1", 120, 0, 0.2, 4 * np.pi), seed=3)
    counted, alarms = [], []
    with (
        server_process("--models", str(sensors)) as server,
        running_prometheus(tmp_path, server) as prometheus,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = StepstateServiceStub(channel)
        for session_id in (steady, shifted):
            stub.OpenSession(pb.OpenSessionRequest(session_id=session_id, model="sensor1"))
        for shift in (0.0, 30.0):
            step(stub, steady, x)
            step(stub, shifted, x + np.array([shift, 0.0]))
            prometheus.scrape()
            counted.append(prometheus.value(ALARMS))
            alarms.append([told(stub, name).drift.alarms for name in (steady, shifted)])
        drifting = [told(stub, name).drift.drifting for name in (steady, shifted)]
        alert = 'ALERTS{alertname="StepstateForecastsDrift", model="sensor1"}'
        eventually(lambda: prometheus.value(alert) == 1)
    assert counted == [sum(before_or_after) for before_or_after in alarms]
    (steady_before, shifted_before), (steady_after, shifted_after) = alarms
    assert steady_after == steady_before
    assert shifted_after > shifted_before
    assert drifting == [False, True]
