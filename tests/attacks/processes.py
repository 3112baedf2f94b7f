"""Children of the tests, and what the kernel says about a process."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")
"""The same that `tests.forked` uses: a child is there within some milliseconds."""


@contextmanager
def in_child(function: Callable[..., None], *arguments: Any) -> Iterator[BaseProcess]:
    """Runs a function in a process of its own, which is killed at the end of the block."""
    process = _FORKS.Process(target=function, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


class Memory:
    """The resident memory of a process, in bytes."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")

    def now(self) -> int:
        """What it has."""
        return self._read("VmRSS")

    def peak(self) -> int:
        """The most that it had since `forget_peak`."""
        return self._read("VmHWM")

    def forget_peak(self) -> None:
        """Counts the peak from now on."""
        (self._folder / "clear_refs").write_text("5")

    def _read(self, name: str) -> int:
        text = (self._folder / "status").read_text()
        found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
        assert found, f"{self._folder} has no {name}: the process has ended"
        return 1024 * int(found[1])
