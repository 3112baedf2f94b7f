"""Sessions of the store that take no steps: damaged ones, and those whose model is gone."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from grpc import StatusCode as Code

from stepstate import errors
from stepstate.cli.main import main
from stepstate.client import AsyncClient
from stepstate.config import ServerConfig
from stepstate.server import Server, running_server
from stepstate.stores.redis import keys
from stepstate.v1 import stepstate_pb2 as pb
from tests.integration.wire import (
    TOLERANCE,
    draw,
    largest_difference,
    opened,
    raw_stub,
    refused,
    request,
    sample,
    scrape,
    until,
)
from tests.networks import Network, make_network
from tests.redis_process import RedisProcess, redis_process

SYNC = pb.DURABILITY_SYNC
NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def one_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    with redis_process(tmp_path_factory.mktemp("redis")) as running:
        yield running


class Redis:
    """Changes what a Redis has of sessions, behind the server's back."""

    def __init__(self, server: RedisProcess) -> None:
        self.url = server.url
        self._server = server
        server.command("FLUSHALL")

    def damage(self, session_id: str) -> None:
        self._server.command("HSET", keys.session(session_id), "e", "text")

    def swap(self, one: str, other: str) -> None:
        self._server.command("RENAME", keys.session(one), "aside")
        self._server.command("RENAME", keys.session(other), keys.session(one))
        self._server.command("RENAME", "aside", keys.session(other))

    def swap_snapshots(self, one: str, other: str) -> None:
        swap = (
            "local one = redis.call('HGET', KEYS[1], 's') "
            "redis.call('HSET', KEYS[1], 's', redis.call('HGET', KEYS[2], 's')) "
            "redis.call('HSET', KEYS[2], 's', one)"
        )
        self._server.command("EVAL", swap, "2", keys.session(one), keys.session(other))


class File:
    """The same of a file of SQLite."""

    def __init__(self, path: Path) -> None:
        self.url = f"sqlite:{path}"
        self._path = path

    def run(self, statement: str, *values: object) -> None:
        with closing(sqlite3.connect(self._path, isolation_level=None)) as file:
            file.execute(statement, values)

    def damage(self, session_id: str) -> None:
        """A flipped bit: the record begins with s instead of { ."""
        self.run(
            "UPDATE sessions SET record = 's' || substr(record, 2) WHERE session_id = ?", session_id
        )

    def swap(self, one: str, other: str) -> None:
        self.run("UPDATE sessions SET session_id = '-' WHERE session_id = ?", one)
        self.run("UPDATE sessions SET session_id = ? WHERE session_id = ?", one, other)
        self.run("UPDATE sessions SET session_id = ? WHERE session_id = '-'", other)

    def swap_snapshots(self, one: str, other: str) -> None:
        with closing(sqlite3.connect(self._path, isolation_level=None)) as file:
            found = dict(file.execute("SELECT session_id, snapshot FROM sessions").fetchall())
        for name, snapshot in ((one, found[other]), (other, found[one])):
            self.run("UPDATE sessions SET snapshot = ? WHERE session_id = ?", snapshot, name)


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.long)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> File | Redis:
    if request.param == "sqlite":
        return File(tmp_path / "placed.db")
    return Redis(request.getfixturevalue("one_redis"))


@pytest.fixture
def settings(config: ServerConfig, place: File | Redis) -> ServerConfig:
    return replace(config, store=place.url)


async def filled(settings: ServerConfig) -> None:
    """A server that leaves four sessions at t = 3."""
    async with running_server(settings) as server, raw_stub(server.address) as stub:
        for name in NAMES:
            await opened(stub, name, durability=SYNC)
            await stub.Step(request(name, 0, draw(3)))


async def command(server: Server, *arguments: str) -> Result:
    told = [*arguments, "--server", server.address]
    return await asyncio.to_thread(CliRunner().invoke, main, told)


async def gauge(server: Server, name: str) -> float:
    return sample(await scrape(server.metrics_address), name)


