"""`python -m benchmarks`: what it measures makes sense, and it explains what it refuses."""

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
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result

from benchmarks.cli import main
from tests.markdown import ROOT
from tests.redis_process import redis_process

pytestmark = pytest.mark.long  # measures real servers

COMMAND = [sys.executable, "-m", "benchmarks"]
SHORT = ["--seconds", "0.5", "--rounds", "1"]


def run(*options: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *options], capture_output=True, text=True, timeout=240, check=False, env=env
    )


def run_here(*options: str) -> Result:
    """In this process, which spares the imports: for what is refused before anything starts."""
    return CliRunner().invoke(main, list(options))


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def figures(json_path: Path, found: subprocess.CompletedProcess[str]) -> Any:
    """The results, when the report says what it must."""
    assert found.returncode == 0, found.stderr
    report = json.loads(json_path.read_text())
    assert report["machine"]["cores"] > 0
    assert set(report["machine"]["packages"]) >= {"torch", "grpcio"}
    for told in (report["command"], report["workload"], report["machine"]["cpu"]):
        assert told in found.stdout
    return report["results"]


def assert_is_window(measured: dict[str, float]) -> None:
    assert measured["steps"] > 0
    assert measured["counted"] > 0
    assert measured["steps_per_second"] > 0
    assert_rising(measured["latency_ms"])
    assert measured["cpu_us_per_step"] > 0


def assert_rising(latency: dict[str, float]) -> None:
    """Percentiles to 99.9 and beyond, each at least the one before it."""
    assert set(latency) >= {"50", "90", "99", "99.9", "100"}
    values = [latency[name] for name in sorted(latency, key=float)]
    assert values[0] > 0
    assert values == sorted(values)


def assert_matchup(matchup: dict[str, Any]) -> None:
    """A contender's rounds are sound, and its ratios are theirs."""
    (before,), (measured,) = matchup["baseline"], matchup["measured"]
    assert matchup.get("median_round", measured) == measured
    for window in (before, measured):
        assert_is_window(window)
    figures: dict[str, Callable[[dict[str, Any]], float]] = {
        "rate_ratio": lambda window: window["steps_per_second"],
        "p50_ratio": lambda window: window["latency_ms"]["50"],
        "p99_ratio": lambda window: window["latency_ms"]["99"],
        "cpu_ratio": lambda window: window["cpu_us_per_step"],
    }
    assert "rate_ratio" in matchup
    for name, figure in figures.items():
        if name not in matchup:
            continue
        ratio = matchup[name]
        assert ratio["least"] == ratio["median"] == ratio["most"]
        assert ratio["median"] == pytest.approx(figure(measured) / figure(before))


def test_measures_packed_streams_by_rows_of_a_message(tmp_path: Path):
    out = tmp_path / "out"
    options = ("--path", "packed", "--sessions", "40", "--rows", "8,16", *SHORT)
    found = run("--json", str(out), "--processes", "2", *options)
    results = figures(out, found)
    cases = [(result["path"], result["sessions"], result["rows"]) for result in results]
    assert cases == [("packed", 40, 8), ("packed", 64, 16)]
    for result in results:
        (matchup,) = result["matchups"]
        assert_matchup(matchup)
        for window in (*matchup["baseline"], *matchup["measured"]):
            assert window["steps"] % result["rows"] == 0
        (forward,), (measured,) = result["forward"], matchup["measured"]
        for name, figure in (("rate", "steps_per_second"), ("cpu", "cpu_us_per_step")):
            ratio = matchup[f"forward_{name}_ratio"]["median"]
            assert ratio == pytest.approx(measured[figure] / forward[figure])
    assert "2 messages in flight" in found.stdout


def test_measures_echo_steps_and_the_bare_forward_for_each_load(tmp_path: Path):
    out = tmp_path / "out"
    options = ("--path", "stream,unary", "--sessions", "1,4", "--processes", "2", *SHORT)
    found = run("--json", str(out), *options)
    results = figures(out, found)
    cases = [(result["path"], result["sessions"], result["rows"]) for result in results]
    assert cases == [("stream", 1, 1), ("stream", 4, 1), ("unary", 1, 1), ("unary", 4, 1)]
    for result in results:
        assert result["baseline"]["name"] == "echo"
        assert_is_window(result["baseline"]["median_round"])
        (matchup,) = result["matchups"]
        assert matchup["name"] == "steps"
        assert_matchup(matchup)
        (forward,) = result["forward"]
        assert forward["steps_per_second"] > 0
    for head in ("p99.9 ms", "rate ÷ echo's", "rate ÷ forward's"):
        assert f"| {head} |" in " ".join(found.stdout.split())


