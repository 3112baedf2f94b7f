"""A stream that has ended leaves nothing: no memory, and no object for Python's collector."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from stepstate.config import ServerConfig
from stepstate.loop import ServerLoop
from stepstate.server import running_server
from tests.attacks.harness import MIB, Ground
from tests.attacks.processes import Memory, in_child
from tests.attacks.streams import KINDS, ONE, Kind, nothing, run
from tests.integration.wire import opened, raw_stub

pytestmark = pytest.mark.attacks

STREAMS = 40
ROOM, MAX_OBJECTS = 5 * MIB, 100


class Counted:
    """A server in a process of its own, which counts its objects when it is asked to.

    Its collector is off: what only that would find counts as left.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.address: str = connection.recv()

    async def growth(self, kind: Kind, count: int, *, in_order: bool) -> tuple[int, int]:
        """Bytes and objects that are left by streams of a client that is gone."""
        memory, objects = self._count(collect=True)
        with in_child(run, self.address, kind, count, in_order) as client:
            await asyncio.to_thread(client.join, 60)
            assert client.exitcode == 0
        await asyncio.sleep(0.5)
        memory_after, objects_after = self._count(collect=False)
        return memory_after - memory, objects_after - objects

    def _count(self, *, collect: bool) -> tuple[int, int]:
        self._connection.send(collect)
        counted: tuple[int, int] = self._connection.recv()
        return counted


@contextmanager
def counted_server(folder: Path) -> Iterator[Counted]:
    mine, its = multiprocessing.Pipe()
    with in_child(_serve, folder, its):
        its.close()
        yield Counted(mine)


def _serve(folder: Path, connection: Connection) -> None:
    with asyncio.Runner(loop_factory=ServerLoop) as runner:
        runner.run(_count_until_killed(folder, connection))


async def _count_until_killed(folder: Path, connection: Connection) -> None:
    ground = Ground.of(folder)
    settings = ServerConfig(
        models=ground.models,
        listen="127.0.0.1:0",
        metrics_listen="127.0.0.1:0",
        store="memory:",  # the cursors of sqlite leave some weak references for a while
    )
    memory = Memory(os.getpid())
    async with running_server(settings) as server:
        connection.send(server.address)
        gc.disable()
        while True:
            if await asyncio.to_thread(connection.recv):
                gc.collect()
            connection.send((memory.now(), len(gc.get_objects())))


@pytest.mark.parametrize("in_order", [True, False], ids=["ended", "cancelled"])
@pytest.mark.parametrize("kind", KINDS)
async def test_streams_that_ended_leave_nothing(tmp_path: Path, kind: Kind, *, in_order: bool):
    with counted_server(tmp_path) as server:
        async with raw_stub(server.address) as stub:
            await opened(stub, ONE)
        await server.growth(kind, 4, in_order=in_order)
        _, grpcs_own = await server.growth(nothing, STREAMS, in_order=True)
        memory, objects = await server.growth(kind, STREAMS, in_order=in_order)
    print(f"{memory / MIB:.1f} MiB, {objects} objects; of gRPC itself {grpcs_own}")
    assert objects - grpcs_own <= MAX_OBJECTS
    assert memory <= ROOM
