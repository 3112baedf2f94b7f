"""What a command says and does before there is a server: imports, variables, models, signals."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from stepstate.cli import main
from stepstate.cli.main import COMMANDS
from stepstate.config import ServerConfig
from stepstate.models import load_model
from stepstate.server import build_server, running_server
from tests.integration.wire import HANG, scrape
from tests.processes import server_process

COMMAND = [sys.executable, "-m", "stepstate.cli"]
_IMPORTED = """
import sys
from stepstate.cli import main
try:
    main(sys.argv[1:], prog_name="stepstate")
except SystemExit as end:
    print(end.code, *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def imported_by(*arguments: str) -> set[str]:
    """The packages that a command has imported when it ends; it ends well or not."""
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTED, *arguments],
        capture_output=True,
        text=True,
        timeout=HANG,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        *((name, "--help") for name in COMMANDS),
        ("step", "--server", "127.0.0.1:1", "--start-time", "never"),
        *(
            pytest.param(command, marks=pytest.mark.long)  # they wait for ten seconds
            for command in (
                ("sessions", "list", "--server", "nowhere:"),
                ("models", "--server", "nowhere:"),
            )
        ),
        ("serve", "--listen", "nowhere"),
    ],
    ids=" ".join,
)
def test_nothing_imports_torch_but_a_server_that_is_to_run(arguments: tuple[str, ...]):
    found = imported_by(*arguments)
    assert "click" in found
    assert "torch" not in found
    if arguments == ("--help",):
        assert not {"grpc", "numpy", "stepstate.client"} & found


# Options and variables.


def options() -> Iterator[tuple[str, click.Option]]:
    """Every option of every command, with the command's path."""
    waiting: list[tuple[str, click.Command]] = [("", main)]
    while waiting:
        path, command = waiting.pop()
        yield from ((path, one) for one in command.params if isinstance(one, click.Option))
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                found = command.get_command(context, name)
                assert found is not None
                waiting.append((f"{path} {name}".strip(), found))


# What images, shells and Kubernetes (for a service named "stepstate") set.
TAKEN = re.compile(
    r"STEPSTATE_(VERSION|HOME|ROOT|PORT|PORT_.*|SERVICE_HOST|SERVICE_PORT.*|ENV|USER|PATH)"
)


def test_no_variable_means_two_things_or_what_others_set():
    meanings: dict[str, set[tuple[str, str]]] = {}
    for path, option in options():
        names = [option.envvar] if isinstance(option.envvar, str) else option.envvar or []
        for name in names:
            assert not TAKEN.fullmatch(name), f"{name} of stepstate {path}"
            meanings.setdefault(name, set()).add((option.opts[0], repr(option.type)))
    assert "STEPSTATE_MODEL_VERSION" in meanings
    assert {name for name, found in meanings.items() if len(found) > 1} == set()


def test_every_command_is_listed_and_can_be_imported():
    listed = CliRunner().invoke(main, ["--help"]).stdout
    for name, (_, text) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", listed, re.MULTILINE)
        assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0


# Models.


