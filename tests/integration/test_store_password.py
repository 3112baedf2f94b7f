"""The password of Redis: where it may come from, and that nothing shows it."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner

from stepstate.cli import main
from stepstate.config import ConfigError, ServerConfig
from stepstate.errors import StoreOpenError
from stepstate.server import build_server
from stepstate.stores import open_store, read_password
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.processes import SERVING
from tests.redis_process import RedisProcess, redis_cluster, redis_process, redis_sentinel

SECRET = "s3cret-Zx9/+@:"
QUOTED = "s3cret-Zx9%2F%2B%40%3A"
SHOWN = "s3cret"
"""The part that has no characters to escape, in whatever shows it."""
WRONG = f"{SHOWN}-wrong"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """Its default user has a password, and so has the user "steps"."""
    folder = tmp_path_factory.mktemp("redis")
    with redis_process(folder, "--appendonly", "yes") as server:
        server.command("ACL", "SETUSER", "steps", "on", f">{SECRET}", "~*", "+@all")
        server.command("CONFIG", "SET", "requirepass", SECRET)
        yield server


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "password"
    made.write_text(f"{SECRET}\n")
    return made


@pytest.fixture
def wrong_file(tmp_path: Path) -> Path:
    made = tmp_path / "wrong"
    made.write_text(WRONG)
    return made


def place(redis: RedisProcess) -> str:
    return f"127.0.0.1:{redis.port}"


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{QUOTED}@127.0.0.1:1/0",
        f"rediss://steps:{QUOTED}@127.0.0.1:1",
        f"redis://127.0.0.1:1/0?password={QUOTED}",
        f"redis+cluster://steps:{QUOTED}@127.0.0.1:1,127.0.0.1:2",
        f"redis+sentinel://steps:{QUOTED}@127.0.0.1:1/sessions",
        f"redis+sentinel://127.0.0.1:1/sessions?sentinel_password={QUOTED}",
    ],
)
def test_a_password_on_the_command_line_is_refused_with_the_ways_out(url: str):
    done = CliRunner().invoke(main, ["serve", "--store", url])
    assert done.exit_code == 1
    assert "--store-password-file" in done.stderr
    assert "STEPSTATE_STORE_PASSWORD" in done.stderr
    assert SHOWN not in done.output


@pytest.mark.parametrize("how", ["variable", "file", "url"])
@pytest.mark.parametrize("user", ["", "steps"])
async def test_a_wrong_password_is_named_and_not_shown(
    redis: RedisProcess, wrong_file: Path, config: ServerConfig, how: str, user: str
):
    at = f"{user}@" if user else ""
    settings = {
        "variable": {"store": f"redis://{at}{place(redis)}", "store_password": WRONG},
        "file": {"store": f"redis://{at}{place(redis)}", "store_password_file": str(wrong_file)},
        "url": {"store": f"redis://{user}:{WRONG}@{place(redis)}"},
    }
    with pytest.raises(StoreOpenError, match="STEPSTATE_STORE_PASSWORD") as refused:
        await build_server(replace(config, **settings[how]))
    assert place(redis) in str(refused.value)
    assert "password" in str(refused.value)
    assert SHOWN not in str(refused.value) + repr(refused.value)


@contextmanager
def serving(
    model_root: Path, log: Path, *options: str, **variables: str
) -> Iterator[tuple[subprocess.Popen, str, str]]:
    """A server, its address and that of its metrics; its output is in the log when it has ended."""
    env = os.environ | {f"STEPSTATE_{name.upper()}": value for name, value in variables.items()}
    command = [sys.executable, "-m", "stepstate.cli", "serve", "--models", str(model_root)]
    command += ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
    command += ["--log-level", "DEBUG", *options]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, env=env, text=True
        )
    line = process.stdout.readline()
    try:
        found = SERVING.search(line)
        assert found, log.read_text()
        yield process, found["address"], found["metrics"]
    finally:
        process.terminate()
        line += process.communicate(timeout=40)[0]
        log.write_text(log.read_text() + line)


@pytest.mark.parametrize(
    "how", ["file", *(pytest.param(how, marks=pytest.mark.long) for how in ("variable", "url"))]
)
def test_nothing_that_a_server_says_or_shows_has_the_password(
    redis: RedisProcess, file: Path, model_root: Path, tmp_path: Path, how: str
):
    """Nor what it says to clients when Redis no longer accepts the password."""
    url, options = f"redis://steps@{place(redis)}/1", ()
    if how == "variable":
        variables = {"store": url, "store_password": SECRET}
    elif how == "file":
        options, variables = ("--store", url, "--store-password-file", str(file)), {}
    else:
        variables = {"store": f"redis://steps:{QUOTED}@{place(redis)}/1"}
    opening = pb.OpenSessionRequest(session_id=how, model="lstm", durability=pb.DURABILITY_SYNC)
    step = pb.StepRequest(session_id=how, x=[0.1, 0.2, 0.3])
    log = tmp_path / "log"
    with (
        serving(model_root, log, *options, **variables) as (process, address, metrics),
        grpc.insecure_channel(address) as channel,
    ):
        stub = StepstateServiceStub(channel)
        stub.OpenSession(opening)
        assert stub.Step(step).durable_t == 1
        with redis.client() as client:
            client.auth(SECRET)
            client.execute_command("ACL", "SETUSER", "steps", "resetpass", ">another")
            client.client_kill_filter(_type="normal", skipme=True)
            with pytest.raises(grpc.RpcError, match="store") as refused:
                stub.Step(step)
            scraped = urllib.request.urlopen(metrics).read().decode()
            client.execute_command("ACL", "SETUSER", "steps", f">{SECRET}")
        shown = [str(refused.value), repr(refused.value), scraped]
        shown.append(Path(f"/proc/{process.pid}/cmdline").read_text())
    shown.append(log.read_text())
    assert "away" in shown[-1]
    assert [text for text in shown if SHOWN in text] == []


def test_values_that_may_hold_a_password_are_not_in_the_repr_of_the_settings():
    for settings in (
        {"store": f"redis://:{QUOTED}@h:1"},
        {"store": "redis://h:1", "store_password": SECRET},
    ):
        assert SHOWN not in repr(ServerConfig(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"store": f"redis://:{QUOTED}@h:1", "store_password": SECRET},
        {"store": f"redis://h:1?password={QUOTED}", "store_password_file": "f"},
        {"store": "redis://h:1", "store_password": SECRET, "store_password_file": "f"},
    ],
)
def test_a_password_in_two_places_is_refused(settings: dict[str, str]):
    with pytest.raises(ConfigError, match="give it once") as refused:
        ServerConfig(**settings)
    assert SHOWN not in str(refused.value)


@pytest.mark.parametrize("store", ["memory:", "sqlite:s.db"])
def test_a_password_for_a_store_that_has_none_is_refused(store: str):
    with pytest.raises(ConfigError, match="store_password is for Redis"):
        ServerConfig(store=store, store_password=SECRET)


def test_a_file_without_a_password_says_what_is_wrong_with_it(tmp_path: Path, file: Path):
    assert read_password(str(file)) == SECRET
    for path, content in ((tmp_path / "none", None), (file, b"\n"), (file, b"\xff\xfe")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(StoreOpenError, match=f"password in {path}.*write the password"):
            read_password(str(path))


async def used(url: str) -> None:
    """The password opens a store, and without it there is none."""
    store = await open_store(url, clock=lambda: 0.0, password=SECRET)
    await store.probe()
    await store.close()
    with pytest.raises(StoreOpenError, match="STEPSTATE_STORE_PASSWORD") as refused:
        await open_store(url, clock=lambda: 0.0, password=WRONG)
    assert SHOWN not in str(refused.value)


async def test_a_primary_that_sentinels_name_has_the_same_ways(redis: RedisProcess, tmp_path: Path):
    with redis_sentinel(tmp_path / "sentinel", redis) as sentinel:
        sentinel.command("SENTINEL", "SET", "sessions", "auth-pass", SECRET)
        for user in ("", "steps@"):
            await used(f"redis+sentinel://{user}127.0.0.1:{sentinel.port}/sessions/2")


@pytest.mark.long
async def test_every_node_of_a_cluster_gets_the_password(tmp_path: Path):
    with redis_cluster(tmp_path) as nodes:
        for node in nodes:
            node.command("CONFIG", "SET", "requirepass", SECRET)
        await used("redis+cluster://" + ",".join(map(place, nodes)))
