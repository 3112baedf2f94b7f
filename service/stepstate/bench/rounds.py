"""Rounds: a baseline and its contenders in turn, under the same load, each over one window."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import grpc
import numpy as np

from stepstate.bench.clients import Clients, running_clients
from stepstate.bench.errors import BenchError
from stepstate.bench.figures import Comparison, Contest, Measurement, Plan
from stepstate.bench.load import Kind, Load, Sample, Window
from stepstate.bench.model import INPUTS, NAME
from stepstate.bench.servers import Launched
from stepstate.bench.usage import check_proc, cpu_seconds
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub

WARM_UP_SECONDS = 1.0
"""Caches and the first forwards settle in it, after every stream was answered once."""

LEFT_BEHIND = timedelta(hours=1)
"""When sessions expire that a broken off benchmark left in somebody's Redis."""

_SEED = 2


@dataclass(frozen=True, slots=True)
class Target:
    """What is put under load."""

    name: str
    server: Launched
    kind: Kind = Kind.STEP
    durability: str = "unspecified"
    """Of its sessions, by the contract's name in small letters."""
    store_pid: int | None = None
    """Its store's process, if it has one of its own here."""


def run(
    plan: Plan, baseline: Target, contenders: Sequence[Target], tell: Callable[[str], None]
) -> list[Comparison]:
    """Measures each contender after the baseline, round by round, and says how each round went.

    Raises:
        BenchError: a server refuses a step, or breaks off.
    """
    check_proc()
    with running_clients(plan.processes) as clients:
        rounds = _Rounds(plan, baseline, contenders, clients, tell)
        return [rounds.compare(sessions) for sessions in plan.sessions]


def workload(plan: Plan, what: str) -> str:
    """The load, in words."""
    return (
        f"closed loop, one stream a session, one row of {INPUTS} a message, with t; "
        f"clients: {plan.processes} Python process(es) on the same machine; {plan.rounds} round(s) "
        f"of {plan.seconds:g} s after {WARM_UP_SECONDS:g} s of warm-up, {what} in turn"
    )


@dataclass(frozen=True, slots=True)
class _Rounds:
    plan: Plan
    baseline: Target
    contenders: Sequence[Target]
    clients: Clients
    tell: Callable[[str], None]

    def compare(self, sessions: int) -> Comparison:
        rounds = [self._round(sessions, number + 1) for number in range(self.plan.rounds)]
        contests: list[Contest] = []
        for contender, pairs in zip(self.contenders, zip(*rounds, strict=True), strict=True):
            before, measured = zip(*pairs, strict=True)
            contests.append(Contest(contender.name, before, measured))
        return Comparison(sessions, self.baseline.name, tuple(contests))

    def _round(self, sessions: int, number: int) -> list[tuple[Measurement, Measurement]]:
        pairs: list[tuple[Measurement, Measurement]] = []
        for contender in self.contenders:
            pairs.append(self._pair(contender, sessions))
            before, measured = pairs[-1]
            self.tell(
                f"sessions {sessions}, round {number} of {self.plan.rounds}: "
                f"{self.baseline.name} {before.messages_per_second:,.0f}/s, "
                f"{contender.name} {measured.messages_per_second:,.0f}/s"
            )
        return pairs

    def _pair(self, contender: Target, sessions: int) -> tuple[Measurement, Measurement]:
        """A window of the baseline, then one of a contender."""
        seconds = self.plan.seconds
        before = _measure(self.baseline, self.clients, sessions, seconds)
        return before, _measure(contender, self.clients, sessions, seconds)


def _measure(target: Target, clients: Clients, sessions: int, seconds: float) -> Measurement:
    """One window: the replies within it, and the CPU that was used within it."""
    with _open_sessions(target, sessions) as prefixes:
        count = min(len(clients), len(prefixes))
        address = target.server.address
        clients.prepare([Load(target.kind, address, prefixes[k::count]) for k in range(count)])
        start = time.monotonic() + WARM_UP_SECONDS
        window = Window(start, start + seconds)
        clients.send(window)
        pids = [target.server.pid, *([target.store_pid] if target.store_pid else [])]
        cores = _busy_cores(pids, window)
        return _summary(clients.collect(), window, cores)


@contextmanager
def _open_sessions(target: Target, count: int) -> Iterator[list[bytes]]:
    """Sessions that are open inside the block: for each its request without `t`."""
    rows = np.random.default_rng(_SEED).standard_normal((count, INPUTS))
    run_id = uuid.uuid4().hex
    names = [f"bench-{run_id}-{number}" for number in range(count)]
    prefixes = [_prefix(*pair) for pair in zip(names, rows.tolist(), strict=True)]
    if target.kind is Kind.ECHO:
        yield prefixes
        return
    try:
        with grpc.insecure_channel(target.server.address) as channel:
            stub = StepstateServiceStub(channel)
            for name in names:
                stub.OpenSession(opening(name, target.durability))
            yield prefixes
            for name in names:
                stub.CloseSession(pb.CloseSessionRequest(session_id=name))
    except grpc.RpcError as error:
        raise BenchError(f"a session can't be opened or closed: {error.details()}") from error


def opening(session_id: str, durability: str) -> pb.OpenSessionRequest:
    """A request for a session of the benchmark's model."""
    request = pb.OpenSessionRequest(
        session_id=session_id, model=NAME, durability=f"DURABILITY_{durability.upper()}"
    )
    request.idle_timeout.FromTimedelta(LEFT_BEHIND)
    return request


def _prefix(session_id: str, row: list[float]) -> bytes:
    return pb.StepRequest(session_id=session_id, x=row).SerializeToString()


def _busy_cores(pids: Sequence[int], window: Window) -> list[float]:
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


def _summary(samples: Sequence[Sample], window: Window, cores: Sequence[float]) -> Measurement:
    latencies = np.concatenate([sample.latencies for sample in samples])
    if not len(latencies):
        raise BenchError(f"no reply came within {window.seconds:g} s: give --seconds more")
    rate = len(latencies) / window.seconds
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    server, store = (used / rate * 1e6 for used in (*cores, 0.0)[:2])
    return Measurement(len(latencies), rate, float(p50), float(p99), server, store)
