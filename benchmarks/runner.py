"""Rounds: a baseline and its contenders in turn, under the same load, each over one window."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import grpc
import numpy as np

from benchmarks import BenchError
from benchmarks.access import OPEN, Access
from benchmarks.clients import Clients, running_clients
from benchmarks.load import ArrivalSchedule, CallPath, Kind, Load, Sample, Window
from benchmarks.models import INPUTS, NAME
from benchmarks.procstat import check_proc, cpu_seconds
from benchmarks.results import (
    PERCENTILES,
    Case,
    Comparison,
    Matchup,
    Measurement,
    Plan,
    rate_of,
)
from benchmarks.sender import MAX_STREAMS
from benchmarks.servers import ServerProcess
from benchmarks.sessions import SessionOptions, close_sessions, open_sessions

_SEED = 2


@dataclass(frozen=True, slots=True)
class Target:
    """What is put under load."""

    name: str
    server: ServerProcess
    kind: Kind = Kind.STEP
    durability: str = "unspecified"
    """Of its sessions, by the contract's name in small letters."""
    store_pid: int | None = None
    """Its store's process, if it has one of its own here."""
    stateless: bool = False
    """It answers steps of sessions that nobody has opened."""
    model: str = NAME
    """Of its sessions."""
    access: Access = OPEN
    """How a client gets in."""


Forward = Callable[[int], Measurement]
"""Runs the bare forward with so many rows."""


class LoadClients(Protocol):
    """Processes that send loads at the same time; see `Clients`."""

    def __len__(self) -> int: ...

    def prepare(self, questions: Sequence[Load]) -> None:
        """Gives each load to a process; returns when each session was answered once."""
        ...

    def send(self, window: Window) -> None:
        """Starts sending."""
        ...

    def collect(self) -> list[Sample]:
        """What each process saw."""
        ...


def run(
    plan: Plan,
    baseline: Target,
    contenders: Sequence[Target],
    log: Callable[[str], None],
    forward: Forward | None = None,
) -> list[Comparison]:
    """Measures each contender after the baseline, round by round, and says how each round went.

    Args:
        plan: what to run.
        baseline: measured before each contender.
        contenders: what is compared with it.
        log: is called with a line of progress.
        forward: measured after each round, if given.

    Raises:
        BenchError: a server refuses a step, or breaks off.
    """
    check_proc()
    with running_clients(plan.processes) as clients:
        rounds = _Rounds(plan, baseline, contenders, clients, log, forward)
        return [rounds.compare(case) for case in plan.cases()]


def workload(plan: Plan, what: str) -> str:
    """The load, in words."""
    rates = " and ".join(f"{rate:g}" for rate in plan.rates)
    loop = f"{rates} steps/s in all, at fixed times" if rates else "closed loop"
    paths = "; ".join(_WORKLOADS[path](plan) for path in plan.paths)
    return (
        f"{loop}; {paths}; rows of {INPUTS}, with t; "
        f"clients: {plan.processes} Python process(es) on the same machine; {plan.rounds} round(s) "
        f"of {plan.seconds:g} s after {plan.warm_up:g} s of warm-up, {what} in turn"
    )


def _stream_workload(plan: Plan) -> str:
    shared = max(plan.sessions) > MAX_STREAMS * plan.processes
    more = f", beyond {MAX_STREAMS:,} sessions a process several on one" if shared else ""
    return f"stream: one row a message, one stream a session{more}"


def _packed_workload(plan: Plan) -> str:
    in_flight = "" if plan.rates else f", {plan.in_flight} messages in flight"
    return f"packed: rows of different sessions in a message, one stream a process{in_flight}"


_WORKLOADS: dict[CallPath, Callable[[Plan], str]] = {
    CallPath.STREAM: _stream_workload,
    CallPath.UNARY: lambda _: "unary: one row a call, one call of a session at a time",
    CallPath.PACKED: _packed_workload,
}


@dataclass(frozen=True, slots=True)
class _Rounds:
    plan: Plan
    baseline: Target
    contenders: Sequence[Target]
    clients: Clients
    log: Callable[[str], None]
    forward: Forward | None

    def compare(self, case: Case) -> Comparison:
        rounds: list[list[tuple[Measurement, Measurement]]] = []
        forwards: list[Measurement] = []
        for number in range(1, self.plan.rounds + 1):
            rounds.append(self._round(case, number))
            if self.forward is not None:
                forwards.append(self.forward(forward_rows(case)))
        matchups: list[Matchup] = []
        for contender, pairs in zip(self.contenders, zip(*rounds, strict=True), strict=True):
            before, measured = zip(*pairs, strict=True)
            matchups.append(Matchup(contender.name, before, measured))
        return Comparison(case, self.baseline.name, tuple(matchups), tuple(forwards))

    def _round(self, case: Case, number: int) -> list[tuple[Measurement, Measurement]]:
        pairs: list[tuple[Measurement, Measurement]] = []
        for contender in self.contenders:
            before = self._measure(self.baseline, case)
            measured = self._measure(contender, case)
            pairs.append((before, measured))
            self.log(
                f"{case}, round {number} of {self.plan.rounds}: "
                f"{self.baseline.name} {rate_of(before):,.0f}/s, "
                f"{contender.name} {rate_of(measured):,.0f}/s"
            )
        return pairs

    def _measure(self, target: Target, case: Case) -> Measurement:
        with opened_sessions(target, case.sessions) as names:
            return measure(self.plan, target, self.clients, case, names)