async def test_a_damaged_session_is_data_loss_and_all_others_go_on(
    settings: ServerConfig, place: File | Redis, networks: dict[str, Network], caplog
):
    await filled(settings)
    place.damage("b")
    caplog.set_level(logging.WARNING, "stepstate")
    async with (
        running_server(settings) as server,
        raw_stub(server.address) as stub,
        AsyncClient(server.address) as client,
    ):
        for ask in (
            stub.Step(request("b", 3, draw(1))),
            stub.GetSession(pb.GetSessionRequest(session_id="b")),
            stub.OpenSession(pb.OpenSessionRequest(session_id="b", model="lstm")),
            stub.ForkSession(pb.ForkSessionRequest(session_id="b")),
            stub.ExportSession(pb.ExportSessionRequest(session_id="b")),
        ):
            refusal = await refused(ask)
            assert (refusal.code, refusal.reason) == (Code.DATA_LOSS, "SESSION_UNREADABLE")
        with pytest.raises(errors.SessionUnreadable, match="stepstate sessions close b"):
            await client.info("b")
        told = {info.session_id: info.status async for info in client.sessions()}
        assert told == {"a": "open", "b": "unreadable", "c": "open", "d": "open"}
        x = draw(5)
        for name in ("a", "c", "d"):
            y = (await stub.Step(request(name, 3, x[3:]))).y
            offline = networks["lstm"].offline(x)[3:].ravel()
            assert largest_difference(y, offline) <= TOLERANCE
        for _ in range(3):
            await server.sessions.survey.look()
            await server.sessions.sweep()
        assert await gauge(server, "stepstate_sessions_unreadable") == 1
        listed = await command(server, "sessions", "list")
        assert listed.exit_code == 0, listed.output
        assert [line.split()[-1] for line in listed.output.splitlines() if line[0] == "b"] == [
            "unreadable"
        ]

        closed = await command(server, "sessions", "close", "b")
        assert closed.exit_code == 0, closed.output
        assert json.loads(closed.output)["status"] == "unreadable"
        assert await gauge(server, "stepstate_sessions_unreadable") == 0
        assert (await refused(stub.Step(request("b", 3, draw(1))))).reason == "SESSION_CLOSED"
        await opened(stub, "b")
    said = [record for record in caplog.records if "can't be read" in record.message]
    assert len(said) == 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_sessions_whose_rows_were_swapped_are_data_loss_and_not_taken_over(
    settings: ServerConfig, place: File | Redis
):
    await filled(settings)
    place.swap("a", "c")
    async with running_server(settings) as server, raw_stub(server.address) as stub:
        for name in ("a", "c"):
            refusal = await refused(stub.Step(request(name, 3, draw(1))))
            assert (refusal.code, refusal.reason) == (Code.DATA_LOSS, "SESSION_UNREADABLE")
        for name in ("b", "d"):
            assert (await stub.Step(request(name, 3, draw(1)))).t == 4
        assert len(server.sessions) == 2


async def test_sessions_whose_snapshots_were_swapped_are_data_loss_and_not_taken_over(
    settings: ServerConfig, place: File | Redis
):
    await filled(settings)
    place.swap_snapshots("a", "c")
    async with running_server(settings) as server, raw_stub(server.address) as stub:
        for name in ("a", "c"):
            refusal = await refused(stub.Step(request(name, 3, draw(1))))
            assert (refusal.code, refusal.reason) == (Code.DATA_LOSS, "SESSION_UNREADABLE")
        assert (await stub.Step(request("b", 3, draw(1)))).t == 4
        assert await gauge(server, "stepstate_session_takeovers_total") == 0
        closed = await stub.CloseSession(pb.CloseSessionRequest(session_id="c"))
        assert closed.session.t == 3


@pytest.mark.parametrize("overwritten", [False, True])
async def test_sessions_of_a_model_that_is_gone_are_listed_counted_and_closed(
    settings: ServerConfig, tmp_path: Path, caplog, overwritten
):
    """Removed, or overwritten by another one of the same name and version."""
    await filled(settings)
    make_network("lstm" if overwritten else "other", seed=404).write(tmp_path / "models")
    caplog.set_level(logging.WARNING, "stepstate")
    async with (
        running_server(replace(settings, models=tmp_path / "models")) as server,
        raw_stub(server.address) as stub,
        AsyncClient(server.address) as client,
    ):

        async def counted() -> bool:
            return await gauge(server, "stepstate_sessions_orphaned") == len(NAMES)

        await until(counted)
        (said,) = [record for record in caplog.records if "not loaded here" in record.message]
        assert (said.sessions, said.models) == (4, "lstm/1: 4")
        refusal = await refused(stub.Step(request("a", 3, draw(1))))
        assert (refusal.code, refusal.reason) == (
            Code.FAILED_PRECONDITION,
            "SNAPSHOT_MODEL_MISMATCH",
        )
        assert "close it: stepstate sessions close a" in refusal.message
        told = {info.session_id: (info.status, info.t) async for info in client.sessions("lstm")}
        assert told == dict.fromkeys(NAMES, ("model_missing", 3))
        assert (await client.info("b")).status == "model_missing"
        listed = await command(server, "sessions", "list")
        assert listed.output.count("model_missing") == 4

        closed = await command(server, "sessions", "close", "a")
        assert closed.exit_code == 0, closed.output
        assert (await client.close("b")).t == 3
        assert (await refused(stub.Step(request("a", 3, draw(1))))).reason == "SESSION_CLOSED"
        assert await gauge(server, "stepstate_sessions_orphaned") == 2
        assert {info.session_id async for info in client.sessions()} == {"c", "d"}
    async with running_server(settings) as server, raw_stub(server.address) as stub:
        assert (await stub.Step(request("c", 3, draw(1)))).t == 4  # its model is back
