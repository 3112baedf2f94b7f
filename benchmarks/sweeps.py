"""The latency of active sessions while a server ends, or saves, very many others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks import BenchError
from benchmarks.clients import Clients, running_clients
from benchmarks.idle import IdleSessions
from benchmarks.load import ArrivalSchedule, CallPath, Kind, Load, Sample, Window
from benchmarks.models import DESCRIPTION, INPUTS
from benchmarks.options import MAX_IDLE, option
from benchmarks.procstat import PAGE_SECONDS, check_proc, series
from benchmarks.report import Report
from benchmarks.runner import Target, opened_sessions, percentiles
from benchmarks.servers import (
    DURABLE,
    STORES,
    ServerProcess,
    bench_folder,
    fresh_store,
    running_stepstate,
)
from benchmarks.sessions import SessionOptions

QUIET_SECONDS = 5.0
"""How long the active sessions are measured before a sweep."""
POLL_SECONDS = 0.5
"""Between two requests for the server's metrics, before a sweep as well."""
_TRIAL = 1_000
_MARGIN = 1.5
"""How much slower opening may become than in a trial."""
_SEED = 5


@dataclass(frozen=True, slots=True)
class SweepsPlan:
    """The latency of active sessions while very many others expire, or are saved."""

    sessions: int = option(
        100_000, click.IntRange(1, MAX_IDLE), "Sessions that expire, or are saved."
    )
    store: str = option("sqlite", click.Choice(STORES), "Where they are kept; memory saves none.")
    active: int = option(64, click.IntRange(1, 10_000), "Sessions that are stepped meanwhile.")
    rate: float = option(500.0, click.FloatRange(1.0, 1e6), "Steps a second of all of them.")
    seconds: float = option(
        30.0, click.FloatRange(1.0, 3600.0), "How long each sweep is watched at the most."
    )
    processes: int = option(2, click.IntRange(1, 64), "Clients that open the sessions.")


@dataclass(frozen=True, slots=True)
class _Sweep:
    """The steps that were due before a sweep and during it."""

    what: str
    sessions: int
    """Ended, or saved, while it was watched."""
    seconds: float
    """How long it took, or was watched."""
    quiet_ms: dict[str, float]
    swept_ms: dict[str, float]
    """Latencies by percentile, from when a step was due."""

    @property
    def p99_ratio(self) -> float:
        return self.swept_ms["99"] / self.quiet_ms["99"]


def sweeps(plan: SweepsPlan, log: Callable[[str], None]) -> Report:
    """Lets very many sessions expire at once and, with a durable store, saves as many.

    Raises:
        BenchError: a server does not start, refuses something, or breaks off.
    """
    check_proc()
    with (
        bench_folder() as folder,
        running_clients(1) as stepper,
        running_clients(plan.processes) as openers,
    ):
        run = _Sweeps(plan, folder, stepper, openers)
        found = [run.expiry()]
        log(_progress(found[-1]))
        if plan.store in DURABLE:
            found.append(run.snapshots())
            log(_progress(found[-1]))
    return _report(plan, found)


