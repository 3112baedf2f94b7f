"""A running server takes over a changed configuration file: all that it can, or nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest

from stepstate.client import AsyncClient
from stepstate.config import ServerConfig
from stepstate.configuration import Configuration, Given, SettingOrigin, read_file, resolve
from stepstate.configuration.reload import ConfigurationReloader
from stepstate.errors import Unauthenticated
from stepstate.server import Server, running_server
from stepstate.tenants import LimitTable
from tests.certificates import Authority, Certificate
from tests.credentials import bearer, token
from tests.integration.commands import read_terminal
from tests.integration.wire import HANG
from tests.processes import ServerProcess, server_process

RELOADED = "the configuration is reloaded"
ADDRESSES = "[server]\nlisten = '127.0.0.1:0'\nmetrics_listen = '127.0.0.1:0'\n"
REFUSED = "the configuration is not reloaded: the one before stays in use"


@dataclass(frozen=True, slots=True)
class Reloading:
    """A server in this process, with a configuration file."""

    server: Server
    file: Path
    reloader: ConfigurationReloader

    async def reload(self, text: str) -> bool:
        """Lets it reload a file with this text."""
        await asyncio.to_thread(self.file.write_text, text)
        return await self.reloader.reload()


@asynccontextmanager
async def reloading(config: ServerConfig, file: Path, text: str = "") -> AsyncIterator[Reloading]:
    """A server that runs with a file; models, store and transport are its options."""
    await asyncio.to_thread(file.write_text, f"{ADDRESSES}{text}")
    names = ("models", "store", "transport")
    given = {name: Given(getattr(config, name), SettingOrigin.OPTION) for name in names}

    def load() -> Configuration:
        return resolve(given, read_file(str(file)))

    configuration = load()
    tables = {"limits": configuration.limits, "certificates": configuration.certificates}
    async with running_server(configuration.server, **tables) as server:
        yield Reloading(server, file, server.reload_with(load, configuration))


@pytest.fixture
def level() -> AsyncIterator[None]:
    before = logging.getLogger().level
    yield
    logging.getLogger().setLevel(before)


async def test_what_can_be_reloaded_is_and_the_rest_is_named(
    config: ServerConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, level: None
):
    async with reloading(config, tmp_path / "f.toml") as one:
        assert await one.reload(f'{ADDRESSES}log_level = "ERROR"\n[limits]\nstreams = 3')
        assert one.server.tenants.limits.of("any").streams == 3
        assert logging.getLogger().level == logging.ERROR
        logging.getLogger().setLevel(logging.INFO)
        assert await one.reload(f"{ADDRESSES}slots = 5\nbatch_rows = 7\nlog_level = 'WARNING'")
        assert await one.reload(f"{ADDRESSES}slots = 5\n")
        assert await one.reload(ADDRESSES)
    waiting = [record.settings for record in caplog.records if hasattr(record, "settings")]
    assert waiting == ["slots, batch_rows", "slots"]


DEBUG = f"{ADDRESSES}log_level = 'DEBUG'\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"{DEBUG}slotz = 1", "line 5: 'slotz' is no name in [server]"),
        (f"{DEBUG}slots = 0", "line 5: slots is 0"),
        (f"{DEBUG}tokens_file = 'none'", "--tokens-file none: "),
        (f"{DEBUG}tls_cert = 'a'\ntls_key = 'b'", "--tls-cert a: "),
        (f"{DEBUG}[limits]\nstreams = 3\n[tenants.a]\nweight = 0", "weight is 0"),
        (f"{DEBUG}log_", "this is no TOML"),
        (DEBUG.replace("127.0.0.1", "0.0.0.0"), "--listen 0.0.0.0:0: other machines can reach it"),
    ],
)
async def test_a_file_with_one_error_changes_nothing_and_says_so(
    text: str, problem: str, config: ServerConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    before = logging.getLogger().level
    async with reloading(config, tmp_path / "f.toml") as one:
        running = logging.getLogger().level
        assert not await one.reload(text)
        assert logging.getLogger().level == running == before
        assert one.server.tenants.limits == LimitTable()
    (record,) = [record for record in caplog.records if record.getMessage() == REFUSED]
    assert problem in record.problems


@pytest.mark.transports
async def test_what_a_certificate_proves_is_reloaded_and_its_streams_end_with_that(
    config: ServerConfig, tmp_path: Path, authority: Authority, certificate: Certificate
):
    own = authority.issue("meter")
    tls = f"tls_cert = '{certificate.file}'\ntls_key = '{certificate.key}'\n"
    tls += f"tls_client_ca = '{authority.file}'\n"
    rule = "[[certificates]]\nmatch = 'CN:meter'\ntenant = 'acme'\nscopes = ['step', 'read']\n"
    parts = (authority.file, own.key, own.file)
    credentials = grpc.ssl_channel_credentials(*(part.read_bytes() for part in parts))
    async with reloading(config, tmp_path / "f.toml", tls + rule) as one:
        assert await one.reload(f"{ADDRESSES}{tls}{rule}")
        async with (
            AsyncClient(one.server.address, credentials=credentials, timeout=1.0) as client,
            await client.open("lstm", session_id="s") as session,
        ):
            await session.step([1.0, 2.0, 3.0])
            other = rule.replace("CN:meter", "CN:other")
            assert await one.reload(f"{ADDRESSES}{tls}{other}")
            await asyncio.sleep(1.5)  # credentials of open calls are looked at every second
            with pytest.raises(Unauthenticated):
                await session.step([1.0, 2.0, 3.0])
            assert await one.reload(f"{ADDRESSES}{tls}{other}{rule}")
            await session.step([1.0, 2.0, 3.0])
            assert session.t == 2


# As a process, by its signals and its file.


def events(log: Path) -> list[str]:
    """What the log says so far."""
    lines = log.read_text().splitlines()
    return [json.loads(line)["event"] for line in lines if line.startswith("{")]


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def series(server: ServerProcess, name: str) -> float:
    with urlopen(server.metrics_url) as page:
        found = re.search(rf"^{re.escape(name)} (\S+)$", page.read().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_a_change_of_the_file_and_sighup_reload_it(model_root: Path, tmp_path: Path):
    file, log = tmp_path / "f.toml", tmp_path / "log"
    file.write_text(f"[server]\nmodels = '{model_root}'\n")
    with server_process("--config", str(file), log=log) as server:
        started = series(server, "stepstate_config_last_reload_success_timestamp_seconds")
        file.write_text(f"[server]\nmodels = '{model_root}'\nslots = 9\n")
        wait_for(lambda: events(log).count(RELOADED) == 1)
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: events(log).count(RELOADED) == 2)
        file.write_text("[server]\nmodel = 'x'\n")
        wait_for(lambda: REFUSED in events(log))
        assert server.process.poll() is None
        wait_for(lambda: series(server, 'stepstate_config_reloads_total{result="refused"}') == 1)
        assert series(server, 'stepstate_config_reloads_total{result="applied"}') == 2
        reloaded = series(server, "stepstate_config_last_reload_success_timestamp_seconds")
        assert reloaded > started


def test_a_server_with_a_file_drains_when_its_terminal_closes(model_root: Path, tmp_path: Path):
    """The same signal as for a reload, after which the terminal is gone."""
    file, log = tmp_path / "f.toml", tmp_path / "log"
    file.write_text("[server]\nlisten = '127.0.0.1:0'\nmetrics_listen = '127.0.0.1:0'\n")
    command = f"{sys.executable} -m stepstate.cli serve --models {model_root} --config {file}"
    ours, theirs = pty.openpty()
    with log.open("wb") as errors:
        process = subprocess.Popen(
            ["setsid", "--ctty", "sh", "-c", f"exec {command} --store memory:"],
            stdin=theirs,
            stdout=theirs,
            stderr=errors,
            cwd=tmp_path,
        )
    os.close(theirs)
    try:
        said = b""
        while b"serving" not in said:
            said += read_terminal(ours)
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: RELOADED in events(log))
        os.close(ours)
        assert process.wait(HANG) == 0
    finally:
        process.kill()
        process.wait()
    assert events(log)[-2:] == ["draining", "stopped"]


# Under load.

STREAMS = 64


@pytest.mark.transports
async def test_64_streams_step_on_while_all_is_replaced(
    config: ServerConfig, tmp_path: Path, authority: Authority, level: None
):
    """The certificate and its key, the tokens, the limits and the log level; no step fails."""
    certificate, key, tokens = (tmp_path / name for name in ("cert.pem", "key.pem", "tokens.json"))
    names = "DNS:localhost,IP:127.0.0.1"

    def replace_certificate(name: str) -> None:
        made = authority.issue(name, names)
        shutil.copy(made.file, certificate)
        shutil.copy(made.key, key)

    replace_certificate("reload-first")
    caller = token(tokens)
    files = f"tls_cert = '{certificate}'\ntls_key = '{key}'\ntokens_file = '{tokens}'\n"
    stop = asyncio.Event()

    async def step(client: AsyncClient, number: int) -> int:
        async with await client.open("lstm", session_id=f"s{number}") as session:
            while not stop.is_set():
                await session.step([1.0, 2.0, 3.0])
            return session.t

    async with reloading(config, tmp_path / "f.toml", files) as one:
        trusting = grpc.ssl_channel_credentials(authority.file.read_bytes())
        async with AsyncClient(
            one.server.address, credentials=trusting, metadata=bearer(caller)
        ) as client:
            stepping = asyncio.gather(*(step(client, number) for number in range(STREAMS)))
            for turn in range(5):
                await asyncio.sleep(0.2)
                await asyncio.to_thread(replace_certificate, f"reload-{turn}")
                token(tokens, f"other-{turn}")
                level_now = ("WARNING", "ERROR")[turn % 2]
                limits = f"[limits]\nstreams = {1000 + turn}\n[tenants.default]\nweight = 2\n"
                said = f"{ADDRESSES}log_level = '{level_now}'\n{files}{limits}"
                assert await one.reload(said)
            stop.set()
            steps = await stepping
        assert one.server.tls is not None
        assert not one.server.tls.reload_failed
    assert min(steps) >= 5
