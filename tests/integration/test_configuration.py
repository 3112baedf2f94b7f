"""The configuration file, seen from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from stepstate.cli import main
from stepstate.cli.main import COMMANDS
from tests.processes import server_process

SECRET = "hunter2"


def run(*arguments: object, variables: Mapping[str, str] | None = None) -> Result:
    found = CliRunner().invoke(main, [*map(str, arguments)], env=variables)
    assert found.exception is None or isinstance(found.exception, SystemExit)
    return found


@pytest.fixture
def file(tmp_path: Path, model_root: Path) -> Path:
    """A file that a server can start with."""
    path = tmp_path / "stepstate.toml"
    path.write_text(f'[server]\nmodels = "{model_root}"\nslots = 7\nreplay_rows = 8\n')
    return path


def shown(text: str) -> dict[str, str]:
    """What `config show` prints of [server]: the rest of a line by its key."""
    return dict(line.split(" = ", 1) for line in text.splitlines() if " = " in line)


def test_a_server_takes_its_settings_from_the_file(file: Path):
    with server_process("--config", str(file)) as server:
        assert server.address.startswith("127.0.0.1:")  # of an option, which wins


def test_show_prints_each_setting_with_its_origin(file: Path):
    variables = {"STEPSTATE_CONFIG": str(file), "STEPSTATE_REPLAY_ROWS": "9"}
    found = shown(run("config", "show", "--listen", "[::1]:1", variables=variables).stdout)
    assert found["listen"] == '"[::1]:1"  # option'
    assert found["replay_rows"] == "9  # variable"
    assert found["slots"] == "7  # file"
    assert found["chunk_rows"] == "96  # default"


def test_what_is_shown_can_be_fed_back(file: Path, tmp_path: Path):
    copy = tmp_path / "copy.toml"
    copy.write_text(run("config", "show", file).stdout)
    again = run("config", "show", copy).stdout
    assert again.replace("# file", "# default") == copy.read_text().replace("# file", "# default")


def test_show_prints_no_secret(file: Path):
    for variable in (
        {"STEPSTATE_STORE": f"redis://user:{SECRET}@host"},
        {"STEPSTATE_STORE": "redis://host", "STEPSTATE_STORE_PASSWORD": SECRET},
    ):
        done = run("config", "show", file, variables=variable)
        assert done.exit_code == 0
        assert SECRET not in done.output


def test_check_accepts_what_a_server_can_start_with(file: Path):
    done = run("config", "check", file)
    assert (done.exit_code, done.stderr) == (0, "")
    assert (
        done.stdout
        == "nothing found that would stop a server; its store and addresses were not tried\n"
    )


def test_check_names_all_that_would_stop_a_server(file: Path, tmp_path: Path):
    options = [
        *("--models", tmp_path / "none", "--store", "redis://h"),
        *("--store-password-file", tmp_path / "none", "--snapshot-key", tmp_path / "none"),
        *("--tokens-file", tmp_path / "none", "--tls-cert", "none", "--tls-key", "none"),
        *("--jwt-issuer", "i", "--jwt-audience", "a", "--jwt-jwks", tmp_path / "none"),
        *("--audit-log", tmp_path / "none" / "log"),
    ]
    done = run("config", "check", file, *options)
    assert done.exit_code == 1
    *problems, last = done.stderr.splitlines()
    assert last == "Error: 7 to put right"
    starts = ["--tls-cert", "--tokens-file", "--jwt-jwks", str(tmp_path), "--snapshot-key"]
    starts += ["store ", "--audit-log"]
    assert [
        problem[: len(start)] for problem, start in zip(problems, starts, strict=True)
    ] == starts


def test_check_asks_for_protection_where_others_could_reach_the_server(file: Path):
    done = run("config", "check", file, "--listen", "0.0.0.0:1")
    assert done.exit_code == 1
    assert done.stderr.startswith("--listen 0.0.0.0:1: other machines can reach it")


@pytest.mark.parametrize(
    "command", [("serve", "--config"), ("config", "check"), ("config", "show")]
)
def test_a_wrong_file_is_refused_with_its_line(command: tuple[str, ...], file: Path):
    file.write_text("[server]\nslotz = 3\n")
    done = run(*command, file)
    assert done.exit_code == 1
    assert done.stderr == (
        f"Error: {file}, line 2: 'slotz' is no name in [server]: did you mean slots?\n"
    )


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
def test_a_server_that_others_could_reach_does_not_start_unprotected(file: Path, listen: str):
    done = run("serve", "--config", file, "--listen", listen)
    assert done.exit_code == 1
    assert f"--listen {listen}: other machines can reach it" in done.stderr
    with server_process("--config", str(file), "--listen", listen, "--insecure") as server:
        assert server.address


def test_a_secret_on_the_command_line_is_refused_and_not_repeated():
    done = run("config", "show", "--store", f"redis://:{SECRET}@host")
    assert done.exit_code == 1
    assert SECRET not in done.output
    assert "STEPSTATE_STORE_PASSWORD" in done.stderr


def test_config_is_a_command():
    assert "config" in COMMANDS