def test_measures_another_checkout_beside_this_one(tmp_path: Path):
    out = tmp_path / "out"
    found = run("--json", str(out), "--sessions", "2", "--other", str(ROOT), *SHORT)
    (result,) = figures(out, found)
    assert result["baseline"]["name"] == "other"
    (matchup,) = result["matchups"]
    assert matchup["name"] == "this"
    assert_matchup(matchup)
    assert result["forward"] == []
    assert f"--other {ROOT}" in found.stdout


def test_at_a_fixed_rate_as_many_steps_are_sent_as_are_due(tmp_path: Path):
    out = tmp_path / "out"
    options = ("--sessions", "4", "--processes", "2", "--seconds", "2", "--rounds", "1")
    found = run("--json", str(out), "--rate", "50", "--echo", "tuned", *options)
    (result,) = figures(out, found)
    (matchup,) = result["matchups"]
    for window in (*matchup["baseline"], *matchup["measured"]):
        # Replies to those that were due before it may come within it, on a busy machine.
        assert window["counted"] == pytest.approx(100, abs=2)
        assert window["unanswered"] == 0
    assert "50 steps/s in all, at fixed times" in found.stdout
    assert "the echo gets gRPC's events as the server does" in found.stdout


def test_measures_each_store_and_durability_beside_memory(
    tmp_path: Path, program: Callable[[str], str]
):
    program("redis-server")
    out = tmp_path / "out"
    chosen = ("--durabilities", "async,sync", "--stores", "sqlite,redis")
    found = run("durability", "--sessions", "4", *SHORT, *chosen, "--json", str(out))
    (result,) = figures(out, found)
    assert (result["sessions"], result["baseline"]["name"]) == (4, "memory")
    names = [matchup["name"] for matchup in result["matchups"]]
    assert names == ["sqlite async", "sqlite sync", "redis async", "redis sync"]
    for matchup in result["matchups"]:
        assert_matchup(matchup)
        (measured,) = matchup["measured"]
        store_cpu = measured["store_cpu_us_per_step"]
        # Redis async writes at its interval: a short window may hold none of it, or some.
        if matchup["name"] != "redis async":
            assert (store_cpu > 0) == (matchup["name"] == "redis sync")
    assert "--appendonly yes --appendfsync everysec" in found.stdout


def test_a_redis_that_is_there_keeps_nothing_of_a_benchmark(tmp_path: Path):
    with redis_process(tmp_path) as redis:
        url = redis.url.replace("//", "//default:secret@")
        chosen = ("--durabilities", "sync", "--stores", "redis", "--redis-url", url)
        found = run("durability", "--sessions", "2", *SHORT, *chosen)
        assert found.returncode == 0, found.stderr
        assert f"the redis at redis://127.0.0.1:{redis.port}/0" in found.stdout
        assert "secret" not in found.stdout
        assert redis.command("DBSIZE") > 0  # how the sessions ended
        assert [key for key in redis.command("KEYS", "*bench-*") if "ending" not in key] == []


@pytest.mark.parametrize("store", ["sqlite", "redis"])
def test_measures_a_restart_after_kill_9_beside_a_bare_start(
    tmp_path: Path, store: str, program: Callable[[str], str]
):
    if store == "redis":
        program("redis-server")
    out = tmp_path / "out"
    few = ("--store", store, "--stored", "20", "--rows", "3", "--rounds", "2")
    found = run("restart", *few, "--json", str(out))
    results = figures(out, found)
    assert len(results["rounds"]) == 2
    for each in results["rounds"]:
        assert 0 < each["others"] < each["bare_start"]
        assert each["restart"] > 0
    for name in ("bare_start", "restart", "more", "others"):
        assert results[name]["least"] <= results[name]["median"] <= results[name]["most"]
    assert results["stored_bytes"] > 20 * 1_000
    assert "20 sessions are stored" in found.stderr


def test_measures_more_sessions_than_slots(tmp_path: Path):
    out = tmp_path / "out"
    found = run("residency", "--sessions", "50", "--slots", "10", "--json", str(out))
    results = figures(out, found)
    opened, *stepped = results["phases"]
    assert len(stepped) == 2
    assert opened["spills"] >= 40
    assert opened["restores"] == 0
    for phase in stepped:
        assert 30 <= phase["restores"] <= 50
        assert phase["spills"] >= phase["restores"] - 10
        assert phase["sessions_per_second"] == pytest.approx(50 / phase["seconds"])
        assert 0 < phase["p50_ms"] <= phase["p99_ms"] <= phase["max_ms"]
        assert phase["resident_bytes"] > 50 * 2**20
        assert phase["file_bytes"] > 50 * 1_000


