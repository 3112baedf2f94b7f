"""The latency of other sessions while one is primed with a long history."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import TypeAlias

import click
import grpc
import numpy as np
import uvloop
from numpy.typing import NDArray

from benchmarks import BenchError
from benchmarks.models import DESCRIPTION, INPUTS, NAME
from benchmarks.options import option
from benchmarks.report import Report, spread_text
from benchmarks.results import Spread, spread
from benchmarks.servers import ServerProcess, bench_folder, running_stepstate
from stepstate.client import Client
from stepstate.errors import StepstateError
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub

QUIET_SECONDS = 3.0
"""How long the others are measured without priming."""
_SEED = 4
_Stream: TypeAlias = "grpc.aio.StreamStreamCall[pb.StepRequest, pb.StepResponse]"


@dataclass(frozen=True, slots=True)
class PrimingPlan:
    """The latency of others while a session is primed with history, and the rate of that."""

    rows: int = option(100_000, click.IntRange(1, 1_000_000), "Rows of history.")
    others: int = option(16, click.IntRange(1, 1_000), "Sessions that are stepped meanwhile.")
    rate: float = option(50.0, click.FloatRange(0.1, 10_000.0), "Steps a second of each of them.")
    rounds: int = option(3, click.IntRange(1, 100), "Primed sessions, one after the other.")


@dataclass(frozen=True, slots=True)
class _Round:
    rows_per_second: float
    """Primed."""
    quiet_p50_ms: float
    quiet_p99_ms: float
    """Of the others' steps, before."""
    primed_p50_ms: float
    primed_p99_ms: float
    """Of the others' steps, meanwhile."""

    @property
    def p99_ratio(self) -> float:
        """The p99 of the others during priming over that before."""
        return self.primed_p99_ms / self.quiet_p99_ms


def priming(plan: PrimingPlan, log: Callable[[str], None]) -> Report:
    """Primes a session while others are stepped at a fixed rate, and measures these.

    Raises:
        BenchError: the server does not start, or refuses something.
    """
    with bench_folder() as folder, running_stepstate(folder, "memory:") as server:
        rounds: list[_Round] = []
        for number in range(1, plan.rounds + 1):
            try:
                rounds.append(uvloop.run(_round(plan, server)))
            except grpc.RpcError as error:
                raise BenchError(f"a step was refused: {error}") from error
            found = rounds[-1]
            log(
                f"round {number} of {plan.rounds}: {found.rows_per_second:,.0f} rows/s, p99 of the "
                f"others {found.quiet_p99_ms:.2f} ms before, {found.primed_p99_ms:.2f} ms meanwhile"
            )
        return _report(plan, rounds)


async def _round(plan: PrimingPlan, server: ServerProcess) -> _Round:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = StepstateServiceStub(channel)
        names = [f"other-{number}-{time.monotonic_ns()}" for number in range(plan.others)]
        for name in names:
            await stub.OpenSession(pb.OpenSessionRequest(session_id=name, model=NAME))
        streams = [(stub.StreamSteps(), name) for name in names]
        await _paced(plan, streams, asyncio.create_task(asyncio.sleep(0.5)))  # warm-up
        quiet = await _paced(plan, streams, asyncio.create_task(asyncio.sleep(QUIET_SECONDS)))
        primer = asyncio.create_task(asyncio.to_thread(_prime_elsewhere, server.address, plan.rows))
        primed = await _paced(plan, streams, primer)
        for name in names:
            await stub.CloseSession(pb.CloseSessionRequest(session_id=name))
    seconds = await primer
    p50, p99 = np.percentile(quiet, [50, 99]) * 1e3
    later_p50, later_p99 = np.percentile(primed, [50, 99]) * 1e3
    return _Round(plan.rows / seconds, float(p50), float(p99), float(later_p50), float(later_p99))


async def _paced(
    plan: PrimingPlan, streams: Sequence[tuple[_Stream, str]], until: asyncio.Task[object]
) -> NDArray[np.float64]:
    """Steps each session at the rate until a task is done; latencies in seconds.

    They count from the time at which a step was due, so that waiting is not hidden.
    """
    start, interval = time.perf_counter(), 1 / plan.rate
    found = await asyncio.gather(
        *(
            _pace(stream, name, start + interval * place / len(streams), interval, until)
            for place, (stream, name) in enumerate(streams)
        )
    )
    return np.array([latency for some in found for latency in some])


async def _pace(
    stream: _Stream, name: str, due: float, interval: float, until: asyncio.Task[object]
) -> list[float]:
    request = pb.StepRequest(session_id=name, x=[0.5] * INPUTS)
    latencies: list[float] = []
    while not until.done():
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        await stream.write(request)
        response = await stream.read()
        if not isinstance(response, pb.StepResponse) or response.HasField("error"):
            raise BenchError(f"a step was refused: {response}")
        latencies.append(time.perf_counter() - due)
        due += interval
    return latencies


def _prime_elsewhere(address: str, rows: int) -> float:
    """Primes a session in a process of its own; returns the seconds it took."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_prime, args=(address, rows, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        answer: float | str = ours.recv()
    except EOFError:
        answer = "its process died"
    process.join()
    if isinstance(answer, str):
        raise BenchError(f"priming failed: {answer}")
    return answer


def _prime(address: str, rows: int, parent: Connection[float | str, object]) -> None:
    history = np.random.default_rng(_SEED).standard_normal((rows, INPUTS)).astype(np.float32)
    try:
        with Client(address) as client, client.open(NAME) as session:
            began = time.perf_counter()
            session.prime(history)
            parent.send(time.perf_counter() - began)
    except StepstateError as error:
        parent.send(str(error))


def _report(plan: PrimingPlan, rounds: Sequence[_Round]) -> Report:
    def text(figure: Callable[[_Round], float], digits: int = 2) -> str:
        return spread_text(_spread(rounds, figure), digits)

    return Report(
        workload=(
            f"{DESCRIPTION}; {plan.others} sessions, {plan.rate:g} steps/s each on a stream of its "
            f"own, while another process primes one session with {plan.rows:,} rows; store "
            f"memory:; {plan.rounds} round(s), each with {QUIET_SECONDS:g} s without priming first"
        ),
        heads=("figure", "median (least–most)"),
        rows=[
            ("rows primed a second", text(lambda found: found.rows_per_second, 0)),
            ("p50 of the others without, ms", text(lambda found: found.quiet_p50_ms)),
            ("p50 of the others meanwhile, ms", text(lambda found: found.primed_p50_ms)),
            ("p99 of the others without, ms", text(lambda found: found.quiet_p99_ms)),
            ("p99 of the others meanwhile, ms", text(lambda found: found.primed_p99_ms)),
            ("p99 meanwhile over without", text(lambda found: found.p99_ratio)),
        ],
        notes=("Latency counts from the time at which a step was due.",),
        results=[{**asdict(found), "p99_ratio": found.p99_ratio} for found in rounds],
    )


def _spread(rounds: Sequence[_Round], figure: Callable[[_Round], float]) -> Spread:
    return spread(figure(found) for found in rounds)
