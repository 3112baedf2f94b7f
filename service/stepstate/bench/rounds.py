"""Rounds: echo and steps in turn, under the same load, each measured over one window."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from stepstate.bench.clients import Clients, running_clients
from stepstate.bench.errors import BenchError
from stepstate.bench.figures import Comparison, Measurement, Plan
from stepstate.bench.load import Kind, Load, Sample, Window
from stepstate.bench.model import INPUTS, NAME
from stepstate.bench.servers import Launched, running_echo, running_stepstate
from stepstate.client import Client, Session
from stepstate.errors import StepstateError
from stepstate.v1 import stepstate_pb2 as pb

WARM_UP_SECONDS = 1.0
"""Caches and the first forwards settle in it, after every stream was answered once."""

_SEED = 2
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def run(plan: Plan, tell: Callable[[str], None]) -> list[Comparison]:
    """Runs the plan on servers of its own, and says after each round how it went.

    Raises:
        BenchError: a server does not start, refuses a step, or breaks off.
    """
    if not Path("/proc/self/stat").exists():
        raise BenchError("a server's CPU time is read from /proc, which is missing: use Linux")
    with ExitStack() as stack:
        servers = {
            Kind.ECHO: stack.enter_context(running_echo()),
            Kind.STEP: stack.enter_context(running_stepstate()),
        }
        clients = stack.enter_context(running_clients(plan.processes))
        return [_compare(plan, sessions, servers, clients, tell) for sessions in plan.sessions]


def _compare(
    plan: Plan,
    sessions: int,
    servers: dict[Kind, Launched],
    clients: Clients,
    tell: Callable[[str], None],
) -> Comparison:
    echo: list[Measurement] = []
    step: list[Measurement] = []
    for number in range(1, plan.rounds + 1):
        with _open_sessions(servers[Kind.STEP].address, sessions) as prefixes:
            for kind, rounds in ((Kind.ECHO, echo), (Kind.STEP, step)):
                rounds.append(_measure(kind, servers[kind], clients, prefixes, plan.seconds))
        rates = (rounds[-1].messages_per_second for rounds in (echo, step))
        told = "echo {:,.0f}/s, steps {:,.0f}/s".format(*rates)
        tell(f"sessions {sessions}, round {number} of {plan.rounds}: {told}")
    return Comparison(sessions, tuple(echo), tuple(step))


@contextmanager
def _open_sessions(target: str, count: int) -> Iterator[list[bytes]]:
    """Sessions that are open inside the block: for each its request without `t`."""
    rows = np.random.default_rng(_SEED).standard_normal((count, INPUTS))
    try:
        with Client(target) as client:
            opened = [client.open(NAME) for _ in range(count)]
            yield [_prefix(*pair) for pair in zip(opened, rows.tolist(), strict=True)]
            for session in opened:
                session.close()
    except StepstateError as error:
        raise BenchError(f"a session can't be opened or closed: {error}") from error


def _prefix(session: Session, row: list[float]) -> bytes:
    return pb.StepRequest(session_id=session.session_id, x=row).SerializeToString()


def _measure(
    kind: Kind, server: Launched, clients: Clients, prefixes: Sequence[bytes], seconds: float
) -> Measurement:
    """One window: the replies within it, and the CPU that the server used within it."""
    count = min(len(clients), len(prefixes))
    clients.prepare([Load(kind, server.address, prefixes[k::count]) for k in range(count)])
    start = time.monotonic() + WARM_UP_SECONDS
    window = Window(start, start + seconds)
    clients.send(window)
    cores = _busy_cores(server.pid, window)
    return _summary(clients.collect(), window, cores)


def _busy_cores(pid: int, window: Window) -> float:
    """CPU seconds a second over the window, which it waits for.

    On a busy machine both readings may come late, so they are set against the
    time between them, not against the window's length.
    """
    _sleep_until(window.start)
    began, used_before = time.monotonic(), _cpu_seconds(pid)
    _sleep_until(window.finish)
    ended, used_after = time.monotonic(), _cpu_seconds(pid)
    return (used_after - used_before) / (ended - began)


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process: fields 14 and 15 of proc(5)'s stat.

    The name of the process, field 2, is in brackets and may hold anything.
    """
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = after_name[11:13]
    return (int(user) + int(system)) / _TICKS_PER_SECOND


def _summary(samples: Sequence[Sample], window: Window, cores: float) -> Measurement:
    latencies = np.concatenate([sample.latencies for sample in samples])
    if not len(latencies):
        raise BenchError(f"no reply came within {window.seconds:g} s: give --seconds more")
    rate = len(latencies) / window.seconds
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    return Measurement(len(latencies), rate, float(p50), float(p99), cores / rate * 1e6)
