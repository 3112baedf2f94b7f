"""Through kill -9, stores that are away and competing servers no row is lost, none applied twice.

Short runs; `python -m tests.chaos.campaign --all` runs every scenario at length.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos import store_faults
from tests.chaos.campaign import Run, all_runs
from tests.chaos.fleet import fleet
from tests.chaos.scenarios import Ground, Outcome
from tests.networks import Network

SESSIONS = 200
SHORT = {
    "server killed, sqlite, async": 3,
    "server killed, sqlite, sync": 3,
    "server killed, redis, async": 3,
    "server killed, redis, sync": 3,
    "server killed, slots 50, sqlite, async": 2,
    "server terminated, sqlite, all": 2,
    "calls cancelled, sqlite, sync": 2,
    "client killed, sqlite, async": 2,
    "library resumes, sqlite, async": 2,
    "library resumes, redis, sync": 2,
    "redis killed, redis, sync": 2,
    "servers swapped, redis, async": 2,
    "servers fought, redis, sync": 2,
    "store hurt, how full disk, sqlite, all": 1,
    "store hurt, how read-only database, sqlite, all": 1,
    "store hurt, how stopped Redis, redis, all": 1,
}
"""Faults of each."""
SHORTEST = ("server killed, sqlite, sync", "servers fought, redis, sync")


def name(run: Run) -> str:
    return f"{run}, {run.store}, {run.durability}"


@pytest.fixture
def ground(run: Run, tmp_path: Path, model_root: Path, networks: dict[str, Network]) -> Ground:
    return Ground(tmp_path, model_root, networks["lstm"], SESSIONS, SHORT[name(run)])


def marked(run: Run) -> object:
    """Two of them are short enough for every change."""
    return pytest.param(run, marks=() if name(run) in SHORTEST else pytest.mark.long, id=name(run))


@pytest.mark.parametrize("run", [marked(run) for run in all_runs() if name(run) in SHORT])
async def test_no_row_is_lost_and_none_applied_twice(
    ground: Ground, run: Run, program: Callable[[str], str]
):
    if run.store == "redis":
        program("redis-server")
    outcome = await run.outcome(ground)
    print(outcome)
    outcome.check()
    assert outcome.tally.sessions == SESSIONS


@pytest.mark.long
async def test_a_server_that_comes_back_to_a_read_only_database_does_not_start_until_it_may_write(
    tmp_path: Path, model_root: Path, networks: dict[str, Network]
):
    folder = tmp_path / "store"
    folder.mkdir()
    ground = Ground(tmp_path, model_root, networks["lstm"], SESSIONS, faults=1)
    url, prefix = f"sqlite:{folder / 'sessions.db'}", store_faults.subject_to_permissions()
    async with ground.serve(url, prefix=prefix) as server, fleet(server.address) as clients:
        await clients.launch(SESSIONS, ("async", "sync"))
        await clients.progress(1)
        server.kill()
        before = await clients.rows_at_standstill()
        with store_faults.read_only(folder):
            with pytest.raises(AssertionError, match="see that the server may write there"):
                await server.start()
            await clients.last(1.0)
            assert await clients.rows_at_standstill() == before
        await server.start()
        await clients.progress(1)
        Outcome(1, await clients.finish(networks["lstm"])).check()


@pytest.mark.long
@pytest.mark.parametrize("parts", [("-wal",), ("-shm",), ("-wal", "-shm")], ids="".join)
async def test_files_that_are_deleted_beside_the_database_of_a_server_that_is_killed_cost_no_row(
    tmp_path: Path, model_root: Path, networks: dict[str, Network], parts: tuple[str, ...]
):
    """A step after the deletion is all that the server needs to notice it."""
    ground = Ground(tmp_path, model_root, networks["lstm"], SESSIONS, faults=1)
    path = tmp_path / "sessions.db"
    async with ground.serve(f"sqlite:{path}") as server, fleet(server.address) as clients:
        await clients.launch(SESSIONS, ("async", "sync"))
        for _ in range(2):
            await clients.progress(1)
            for part in parts:
                path.with_name(path.name + part).unlink()
            await clients.progress(1)
            server.kill()
            await server.start()
        Outcome(2, await clients.finish(networks["lstm"])).check()
