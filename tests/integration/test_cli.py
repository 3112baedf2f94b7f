"""The command `stepstate`: what it prints, and how it fails; as a process where that matters."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from stepstate import __version__
from stepstate.cli import main
from stepstate.client import Client
from stepstate.models import write_model
from tests.integration.wire import HANG, TOLERANCE, draw, largest_difference
from tests.networks import Network
from tests.processes import ServerProcess, server_process

COMMAND = [sys.executable, "-m", "stepstate.cli"]
Done = subprocess.CompletedProcess[str]


def run(*arguments: str) -> Done:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=HANG, check=False
    )


@pytest.fixture
def run_here() -> Iterator[Callable[..., Done]]:
    """Runs a command in this process, which spares the imports."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def invoke(
        *arguments: str, given: str = "", variables: Mapping[str, str] | None = None
    ) -> Done:
        found = CliRunner().invoke(main, arguments, input=given, env=variables)
        assert found.exception is None or isinstance(found.exception, SystemExit)
        return Done(arguments, found.exit_code, found.stdout, found.stderr)

    yield invoke
    root.handlers[:] = handlers
    root.setLevel(level)


def complaint(done: Done) -> str:
    """The one line that a failed command says."""
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr
    said = done.stderr.strip().splitlines()
    assert said[-1].startswith("Error: "), done.stderr
    # click shows the usage before a wrong option, and nothing else does.
    assert len(said) == 1 or said[0].startswith("Usage: "), done.stderr
    return said[-1]


@pytest.fixture(scope="module")
def server(model_root: Path) -> Iterator[ServerProcess]:
    with server_process("--models", str(model_root)) as running:
        yield running


@pytest.fixture
def address(server: ServerProcess) -> str:
    return server.address


@pytest.fixture
def ask(address: str, run_here: Callable[..., Done]) -> Callable[..., Done]:
    """Runs a command of a client against the server."""
    return lambda *arguments, given="": run_here(*arguments, "--server", address, given=given)


# stepstate serve.


def test_serve_prints_the_ports_it_took(server: ServerProcess):
    ports = {
        int(part.rpartition(":")[2].split("/")[0]) for part in (server.address, server.metrics_url)
    }
    assert len(ports) == 2
    assert 0 not in ports
    with Client(server.address) as client:
        assert len(client.models()) == 6


def write_broken(folder: Path, network: Network, how: str) -> None:
    made = network.write(folder)
    manifest, weights = made / "manifest.json", made / "model.safetensors"
    document = json.loads(manifest.read_text())
    match how:
        case "a missing key":
            del document["cell"]["num_layers"]
            manifest.write_text(json.dumps(document))
        case "a changed value":
            document["inputs"][0]["unit"] = "edited"
            manifest.write_text(json.dumps(document))
        case "no JSON":
            manifest.write_text(manifest.read_text()[:100])
        case "truncated weights":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "swapped weights":
            other = Network("other", network.module, network.head, network.manifest)
            with_noise = {name: tensor + 1 for name, tensor in other.tensors().items()}
            write_model(folder / "aside" / "lstm" / "1", network.manifest, with_noise)
            shutil.move(folder / "aside" / "lstm" / "1" / "model.safetensors", weights)
            shutil.rmtree(folder / "aside")
        case "no weights":
            weights.unlink()
        case "another folder":
            shutil.move(made, folder / network.name / "2")