BATCH_ROWS = 256
"""A server's default for the most rows of one forward."""


def forward_rows(case: Case) -> int:
    """The most rows of a forward under a load."""
    return case.rows if case.path is CallPath.PACKED else min(case.sessions, BATCH_ROWS)


def measure(
    plan: Plan, target: Target, clients: LoadClients, case: Case, names: Sequence[str]
) -> Measurement:
    """One window: the replies within it, and the CPU that was used within it.

    Args:
        plan: the window, and the schedule.
        target: what is asked.
        clients: who ask.
        case: how they ask.
        names: sessions that are open at t = 0.
    """
    clients.prepare(_loads(plan, target, case, names, len(clients)))
    window = window_from_now(plan.warm_up, plan.seconds)
    clients.send(window)
    pids = [target.server.pid, *([target.store_pid] if target.store_pid else [])]
    cores = busy_cores(pids, window)
    return _summary(clients.collect(), window, cores, case.rows)


def window_from_now(warm_up: float, seconds: float) -> Window:
    """A window that begins when every process has received it."""
    begin = time.monotonic() + 0.05
    return Window(begin, begin + warm_up, begin + warm_up + seconds)


def _loads(
    plan: Plan, target: Target, case: Case, names: Sequence[str], processes: int
) -> list[Load]:
    """Shares the sessions between the processes, whose messages are due in turn."""
    x = np.random.default_rng(_SEED).standard_normal((len(names), INPUTS)).astype(np.float32)
    count = min(processes, len(names))
    between = None if case.rate is None else case.rows / case.rate
    return [
        Load(
            kind=target.kind,
            path=case.path,
            target=target.server.address,
            names=names[place::count],
            x=x[place::count],
            schedule=None if between is None else ArrivalSchedule(between * count, between * place),
            rows=case.rows,
            in_flight=plan.in_flight,
            connections=case.connections,
            access=target.access,
        )
        for place in range(count)
    ]


@contextmanager
def opened_sessions(target: Target, count: int) -> Iterator[list[str]]:
    """Names of sessions that are open inside the block."""
    run_id = uuid.uuid4().hex
    names = [f"bench-{run_id}-{number}" for number in range(count)]
    if target.kind is Kind.ECHO or target.stateless:
        yield names
        return
    options = SessionOptions(target.durability, model=target.model)
    try:
        asyncio.run(open_sessions(target.server.address, names, options, target.access))
        yield names
        asyncio.run(close_sessions(target.server.address, names, target.access))
    except grpc.RpcError as error:
        raise BenchError(f"a session can't be opened or closed: {error.details()}") from error


def busy_cores(pids: Sequence[int], window: Window) -> list[float]:
    """CPU seconds a second of each process over the window, which it waits for.

    On a busy machine both readings may come late, so they are set against the
    time between them, not against the window's length.
    """
    _sleep_until(window.start)
    began, used_before = time.monotonic(), [cpu_seconds(pid) for pid in pids]
    _sleep_until(window.finish)
    ended, used_after = time.monotonic(), [cpu_seconds(pid) for pid in pids]
    pairs = zip(used_before, used_after, strict=True)
    return [(after - before) / (ended - began) for before, after in pairs]


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def _summary(
    samples: Sequence[Sample], window: Window, cores: Sequence[float], rows: int
) -> Measurement:
    steps = rows * sum(sample.replies for sample in samples)
    latencies = np.concatenate([sample.latencies for sample in samples])
    if not steps or not len(latencies):
        raise BenchError(f"no reply came within {window.seconds:g} s: give --seconds more")
    rate = steps / window.seconds
    server, store = (used / rate * 1e6 for used in (*cores, 0.0)[:2])
    unanswered = sum(sample.unanswered for sample in samples)
    return Measurement(
        steps=steps,
        steps_per_second=rate,
        latency_ms=percentiles(latencies),
        cpu_us_per_step=server,
        store_cpu_us_per_step=store,
        counted=rows * len(latencies),
        unanswered=rows * unanswered,
    )


def percentiles(latencies: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Of latencies in seconds, in milliseconds."""
    found = np.percentile(latencies, PERCENTILES) * 1e3
    return {f"{p:g}": float(value) for p, value in zip(PERCENTILES, found, strict=True)}
