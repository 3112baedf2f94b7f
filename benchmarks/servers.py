"""What is under load, each a process of its own: a bare echo, `stepstate serve`, a Redis.

And the stores that are compared, each fresh: a file, a Redis of its own, or a given one.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO

from benchmarks import BenchError
from benchmarks.models import NAME, write_bench_model

ROOT = Path(__file__).parents[1]
"""This checkout."""
DURABLE = ("sqlite", "redis")
STORES = ("memory", *DURABLE)
DURABILITIES = ("none", "async", "sync")
START_SECONDS = 120.0
"""Importing torch from a cold disk on a busy machine takes most of a minute."""

STOP_SECONDS = 40.0
"""Longer than the server's own limit for a drain."""

LOG_CHARACTERS = 4_000
"""How much of the end of a server's log an error shows."""

REDIS_OPTIONS = ("--appendonly", "yes", "--appendfsync", "everysec", "--save", "")
"""As README.md advises: kill -9 of Redis loses nothing, a loss of power the last second."""

_ADDRESS = re.compile(r" on (?P<address>[^\s,]+:\d+)(?:, metrics on (?P<metrics>\S+))?")


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A server that listens."""

    pid: int
    address: str
    metrics_url: str = ""

    def kill(self) -> None:
        """Ends it by kill -9."""
        os.kill(self.pid, signal.SIGKILL)


_Process = subprocess.Popen[str]


@contextmanager
def bench_folder(*models: str) -> Iterator[Path]:
    """A temporary folder with models, for the files of servers too.

    Args:
        models: by name; none: the model that steps.
    """
    with tempfile.TemporaryDirectory(prefix="stepstate-bench-") as folder:
        for model in models or (NAME,):
            write_bench_model(_models(Path(folder)), model)
        yield Path(folder)


def bench_model(folder: Path) -> Path:
    """The folder of the model that steps, in a `bench_folder`."""
    return _models(folder) / NAME / "1"


@contextmanager
def running_echo(*options: str) -> Iterator[ServerProcess]:
    """A bare echo that serves inside the block; `options` are those of `benchmarks.echo`."""
    with _running(_python("benchmarks.echo", *options), _announced) as launched:
        yield launched


@contextmanager
def running_step_echo(transport: str) -> Iterator[ServerProcess]:
    """A server that answers steps at once: see `benchmarks.step_echo`."""
    with _running(_python("benchmarks.step_echo", transport), _announced) as launched:
        yield launched


@contextmanager
def running_floor(program: Path) -> Iterator[ServerProcess]:
    """The same in C++: see `benchmarks.cpp`."""
    with _running([str(program)], _announced) as launched:
        yield launched


@contextmanager
def running_stepstate(
    folder: Path, store: str, *options: str, checkout: Path | None = None
) -> Iterator[ServerProcess]:
    """A `stepstate serve` of a benchmark's model, with default settings otherwise.

    Args:
        folder: a `bench_folder`.
        store: its URL.
        options: more of the command's.
        checkout: whose package it runs; None: the installed one.
    """
    where = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
    what = ["--models", str(_models(folder)), "--log-level", "WARNING"]
    command = _python("stepstate.cli", "serve", *where, *what, *options)
    variables = {"STEPSTATE_STORE": store}  # it may hold a password, which `ps` would show
    if checkout is not None:
        variables["PYTHONPATH"] = str(checkout.resolve() / "service")
    with _running(command, _announced, variables) as launched:
        yield launched


@contextmanager
def running_redis(folder: Path) -> Iterator[ServerProcess]:
    """A `redis-server` with an append-only file in a folder."""
    program = shutil.which("redis-server")
    if program is None:
        raise BenchError("redis-server is not installed: install it, or leave redis out")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [program, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)]
    command += ["--loglevel", "warning", *REDIS_OPTIONS]
    with _running(command, lambda process: _answering_redis(process, port)) as launched:
        yield launched


def _models(folder: Path) -> Path:
    return folder / "models"


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


@contextmanager
def _running(
    command: Sequence[str],
    ready: Callable[[_Process], ServerProcess],
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[ServerProcess]:
    """Runs a command until the block ends; an error in the block is reported with its log."""
    with tempfile.TemporaryFile("w+") as log:
        process = _start(command, log, variables)
        try:
            yield ready(process)
        except Exception as error:
            raise _explained(error, command, process, log) from error
        finally:
            _stop(process)


def _start(command: Sequence[str], log: IO[str], variables: Mapping[str, str]) -> _Process:
    # The server has its defaults, whatever is set here, so that two runs can be compared.
    kept = {name: value for name, value in os.environ.items() if name[:10] != "STEPSTATE_"}
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        cwd=ROOT,  # where `-m benchmarks.echo` is found
        env={**kept, **variables},
        # Ctrl-C is for the benchmark, which then stops its servers.
        process_group=0,
    )


def _announced(process: _Process) -> ServerProcess:
    """Reads the line that the process prints when it listens."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], START_SECONDS)[0]:
        raise BenchError(f"it did not start within {START_SECONDS:g} s")
    line = process.stdout.readline()
    match = _ADDRESS.search(line)
    if match is None:
        raise BenchError(f"it did not start; it printed {line!r}")
    return ServerProcess(process.pid, match["address"], match["metrics"] or "")


def _answering_redis(process: _Process, port: int) -> ServerProcess:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0) as connection:
            connection.sendall(b"PING\r\n")
            if connection.recv(16).startswith(b"+PONG"):
                return ServerProcess(process.pid, f"127.0.0.1:{port}")
        time.sleep(0.02)
    raise BenchError("it did not start")


def _explained(
    error: Exception, command: Sequence[str], process: _Process, log: IO[str]
) -> Exception:
    try:
        ended = f"ended with status {process.wait(timeout=0.5)}"
    except subprocess.TimeoutExpired:
        ended = "was still running"
    log.seek(0)
    told = log.read().strip()[-LOG_CHARACTERS:]
    if not told and process.returncode is None:
        return error
    return BenchError(f"{error}\n`{' '.join(command)}` {ended}; its log:\n{told}")


def _stop(process: _Process) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    finally:
        if process.stdout is not None:
            process.stdout.close()


@dataclass(frozen=True, slots=True)
class Store:
    """A store that servers can be given."""

    kind: str
    url: str
    description: str
    """For the workload in a report."""
    pid: int | None = None
    """Its process, if it has one of its own that was started here."""
    folder: Path | None = None
    """Where its files are, if they are here."""

    def file_bytes(self) -> int:
        """Bytes of its files, write-ahead log included."""
        files = self.folder.rglob("*") if self.folder is not None else ()
        return sum(path.stat().st_size for path in files if path.is_file())


@contextmanager
def fresh_store(kind: str, folder: Path) -> Iterator[Store]:
    """A store without sessions, in a folder of its own inside another."""
    own = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=folder))
    if kind == "redis":
        with running_redis(own) as redis:
            told = f"redis-server of its own with {' '.join(REDIS_OPTIONS[:4])}"
            told += f", its file on {_file_system(own)}"
            yield Store(kind, f"redis://{redis.address}/0", told, redis.pid, own)
    elif kind == "sqlite":
        told = f"sqlite without fsync, its file on {_file_system(own)}"
        yield Store(kind, f"sqlite:{own}/sessions.db", told, folder=own)
    else:
        yield Store(kind, "memory:", "memory")


def _file_system(path: Path) -> str:
    """The kind of file system that a path is on, by proc(5)'s mounts."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    _, kind = max((len(point), kind) for point, kind in mounts if path.is_relative_to(point))
    return kind
