"""Servers as processes of their own, for tests that signal, kill or watch them."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_LINE = re.compile(r"serving (?P<models>.*) on (?P<address>\S+), metrics on (?P<metrics>\S+)")


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A running `stepstate serve`."""

    process: subprocess.Popen[str]
    address: str
    metrics_url: str


@contextmanager
def server_process(*options: str) -> Iterator[ServerProcess]:
    """Runs `stepstate serve` on free ports until the block ends, then drains it.

    Unless told otherwise it keeps its sessions in a file of its own.
    """
    with tempfile.TemporaryDirectory(prefix="stepstate-store-") as folder:
        defaults = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
        defaults += ["--store", f"sqlite:{folder}/sessions.db"]
        command = [sys.executable, "-m", "stepstate.cli", "serve", *defaults, *options]
        with _running(command) as server:
            yield server


@contextmanager
def _running(command: list[str]) -> Iterator[ServerProcess]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = _LINE.search(line)
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
            if process.stdout is not None:
                process.stdout.close()
