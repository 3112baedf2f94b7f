"""How gRPC's events reach the loop of a server."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable

import grpc
import pytest

from stepstate import events
from stepstate.events import ServerLoop

_IMPORTS = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "grpc":
            print(os.environ.get("GRPC_EXPERIMENTS"))

sys.meta_path.insert(0, Watch())
__import__(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("module", "set_up"),
    [
        (("stepstate.cli.serve",), "-event_engine_listener"),
        (("stepstate.bench.echo", "--tuned"), "-event_engine_listener"),
        (("stepstate.bench.echo",), None),
        (("stepstate.client",), None),
    ],
)
def test_a_server_sets_grpc_up_before_it_is_imported(
    module: tuple[str, ...], set_up: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads its settings once, then; a client's process is not ours to set up."""
    monkeypatch.delenv("GRPC_EXPERIMENTS", raising=False)
    run = subprocess.run(
        [sys.executable, "-c", _IMPORTS, *module],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert run.stdout == f"{set_up}\n"


def test_grpc_knows_what_it_is_told() -> None:
    """It would log an experiment that it has no more: then the setting has to go."""
    program = "import stepstate.cli.serve, grpc; grpc.server(None)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stderr == ""


def test_settings_of_an_operator_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPC_EXPERIMENTS", "tcp_frame_size_tuning")
    events.set_up_grpc()
    assert events.os.environ["GRPC_EXPERIMENTS"] == "tcp_frame_size_tuning"


def test_one_turn_takes_all_bytes_of_grpc_but_the_one_that_it_takes_itself() -> None:
    taken: list[bytes] = []
    told, teller = socket.socketpair()
    with told, teller:
        told.settimeout(0)
        handle = _Handler(lambda: taken.append(told.recv(1)))
        teller.send(b"1" * 300)
        _turns(told, handle)
        assert taken == [b"1"]
        with pytest.raises(BlockingIOError):
            told.recv(1)
        teller.send(b"1")
        _turns(told, handle)
        assert taken == [b"1", b"1"]


def test_other_readers_get_every_byte() -> None:
    told, teller = socket.socketpair()
    with told, teller:
        teller.send(b"12")
        taken: list[bytes] = []
        _turns(told, lambda: taken.append(told.recv(1)))
        assert taken == [b"1", b"2"]


def test_grpc_is_read_in_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class is known by name only: a new name would go unseen, and cost a third."""
    turns: list[socket.socket] = []
    at_once = events._at_once

    def counted(told: socket.socket, *rest: object) -> None:
        turns.append(told)
        at_once(told, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(events, "_at_once", counted)
    with asyncio.Runner(loop_factory=ServerLoop) as runner:
        replies = runner.run(_talk())
    assert replies == [b"0", b"1", b"2"]
    assert turns


class _Handler:
    """Stands for gRPC's handler, which is known by the name of its class."""

    def __init__(self, handle: Callable[[], object]) -> None:
        self._handle = handle

    def handle(self) -> None:
        self._handle()


_Handler.__name__ = "PollerCompletionQueue"


def _turns(told: socket.socket, handler: _Handler | Callable[[], object]) -> None:
    """Lets a loop read for a few turns."""
    handle = handler.handle if isinstance(handler, _Handler) else handler

    async def turns() -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(told, handle)
        for _ in range(5):
            await asyncio.sleep(0.001)
        loop.remove_reader(told)

    with asyncio.Runner(loop_factory=ServerLoop) as runner:
        runner.run(turns())


async def _talk() -> list[bytes]:
    """An echo's replies."""
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(_echo)
    service = grpc.method_handlers_generic_handler("Echo", {"Stream": handler})
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream("/Echo/Stream")()
        replies = []
        for place in range(3):
            await call.write(str(place).encode())
            replies.append(await call.read())
        await call.done_writing()
        await call.read()
    await server.stop(0)
    return replies


async def _echo(_requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
    while (message := await context.read()) is not grpc.aio.EOF:
        await context.write(message)