BROKEN = {
    "a missing key": ("manifest.json", "cell.num_layers"),
    "a changed value": ("manifest.json", "fingerprint"),
    "no JSON": ("manifest.json", "JSON"),
    "truncated weights": ("model.safetensors", "not a whole safetensors file"),
    "swapped weights": ("lstm/1", "fingerprint"),
    "no weights": ("model.safetensors", "No such file"),
    "another folder": ("lstm/2", "1"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_serve_refuses_a_broken_model_by_name(
    how: str, networks: dict[str, Network], tmp_path: Path, run_here: Callable[..., Done]
):
    write_broken(tmp_path, networks["lstm"], how)
    said = complaint(run_here("serve", "--models", str(tmp_path), "--listen", "127.0.0.1:0"))
    where, what = BROKEN[how]
    assert where in said or how in {"a changed value", "swapped weights"}
    assert str(tmp_path) in said
    assert what in said


def test_serve_needs_a_folder_with_models(tmp_path: Path, run_here: Callable[..., Done]):
    missing = complaint(run_here("serve", "--models", str(tmp_path / "nope")))
    assert f"{tmp_path}/nope: is not a folder" in missing
    (tmp_path / "lstm" / "1").mkdir(parents=True)
    empty = complaint(run_here("serve", "--models", str(tmp_path)))
    assert "manifest.json" in empty


@pytest.mark.parametrize("option", ["--listen", "--metrics-listen"])
def test_serve_says_which_port_is_taken(
    option: str, model_root: Path, run_here: Callable[..., Done]
):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"--listen": "127.0.0.1:0", "--metrics-listen": "127.0.0.1:0"}
        ports[option] = f"127.0.0.1:{port}"
        options = [text for pair in ports.items() for text in pair]
        done = run_here("serve", "--models", str(model_root), *options)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert f"{option} 127.0.0.1:{port}: can't listen there" in done.stderr


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("STEPSTATE_LISTEN", "nowhere"),
        ("STEPSTATE_LISTEN", "127.0.0.1:99999"),
        ("STEPSTATE_MAX_SESSIONS", "many"),
        ("STEPSTATE_MAX_SESSIONS", "0"),
        ("STEPSTATE_MAX_SESSIONS", "99999999999999"),
        ("STEPSTATE_BATCH_ROWS", "-1"),
        ("STEPSTATE_IDLE_TIMEOUT", "nan"),
        ("STEPSTATE_DRAIN_SECONDS", "inf"),
        ("STEPSTATE_LOG_LEVEL", "LOUD"),
    ],
)
def test_serve_refuses_a_corrupt_variable_by_name(
    model_root: Path, variable: str, value: str, run_here: Callable[..., Done]
):
    ports = {"STEPSTATE_LISTEN": "127.0.0.1:0", "STEPSTATE_METRICS_LISTEN": "127.0.0.1:0"}
    variables = {**ports, "STEPSTATE_MODELS": str(model_root), variable: value}
    said = complaint(run_here("serve", variables=variables))
    name = variable.removeprefix("STEPSTATE_").lower()
    assert name in said or f"--{name.replace('_', '-')}" in said
    assert value in said


# stepstate step.


def as_csv(x: np.ndarray, header: str = "") -> str:
    lines = [",".join(f"{value:.9g}" for value in row) for row in x]
    return "\n".join([header, *lines] if header else lines) + "\n"


def test_step_prints_the_outputs_of_each_row(ask, networks: dict[str, Network]):
    x = draw(15)
    done = ask("step", "--model", "lstm", given=as_csv(x))
    assert done.returncode == 0, done.stderr
    header, *lines = csv.reader(io.StringIO(done.stdout))
    assert header == ["t", "y0", "y1"]
    assert [int(line[0]) for line in lines] == list(range(1, 16))
    got = np.array([[float(value) for value in line[1:]] for line in lines])
    assert largest_difference(got, networks["lstm"].offline(x)) <= TOLERANCE


def test_step_takes_columns_by_the_names_of_a_header(ask, networks: dict[str, Network]):
    x = draw(8)
    shuffled = np.column_stack((x[:, 2], np.full(8, 7), x[:, 0], x[:, 1]))
    given = as_csv(shuffled, " x2 ,note,x0,x1")
    done = ask("step", "--model", "lstm", "--output", "jsonl", given=given)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["t"] for line in lines] == list(range(1, 9))
    got = np.array([[line["y0"], line["y1"]] for line in lines])
    assert largest_difference(got, networks["lstm"].offline(x)) <= TOLERANCE


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("1,2,three", "three"),
        ("1,2", "it has 2"),
        ("1,2,3,4", "expected 3 numbers separated by commas (it has 4)"),
        ("1,2,", "--missing impute or hold"),
        ("nan,1,1", "'x0' is nan; a missing value takes a session"),
        ("1,1e39,1", "'x1' is inf"),
    ],
)
def test_step_names_the_line_that_is_bad_after_answering_those_before(ask, bad: str, told: str):
    done = ask("step", "--model", "lstm", given=as_csv(draw(3)) + f"{bad}\n" + as_csv(draw(2)))
    said = complaint(done)
    assert told in said
    assert len(done.stdout.splitlines()) == 1 + 3
    assert "line 4 of the input" in said


