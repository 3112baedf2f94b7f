"""The load generator in C++ (`load.cc`), used as the client processes in Python are."""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from benchmarks import BenchError
from benchmarks.clients import ANSWER_SECONDS
from benchmarks.load import Load, Sample, Window

_SILENT = f"the load generator got no reply for {ANSWER_SECONDS:g} s: the server hangs"


@dataclass(frozen=True, slots=True)
class LastReply:
    """The last reply to a session."""

    session_id: str
    t: int
    y: float
    """Its first output."""


class CppGenerator:
    """Sends one load after the other, from one process each: `prepare`, `send`, `collect`.

    As a context it ends a process that is still there.

    Args:
        program: see `CppPrograms.load`.
    """

    def __init__(self, program: Path) -> None:
        self.last_replies: list[LastReply] = []
        """Of the sessions of the last load."""
        self._program = program
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
        self._processes.clear()

    def __len__(self) -> int:
        return 1

    def prepare(self, questions: Sequence[Load]) -> None:
        """Starts to send a load; returns when each of its sessions was answered once.

        Raises:
            BenchError: a server refused a step, or broke off.
        """
        (load,) = questions
        process = self._start(load)
        rows = zip(load.names, load.x.tolist(), strict=True)
        lines = [f"{name} {' '.join(map(repr, row))}\n" for name, row in rows]
        self._write(process, "".join([*lines, "\n"]))
        if self._read_line(process) != "ready\n":
            self._end(process)

    def send(self, window: Window) -> None:
        """Starts sending, until the end of the window."""
        (process,) = self._processes
        self._write(process, f"{window.begin:.9f} {window.start:.9f} {window.finish:.9f}\n")

    def collect(self) -> list[Sample]:
        """What was seen in the window.

        Raises:
            BenchError: a server refused a step, or broke off.
        """
        (process,) = self._processes
        sessions, _, replies = self._end(process).partition("\n\n")
        self.last_replies = [
            LastReply(name, int(t), float(y))
            for name, t, y in (line.split() for line in sessions.splitlines())
        ]
        figures = np.array(replies.split(), np.float64).reshape(-1, 2)
        return [Sample(figures[:, 0], figures[:, 1], len(figures), unanswered=0)]

    def _start(self, load: Load) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(self._program), load.target, load.path.value, str(load.connections)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **load.access.variables()},
            process_group=0,  # Ctrl-C is for the benchmark, which then ends it
        )
        self._processes.append(process)
        return process

    @staticmethod
    def _write(process: subprocess.Popen[str], text: str) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(text)
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: what it said is read next

    @staticmethod
    def _read_line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], ANSWER_SECONDS)[0]:
            raise BenchError(_SILENT)
        return process.stdout.readline()

    def _end(self, process: subprocess.Popen[str]) -> str:
        """What it printed when it ended.

        Raises:
            BenchError: it failed, or went on for too long.
        """
        try:
            printed, told = process.communicate(timeout=ANSWER_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise BenchError(_SILENT) from error
        self._processes.remove(process)
        if process.returncode:
            raise BenchError(f"the load generator failed: {told.strip() or process.returncode}")
        return printed
