"""`stepstate forecast`, and what the other commands tell of forecasts and missing rows."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from stepstate.client import Client
from stepstate.models import write_model
from tests import offline
from tests.integration.commands import Ask, ask_at, read_terminal
from tests.integration.wire import HANG
from tests.networks import make_network
from tests.processes import server_process


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with two sessions: a sensor without times, and an hourly one with two outputs."""
    root = tmp_path_factory.mktemp("forecasters")
    offline.forecasting_network().write(root)
    hourly = make_network("hourly", inputs=1, outputs=4, hidden=4, layers=1, seed=2)
    outputs = [{"name": name, "unit": "m", "horizons": [1, 2]} for name in ("x0", "other")]
    hourly.manifest.update(step_interval_seconds=3600, outputs=outputs)
    write_model(root / "hourly" / "1", hourly.manifest, hourly.tensors())
    x = np.random.default_rng(0).normal(5, 1, (60, 2))
    with server_process("--models", str(root)) as server, Client(server.address) as client:
        client.open("sensor1", session_id="sensor", history=x, interval_level=0.8)
        start = datetime(2026, 3, 1, tzinfo=UTC)
        client.open("hourly", session_id="hourly", start_time=start, history=x[:5, :1])
        yield server.address


@pytest.fixture
def ask(address: str) -> Ask:
    return ask_at(address)


def scenario(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_a_table_has_a_line_for_each_horizon(ask: Ask, address: str):
    done = ask("forecast", "sensor", "--horizon", 3)
    assert done.exit_code == 0, done.stderr
    title, header, *lines = done.stdout.splitlines()
    assert title == "level [m] from t=60"
    assert header.split() == ["ahead", "0.1", "0.5", "0.9", "how"]
    with Client(address) as client:
        want = client.session("sensor").forecast(3)
    assert [line.split()[0] for line in lines] == ["1", "2", "3"]
    got = [[float(cell) for cell in line.split()[1:4]] for line in lines]
    assert np.allclose(got, want.values, rtol=1e-6)
    assert {line.split()[-1] for line in lines} == {"direct"}


def test_a_table_for_each_output_has_the_times(ask: Ask):
    done = ask("forecast", "hourly")
    first, _, second = done.stdout.partition("\n\n")
    assert first.startswith("x0 [m] from t=5\n")
    assert second.startswith("other [m] from t=5\n")
    assert [line.split()[1] for line in first.splitlines()[1:]] == [
        "time",
        "2026-03-01T05:00:00Z",
        "2026-03-01T06:00:00Z",
    ]


def test_what_is_not_known_is_empty_in_csv_and_null_in_json(ask: Ask):
    options = ("forecast", "sensor", "--horizon", 5, "--quantiles", "0.25,0.5")
    lines = list(csv.DictReader(io.StringIO(ask(*options, "--output", "csv").stdout)))
    assert list(lines[0]) == ["scenario", "output", "horizon", "time", "0.25", "0.5", "method"]
    assert [line["horizon"] for line in lines] == ["1", "2", "3", "4", "5"]
    assert (lines[3]["0.5"], lines[3]["method"]) == ("", "")
    assert float(lines[4]["0.25"]) < float(lines[4]["0.5"])
    told = [json.loads(line) for line in ask(*options, "--output", "jsonl").stdout.splitlines()]
    assert told[3]["quantiles"] == {"0.25": None, "0.5": None}
    assert (told[0]["session_id"], told[0]["t"], told[0]["time"]) == ("sensor", 60, None)
    assert math.isclose(told[4]["quantiles"]["0.5"], float(lines[4]["0.5"]), rel_tol=1e-6)


def test_scenarios_come_from_files(ask: Ask, tmp_path: Path):
    warm = scenario(tmp_path, "warm.csv", "\ufeffheat,note\n3,a\n3,b\n,c\n3,d\n3,e\n3,f\n")
    given = scenario(tmp_path, "given.csv", "4,1\n4,1\n")
    done = ask(
        "forecast", "sensor", "--horizon", 2, "--scenario", warm, "--scenario", given,
        "--output", "csv",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    lines = list(csv.DictReader(io.StringIO(done.stdout)))
    assert {(line["scenario"], line["output"]) for line in lines} >= {
        ("warm", "level"),
        ("given", "level"),
    }
    levels = [line for line in lines if (line["scenario"], line["output"]) == ("given", "level")]
    assert [(line["0.5"], line["method"]) for line in levels] == [("4", "given")] * 2
    assert (
        "level [m] from t=60, given"
        in ask("forecast", "sensor", "--horizon", 2, "--scenario", given).stdout
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("nobody",), "session 'nobody' is unknown"),
        (("sensor", "--horizon", "0"), "--horizon"),
        (("sensor", "--horizon", "50"), "no forecast of sensor1/1"),
        (("sensor", "--quantiles", "a"), "such as 0.05,0.5,0.95"),
        (("sensor", "--quantiles", "0.5,1"), "quantiles[1]"),
        (("sensor", "--scenario", "nowhere.csv"), "nowhere.csv"),
        (("sensor", "--plot", "--output", "csv"), "leave out --output csv"),
    ],
)
def test_what_can_not_be_is_said(ask: Ask, options: tuple[str, ...], told: str):
    done = ask("forecast", *options)
    assert done.exit_code != 0
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("level,heat\n", "has no rows"),
        ("heat\n1\nmuch\n", "line 3"),
        ("heat\n1\n1,2\n", "line 3 of"),
        ("1\n", "line 1"),
        ("1,2,3\n", "expected 2 numbers"),
    ],
)
def test_a_scenario_that_can_not_be_read_is_named(ask: Ask, tmp_path: Path, text: str, told: str):
    done = ask("forecast", "sensor", "--scenario", scenario(tmp_path, "odd.csv", text))
    assert done.exit_code != 0
    assert "odd.csv" in done.stderr
    assert told in done.stderr


