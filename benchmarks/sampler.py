"""py-spy, which samples what a server is doing while clients put it under load."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import BenchError
from benchmarks.load import Load, Sample, Window
from benchmarks.parts import Frame
from benchmarks.runner import LoadClients

_PROGRAM = Path(sys.executable).parent / "py-spy"
_PER_SECOND = 250
_LIMIT_SECONDS = 60.0
"""For reading the symbols of a process before, and writing the file after."""
_FRAME = re.compile(r"(?P<function>.+) \(stepstate/(?P<file>[^:]+):\d+\)")
_OTHER_THREADS = "Thread._bootstrap "
"""Their outermost function; the event loop runs in the main thread."""

Stack = tuple[Frame, ...]
"""Functions of the package, the outermost first."""


class SampledClients:
    """Clients that send a load as they do, while the server is sampled.

    Args:
        clients: who send.
        pid: the server's.
        folder: for py-spy's file.
    """

    def __init__(self, clients: LoadClients, pid: int, folder: Path) -> None:
        self._clients = clients
        self._pid = pid
        self._file = folder / "stacks"
        self._sampling: subprocess.Popen[str] | None = None

    def __len__(self) -> int:
        return len(self._clients)

    def prepare(self, questions: Sequence[Load]) -> None:
        """See `LoadClients`."""
        self._clients.prepare(questions)

    def send(self, window: Window) -> None:
        """Starts sending and sampling: py-spy needs most of the warm-up to begin."""
        self._clients.send(window)
        command = [str(_PROGRAM), "record", "--pid", str(self._pid), "--output", str(self._file)]
        command += ["--format", "raw", "--function", "--rate", str(_PER_SECOND)]
        self._sampling = subprocess.Popen(
            [*command, "--duration", str(max(1, int(window.seconds)))],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def collect(self) -> list[Sample]:
        """See `LoadClients`.

        Raises:
            BenchError: py-spy failed; it may lack the right to trace another process.
        """
        assert self._sampling is not None
        found = self._clients.collect()
        _, told = self._sampling.communicate(timeout=_LIMIT_SECONDS)
        if self._sampling.returncode:
            raise BenchError(f"py-spy failed: {told.strip()}")
        return found

    def stacks(self) -> Counter[Stack]:
        """How often the main thread was seen at work in each place.

        Raises:
            BenchError: it never was.
        """
        found: Counter[Stack] = Counter()
        for line in self._file.read_text().splitlines():
            frames, _, count = line.rpartition(" ")
            if _OTHER_THREADS not in frames:
                found[_stack(frames)] += int(count)
        if not found:
            raise BenchError("py-spy saw the server idle all the time: give --seconds more")
        return found


def _stack(frames: str) -> Stack:
    """Of a line of py-spy's raw format."""
    matches = (_FRAME.fullmatch(frame) for frame in frames.split(";"))
    return tuple(
        Frame(match["file"], match["function"].replace(".<locals>", ""))
        for match in matches
        if match is not None
    )


@contextmanager
def sampled(clients: LoadClients, pid: int) -> Iterator[SampledClients]:
    """Clients under whose loads a server is sampled.

    Raises:
        BenchError: py-spy is not installed.
    """
    if not _PROGRAM.exists():
        raise BenchError(f"{_PROGRAM} is missing: install py-spy, or use `make setup`")
    with TemporaryDirectory() as folder:
        yield SampledClients(clients, pid, Path(folder))