@dataclass(frozen=True, slots=True)
class _Sweeps:
    plan: SweepsPlan
    folder: Path
    stepper: Clients
    openers: Clients

    def expiry(self) -> _Sweep:
        """Sessions that expire at the same moment."""
        with self._active() as (server, names):
            moment = self._open_until(server)
            window = self._send(server, names, moment - QUIET_SECONDS)
            end = self._watch(server, moment, window, lambda: self._left_to_expire(server))
            ended = self.plan.sessions - self._left_to_expire(server)
            return self._sweep("expiry", ended, window=window, moment=moment, end=end)

    def snapshots(self) -> _Sweep:
        """Sessions that all have an unsaved row."""
        with self._active() as (server, names):
            idle = IdleSessions(self.plan.sessions, server.address, self.openers)
            idle.open(SessionOptions())
            window = self._send(server, names, time.monotonic() + 1.0)
            self._watch(server, window.start + QUIET_SECONDS, window, lambda: 0)
            saved = _saved(server)
            time.sleep(PAGE_SECONDS)  # the next look is at a page of its own
            burst = time.monotonic()
            idle.step()
            moment = time.monotonic()
            # The active sessions' own rows of about two rounds are always waiting.
            waiting = 3 * self.plan.rate
            end = self._watch(server, moment, window, lambda: _unsaved(server) > waiting)
            count = _saved(server) - saved
            return self._sweep(
                "snapshots", count, window=window, moment=moment, end=end, quiet_until=burst
            )

    @contextmanager
    def _active(self) -> Iterator[tuple[ServerProcess, Sequence[str]]]:
        """A server with room for all, and the sessions that are stepped."""
        room = str(self.plan.sessions + self.plan.active + _TRIAL)
        options = ("--slots", room, "--max-sessions", room)
        with (
            fresh_store(self.plan.store, self.folder) as store,
            running_stepstate(self.folder, store.url, *options) as server,
            opened_sessions(Target("active", server), self.plan.active) as names,
        ):
            yield server, names

    def _open_until(self, server: ServerProcess) -> float:
        """Opens sessions that all expire at the moment that is returned."""
        trial = IdleSessions(_TRIAL, server.address, self.openers)
        each = trial.open(SessionOptions()) / _TRIAL
        trial.close()
        opening = _MARGIN * each * self.plan.sessions
        moment = time.monotonic() + opening + QUIET_SECONDS + 4.0
        IdleSessions(self.plan.sessions, server.address, self.openers).open(
            SessionOptions(expires_at=moment)
        )
        if time.monotonic() > moment - QUIET_SECONDS - 1.0:
            raise BenchError(
                "opening became much slower meanwhile, and sessions expired: try again"
            )
        return moment

    def _send(self, server: ServerProcess, names: Sequence[str], start: float) -> Window:
        """Begins to step the active sessions, at fixed times."""
        x = np.random.default_rng(_SEED).standard_normal((len(names), INPUTS)).astype(np.float32)
        schedule = ArrivalSchedule(1 / self.plan.rate, 0.0)
        load = Load(Kind.STEP, CallPath.STREAM, server.address, names, x, schedule)
        self.stepper.prepare([load])
        finish = start + QUIET_SECONDS + self.plan.seconds
        window = Window(time.monotonic(), start, finish)
        self.stepper.send(window)
        return window

    def _watch(
        self, server: ServerProcess, moment: float, window: Window, left: Callable[[], float]
    ) -> float:
        """Waits for a moment, then until nothing is left to do; returns the time of that."""
        while True:
            now = time.monotonic()
            something = _unsaved(server) if now < moment else left()
            if now >= window.finish or (now >= moment and not something):
                return now
            time.sleep(max(0.0, min(now + POLL_SECONDS, window.finish) - time.monotonic()))

    def _left_to_expire(self, server: ServerProcess) -> int:
        ended = series(server.metrics_url, "stepstate_sessions_closed_total", reason="expired")
        return self.plan.sessions - int(ended)

    def _sweep(
        self,
        what: str,
        sessions: int,
        *,
        window: Window,
        moment: float,
        end: float,
        quiet_until: float | None = None,
    ) -> _Sweep:
        (sample,) = self.stepper.collect()
        quiet = _due_within(sample, window.start, quiet_until or moment)
        swept = _due_within(sample, moment, max(end, moment + POLL_SECONDS))
        return _Sweep(what, sessions, end - moment, percentiles(quiet), percentiles(swept))


def _due_within(sample: Sample, start: float, finish: float) -> NDArray[np.float64]:
    """The latencies of the messages that were due in a period."""
    found = sample.latencies[(sample.since >= start) & (sample.since < finish)]
    if not len(found):
        raise BenchError("no step was due in the sweep: give --rate more")
    return found


def _saved(server: ServerProcess) -> int:
    return int(series(server.metrics_url, "stepstate_snapshots_total"))


def _unsaved(server: ServerProcess) -> float:
    return series(server.metrics_url, "stepstate_snapshot_backlog_rows")


def _progress(sweep: _Sweep) -> str:
    return (
        f"{sweep.what}: {sweep.sessions:,} sessions in {sweep.seconds:.1f} s, p99 of the active "
        f"{sweep.quiet_ms['99']:.2f} ms before, {sweep.swept_ms['99']:.2f} ms meanwhile"
    )


def _report(plan: SweepsPlan, found: Sequence[_Sweep]) -> Report:
    return Report(
        workload=(
            f"{DESCRIPTION}; store {plan.store}; {plan.active} active sessions, {plan.rate:g} "
            f"steps/s in all at fixed times, one stream a session, while {plan.sessions:,} others "
            f"expire at the same moment, or have their snapshots saved; each watched for at most "
            f"{plan.seconds:g} s, after {QUIET_SECONDS:g} s without"
        ),
        heads=(
            *("sweep", "sessions", "seconds", "p50 ms before", "p99 before", "most before"),
            *("p50 ms meanwhile", "p99 meanwhile", "most meanwhile", "p99 ÷ before"),
        ),
        rows=[_row(sweep) for sweep in found],
        notes=("Latency counts from the time at which a step was due.",),
        results=[{**asdict(sweep), "p99_ratio": sweep.p99_ratio} for sweep in found],
    )


def _row(sweep: _Sweep) -> tuple[str, ...]:
    latencies = (
        f"{latency[name]:.2f}"
        for latency in (sweep.quiet_ms, sweep.swept_ms)
        for name in ("50", "99", "100")
    )
    counts = (sweep.what, f"{sweep.sessions:,}", f"{sweep.seconds:.1f}")
    return (*counts, *latencies, f"{sweep.p99_ratio:.2f}")