def test_scenarios_of_one_name_are_refused(ask: Ask, tmp_path: Path):
    (tmp_path / "other").mkdir()
    files = [scenario(folder, "a.csv", "4,1\n") for folder in (tmp_path, tmp_path / "other")]
    done = ask("forecast", "sensor", "--scenario", files[0], "--scenario", files[1])
    assert "two scenarios have the name 'a'" in done.stderr


def test_a_plot_is_drawn_on_demand(ask: Ask):
    done = ask("forecast", "hourly", "--plot")
    assert "median" in done.stdout
    assert "┌" in done.stdout
    assert "\033[" not in done.stdout
    assert "┌" not in ask("forecast", "hourly").stdout


def on_terminal(command: list[str], variables: dict[str, str]) -> tuple[int, str]:
    """Runs a command whose standard output is a terminal; its status, and what was shown."""
    ours, its = pty.openpty()
    shown = b""
    try:
        with subprocess.Popen(command, stdout=its, env=variables) as process:
            os.close(its)
            while part := read_terminal(ours):
                shown += part
            return process.wait(HANG), shown.decode()
    finally:
        os.close(ours)


@pytest.mark.parametrize(("option", "drawn"), [((), True), (("--no-plot",), False)])
def test_on_a_terminal_a_plot_is_drawn(address: str, option: tuple[str, ...], *, drawn: bool):
    command = [sys.executable, "-m", "stepstate.cli", "forecast", "sensor", "--horizon", "3"]
    variables = os.environ | {"STEPSTATE_TARGET": address, "COLUMNS": "80", "TERM": "xterm"}
    status, text = on_terminal([*command, *option], variables)
    assert status == 0
    assert "level [m] from t=60" in text
    assert ("┌" in text) is ("\033[" in text) is drawn


# The other commands.


@pytest.mark.parametrize("missing", ["impute", "hold"])
def test_an_empty_cell_is_a_missing_value_where_there_is_a_policy(ask: Ask, missing: str):
    options = ("step", "--model", "sensor1", "--output", "jsonl")
    rows = "heat,level\n-1,5\n,6\n\n-1,\nnan,nan\n"
    done = ask(*options, "--missing", missing, given=rows)
    assert done.exit_code == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["t"] for line in lines] == [1, 2, 3, 4]
    names = [f"level+{ahead}@{level}" for ahead in (1, 2, 3, 5) for level in (0.05, 0.5, 0.95)]
    assert list(lines[0]) == ["t", *names, "warm"]
    one = ask("step", "--model", "hourly", "--start-time", "2026-03-01", *options[3:],
              "--missing", missing, given='5\n""\n\nnan\n')  # fmt: skip
    assert [json.loads(line)["t"] for line in one.stdout.splitlines()] == [1, 2, 3]
    refused = ask(*options, given=rows)
    assert refused.exit_code != 0
    assert "line 3 of the input" in refused.stderr
    assert len(refused.stdout.splitlines()) == 1


def test_a_session_is_shown_with_its_accuracy_as_valid_json(ask: Ask, address: str):
    with Client(address) as client:
        client.open("sensor1", session_id="young", history=[[5.0, 1.0]], missing="hold")
    for name, scored in (("sensor", 59), ("young", 0)):
        shown = json.loads(
            ask("sessions", "show", name).stdout,
            parse_constant=lambda told: pytest.fail(f"{told} is no JSON"),
        )
        first = shown["accuracy"][0]
        assert (first["output"], first["horizon"], first["scored"]) == ("level", 1, scored)
        assert (first["mean_absolute_scaled_error"] is None) is (name == "young")
        assert shown["drift"]["last_t"] is None or shown["drift"]["alarms"]
    assert (shown["missing"], shown["interval_level"]) == ("hold", 0.9)


def test_an_operator_resets_a_sessions_accuracy(ask: Ask, address: str):
    with Client(address) as client:
        client.open("sensor1", session_id="glitch", history=[[5.0, 1.0]] * 30)
        before = client.info("glitch").accuracy[0]
    shown = json.loads(ask("sessions", "reset-accuracy", "glitch").stdout)
    first = shown["accuracy"][0]
    assert (before.scored, shown["t"], first["scored"], first["recent_scored"]) == (29, 30, 0, 0)
    assert (first["mean_absolute_error"], first["recent_median_absolute_error"]) == (None, None)
    assert (shown["drift"]["alarms"], shown["drift"]["learning"]) == (0, True)


def test_models_tell_what_they_know_of_forecasts(ask: Ask):
    told = ask("models").stdout
    assert "level [m], 1 to 5 steps ahead, quantiles 0.05, 0.5, 0.95" in told
    assert "lags       reach back 7 rows" in told
    assert "tracked    1, 3 steps ahead" in told
    hourly = told[: told.index("sensor1/1")]
    assert "lags" not in hourly
    assert "quantiles" not in hourly
