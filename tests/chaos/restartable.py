"""Programs that are killed and come back on the same port: a server, and what it depends on."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from tests.forked import Forked
from tests.integration.wire import HANG, sample, scrape
from tests.processes import SERVING

_BELOW_EPHEMERAL = (20_000, 32_000)
"""No outgoing connection takes these ports while their program is down."""


def free_port() -> int:
    """A port that stays free, too, while nobody listens on it."""
    while True:
        port = random.randint(*_BELOW_EPHEMERAL)
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Program:
    """A program that can be killed and started again.

    Args:
        command: the program and its options.
        log: where its stderr goes.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        self.process: subprocess.Popen[str] | Forked | None = None
        self._command = command

    def run(self) -> None:
        """Starts it."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    async def end(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        status = await asyncio.to_thread(self.process.wait, HANG)
        self.process.stdout.close()
        return status

    @property
    def running(self) -> bool:
        """Whether it has begun, and not ended."""
        return self.process is not None and self.process.poll() is None

    def kill_if_running(self) -> None:
        """Leaves nothing behind."""
        if self.running:
            self.kill()


class RestartableServer(Program):
    """A `stepstate serve` that is always found at one address.

    Args:
        options: of `stepstate serve`.
        log: where its log goes.
        prefix: a program that starts it.
    """

    def __init__(self, *options: str, log: Path, prefix: Sequence[str] = ()) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.metrics_address = ""
        self._options = ["--listen", self.address, "--metrics-listen", "127.0.0.1:0"]
        self._options += ["--log-level", "ERROR", *options]
        self._forked = not prefix
        serve = [*prefix, sys.executable, "-m", "stepstate.cli", "serve", *self._options]
        super().__init__(serve, log)

    def run(self) -> None:
        """Starts it; by a fork, which is quick, if nothing else is to start it."""
        if self._forked:
            self.process = Forked(self._options, self.log)
        else:
            super().run()

    async def start(self) -> None:
        """Starts it, and waits until it serves."""
        self.run()
        line = await asyncio.to_thread(self.process.stdout.readline)
        match = SERVING.search(line)
        if match is None:
            await self.end()
        assert match, f"the server did not start: {self.log.read_text()}"
        self.metrics_address = match["metrics"].split("/")[2]

    async def drained(self) -> None:
        """Ends it, as an orchestrator does."""
        await self.lost_no_slot()
        status = await self.end()
        assert status == 0, f"exit status {status}: {self.log.read_text()}"

    async def lost_no_slot(self) -> None:
        """Each of its slots is free or a session's."""
        assert sample(await scrape(self.metrics_address), "stepstate_slots_leaked") == 0

    def surprises(self) -> list[str]:
        """What it logged that no fault explains."""
        return [line for line in self.log.read_text().splitlines() if "raceback" in line]


@asynccontextmanager
async def restartable_server(
    folder: Path, *options: str, prefix: Sequence[str] = ()
) -> AsyncIterator[RestartableServer]:
    """A running server; what it logs must hold no surprise."""
    made = RestartableServer(*options, log=folder / f"server-{free_port()}.log", prefix=prefix)
    try:
        await made.start()
        yield made
        if made.running:
            await made.lost_no_slot()
    finally:
        made.kill_if_running()
    assert not made.surprises(), made.log.read_text()


class RestartableRedis(Program):
    """A Redis that keeps every write, and is always found at one port.

    Args:
        folder: where its append-only file is.
    """

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        options = f"--port {self.port} --bind 127.0.0.1 --save --appendonly yes"
        options += f" --appendfsync always --dir {folder}"
        super().__init__(["redis-server", *options.split(" ")], folder / "redis.log")

    def run(self) -> None:
        """Starts it."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, text=True)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    async def start(self) -> None:
        """Starts it, and waits until it answers."""
        self.run()
        async with asyncio.timeout(HANG):
            while not await asyncio.to_thread(self._answers):
                await asyncio.sleep(0.02)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as one:
                one.sendall(b"PING\r\n")
                return one.recv(100).startswith(b"+PONG")
        except OSError:
            return False


@asynccontextmanager
async def restartable_redis(folder: Path) -> AsyncIterator[RestartableRedis]:
    """A running Redis."""
    made = RestartableRedis(folder)
    try:
        await made.start()
        yield made
    finally:
        made.kill_if_running()
