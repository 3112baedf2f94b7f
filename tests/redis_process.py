"""Real Redis servers on free loopback ports, alone or as a cluster, for tests that hurt them."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import redis

from tests.certificates import Authority, Certificate

SLOTS = 16_384
START_SECONDS = 20.0


def redis_server() -> str:
    """The path of redis-server; without it the test is skipped, which CI refuses."""
    path = shutil.which("redis-server")
    if path is None:
        pytest.skip(
            "MISSING PROGRAM: redis-server; .ci/run installs it, or: apt-get install redis-server"
        )
    return path


class RedisProcess:
    """A redis-server that can be killed, paused and started again on its port and folder.

    Args:
        folder: what it keeps is there.
        options: of redis-server, such as "--appendonly", "yes".
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.tls_port = free_port()
        """Where it speaks TLS, if its options have `tls_options`."""
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """For `open_store`."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        self.launch()
        self.wait()

    def launch(self, *more: str) -> None:
        """Starts it, perhaps with more options; it may not answer yet."""
        command = [redis_server(), "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self.folder), "--save", "", *self._options, *more]
        if "--tls-cert-file" in self._options:
            command += ["--tls-port", str(self.tls_port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def wait(self) -> None:
        """Waits until it answers."""
        assert self._process is not None
        until = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, "redis-server ended"
            assert time.monotonic() < until, "redis-server does not answer"
            time.sleep(0.01)

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """kill -9, and a start."""
        self.kill()
        self.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stopped by SIGSTOP inside the block: it is there and does not answer."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def client(self) -> redis.Redis:
        """A blocking client, to look inside."""
        return redis.Redis(port=self.port, protocol=2, decode_responses=True)

    def command(self, *words: str | int) -> object:
        """Sends one command."""
        with self.client() as client:
            return client.execute_command(*words)

    def _answers(self) -> bool:
        try:
            return self.command("PING") is True
        except redis.RedisError:
            return False


def tls_options(authority: Authority, certificate: Certificate) -> tuple[str, ...]:
    """The options of a server that speaks TLS too; its clients need no certificate."""
    own = ("--tls-cert-file", str(certificate.file), "--tls-key-file", str(certificate.key))
    return (*own, "--tls-ca-cert-file", str(authority.file), "--tls-auth-clients", "no")


class SentinelProcess(RedisProcess):
    """A Redis Sentinel that watches one primary as the service "sessions".

    Args:
        folder: its configuration is there; it writes it anew.
        primary: whom it watches.
        options: of redis-server; with `tls_options` it names the primary's port with TLS.
    """

    def __init__(self, folder: Path, primary: RedisProcess, *options: str) -> None:
        super().__init__(folder, *options)
        self._primary = primary

    def launch(self, *more: str) -> None:
        """See `RedisProcess.launch`."""
        config = self.folder / "sentinel.conf"
        pairs = zip(self._options[::2], self._options[1::2], strict=True)
        lines = [f"{name.removeprefix('--')} {value}" for name, value in pairs]
        port = self._primary.port
        if lines:
            lines += [f"tls-port {self.tls_port}", "tls-replication yes"]
            port = self._primary.tls_port
        config.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {self.folder}\n"
            + "".join(f"{line}\n" for line in lines)
            + f"sentinel monitor sessions 127.0.0.1 {port} 1\n"
            "sentinel down-after-milliseconds sessions 1000\n"
        )
        command = [redis_server(), str(config), "--sentinel", *more]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)


@contextmanager
def redis_sentinel(folder: Path, primary: RedisProcess, *options: str) -> Iterator[SentinelProcess]:
    """One Sentinel, for the time of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    sentinel = SentinelProcess(folder, primary, *options)
    sentinel.start()
    try:
        yield sentinel
    finally:
        sentinel.kill()


@contextmanager
def redis_process(folder: Path, *options: str) -> Iterator[RedisProcess]:
    """One Redis, for the time of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    server = RedisProcess(folder, *options)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def redis_cluster(
    folder: Path, nodes: int = 3, *, tls: tuple[str, ...] = ()
) -> Iterator[list[RedisProcess]]:
    """A cluster whose nodes share the slots evenly; with `tls_options` they talk by TLS, too."""
    with ExitStack() as stack:
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000", *tls)
        if tls:
            options += ("--tls-cluster", "yes")
        servers = [
            stack.enter_context(redis_process(folder / str(i), *options)) for i in range(nodes)
        ]
        for i, server in enumerate(servers):
            first, end = SLOTS * i // nodes, SLOTS * (i + 1) // nodes
            server.command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
            port = servers[0].tls_port if tls else servers[0].port
            server.command("CLUSTER", "MEET", "127.0.0.1", port)
        until = time.monotonic() + START_SECONDS
        while not all(_is_whole(server, nodes) for server in servers):
            assert time.monotonic() < until, "the cluster does not form"
            time.sleep(0.02)
        yield servers


def _is_whole(server: RedisProcess, nodes: int) -> bool:
    with server.client() as client:
        info = client.execute_command("CLUSTER INFO")
    return info["cluster_state"] == "ok" and info["cluster_known_nodes"] == str(nodes)


def free_port() -> int:
    """A port that nobody has at the moment, nor the one 10,000 above (a cluster's own)."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                other.bind(("127.0.0.1", port + 10_000))
            except (OSError, OverflowError):
                continue
            return int(port)
