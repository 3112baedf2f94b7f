"""What a forecast costs beside a step: unary calls of each, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import click
import grpc
import numpy as np

from benchmarks import BenchError
from benchmarks.models import FORECASTING_DESCRIPTION, FORECASTING_NAME, HORIZONS
from benchmarks.options import option
from benchmarks.procstat import check_proc, cpu_seconds
from benchmarks.report import Report, spread_text
from benchmarks.results import Spread, spread
from benchmarks.servers import ServerProcess, bench_folder, running_stepstate
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub

ROWS = 400
"""Of each session, before it is forecast."""
_SEED = 3


@dataclass(frozen=True, slots=True)
class ForecastPlan:
    """A forecast beside a step, and many sessions' forecasts in one call."""

    sessions: int = option(1_000, click.IntRange(1, 6_000), "Sessions forecast in one call.")
    calls: int = option(300, click.IntRange(1, 100_000), "Calls of each kind in a round.")
    rounds: int = option(3, click.IntRange(1, 100), "Rounds of all kinds in turn.")


@dataclass(frozen=True, slots=True)
class _Cost:
    """Of one call, or of one session of it."""

    p50_ms: float
    cpu_us: float
    """The server's."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of call."""

    name: str
    call: Callable[[], object]
    calls: int
    of: int
    """Sessions of a call."""


def forecasting(plan: ForecastPlan, log: Callable[[str], None]) -> Report:
    """Steps and forecasts in turn.

    Raises:
        BenchError: the server does not start, or refuses a call.
    """
    check_proc()
    with bench_folder(FORECASTING_NAME) as folder, running_stepstate(folder, "memory:") as server:
        try:
            with grpc.insecure_channel(server.address) as channel:
                return _measure(plan, server, StepstateServiceStub(channel), log)
        except grpc.RpcError as error:
            raise BenchError(f"a call was refused: {error.details()}") from error


def _measure(
    plan: ForecastPlan,
    server: ServerProcess,
    stub: StepstateServiceStub,
    log: Callable[[str], None],
) -> Report:
    names = [f"bench-{number}" for number in range(plan.sessions)]
    history = np.random.default_rng(_SEED).standard_normal(ROWS).tolist()
    for name in names:
        stub.OpenSession(pb.OpenSessionRequest(session_id=name, model=FORECASTING_NAME))
        stub.Step(pb.StepRequest(session_id=name, x=history, last_only=True))
    log(f"{plan.sessions} sessions have {ROWS} rows each")
    kinds = _kinds(plan, stub, names)
    rounds: list[dict[str, _Cost]] = []
    for number in range(1, plan.rounds + 1):
        rounds.append({kind.name: _cost(server, kind) for kind in kinds})
        medians = ", ".join(f"{name} {cost.p50_ms:.2f} ms" for name, cost in rounds[-1].items())
        log(f"round {number} of {plan.rounds}: {medians}")
    return _report(plan, kinds, rounds)


def _kinds(plan: ForecastPlan, stub: StepstateServiceStub, names: Sequence[str]) -> list[_Kind]:
    step = pb.StepRequest(session_id=names[0], x=[0.5])
    direct = pb.ForecastRequest(session_id=names[:1], horizon=HORIZONS)
    fed_back = pb.ForecastRequest(session_id=names[:1], horizon=2 * HORIZONS)
    together = pb.ForecastRequest(session_id=names, horizon=HORIZONS)
    few = max(1, plan.calls // 20)
    return [
        _Kind("step", lambda: stub.Step(step), plan.calls, 1),
        _Kind(f"forecast {HORIZONS}", lambda: stub.Forecast(direct), plan.calls, 1),
        _Kind(f"forecast {2 * HORIZONS}", lambda: stub.Forecast(fed_back), plan.calls, 1),
        _Kind(
            f"forecast {HORIZONS} of {plan.sessions}",
            lambda: stub.Forecast(together),
            few,
            plan.sessions,
        ),
    ]


def _cost(server: ServerProcess, kind: _Kind) -> _Cost:
    kind.call()
    taken: list[float] = []
    before = cpu_seconds(server.pid)
    for _ in range(kind.calls):
        began = time.perf_counter()
        kind.call()
        taken.append(time.perf_counter() - began)
    used = cpu_seconds(server.pid) - before
    if not used:
        raise BenchError("so few calls take less CPU than can be read: give --calls more")
    return _Cost(float(np.median(taken)) * 1e3, used / (kind.calls * kind.of) * 1e6)


def _report(
    plan: ForecastPlan, kinds: Sequence[_Kind], rounds: Sequence[dict[str, _Cost]]
) -> Report:
    step = kinds[0].name

    def over_rounds(name: str, figure: Callable[[_Cost], float]) -> Spread:
        return spread(figure(found[name]) for found in rounds)

    def ratio(name: str, figure: Callable[[_Cost], float]) -> Spread:
        return spread(figure(found[name]) / figure(found[step]) for found in rounds)

    return Report(
        workload=(
            f"{FORECASTING_DESCRIPTION}; unary calls of one Python client, one at a time; "
            f"{plan.rounds} round(s) of {plan.calls} calls of each kind in turn"
        ),
        heads=("call", "p50 ms", "over step", "server CPU µs a session", "over step"),
        rows=[
            (
                kind.name,
                spread_text(over_rounds(kind.name, lambda cost: cost.p50_ms)),
                spread_text(ratio(kind.name, lambda cost: cost.p50_ms)),
                spread_text(over_rounds(kind.name, lambda cost: cost.cpu_us), 0),
                spread_text(ratio(kind.name, lambda cost: cost.cpu_us)),
            )
            for kind in kinds
        ],
        notes=(
            f"Horizons to {HORIZONS} are read from the state, those beyond after rows were fed",
            "back. Medians (least–most) of the rounds.",
        ),
        results=[{name: asdict(cost) for name, cost in found.items()} for found in rounds],
    )
