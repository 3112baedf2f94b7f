"""A stream that has ended leaves nothing: no memory, and no object for Python's collector."""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path

import pytest

from stepstate.config import ServerConfig
from stepstate.server import running_server
from tests.attacks.harness import MIB, Ground
from tests.attacks.processes import Memory, in_child
from tests.attacks.streams import KINDS, ONE, Kind, nothing, run
from tests.integration.wire import opened, raw_stub

pytestmark = pytest.mark.attacks

STREAMS = 40
ROOM, MAX_OBJECTS = 5 * MIB, 100


@pytest.mark.parametrize("in_order", [True, False], ids=["ended", "cancelled"])
@pytest.mark.parametrize("kind", KINDS)
async def test_streams_that_ended_leave_nothing(tmp_path: Path, kind: Kind, *, in_order: bool):
    """The server is in this process, so that its objects can be counted; its clients are not."""
    ground = Ground.of(tmp_path)
    settings = ServerConfig(
        models=ground.models,
        listen="127.0.0.1:0",
        metrics_listen="127.0.0.1:0",
        store=f"sqlite:{ground.store}",
    )
    async with running_server(settings) as server:
        async with raw_stub(server.address) as stub:
            await opened(stub, ONE)
        await growth(server.address, kind, 4, in_order=in_order)
        _, grpcs_own = await growth(server.address, nothing, STREAMS, in_order=in_order)
        memory, objects = await growth(server.address, kind, STREAMS, in_order=in_order)
    print(f"{memory / MIB:.1f} MiB, {objects} objects; of gRPC itself {grpcs_own}")
    assert objects - grpcs_own <= MAX_OBJECTS
    assert memory <= ROOM


async def growth(address: str, kind: Kind, count: int, *, in_order: bool) -> tuple[int, int]:
    """Bytes and objects that are left by streams of a client that is gone."""
    gc.collect()
    gc.disable()  # what only it would find counts as left
    try:
        memory, objects = Memory(os.getpid()).now(), len(gc.get_objects())
        with in_child(run, address, kind, count, in_order) as client:
            await asyncio.to_thread(client.join, 60)
            assert client.exitcode == 0
        await asyncio.sleep(0.5)
        return Memory(os.getpid()).now() - memory, len(gc.get_objects()) - objects
    finally:
        gc.enable()
