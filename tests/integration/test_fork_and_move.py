"""Forks of sessions, and sessions that move to another server; by client and by command."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from click.testing import CliRunner, Result

from stepstate import errors
from stepstate.cli import main
from stepstate.client import AsyncClient
from stepstate.config import ServerConfig
from stepstate.server import Server, running_server
from stepstate.v1 import stepstate_pb2 as pb
from tests.chaos.faults import relay
from tests.integration.clients import Connect
from tests.integration.restarts import SELDOM, StartRestartable, kill_and_restart
from tests.integration.wire import (
    HANG,
    TOLERANCE,
    draw,
    largest_difference,
    raw_stub,
    refused,
)
from tests.networks import Network


async def test_a_fork_goes_on_apart_and_is_resumed_too(
    restartable: StartRestartable, connect: Connect, networks: dict[str, Network]
):
    x, network = draw(60), networks["lstm"]
    other = np.concatenate((x[:30], draw(30, seed=9)))
    server = await restartable(SELDOM)
    async with connect(server.address, timeout=HANG) as client:
        session = await client.open("lstm", session_id="a")
        await session.step(x[:30])
        fork = await session.fork("b")
        plain = await client.fork("a", durability="sync")
        assert (fork.t, plain.t, plain.info.durability) == (30, 30, "sync")
        assert fork.info.model == "lstm"
        head = await session.step(x[30:40]), await fork.step(other[30:40])
        await plain.step(other[30:40])
        await kill_and_restart(server)
        tail = await session.step(x[40:]), await fork.step(other[40:])
        rest = await plain.step(other[40:])
        with pytest.raises(errors.SessionExists):
            await client.fork(session, "b")
        with pytest.raises(errors.SessionUnknown):
            await client.fork("nope")
    for rows, first, second in zip((x, other), head, tail, strict=True):
        got = np.concatenate((first, second))
        assert largest_difference(got, network.offline(rows)[30:]) <= TOLERANCE
    assert largest_difference(rest, network.offline(other)[40:]) <= TOLERANCE


async def test_a_fork_of_a_session_that_was_set_back_stands_where_the_application_does(
    restartable: StartRestartable, connect: Connect, networks: dict[str, Network]
):
    x = draw(50)
    server = await restartable(SELDOM)
    async with connect(server.address, timeout=HANG) as client:
        session = await client.open("lstm")
        for row in x[:40]:
            await session.step(row)
        await kill_and_restart(server)
        fork = await session.fork()
        assert fork.t == 40
        got = await fork.step(x[40:])
    assert largest_difference(got, networks["lstm"].offline(x)[40:]) <= TOLERANCE


async def test_a_snapshot_moves_a_session_to_another_server(
    restartable: StartRestartable, server: Server, connect: Connect, networks: dict[str, Network]
):
    x, network = draw(60), networks["lstm"]
    old = await restartable(SELDOM)
    async with (
        connect(old.address, timeout=HANG) as source,
        connect(server.address, timeout=HANG) as target,
    ):
        session = await source.open("lstm", session_id="a")
        got = await session.step(x[:30])
        snapshot = await source.export("a")
        moved = await target.restore(snapshot)
        renamed = await target.restore(snapshot, session_id="b", durability="none")
        assert (moved.session_id, moved.t, renamed.session_id) == ("a", 30, "b")
        assert renamed.info.durability == "none"
        assert np.array_equal(await moved.step(x[30:]), await renamed.step(x[30:]))
        again = await target.session("b", t=0)
        assert np.array_equal(await again.step(x[:30]), got)  # the replies came along
        with pytest.raises(errors.SessionExists):
            await target.restore(snapshot)
        with pytest.raises(errors.SnapshotCorrupt):
            await target.restore(snapshot[:-1] + bytes([snapshot[-1] ^ 1]), session_id="c")
        with pytest.raises(errors.InvalidField, match="durability"):
            await target.open("lstm", durability="maybe")  # type: ignore[arg-type]
        rest = (await source.info("a")).t
    assert rest == 30
    assert largest_difference(got, network.offline(x[:30])) <= TOLERANCE


async def test_servers_with_keys_take_only_what_one_of_them_has_signed(
    config: ServerConfig, server: Server, connect: Connect, tmp_path: Path
):
    """Through both pairs of RPCs; the second server is about to have a new key."""
    for name, keys in (("one", ["a" * 32]), ("two", ["b" * 32, "a" * 32])):
        (tmp_path / name).write_text("\n".join(keys))
        (tmp_path / name).chmod(0o600)
    one, two = (
        replace(config, store="memory:", snapshot_key=str(tmp_path / name))
        for name in ("one", "two")
    )
    async with (
        running_server(one) as first,
        running_server(two) as second,
        connect(first.address) as source,
        connect(second.address) as target,
        connect(server.address) as without_keys,
    ):
        session = await source.open("lstm", session_id="a")
        await session.step(draw(5))
        snapshot = await source.export("a")
        async with raw_stub(first.address) as stub:
            exported = await stub.ExportSession(pb.ExportSessionRequest(session_id="a"))
        assert exported.snapshot == snapshot
        for client in (target, without_keys):
            assert (await client.restore(snapshot)).t == 5
        async with raw_stub(second.address) as stub:
            for data in (snapshot[40:], snapshot[:-1] + bytes([snapshot[-1] ^ 1])):
                refusal = await refused(stub.ImportSession(pb.ImportSessionRequest(snapshot=data)))
                assert (refusal.code, refusal.reason) == (
                    grpc.StatusCode.FAILED_PRECONDITION,
                    "SNAPSHOT_UNTRUSTED",
                )
        for unsigned in (await without_keys.export("a"), await target.export("a")):
            with pytest.raises(errors.SnapshotUntrusted):
                await source.restore(unsigned, session_id="b")


async def test_a_lost_reply_of_a_fork_does_not_fork_twice(server: Server, connect: Connect):
    async with relay(server.address) as way, connect(way.address) as client:
        session = await client.open("lstm", session_id="a")
        await session.step(draw(5))
        way.hold_replies()
        forking = asyncio.ensure_future(session.fork())
        await asyncio.wait_for(way.withheld.wait(), HANG)
        while len(server.sessions) < 2:
            await asyncio.sleep(0.005)
        way.lose()
        fork = await forking
        await fork.step(draw(1))
        assert sorted([info.t async for info in client.sessions()]) == [5, 6]


# The commands.


@pytest.fixture
def command(server: Server) -> Callable[..., Awaitable[Result]]:
    """Runs `stepstate` in this process, against the server."""

    async def run(*arguments: str) -> Result:
        told = [*arguments, "--server", server.address]
        return await asyncio.to_thread(CliRunner().invoke, main, told)

    return run


async def test_the_commands_move_a_session(
    command: Callable[..., Awaitable[Result]],
    client: AsyncClient,
    networks: dict[str, Network],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    x, want = draw(30), networks["lstm"].offline(draw(30))
    session = await client.open("lstm", session_id="a", durability="sync")
    await session.step(x[:20])

    exported = await command("sessions", "export", "a")
    assert exported.exit_code == 0, exported.output
    size = (tmp_path / "a.snapshot").stat().st_size
    assert f"a.snapshot: {size} bytes" in exported.stderr
    assert "a.snapshot exists: --force" in (await command("sessions", "export", "a")).stderr
    assert (await command("sessions", "export", "a", "--force")).exit_code == 0
    piped = await command("sessions", "export", "a", "--output", "-")
    assert piped.stdout_bytes == (tmp_path / "a.snapshot").read_bytes()
    nowhere = await command("sessions", "export", "a", "--output", "no/where")
    assert "no/where: No such file" in nowhere.stderr

    taken = await command("sessions", "import", "a.snapshot")
    assert (taken.exit_code, "already open at t=20" in taken.stderr) == (1, True)
    imported = await command("sessions", "import", "a.snapshot", "--session-id", "b")
    assert (json.loads(imported.stdout)["t"], json.loads(imported.stdout)["session_id"]) == (
        20,
        "b",
    )
    forked = json.loads((await command("sessions", "fork", "a", "c")).stdout)
    assert (forked["session_id"], forked["durable_t"]) == ("c", 20)
    made = json.loads((await command("sessions", "fork", "a")).stdout)["session_id"]
    (tmp_path / "broken").write_bytes((tmp_path / "a.snapshot").read_bytes()[:-1])
    broken = await command("sessions", "import", "broken", "--session-id", "d")
    assert "the snapshot can't be read" in broken.stderr
    assert "unknown" in (await command("sessions", "export", "nope")).stderr

    listed = (await command("sessions", "list")).stdout.splitlines()[1:]
    rows = {line.split()[0]: line.split()[1:5] for line in listed}
    assert rows == {name: ["lstm/1", "20", "20", "resident"] for name in ("a", "b", "c", made)}
    for name in rows:
        copy = await client.session(name)
        assert largest_difference(await copy.step(x[20:]), want[20:]) <= TOLERANCE


async def test_the_command_step_opens_with_a_durability(
    command: Callable[..., Awaitable[Result]], client: AsyncClient
):
    options = ("--model", "lstm", "--session-id", "a", "--durability", "sync", "--keep")
    assert (await command("step", *options)).exit_code == 0
    assert (await client.info("a")).durability == "sync"
    refused = await command("step", "--model", "lstm", "--durability", "disk")
    assert "'disk' is not one of" in refused.stderr
