"""Through kill -9, stores that are away and rival servers no row is lost, none applied twice.

Short runs; `python -m tests.chaos.campaign --all` runs every scenario at length.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.campaign import Run, all_runs
from tests.chaos.scenarios import Ground
from tests.networks import Network

SESSIONS = 200
FAULTS = 3
SHORT = (
    "server killed, sqlite, async",
    "server killed, sqlite, sync",
    "server killed, redis, async",
    "server killed, redis, sync",
    "server killed, slots 50, sqlite, async",
    "server killed, slots 50, redis, sync",
    "server terminated, sqlite, all",
    "calls cancelled, sqlite, sync",
    "client killed, sqlite, async",
    "library resumes, sqlite, async",
    "library resumes, redis, sync",
    "redis killed, redis, async",
    "redis killed, redis, sync",
    "servers swapped, redis, async",
    "servers swapped, redis, sync",
    "servers fought, redis, sync",
    "store hurt, how full disk, sqlite, all",
    "store hurt, how read-only database, sqlite, all",
    "store hurt, how stopped Redis, redis, all",
)


def name(run: Run) -> str:
    return f"{run}, {run.store}, {run.durability}"


@pytest.fixture
def ground(tmp_path: Path, model_root: Path, networks: dict[str, Network]) -> Ground:
    return Ground(tmp_path, model_root, networks["lstm"], SESSIONS, FAULTS)


@pytest.mark.parametrize("run", [run for run in all_runs() if name(run) in SHORT], ids=name)
async def test_no_row_is_lost_and_none_applied_twice(
    ground: Ground, run: Run, program: Callable[[str], str]
):
    if run.store == "redis":
        program("redis-server")
    outcome = await run.outcome(ground)
    print(outcome)
    outcome.check()
    assert outcome.tally.sessions == SESSIONS