def test_measures_what_idle_sessions_cost(tmp_path: Path):
    out = tmp_path / "out"
    few = ("--sessions", "500,2000", "--active", "4", "--store", "sqlite")
    results = figures(out, run("scale", *few, *SHORT, "--json", str(out)))
    assert [level["sessions"] for level in results] == [500, 2_000]
    for level in results:
        assert_matchup(level | level["matchup"])
        for turnover in (level["opened"], level["closed"]):
            assert turnover["sessions"] == level["sessions"]
            assert min(turnover["seconds"], turnover["cpu_us_per_session"]) > 0
        memory = level["memory"]
        assert memory["state_bytes"] == 4 * (2 * 2 * 128 + 8)  # h, c of two layers; the last x
        assert memory["replay_bytes"] == 32 * (9 * 4 + 8)
        assert memory["resident_bytes"] > 50 * 2**20
    assert [level["memory"]["beyond_bytes"] is None for level in results] == [True, False]


def test_measures_steps_while_sessions_expire_and_are_saved(tmp_path: Path):
    out = tmp_path / "out"
    few = ("--sessions", "300", "--active", "4", "--rate", "50")
    results = figures(out, run("sweeps", *few, "--seconds", "8", "--json", str(out)))
    assert [sweep["what"] for sweep in results] == ["expiry", "snapshots"]
    for sweep in results:
        for when in ("quiet_ms", "swept_ms"):
            assert_rising(sweep[when])
        assert sweep["p99_ratio"] == sweep["swept_ms"]["99"] / sweep["quiet_ms"]["99"]
        assert sweep["sessions"] > 0
        assert sweep["seconds"] >= 0
    assert results[0]["sessions"] <= 300


def test_measures_forecasts_beside_steps(tmp_path: Path) -> None:
    out = tmp_path / "forecast.json"
    options = ["--sessions", "50", "--calls", "300", "--rounds", "1", "--json", str(out)]
    (found,) = figures(out, run("forecast", *options))
    assert list(found) == ["step", "forecast 48", "forecast 96", "forecast 48 of 50"]
    assert all(cost["p50_ms"] > 0 for cost in found.values())


def test_measures_others_while_a_session_is_primed(tmp_path: Path) -> None:
    out = tmp_path / "priming.json"
    options = ["--rows", "20000", "--others", "2", "--rounds", "1", "--json", str(out)]
    (found,) = figures(out, run("priming", *options))
    assert found["rows_per_second"] > 0
    for when in ("quiet", "primed"):
        assert 0 < found[f"{when}_p50_ms"] <= found[f"{when}_p99_ms"]
    assert found["p99_ratio"] == found["primed_p99_ms"] / found["quiet_p99_ms"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["durability", "--stores", "sqlite,paper"], "expected some of sqlite,redis"),
        (["durability", "--durabilities", ""], "expected some of none,async,sync"),
        (["restart", "--stored", "1"], "Invalid value for '--stored'"),
        (["residency", "--durability", "maybe"], "Invalid value for '--durability'"),
        (["speed"], "unexpected extra argument (speed)"),
        (["--path", "stream,pigeon"], "expected some of stream,unary,packed"),
        (["--rate", "0"], "Invalid value for '--rate'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refuses_what_it_does_not_know(options: list[str], told: str):
    found = run_here(*options)
    assert found.exit_code == 2
    assert told in " ".join(found.stderr.split())


def test_says_what_it_can_measure():
    found = run_here("--help")
    assert found.exit_code == 0
    for command in (
        *("steps", "scale", "sweeps", "durability", "restart", "residency"),
        *("forecast", "priming"),
    ):
        assert f"  {command} " in found.stdout


def test_without_a_redis_server_it_says_what_to_do(tmp_path: Path):
    found = run("durability", "--stores", "redis", *SHORT, env={"PATH": str(tmp_path)})
    assert found.returncode == 1
    assert "redis-server is not installed" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("sessions", ["1,many", "0", "", "1,,2", "10001"])
def test_refuses_session_counts_that_it_cannot_run(sessions: str):
    found = run_here("--sessions", sessions, *SHORT)
    assert found.exit_code == 2
    assert "Invalid value for '--sessions'" in found.stderr
    assert "expected whole numbers from 1 to 10,000" in " ".join(found.stderr.split())
    assert "Traceback" not in found.stderr


def test_refuses_a_report_in_a_missing_folder_before_it_measures(tmp_path: Path):
    found = run_here("--json", str(tmp_path / "missing" / "out"))
    assert found.exit_code == 2
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