def test_a_line_has_as_many_cells_as_the_header(ask):
    done = ask("step", "--model", "lstm", given="x0,x1,x2,note\n1,1,1,a\n\n1,1,1\n")
    warned, said = done.stderr.splitlines()
    assert warned == "columns of the input that are not used: note"
    assert "line 4 of the input is '1,1,1': expected 4 cells" in said
    assert len(done.stdout.splitlines()) == 2


def test_text_begins_with_the_mark_that_spreadsheets_write(ask, networks: dict[str, Network]):
    x = draw(4)
    done = ask("step", "--model", "lstm", given=as_csv(x[:, ::-1], "\ufeffx2,x1,x0"))
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1].split(",")
    got = np.array([float(value) for value in last[1:]])
    assert largest_difference(got, networks["lstm"].offline(x)[-1]) <= TOLERANCE


@pytest.mark.parametrize(
    ("bad", "told"), [(b"1,\xff,3\n", "can't decode"), (b"1," + b"2" * 200_000 + b"\n", "larger")]
)
def test_what_is_no_csv_is_named_by_its_line(address: str, bad: bytes, told: str):
    command = [*COMMAND, "step", "--model", "lstm", "--server", address]
    done = subprocess.run(
        command, input=b"1,2,3\n1,2,3\n" + bad, capture_output=True, timeout=HANG, check=False
    )
    said = complaint(Done(command, done.returncode, done.stdout.decode(), done.stderr.decode()))
    assert "line 3 of the input" in said
    assert told in said


@pytest.mark.parametrize("command", ["models", "step"])
def test_output_that_can_not_be_written_is_one_line(address: str, command: str):
    options = ["--model", "lstm"] if command == "step" else []
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, command, *options, "--server", address],
            input=as_csv(draw(3)),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=HANG,
            check=False,
        )
    assert "No space left on device" in complaint(done)


def open_ids(address: str) -> set[str]:
    with Client(address) as client:
        return {info.session_id for info in client.sessions()}


@pytest.mark.parametrize("bad", ["1,2", "nan,1,1"])
def test_a_session_that_was_given_no_name_does_not_outlive_an_error(ask, address: str, bad: str):
    before = open_ids(address)
    complaint(ask("step", "--model", "lstm", given=f"1,2,3\n{bad}\n"))
    assert open_ids(address) == before
    said = complaint(ask("step", "--model", "lstm", "--keep", given=f"1,2,3\n{bad}\n"))
    (kept,) = open_ids(address) - before
    assert f"; session {kept!r} is left open at t=1" in said


@pytest.mark.parametrize("options", [(), ("--session-id", "stopped")])
def test_a_session_that_was_given_no_name_does_not_outlive_its_run(
    address: str, options: tuple[str, ...]
):
    before = open_ids(address)
    command = [*COMMAND, "step", "--model", "lstm", "--server", address, *options]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdin
        assert running.stdout
        running.stdin.write("1,2,3\n")
        running.stdin.flush()
        assert [running.stdout.readline()[0] for _ in range(2)] == ["t", "1"]
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=HANG)
    assert running.returncode
    assert "Traceback" not in said
    assert open_ids(address) - before == ({"stopped"} if options else set())
    assert ("session 'stopped' is left open at t=1" in said) is bool(options)


def test_step_goes_on_with_a_session_that_was_kept(ask, networks: dict[str, Network]):
    x = draw(10)
    options = ("step", "--model", "lstm", "--session-id", "meter-7", "--keep")
    first = ask(*options, given=as_csv(x[:6]))
    assert first.returncode == 0, first.stderr
    second = ask(*options[:-1], given=as_csv(x[6:]))
    assert second.returncode == 0, second.stderr
    lines = first.stdout.splitlines()[1:] + second.stdout.splitlines()[1:]
    got = np.array([[float(value) for value in line.split(",")] for line in lines])
    assert got[:, 0].tolist() == list(range(1, 11))
    assert largest_difference(got[:, 1:], networks["lstm"].offline(x)) <= TOLERANCE
    # Without --keep it was closed, and is not begun again from zero unseen.
    third = ask(*options[:-1], given=as_csv(x[:1]))
    assert third.returncode == 0
    assert third.stdout.splitlines()[1] == lines[0]
    assert "session 'meter-7' was closed at t=10: it begins anew" in third.stderr


