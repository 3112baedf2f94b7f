"""Servers as processes of their own, for tests that signal, kill or watch them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.forked import Forked

SERVING = re.compile(r"serving (?P<models>.*) on (?P<address>\S+), metrics on (?P<metrics>\S+)")
"""The line that `stepstate serve` prints when it does."""


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A running `stepstate serve`."""

    process: Forked
    address: str
    metrics_url: str


@contextmanager
def server_process(*options: str, log: Path | None = None) -> Iterator[ServerProcess]:
    """Runs `stepstate serve` on free ports until the block ends, then drains it.

    Unless told otherwise it keeps its sessions in a file of its own.

    Args:
        options: of the command.
        log: a file for its stderr; None: ours.
    """
    with tempfile.TemporaryDirectory(prefix="stepstate-store-") as folder:
        defaults = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
        defaults += ["--store", f"sqlite:{folder}/sessions.db"]
        with _running([*defaults, *options], log) as server:
            yield server


@contextmanager
def _running(options: list[str], log: Path | None) -> Iterator[ServerProcess]:
    process = Forked(options, log)
    try:
        line = process.stdout.readline()
        match = SERVING.search(line)
        assert match, f"the server did not start: {line!r}"
        yield ServerProcess(process, match["address"], match["metrics"])
    finally:
        process.terminate()
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            process.stdout.close()
