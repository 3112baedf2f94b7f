"""Expired sessions as users meet them, and servers whose wall clocks are set (libfaketime)."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import StatusCode as Code

from stepstate.client import Client
from stepstate.errors import SessionExists, SessionExpired
from stepstate.v1 import stepstate_pb2 as pb
from tests.integration.clients import AnyClient
from tests.integration.wire import draw, refused, request, until
from tests.processes import SERVING
from tests.redis_process import redis_process

SOON = Duration(nanos=300_000_000)
DAY = 86_400
SESSIONS = 20


@pytest.fixture
async def client(connect, server) -> AsyncIterator[AnyClient]:
    async with connect(server.address) as made:
        yield made


def opening(session_id: str, **fields: object) -> pb.OpenSessionRequest:
    return pb.OpenSessionRequest(session_id=session_id, model="lstm", **fields)


async def expired(stub, session_id: str) -> None:
    """Waits until a session has expired."""

    async def gone() -> bool:
        listed = await stub.ListSessions(pb.ListSessionsRequest(page_size=1000))
        return session_id not in {session.session_id for session in listed.sessions}

    await until(gone)


async def test_an_expired_session_is_told_of_listed_and_restored_on_the_wire(stub):
    await stub.OpenSession(opening("a", idle_timeout=SOON))
    first = await stub.Step(request("a", 0, draw(1)[0]))
    await expired(stub, "a")
    told = await refused(stub.Step(request("a", 1, draw(1)[0])))
    assert (told.code, told.reason) == (Code.NOT_FOUND, "SESSION_EXPIRED")
    assert "stepstate sessions restore a" in told.message
    listed = await stub.ListSessions(pb.ListSessionsRequest(show_expired=True))
    (session,) = listed.sessions
    assert session.status == pb.SESSION_STATUS_EXPIRED
    assert session.purge_time.ToDatetime() > session.expire_time.ToDatetime()
    assert not (await stub.ListSessions(pb.ListSessionsRequest())).sessions

    restored = (await stub.RestoreSession(pb.RestoreSessionRequest(session_id="a"))).session
    assert (restored.t, restored.status) == (1, pb.SESSION_STATUS_OPEN)
    assert not restored.HasField("purge_time")
    again = await stub.Step(request("a", 0, draw(1)[0]))
    assert (again.replayed, list(again.y)) == (True, list(first.y))


async def test_what_can_not_be_restored_says_why(stub):
    await stub.OpenSession(opening("open"))
    ask = pb.RestoreSessionRequest
    told = await refused(stub.RestoreSession(ask(session_id="open")))
    assert (told.code, told.reason) == (Code.ALREADY_EXISTS, "SESSION_EXISTS")
    told = await refused(stub.RestoreSession(ask(session_id="never")))
    assert (told.code, told.reason) == (Code.NOT_FOUND, "SESSION_UNKNOWN")
    told = await refused(stub.RestoreSession(ask(session_id="no id")))
    assert (told.code, told.field) == (Code.INVALID_ARGUMENT, "session_id")


async def test_both_clients_restore(client):
    session = await client.open("lstm", session_id="a", idle_timeout=timedelta(seconds=0.3))
    y = await session.step(draw(1)[0])
    with pytest.raises(SessionExpired):
        while await client.info("a"):
            await asyncio.sleep(0.05)
    shown = [info async for info in client.sessions(show_expired=True)]
    assert [(info.session_id, info.status) for info in shown] == [("a", "expired")]
    assert shown[0].purge_time > shown[0].expire_time
    back = await client.restore_expired("a")
    assert back.t == 1
    with pytest.raises(SessionExists):
        await client.restore_expired("a")
    assert y.shape == (await back.step(draw(1)[0])).shape


class Machine:
    """A `stepstate serve` whose wall clock is set by a file; its monotonic clock stays right."""

    def __init__(self, program, models: Path, folder: Path, store: str) -> None:
        library = subprocess.run(
            [program("faketime"), "-f", "+0d", "printenv", "LD_PRELOAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        self._offset = folder / "offset"
        self.set_clock(0)
        self._environment = os.environ | {
            "LD_PRELOAD": library,
            "FAKETIME_TIMESTAMP_FILE": str(self._offset),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DISABLE_SHM": "1",
        }
        self._options = ["--models", str(models), "--store", store, "--slots", "8"]
        self._options += ["--snapshot-interval", "0.2", "--idle-timeout", "60"]
        self._options += ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]

    def set_clock(self, days: int) -> None:
        new = self._offset.with_suffix(".new")
        new.write_text(f"{days:+d}d\n")
        new.rename(self._offset)

    @contextmanager
    def running(self, *, kill: bool = False) -> Iterator[str]:
        """Its address; at the end it is drained, or killed."""
        command = [sys.executable, "-m", "stepstate.cli", "serve", *self._options]
        with subprocess.Popen(
            command, env=self._environment, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                match = SERVING.search(process.stdout.readline())
                assert match
                yield match["address"]
            finally:
                process.kill() if kill else process.terminate()


@pytest.fixture(params=["sqlite", "redis"])
def machine(request, tmp_path, program, model_root) -> Iterator[Machine]:
    if request.param == "sqlite":
        yield Machine(program, model_root, tmp_path, f"sqlite:{tmp_path}/sessions.db")
        return
    (tmp_path / "redis").mkdir()
    with redis_process(tmp_path / "redis") as server:
        yield Machine(program, model_root, tmp_path, server.url)


def fill(address: str) -> None:
    with Client(address) as client:
        for i in range(SESSIONS):
            kind = "sync" if i % 2 else "async"
            client.open("lstm", session_id=f"s{i}", durability=kind).step(draw(1)[0])
        time.sleep(1.0)  # async ones are saved


def lost(address: str) -> list[str]:
    gone = []
    with Client(address) as client:
        for i in range(SESSIONS):
            try:
                assert np.isfinite(client.session(f"s{i}").step(draw(1)[0])).all()
            except SessionExpired:
                gone.append(f"s{i}")
    return gone


SWEEPS = 8.0
"""Seconds: the store's sessions are looked at every 5."""


@pytest.mark.long
def test_a_machine_that_boots_in_the_past_loses_nothing_when_its_clock_is_right(machine):
    machine.set_clock(-21)
    with machine.running() as address:
        fill(address)
    machine.set_clock(0)
    with machine.running() as address:
        time.sleep(SWEEPS)
        assert lost(address) == []


@pytest.mark.long
def test_a_clock_that_is_set_while_a_server_runs_or_is_down_loses_nothing(machine):
    with machine.running(kill=True) as address:
        fill(address)
        for days in (2, -100):
            machine.set_clock(days)
            time.sleep(SWEEPS)
        assert lost(address) == []
        time.sleep(1.0)
    machine.set_clock(400)  # an outage of a year
    with machine.running() as address:
        time.sleep(SWEEPS)
        assert lost(address) == []
