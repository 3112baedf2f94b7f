"""How long a restart after kill -9 takes, with many sessions in the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from benchmarks.models import DESCRIPTION
from benchmarks.options import option
from benchmarks.report import Report
from benchmarks.results import Spread, spread
from benchmarks.servers import (
    DURABLE,
    ServerProcess,
    Store,
    bench_folder,
    fresh_store,
    running_stepstate,
)
from benchmarks.sessions import STEPPED_AT_ONCE, SessionGroup

DURABILITY = "sync"
"""All steps before a kill are in the store, so the t of the next one is known."""


@dataclass(frozen=True, slots=True)
class RestartPlan:
    """From kill -9 to the first step of a stored session, beside a bare start."""

    store: str = option("sqlite", click.Choice(DURABLE), "Where the sessions are stored.")
    stored: int = option(10_000, click.IntRange(2, 1_000_000), "Sessions that are stored.")
    rows: int = option(
        32, click.IntRange(1, 10_000), "Rows of each session, all kept in its replay window."
    )
    rounds: int = option(3, click.IntRange(1, 100), "Starts of each kind.")


@dataclass(frozen=True, slots=True)
class _Round:
    bare_start: float
    """Seconds from the start of a server on an empty store to its first step."""
    restart: float
    """Seconds from kill -9 to the first step of a stored session."""
    others: float
    """Seconds for a step of each of the other stored sessions after that."""

    @property
    def more(self) -> float:
        """What the kill and the stored sessions cost."""
        return self.restart - self.bare_start


def restart(plan: RestartPlan, log: Callable[[str], None]) -> Report:
    """Kills a server and starts it again, in turn with bare starts.

    Raises:
        BenchError: a server does not start, refuses a step, or answers it wrongly.
    """
    with bench_folder() as folder, fresh_store(plan.store, folder) as store:
        first, others = SessionGroup(1, DURABILITY), SessionGroup(plan.stored - 1, DURABILITY)
        with running_stepstate(folder, store.url) as server:
            for group in (first, others):
                _fill(group, server, plan.rows)
            log(f"{plan.stored:,} sessions are stored, in {store.file_bytes():,} bytes")
            killed_at = _kill(server)
        rounds: list[_Round] = []
        for number in range(1, plan.rounds + 1):
            found, killed_at = _round(folder, store, first, others, killed_at)
            rounds.append(found)
            log(
                f"round {number} of {plan.rounds}: bare start {found.bare_start:.2f} s, "
                f"from kill -9 to the first step {found.restart:.2f} s"
            )
        return _report(plan, store, rounds)


def _fill(group: SessionGroup, server: ServerProcess, rows: int) -> None:
    group.open(server.address)
    for _ in range(rows):
        group.step(server.address)


def _kill(server: ServerProcess) -> float:
    """Kills it; returns when."""
    killed_at = time.monotonic()
    server.kill()
    return killed_at


def _round(
    folder: Path, store: Store, first: SessionGroup, others: SessionGroup, killed_at: float
) -> tuple[_Round, float]:
    """Starts a server after the one before it was killed, and kills it in turn."""
    with running_stepstate(folder, store.url) as server:
        first.step(server.address)
        again = time.monotonic() - killed_at
        taken = others.step(server.address)
        return _Round(_bare_start(folder, store.kind), again, taken.seconds), _kill(server)


def _bare_start(folder: Path, kind: str) -> float:
    with fresh_store(kind, folder) as empty:
        began = time.monotonic()
        with running_stepstate(folder, empty.url) as server:
            _fill(SessionGroup(1, DURABILITY), server, 1)
            return time.monotonic() - began


def _report(plan: RestartPlan, store: Store, rounds: Sequence[_Round]) -> Report:
    found = {
        "bare_start": spread(each.bare_start for each in rounds),
        "restart": spread(each.restart for each in rounds),
        "more": spread(each.more for each in rounds),
        "others": spread(each.others for each in rounds),
    }
    return Report(
        workload=(
            f"{DESCRIPTION}; {plan.stored:,} sync sessions, {plan.rows} single rows applied to "
            f"each, {store.file_bytes():,} bytes in {store.description}; one Python "
            f"client, at most {STEPPED_AT_ONCE} steps on their way; {plan.rounds} round(s), each "
            f"with both starts"
        ),
        heads=("seconds", "median", "least", "most"),
        rows=[
            _row("bare start on an empty store, to its first step", found["bare_start"]),
            _row("kill -9 to the first step of a stored session", found["restart"]),
            _row("the second less the first, round by round", found["more"]),
            _row(f"then a step of each of the other {plan.stored - 1:,}", found["others"]),
        ],
        notes=(
            "The clock runs from the start of the process, or from the kill, until a client has",
            "its answer. Every output was compared with those of the other sessions.",
        ),
        results={
            **{name: asdict(figure) for name, figure in found.items()},
            "rounds": [asdict(each) for each in rounds],
            "stored_bytes": store.file_bytes(),
        },
    )


def _row(what: str, figure: Spread) -> tuple[str, ...]:
    return (what, *(f"{value:.2f}" for value in (figure.median, figure.least, figure.most)))
