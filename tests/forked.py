"""`stepstate serve` as a process that is forked from one with all imports done.

To import torch takes three seconds of CPU on a small machine, a fork some milliseconds. What it
runs is the command itself; how a new interpreter does that is shown in test_lifecycle, test_bench.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from stepstate.cli import main

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["stepstate.cli.serve", "stepstate.server", "stepstate.transport.triton", __name__]
)


class Forked:
    """The part of `subprocess.Popen` that tests use; stdout is a pipe.

    Args:
        options: of `stepstate serve`.
        log: a file for its stderr; None: ours.
    """

    def __init__(self, options: Sequence[str], log: Path | None = None) -> None:
        reading, writing = os.pipe()
        self._process = _FORKS.Process(target=_serve, args=(_Passed(writing), options, log))
        self._process.start()
        os.close(writing)
        self.stdout = os.fdopen(reading)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit status, once it has ended; less than 0: the signal that ended it."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end."""
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired("stepstate serve", timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Sends a signal, if it has not ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it ended just now
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9."""
        self.send_signal(signal.SIGKILL)


class _Passed:
    """A file descriptor on its way to the new process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (DupFd(self.number),)


def _arrived(passed: Any) -> int:
    number: int = passed.detach()
    return number


def _serve(stdout: int, options: Sequence[str], log: Path | None) -> None:
    os.dup2(stdout, 1)
    os.close(stdout)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    if log is not None:
        with log.open("a") as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    main(["serve", *options], prog_name="stepstate")