@pytest.mark.parametrize(
    ("option", "other", "same"),
    [
        ("--model", "gru", "lstm"),
        ("--version", "2", "1"),
        ("--missing", "hold", "reject"),
        ("--durability", "sync", "none"),
        ("--start-time", "2026-03-01T05:00", "2026-03-01T04:00+00:00"),
    ],
)
def test_what_contradicts_an_open_session_is_refused(
    ask, address: str, option: str, other: str, same: str
):
    with Client(address) as client:
        start = datetime(2026, 3, 1, 4, tzinfo=UTC)
        client.open("lstm", session_id="agreed", start_time=start, durability="none")
        options = ("step", "--session-id", "agreed", "--keep")
        said = complaint(ask(*options, option, other, given="1,2,3\n"))
        assert "session 'agreed' is open with " + option in said
        assert client.info("agreed").t == 0
        assert ask(*options, option, same, given="1,2,3\n").returncode == 0
        client.close("agreed")


def test_step_says_what_the_server_refused(ask):
    assert "model 'nope' is not loaded" in complaint(ask("step", "--model", "nope"))
    assert "name one of" in complaint(ask("step"))
    assert "--start-time" in complaint(ask("step", "--model", "lstm", "--start-time", "soon"))


def test_no_server_is_one_line(run_here: Callable[..., Done]):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        assert address in complaint(run_here("health", "--server", address))


# The others.


def test_sessions_are_listed_shown_and_closed(ask, address: str):
    with Client(address) as client:
        client.open("gru", session_id="shown").step(draw(4))
    listed = ask("sessions", "list", "--model", "gru")
    (line,) = (line for line in listed.stdout.splitlines() if "shown" in line)
    assert line.split()[:3] == ["shown", "gru/1", "4"]
    assert "shown" not in ask("sessions", "list", "--model", "lstm").stdout
    shown = json.loads(ask("sessions", "show", "shown").stdout)
    assert (shown["session_id"], shown["model"], shown["t"]) == ("shown", "gru", 4)
    closed = json.loads(ask("sessions", "close", "shown").stdout)
    assert (closed["session_id"], closed["t"]) == ("shown", 4)
    for command in ("show", "close"):
        assert "was closed at t=4" in complaint(ask("sessions", command, "shown"))
    assert "unknown" in complaint(ask("sessions", "show", "never"))


def test_an_expired_session_is_listed_and_restored(ask, address: str):
    with Client(address) as client:
        idle = timedelta(seconds=0.2)
        client.open("gru", session_id="idle", idle_timeout=idle).step(draw(4))
    until = time.monotonic() + 30
    while "idle " in ask("sessions", "list").stdout and time.monotonic() < until:
        time.sleep(0.1)
    assert "`stepstate sessions restore idle`" in complaint(ask("sessions", "show", "idle"))
    (line,) = (n for n in ask("sessions", "list", "--expired").stdout.splitlines() if "idle " in n)
    assert re.search(r"expired +can be restored until 20", line)
    restored = json.loads(ask("sessions", "restore", "idle").stdout)
    assert (restored["session_id"], restored["t"], restored["status"]) == ("idle", 4, "open")


def test_models_are_printed_with_their_columns(ask):
    done = ask("models")
    assert done.returncode == 0, done.stderr
    for told in ("lstm/1", "projected/1", "x2", "y1", "sha256:", "2 × 16 units"):
        assert told in done.stdout


def test_tenants_are_printed_with_their_limits_and_what_they_use(ask):
    done = ask("tenants")
    assert done.returncode == 0, done.stderr
    assert "default  weight 1\n" in done.stdout
    assert re.search(r"^  rows_per_second +[\d,]+ in all, no limit$", done.stdout, re.MULTILINE)
    assert re.search(r"^  calls +1, no limit$", done.stdout, re.MULTILINE)  # this one


def test_health_is_the_exit_status(ask):
    done = ask("health")
    assert (done.returncode, done.stdout.strip()) == (0, "SERVING")


def test_the_version_is_the_packages():
    done = run("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"stepstate, version {__version__}")


def test_every_command_has_help(run_here: Callable[..., Done]):
    listed = run_here("--help").stdout
    for command in ("serve", "step", "forecast", "sessions", "models", "tokens", "health"):
        assert command in listed
        assert run_here(command, "--help").returncode == 0


def test_a_command_that_does_not_exist_is_said_to():
    assert "No such command 'sreve'" in complaint(run("sreve"))
