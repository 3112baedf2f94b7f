"""The two servers under load, each a process of its own: the bare echo and `stepstate serve`."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from stepstate.bench.errors import BenchError
from stepstate.bench.model import write_bench_model

START_SECONDS = 120.0
"""Importing torch from a cold disk on a busy machine takes most of a minute."""

STOP_SECONDS = 40.0
"""Longer than the server's own limit for a drain."""

TOLD_CHARACTERS = 4_000
"""How much of a server's log an error shows: the end of it."""

_ADDRESS = re.compile(r" on (?P<address>[^\s,]+:\d+)")


@dataclass(frozen=True, slots=True)
class Launched:
    """A server that listens."""

    pid: int
    address: str


@contextmanager
def running_echo() -> Iterator[Launched]:
    """A bare echo that serves inside the block."""
    with _running("stepstate.bench.echo") as launched:
        yield launched


@contextmanager
def running_stepstate() -> Iterator[Launched]:
    """A `stepstate serve` of the benchmark's model, with default settings."""
    with tempfile.TemporaryDirectory(prefix="stepstate-bench-") as root:
        write_bench_model(Path(root))
        options = ["--models", root, "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
        options += ["--store", f"sqlite:{root}/stepstate.db"]
        with _running("stepstate.cli", "serve", *options, "--log-level", "WARNING") as launched:
            yield launched


@contextmanager
def _running(*arguments: str) -> Iterator[Launched]:
    """Runs a module until the block ends; an error in the block is told with the module's log."""
    with tempfile.TemporaryFile("w+") as log:
        process = _start(arguments, log)
        try:
            yield Launched(process.pid, _announced(process))
        except Exception as error:
            raise _explained(error, arguments, process, log) from error
        finally:
            _stop(process)


def _start(arguments: Sequence[str], log: IO[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        # The server has its defaults, whatever is set here, so that two runs compare.
        env={name: value for name, value in os.environ.items() if name[:10] != "STEPSTATE_"},
        # Ctrl-C is for the benchmark, which then stops its servers.
        process_group=0,
    )


def _announced(process: subprocess.Popen[str]) -> str:
    """The address on the line that the process prints when it listens."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], START_SECONDS)[0]:
        raise BenchError(f"it did not start within {START_SECONDS:g} s")
    line = process.stdout.readline()
    match = _ADDRESS.search(line)
    if match is None:
        raise BenchError(f"it did not start; it printed {line!r}")
    return match["address"]


def _explained(
    error: Exception, arguments: Sequence[str], process: subprocess.Popen[str], log: IO[str]
) -> Exception:
    try:
        ended = f"ended with status {process.wait(timeout=0.5)}"
    except subprocess.TimeoutExpired:
        ended = "was still running"
    log.seek(0)
    told = log.read().strip()[-TOLD_CHARACTERS:]
    if not told and process.returncode is None:
        return error
    return BenchError(f"{error}\n`python -m {' '.join(arguments)}` {ended}; its log:\n{told}")


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    finally:
        if process.stdout is not None:
            process.stdout.close()
