"""`stepstate step` and `stepstate forecast` with files that have times, and with a history."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stepstate.client import Client
from tests.integration.commands import Ask, ask_at, read_terminal
from tests.integration.test_client_times import START, STEP, boiler, frame, with_gaps
from tests.integration.wire import HANG
from tests.processes import server_process


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("timed")
    boiler().write(root)
    with server_process("--models", str(root)) as server:
        yield server.address


@pytest.fixture
def ask(address: str) -> Ask:
    return ask_at(address)


def lines(*places: int) -> str:
    """The rows of some places as CSV, with their times."""
    return frame(*places).to_csv(date_format="%Y-%m-%dT%H:%M:%SZ")


def outputs(address: str, x: np.ndarray, missing: str = "reject") -> np.ndarray:
    """What a session gives for rows from the start on."""
    with Client(address) as client, client.open("boiler", start_time=START, missing=missing) as one:
        return np.array(list(one.stream(x)))


def table(text: str) -> tuple[list[str], list[list[str]]]:
    header, *rows = csv.reader(io.StringIO(text))
    return header, rows


def test_the_first_line_is_the_start_and_each_line_of_output_has_its_time(ask: Ask, address: str):
    done = ask("step", given=lines(0, 1, 2))
    assert done.exit_code == 0, done.stderr
    header, rows = table(done.stdout)
    assert header == ["t", "time", "level+1", "level+2", "heat+1"]
    assert [row[1] for row in rows] == [f"{START + n * STEP:%FT%T}Z" for n in range(3)]
    got = np.array([[float(cell) for cell in row[2:]] for row in rows])
    assert np.allclose(got, outputs(address, frame(0, 1, 2).to_numpy()), atol=1e-5)


def test_rows_may_be_missing_between_two_lines_where_there_is_a_policy(ask: Ask, address: str):
    done = ask("step", "--missing", "hold", "--output", "jsonl", given=lines(0, 1, 4, 5))
    assert done.exit_code == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["t"] for row in rows] == [1, 2, 5, 6]
    assert rows[2]["time"] == f"{START + 4 * STEP:%FT%T}Z"
    want = outputs(address, with_gaps(0, 1, 4, 5), "hold")
    assert np.allclose([row["heat+1"] for row in rows], want[[0, 1, 4, 5], 2], atol=1e-5)


@pytest.mark.parametrize(
    ("places", "told"),
    [
        ((0, 1, 4), "line 4 of the input: it is at 2026-03-02 02:00:00Z, and 2 rows of boiler/1"),
        ((0, 2, 1), "line 3 of the input: it is at 2026-03-02 01:00:00Z, and 1 row of boiler/1"),
        ((0, 1, 1), "line 4 of the input: it is at 2026-03-02 00:30:00Z; the session is at t=2"),
        ((1, 0), "line 3 of the input: it is at 2026-03-02 00:00:00Z; the session is at t=1"),
    ],
)
def test_a_line_that_is_not_the_next_row_is_named(ask: Ask, places: tuple[int, ...], told: str):
    done = ask("step", given=lines(*places))
    assert done.exit_code == 1
    assert told in done.stderr
    assert len(done.stdout.splitlines()) == 1 + int(told[5]) - 2


def test_a_session_is_gone_on_with_where_it_is(ask: Ask):
    first = ("step", "--session-id", "kept", "--keep")
    assert ask(*first, given=lines(0, 1)).exit_code == 0
    early = ask(*first, given=lines(1))
    assert "leave out the rows that it has already; session 'kept' is left open" in early.stderr
    assert ask(*first, given=lines(2)).exit_code == 0
    again = ask(*first[:-1], given="1,2\n")
    assert table(again.stdout)[1][0][:2] == ["4", f"{START + 3 * STEP:%FT%T}Z"]


def test_what_a_user_of_the_command_can_do_is_told_by_its_options(ask: Ask):
    gap = ask("step", given=lines(0, 3)).stderr
    assert "2 rows of boiler/1 before it are missing" in gap
    assert "--missing impute or hold" in gap
    assert "missing=" not in gap
    plain = ask("step", given="1,2\n").stderr
    assert "give the time of the first row by --start-time, or by a column named time" in plain


@pytest.fixture
def history(tmp_path: Path) -> Path:
    file = tmp_path / "past.csv"
    file.write_text(lines(*range(50)).replace(",", ";").replace(".", ","))
    return file


def test_a_history_brings_a_new_session_up_to_date(ask: Ask, address: str, history: Path):
    done = ask("step", "--history", history, given=lines(50, 51))
    assert done.exit_code == 0, done.stderr
    assert not done.stderr  # no bar where there is no terminal
    _, rows = table(done.stdout)
    assert [row[0] for row in rows] == ["51", "52"]
    want = outputs(address, frame(*range(52)).to_numpy())[-2:]
    assert np.allclose([[float(cell) for cell in row[2:]] for row in rows], want, atol=1e-5)


def test_a_history_that_can_not_be_applied_is_named_by_its_line(
    ask: Ask, address: str, tmp_path: Path
):
    file = tmp_path / "past.csv"
    for text, told in (
        (lines(0, 1, 5), "past.csv: line 4 is at 2026-03-02 02:30:00Z, and 3 rows of boiler/1"),
        (lines(0, 1, 0), "past.csv: line 4 is at 2026-03-02 00:00:00Z, before line 3 at"),
        ("level,heat\n1,2\n1,nan\n", "line 3 of " + str(file) + ": 'heat' is nan; a missing value"),
        ("level,heat\n1,2\n1,x\n", f"line 3 of {file} is '1,x': expected 2 cells"),
        ("level,heat\n", f"line 1 of {file} has no rows"),
        ("level\n", f"line 1 of {file} is a header without heat: the columns of boiler/1 are"),
    ):
        file.write_text(text)
        options = () if "time" in text else ("--start-time", "2026-03-02")
        done = ask("step", "--history", file, *options, given="1,2\n")
        assert done.exit_code == 1
        assert told in done.stderr, done.stderr
    with Client(address) as client:
        assert [info for info in client.sessions() if info.session_id != "kept"] == []


def test_a_history_is_for_a_new_session(ask: Ask, history: Path):
    first = ("step", "--session-id", "primed", "--keep", "--history", history)
    assert ask(*first, given=lines(50)).exit_code == 0
    again = ask(*first, given=lines(51))
    assert "'primed' is open at t=51, and --history is for a new one" in again.stderr
    assert ask(*first[:3], given=lines(51)).exit_code == 0


def test_on_a_terminal_a_bar_shows_how_far_a_history_is(
    address: str, history: Path, tmp_path: Path
):
    ours, its = pty.openpty()
    rows = tmp_path / "rows.csv"
    rows.write_text(lines(50, 51))
    command = [sys.executable, "-m", "stepstate.cli", "step", "--history", str(history)]
    with (
        rows.open() as given,
        subprocess.Popen(
            [*command, "--server", address], stdin=given, stdout=subprocess.PIPE, stderr=its
        ) as process,
    ):
        os.close(its)
        shown = b""
        while part := read_terminal(ours):
            shown += part
        printed = process.stdout.read()
        assert process.wait(HANG) == 0
    os.close(ours)
    assert b"history" in shown
    assert b"rows" in shown
    assert shown.count(b"100%") >= 2
    assert len(printed.splitlines()) == 3


def test_a_scenario_with_times_begins_with_the_next_row(ask: Ask, address: str, tmp_path: Path):
    with Client(address) as client:
        session = client.open("boiler", session_id="ahead", history=frame(*range(9)))
        path = frame(9, 10, 11)
        want = session.forecast(3, scenarios={"cold": path.to_numpy()})["cold"]
    file = tmp_path / "cold.csv"
    file.write_text(lines(9, 10, 11))
    options = ("forecast", "ahead", "--horizon", 3, "--output", "jsonl", "--scenario", file)
    done = ask(*options)
    assert done.exit_code == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    got = [line["quantiles"]["0.5"] for line in found if line["output"] == "level"]
    assert np.allclose(got, want["level"].median, atol=1e-5)
    assert found[0]["time"] == f"{START + 9 * STEP:%FT%T}Z"
    file.write_text(lines(8, 9))
    assert "scenarios['cold']: row 0 is at 2026-03-02 04:00:00Z" in ask(*options).stderr
