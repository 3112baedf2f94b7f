"""How gRPC's events reach the loop of a server."""

from __future__ import annotations

import array
import asyncio
import fcntl
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from benchmarks import echo
from stepstate import loop
from stepstate.loop import CHECK_SECONDS, Pollers, ServerLoop

_IMPORTS = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "grpc":
            print(os.environ.get("GRPC_EXPERIMENTS"))

sys.meta_path.insert(0, Watch())
for module in sys.argv[1].split(","):
    __import__(module)
"""


@pytest.mark.parametrize(
    ("module", "set_up"),
    [
        (("stepstate.cli.serve,stepstate.server",), "-event_engine_listener"),
        (("benchmarks.echo", "--tuned"), "-event_engine_listener"),
        (("benchmarks.echo",), None),
        (("stepstate.client",), None),
    ],
)
def test_a_server_sets_grpc_up_before_it_is_imported(
    module: tuple[str, ...], set_up: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads its settings once, then; a client's process is not ours to set up."""
    monkeypatch.delenv("GRPC_EXPERIMENTS", raising=False)
    assert _python(_IMPORTS, *module).stdout == f"{set_up}\n"


def test_grpc_knows_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would log an experiment that it has no more: then the setting has to go."""
    monkeypatch.setenv("GRPC_VERBOSITY", "ERROR")
    assert _python("import stepstate.cli.serve, grpc; grpc.server(None)").stderr == ""


def test_settings_of_an_operator_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPC_EXPERIMENTS", "tcp_frame_size_tuning")
    loop.set_up_grpc()
    assert os.environ["GRPC_EXPERIMENTS"] == "tcp_frame_size_tuning"


def test_one_turn_takes_all_bytes_of_grpc_but_the_one_that_it_takes_itself() -> None:
    taken: list[bytes] = []
    signals, sender = socket.socketpair()
    with signals, sender:
        signals.settimeout(0)
        handle = PollerCompletionQueue(lambda: taken.append(signals.recv(1))).handle
        sender.send(b"1" * 300)
        _turns(signals, handle)
        assert taken == [b"1"]
        with pytest.raises(BlockingIOError):
            signals.recv(1)
        sender.send(b"1")
        _turns(signals, handle)
        assert taken == [b"1", b"1"]


@pytest.mark.parametrize("left", [0, 1])
def test_another_loop_of_the_process_may_take_the_bytes_first(
    left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All loops of a process have gRPC's one socket; whoever takes its bytes handles the events."""
    signals, sender = socket.socketpair()
    ioctl = fcntl.ioctl

    def overtaken(*arguments: Any) -> int:
        result = ioctl(*arguments)
        signals.recv(3 - left)  # by another loop, in its own thread
        return result

    monkeypatch.setattr(fcntl, "ioctl", overtaken)
    with signals, sender:
        signals.settimeout(0)
        sender.send(b"123")
        loop.handle_all(signals, array.array("i", [0]), lambda: signals.recv(1))
        with pytest.raises(BlockingIOError):
            signals.recv(1)


def test_another_thread_polls_when_all_that_do_are_stuck_and_only_then() -> None:
    """Stuck: it runs and does not wait."""
    stuck, ended, started = threading.Event(), threading.Event(), threading.Semaphore(0)

    def _poll_wrapper() -> None:
        started.release()
        while not ended.is_set():
            if stuck.is_set():  # without Python's lock, for which it would wait
                hashlib.pbkdf2_hmac("sha256", b"", b"", 10_000)
            else:
                time.sleep(0.001)

    first = threading.Thread(target=_poll_wrapper)
    first.start()
    pollers = Pollers(_poll_wrapper)
    try:
        assert started.acquire(timeout=60)
        _check_for(pollers, seconds=0.3)  # it runs, and waits
        assert not started.acquire(blocking=False)
        stuck.set()
        pollers.check()
        while not started.acquire(timeout=CHECK_SECONDS):
            pollers.check()
        stuck.clear()
        _check_for(pollers, seconds=0.3)
        assert not started.acquire(blocking=False)
    finally:
        ended.set()
        first.join()


def _check_for(pollers: Pollers, *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pollers.check()
        time.sleep(CHECK_SECONDS / 10)


def test_grpc_polls_in_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its method is known by name only: without it, nobody would help when its thread is stuck."""
    looked_at: list[str] = []

    def is_stuck(_: Pollers, thread: threading.Thread) -> bool:
        looked_at.append(thread.name)
        return False

    monkeypatch.setattr(Pollers, "_is_stuck", is_stuck)
    with asyncio.Runner(loop_factory=ServerLoop) as runner:
        runner.run(_talk())
    assert looked_at


def test_other_readers_get_every_byte() -> None:
    signals, sender = socket.socketpair()
    with signals, sender:
        sender.send(b"12")
        taken: list[bytes] = []
        _turns(signals, lambda: taken.append(signals.recv(1)))
        assert taken == [b"1", b"2"]


def test_grpc_is_read_in_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class is known by name only: a new name would go unseen, and cost a third."""
    turns: list[socket.socket] = []
    handle_all = loop.handle_all

    def counted(signals: socket.socket, *rest: object) -> None:
        turns.append(signals)
        handle_all(signals, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "handle_all", counted)
    with asyncio.Runner(loop_factory=ServerLoop) as runner:
        replies = runner.run(_talk())
    assert replies == [b"0", b"1", b"2"]
    assert turns


def _python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program that ended well."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


class PollerCompletionQueue:
    """Stands for gRPC's, which is known by its name."""

    def __init__(self, handle: Callable[[], object]) -> None:
        self._handle = handle

    def handle(self) -> None:
        self._handle()


def _turns(signals: socket.socket, handle: Callable[[], object]) -> None:
    """Lets a loop read for a few turns."""

    async def turns() -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(signals, handle)
        for _ in range(5):
            await asyncio.sleep(0.001)
        loop.remove_reader(signals)

    with asyncio.Runner(loop_factory=ServerLoop) as runner:
        runner.run(turns())


async def _talk() -> list[bytes]:
    """An echo's replies."""
    server = grpc.aio.server()
    echo.add_echo(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream(echo.STREAM)()
        replies = []
        for place in range(3):
            await call.write(str(place).encode())
            replies.append(await call.read())
        await call.done_writing()
        await call.read()
    await server.stop(0)
    return replies
