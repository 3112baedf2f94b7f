"""`stepstate bench`, as a process: what it measures makes sense, what it refuses it explains."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

COMMAND = [sys.executable, "-m", "stepstate.cli", "bench"]
SHORT = ["--seconds", "0.5", "--rounds", "1"]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *options], capture_output=True, text=True, timeout=240, check=False
    )


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_measures_echo_and_steps_for_each_number_of_sessions(tmp_path: Path):
    found = run("--sessions", "1,4", *SHORT, "--processes", "2", "--json", str(tmp_path / "out"))
    assert found.returncode == 0, found.stderr

    report = json.loads((tmp_path / "out").read_text())
    assert [result["sessions"] for result in report["results"]] == [1, 4]
    for result in report["results"]:
        for kind in ("echo", "step"):
            (measured,) = result[kind]["rounds"]
            assert measured == result[kind]["median_round"]
            assert measured["messages"] > 0
            assert measured["messages_per_second"] > 0
            assert 0 < measured["p50_ms"] <= measured["p99_ms"]
            assert measured["cpu_us_per_message"] > 0
        for ratio in (result["rate_ratio"], result["p50_ratio"]):
            assert 0 < ratio["least"] <= ratio["median"] <= ratio["most"]

    assert report["machine"]["cores"] > 0
    assert set(report["machine"]["packages"]) >= {"torch", "grpcio"}
    for told in (report["command"], report["workload"], "| sessions |"):
        assert told in found.stdout


@pytest.mark.parametrize("sessions", ["1,many", "0", "", "1,,2", "10001"])
def test_refuses_session_counts_that_it_cannot_run(sessions: str):
    found = run("--sessions", sessions, *SHORT)
    assert found.returncode == 2
    assert "Invalid value for '--sessions'" in found.stderr
    assert "expected whole numbers from 1 to 10,000" in " ".join(found.stderr.split())
    assert "Traceback" not in found.stderr


def test_refuses_a_report_in_a_missing_folder_before_it_measures(tmp_path: Path):
    found = run("--json", str(tmp_path / "missing" / "out"))
    assert found.returncode == 2
    assert "does not exist" in found.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_leaves_no_process_behind_when_a_signal_ends_it(number: signal.Signals):
    with running_bench("--sessions", "2", "--seconds", "60") as bench:
        bench.process.send_signal(number)
        _, told = bench.process.communicate(timeout=90)
        assert bench.process.returncode != 0
        assert "Traceback" not in told
        wait_for(lambda: not any(child.is_running() for child in bench.children), 10)


def test_tells_which_server_broke_off():
    with running_bench("--sessions", "2", "--seconds", "5", "--rounds", "1") as bench:
        (server,) = (child for child in bench.children if "serve" in child.cmdline())
        server.kill()
        _, told = bench.process.communicate(timeout=90)
    assert bench.process.returncode == 1
    assert "Error: " in told
    assert "stepstate.cli serve" in told
    assert "ended with status -9" in told
    assert "Traceback" not in told


@dataclass(frozen=True, slots=True)
class Bench:
    process: subprocess.Popen[str]
    children: list[psutil.Process]
    """Both servers, the client, and the tracker that Python starts beside it."""


def clients(parent: psutil.Process) -> list[psutil.Process]:
    """The client processes, once each is itself: just forked, it still looks like its parent."""
    return [it for it in parent.children() if "--multiprocessing-fork" in it.cmdline()]


@contextmanager
def running_bench(*options: str) -> Iterator[Bench]:
    """A benchmark whose client is at work, killed at the end of the block if need be."""
    # A shell's background job ignores SIGINT, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([*COMMAND, *options], stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    bench = Bench(process, [])
    try:
        parent = psutil.Process(process.pid)
        wait_for(lambda: len(parent.children()) >= 4 and bool(clients(parent)))
        bench.children.extend(parent.children())
        (client,) = clients(parent)
        # More than its imports take.
        wait_for(lambda: sum(client.cpu_times()[:2]) > 1.5)
        yield bench
    finally:
        for left in (process, *bench.children):
            with suppress(psutil.NoSuchProcess):
                left.kill()
        process.communicate()
