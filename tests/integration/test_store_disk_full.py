"""Sync sessions on a small disk that is full: by itself, or by the WAL that a reader keeps."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import pytest

from stepstate.config import ServerConfig
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.outage import OUTAGE_SECONDS, Load, load, outages
from tests.integration.prometheus import eventually, running_prometheus
from tests.integration.wire import HANG, sample, scrape
from tests.networks import Network
from tests.processes import server_process

pytestmark = pytest.mark.long  # outages, each as long as a real one

DISK = 24 * 2**20
LARGE = {"replay_rows": 512}
"""Snapshots of 10 KiB and more, so that the disk is full within seconds."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk, where mounting is permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def reader(path: Path) -> Iterator[None]:
    """A process that has begun to read the database as it is now, and does not end."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM sessions").fetchone()
        yield


def fill(disk: Path) -> Path:
    """Takes all the room that is left."""
    ballast = disk / "ballast"
    with suppress(OSError), ballast.open("wb") as file:
        while file.write(bytes(4096)):
            file.flush()
    return ballast


def names(folder: Path) -> list[str]:
    return [one.name for one in folder.iterdir()]


async def away(clients: Load, *, opening: bool = False) -> None:
    """Waits until steps are refused, and a while longer; new sessions may make the file grow."""
    async with asyncio.timeout(2 * HANG):
        while opening and not clients.refusals:
            await clients.open_more(20)
            await asyncio.sleep(0.01)
    await clients.stays_away()


async def test_a_disk_that_a_reader_filled_is_used_again_when_the_reader_is_gone(
    config: ServerConfig, network: Network, disk: Path, caplog: pytest.LogCaptureFixture
):
    """The WAL, which could not be written back, has room for that; then the file shrinks."""
    path = disk / "sessions.db"
    async with load(config, f"sqlite:{path}", pause=0, **LARGE) as clients:
        with reader(path):
            await away(clients, opening=True)
            assert {cause for _, cause in clients.refusals} <= {"full", "wal"}
            assert path.with_name("sessions.db-wal").stat().st_size > DISK / 4
        await clients.progress(20)
        await clients.healthy_again()
        clients.check(network)
        text = await scrape(clients.server.metrics_address)
        assert sample(text, 'stepstate_store_file_bytes{file="reserve"}') >= DISK / 16
        assert sample(text, 'stepstate_store_file_bytes{file="database"}') > 0
        assert sample(text, "stepstate_store_volume_bytes") == DISK
        assert 0 < sample(text, "stepstate_store_free_bytes") < DISK
    assert outages(caplog) == ["the store is away", "the store is back"]
    assert names(disk) == ["sessions.db"]


async def test_a_disk_that_others_filled_is_used_again_when_there_is_room(
    config: ServerConfig, network: Network, disk: Path, caplog: pytest.LogCaptureFixture
):
    async with load(config, f"sqlite:{disk / 'sessions.db'}", pause=0, **LARGE) as clients:
        ballast = fill(disk)
        await away(clients)
        before = [session.t for session in clients.sessions]
        await asyncio.sleep(OUTAGE_SECONDS)
        assert [session.t for session in clients.sessions] == before
        ballast.unlink()
        await clients.progress(20)
        await clients.healthy_again()
        clients.check(network)
    assert outages(caplog) == ["the store is away", "the store is back"]


async def test_a_disk_filled_by_a_reader_and_by_others_needs_only_the_reader_to_go(
    config: ServerConfig, network: Network, disk: Path
):
    """Not a byte is free: the reserve is what the WAL is written back with."""
    path = disk / "sessions.db"
    async with load(config, f"sqlite:{path}", pause=0, **LARGE) as clients:
        with reader(path):
            await away(clients, opening=True)
            fill(disk)
            assert shutil.disk_usage(disk).free == 0
        await clients.progress(20)
        await clients.healthy_again()
        clients.check(network)


def test_the_alert_on_a_full_disk_fires_and_nothing_takes_it_back(disk: Path, model_root: Path):
    """Reads succeed all the time."""
    opening = pb.OpenSessionRequest(session_id="a", model="lstm", durability=pb.DURABILITY_SYNC)
    steps = (pb.StepRequest(session_id="a", t=t, x=[0.1, 0.2, 0.3]) for t in range(10**6))
    options = ("--models", str(model_root), "--store", f"sqlite:{disk / 'sessions.db'}")
    with (
        server_process(*options) as server,
        TemporaryDirectory() as folder,
        running_prometheus(Path(folder), server) as prometheus,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = StepstateServiceStub(channel)
        stub.OpenSession(opening)
        fill(disk)
        with pytest.raises(grpc.RpcError, match="disk is full"):
            list(map(stub.Step, steps))

        def firing() -> bool:
            assert len(stub.ListSessions(pb.ListSessionsRequest()).sessions) == 1
            alert = 'ALERTS{alertname="StepstateStoreAway", alertstate="firing"}'
            return prometheus.value(alert) == 1

        eventually(firing, seconds=90)
        assert prometheus.value("max_over_time(stepstate_store_up[25s])") == 0
