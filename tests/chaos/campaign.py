"""Kills servers, stores and clients under load, and prints what it cost.

    .venv/bin/python -m tests.chaos.campaign --all
    .venv/bin/python -m tests.chaos.campaign server_killed --store sqlite --durability sync

Each line of the table is one scenario: hundreds of sessions step without a stop, every client
keeps its inputs and the outputs that it was given, and at the end nn.LSTM is run over the inputs.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.chaos import scenarios
from tests.chaos.scenarios import Ground, Outcome
from tests.chaos.store_faults import may_mount
from tests.networks import make_network

HEADS = (
    "scenario",
    "store",
    "durability",
    "faults",
    "sessions",
    "rows acknowledged",
    "rows lost",
    "rows applied twice",
    "rows sent again",
    "longest pause, s",
)
BOTH = ("async", "sync")


class Run:
    """One scenario and its settings, and what the table says of them."""

    def __init__(self, scenario: str, store: str, durability: str, /, **settings: object) -> None:
        self.scenario = scenario
        self.store = store
        self.durability = durability
        self._settings = settings

    def __str__(self) -> str:
        more = (f"{k} {v}" for k, v in self._settings.items() if k not in ("kind", "durability"))
        return ", ".join((self.scenario.replace("_", " "), *more))

    async def outcome(self, ground: Ground) -> Outcome:
        """Runs it."""
        return await getattr(scenarios, self.scenario)(ground, **self._settings)


def all_runs() -> list[Run]:
    """Every scenario, on every store and durability that it is for."""
    runs = []
    for kind, durability in itertools.product(("sqlite", "redis"), BOTH):
        on = {"kind": kind, "durability": durability}
        runs += [
            Run("server_killed", kind, durability, **on),
            Run("server_killed", kind, durability, slots=50, **on),
            Run("calls_cancelled", kind, durability, **on),
            Run("client_killed", kind, durability, **on),
            Run("library_resumes", kind, durability, **on),
        ]
    runs += [Run("server_terminated", kind, "all", kind=kind) for kind in ("sqlite", "redis")]
    for durability in BOTH:
        runs.append(Run("redis_killed", "redis", durability, durability=durability))
        runs.append(Run("servers_swapped", "redis", durability, durability=durability))
    runs.append(Run("servers_fought", "redis", "sync"))
    hurts = [how for how in scenarios.HURTS if how != "full disk" or may_mount()]
    runs += [
        Run("store_hurt", "redis" if "Redis" in how else "sqlite", "all", how=how) for how in hurts
    ]
    return runs


@contextmanager
def ground(sessions: int, faults: int) -> Iterator[Ground]:
    """A place for one scenario."""
    with tempfile.TemporaryDirectory(prefix="stepstate-campaign-") as name:
        network = make_network("lstm", seed=1)
        models = Path(name) / "models"
        network.write(models)
        yield Ground(Path(name), models, network, sessions, faults)


def fought(run: Run, sessions: int, faults: int) -> bool:
    """Runs a scenario and prints its line; whether all was well."""
    random.seed(os.urandom(8))
    with ground(sessions, faults) as place:
        try:
            outcome = asyncio.run(run.outcome(place))
            outcome.check()
        except Exception as error:  # noqa: BLE001 - the others are still to be run
            print(f"| {run} | {run.store} | {run.durability} | FAILED: {error!r} |", flush=True)
            return False
    tally = outcome.tally
    numbers = (outcome.faults, tally.sessions, tally.rows, tally.lost, tally.twice)
    cells = [str(run), run.store, run.durability, *(f"{number:,}" for number in numbers)]
    cells += [f"{tally.rolled_back + tally.repeated:,}", f"{tally.pause:.1f}"]
    print(f"| {' | '.join(cells)} |", flush=True)
    return True


def chosen(options: argparse.Namespace) -> list[Run]:
    """What is asked for."""
    return [
        run
        for run in all_runs()
        if options.all
        or (
            run.scenario == options.scenario
            and options.store in ("", run.store)
            and options.durability in ("", run.durability)
        )
    ]


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = sorted({run.scenario for run in all_runs()})
    parser.add_argument("scenario", nargs="?", default="server_killed", choices=names)
    parser.add_argument("--all", action="store_true", help="every scenario on every store")
    parser.add_argument("--store", default="", choices=("sqlite", "redis"))
    parser.add_argument("--durability", default="", choices=(*BOTH, "all"))
    parser.add_argument("--kills", type=int, default=20, help="faults in each scenario")
    parser.add_argument("--sessions", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, clients and servers together; {sys.version.split()[0]}\n")
    print(f"| {' | '.join(HEADS)} |")
    print(f"|{'---|' * len(HEADS)}")
    done = [fought(run, options.sessions, options.kills) for run in chosen(options)]
    return 0 if done and all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