def test_where_there_are_no_models_nothing_is_left_behind(tmp_path: Path):
    done = subprocess.run(
        [*COMMAND, "serve"], cwd=tmp_path, capture_output=True, text=True, timeout=HANG, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: models: is not a folder; name the folder")
    assert "stepstate models example" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_example_is_the_newest_model_and_is_written_once(tmp_path: Path):
    shipped = Path(__file__).parents[2] / "models" / "electricity"
    newest = max((path for path in shipped.iterdir() if path.name.isdigit()), key=lambda p: p.name)
    done = CliRunner().invoke(main, ["models", "example", str(tmp_path / "made")])
    assert done.exit_code == 0, done.output
    model = load_model(tmp_path / "made" / "electricity" / newest.name)
    assert model.manifest.fingerprint == load_model(newest).manifest.fingerprint
    again = CliRunner().invoke(main, ["models", "example", str(tmp_path / "made")])
    assert again.exit_code == 1
    assert "is there already" in again.stderr


@pytest.fixture
def one_bad(model_root: Path, tmp_path: Path) -> Path:
    """Good models, and one whose weights are cut."""
    root = tmp_path / "models"
    shutil.copytree(model_root, root)
    (root / "gru" / "1" / "model.safetensors").write_bytes(b"cut")
    return root


async def test_good_models_beside_a_bad_one_are_served_on_request(
    one_bad: Path, caplog: pytest.LogCaptureFixture
):
    config = ServerConfig(
        models=one_bad,
        skip_invalid_models=True,
        listen="127.0.0.1:0",
        metrics_listen="127.0.0.1:0",
        store="memory:",
    )
    async with running_server(config) as server:
        loaded = {model.manifest.name for model in server.sessions.catalog}
        text = await scrape(server.metrics_address)
    assert "lstm" in loaded
    assert "gru" not in loaded
    assert 'stepstate_models{state="skipped"} 1.0' in text
    assert f'stepstate_models{{state="loaded"}} {len(loaded)}.0' in text
    (skipped,) = [record for record in caplog.records if record.message == "a model is skipped"]
    assert skipped.levelname == "WARNING"
    assert "gru/1" in skipped.__dict__["folder"]
    assert "safetensors" in skipped.__dict__["problem"]


def test_a_bad_model_stops_a_server_that_was_not_asked_to_skip_it(one_bad: Path, tmp_path: Path):
    store = f"sqlite:{tmp_path}/sessions.db"
    done = CliRunner().invoke(main, ["serve", "--models", str(one_bad), "--store", store])
    assert done.exit_code == 1
    assert "gru/1" in done.stderr
    assert not (tmp_path / "sessions.db").exists()


def test_bad_models_alone_are_no_server(one_bad: Path):
    for folder in one_bad.iterdir():
        if folder.name != "gru":
            shutil.rmtree(folder)
    done = CliRunner().invoke(main, ["serve", "--models", str(one_bad), "--skip-invalid-models"])
    assert done.exit_code == 1
    assert "gru/1" in done.stderr


# Logs.


async def test_without_tritons_messages_the_log_says_so_in_one_plain_line(
    model_root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    for name in [name for name in sys.modules if name.startswith("stepstate.transport.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with caplog.at_level("INFO"):
        server = await build_server(
            ServerConfig(models=model_root, store="memory:", listen="127.0.0.1:0")
        )
        await server.stop()
    (said,) = [record for record in caplog.records if "Triton" in record.message]
    assert said.levelname == "INFO"
    assert said.exc_info is None
    assert "the extra `triton` is not installed" in said.message


# The metrics port.


def answer(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=HANG) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


async def test_the_metrics_port_knows_its_paths(model_root: Path):
    config = ServerConfig(
        models=model_root, listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", store="memory:"
    )
    async with running_server(config) as server:
        root = f"http://{server.metrics_address}"
        status, text = await asyncio.to_thread(answer, f"{root}/metrics?name[]=up")
        assert status == 200
        status, text = await asyncio.to_thread(answer, f"{root}/metrics")
        assert (status, "stepstate_build_info" in text) == (200, True)
        assert await asyncio.to_thread(answer, f"{root}/healthz") == (200, "SERVING\n")
        for path in ("", "/", "/health", "/healthz/", "/metrics/x", "/favicon.ico"):
            status, text = await asyncio.to_thread(answer, root + path)
            assert (status, text) == (404, "there are /metrics and /healthz\n")
        server.state = type(server.state).DRAINING
        assert (await asyncio.to_thread(answer, f"{root}/healthz"))[0] == 503


# Signals.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains_and_the_status_is_0(model_root: Path, number: signal.Signals):
    with server_process("--models", str(model_root)) as server:
        server.process.send_signal(number)
        assert server.process.wait(HANG) == 0


def test_under_nohup_a_server_outlives_its_terminal(model_root: Path, tmp_path: Path):
    options = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--store", "memory:"]
    process = subprocess.Popen(
        ["nohup", *COMMAND, "serve", "--models", str(model_root), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith("serving ")
        process.send_signal(signal.SIGHUP)
        process.terminate()
        _, logged = process.communicate(timeout=HANG)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    lines = [json.loads(line)["event"] for line in logged.splitlines() if line.startswith("{")]
    assert lines[-2:] == ["draining", "stopped"]


_WAITS = """
import os, signal, sys
from stepstate.cli import main

def interrupted(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()

signal.signal(signal.SIGINT, signal.default_int_handler)
main.get_command(None, sys.argv[1]).callback = interrupted
main(prog_name="stepstate")
"""
_IMPORTS = """
import os, signal, sys, time
from stepstate.cli import main

class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":  # whose import has callbacks that swallow what is raised in them
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            except KeyboardInterrupt:
                pass

sys.meta_path.insert(0, Interrupted())
signal.signal(signal.SIGINT, signal.default_int_handler)
main(prog_name="stepstate")
"""


@pytest.mark.parametrize(
    ("code", "arguments"), [(_WAITS, ("step",)), (_IMPORTS, ("serve", "--models", "nowhere"))]
)
def test_ctrl_c_while_a_command_waits_or_starts_ends_it_with_130(
    code: str, arguments: tuple[str, ...]
):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert (done.returncode, done.stderr.strip()) == (130, "")
