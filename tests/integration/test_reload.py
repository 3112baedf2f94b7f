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
import ssl
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
from stepstate.configuration import (
    Configuration,
    GivenValue,
    SettingOrigin,
    read_file,
    reload,
    resolve,
)
from stepstate.configuration.reload import ConfigurationReloader
from stepstate.errors import ModelUnknown, Unauthenticated
from stepstate.models import ModelAccess
from stepstate.server import Server, running_server
from stepstate.tenants import LimitTable
from tests.certificates import Authority, Certificate
from tests.credentials import AUDIENCE, ISSUER, Provider, bearer, token
from tests.integration.commands import read_terminal
from tests.integration.wire import HANG, SHARED_SECONDS
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
    given = {name: GivenValue(getattr(config, name), SettingOrigin.OPTION) for name in names}

    def load() -> Configuration:
        return resolve(given, read_file(str(file)))

    configuration = load()
    async with running_server(
        configuration.server,
        limits=configuration.limits,
        certificates=configuration.certificates,
        access=ModelAccess(configuration.model_tenants),
    ) as server:
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


async def test_the_tenants_of_models_are_reloaded(config: ServerConfig, tmp_path: Path):
    limited = "[models.lstm]\ntenants = ['acme']\n"
    async with (
        reloading(config, tmp_path / "f.toml", limited) as one,
        AsyncClient(one.server.address) as client,
    ):
        assert "lstm" not in [model.name for model in await client.models()]
        assert await one.reload(ADDRESSES)
        session = await client.open("lstm", session_id="s")
        assert await one.reload(f"{ADDRESSES}{limited}[models.gru]\ntenants = ['default']")
        await session.step([1.0, 2.0, 3.0])  # it is in memory
        assert {"lstm", "gru"} & {model.name for model in await client.models()} == {"gru"}
        with pytest.raises(ModelUnknown):
            await client.open("lstm", session_id="other")


DEBUG = f"{ADDRESSES}log_level = 'DEBUG'\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"{DEBUG}slotz = 1", "line 5: 'slotz' is no name in [server]"),
        (f"{DEBUG}slots = 0", "line 5: slots is 0"),
        (f"{DEBUG}tokens_file = 'none'", "--tokens-file none: "),
        (f"{DEBUG}tls_cert = 'a'\ntls_key = 'b'", "--tls-cert a: "),
        (f"{DEBUG}[limits]\nstreams = 3\n[tenants.a]\nweight = 0", "weight is 0"),
        (f"{DEBUG}[models.gruu]\ntenants = ['acme']", "has no model 'gruu'"),
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


async def test_a_refused_file_is_tried_again_until_what_it_names_is_right(
    config: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reload, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(reload, "RETRY_SECONDS", 0.1)
    tokens = tmp_path / "tokens.json"
    async with reloading(config, tmp_path / "f.toml") as one:
        text = f"{ADDRESSES}tokens_file = '{tokens}'\n[limits]\nstreams = 3\n"
        assert not await one.reload(text)
        token(tokens)
        async with asyncio.timeout(HANG):
            while one.server.tenants.limits.defaults.streams != 3:
                await asyncio.sleep(0.02)


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
LEVELS = ("WARNING", "ERROR")


@dataclass(frozen=True, slots=True)
class Rotating:
    """Files of credentials that are replaced."""

    folder: Path
    authority: Authority
    provider: Provider

    def replace(self, name: str) -> tuple[str, str]:
        """Replaces all of them; a new token, and a JWT of a new key."""
        made = self.authority.issue(f"reload-{name}", "DNS:localhost,IP:127.0.0.1")
        shutil.copy(made.file, self.folder / "cert.pem")
        shutil.copy(made.key, self.folder / "key.pem")
        self.provider.add(name)
        (self.folder / "jwks.json").write_bytes(self.provider.jwks())
        return token(self.folder / "tokens.json", name), self.provider.token(name)

    @property
    def settings(self) -> str:
        """They, as settings."""
        names = {"tls_cert": "cert.pem", "tls_key": "key.pem"}
        names |= {"tokens_file": "tokens.json", "jwt_jwks": "jwks.json"}
        files = "".join(f"{key} = '{self.folder / name}'\n" for key, name in names.items())
        return f"{files}jwt_issuer = '{ISSUER}'\njwt_audience = '{AUDIENCE}'\n"


@pytest.mark.transports
async def test_64_streams_step_on_while_all_is_replaced(
    config: ServerConfig, tmp_path: Path, authority: Authority, level: None
):
    """The certificate, tokens, JWKS, limits and the log level: no step fails, and all are used."""
    files = Rotating(tmp_path, authority, Provider())
    stop = asyncio.Event()

    async def step(client: AsyncClient, number: int) -> int:
        async with await client.open("lstm", session_id=f"s{number}") as session:
            while not stop.is_set():
                await session.step([1.0, 2.0, 3.0])
            return session.t

    bearers = files.replace("first")
    async with reloading(config, tmp_path / "f.toml", files.settings) as one:
        trusting = grpc.ssl_channel_credentials(authority.file.read_bytes())

        def connect(text: str) -> AsyncClient:
            return AsyncClient(one.server.address, credentials=trusting, metadata=bearer(text))

        async with connect(bearers[0]) as first, connect(bearers[1]) as second:
            clients = (first, second)
            stepping = asyncio.gather(*(step(clients[n % 2], n) for n in range(STREAMS)))
            for turn in range(5):
                await asyncio.sleep(0.2)
                bearers = await asyncio.to_thread(files.replace, f"turn-{turn}")
                text = f"{ADDRESSES}{files.settings}log_level = '{LEVELS[turn % 2]}'\n"
                limits = f"[limits]\nstreams = {1000 + turn}\n[tenants.acme]\nweight = 2\n"
                assert await one.reload(text + limits)
                assert one.server.tenants.limits.of("acme").streams == 1000 + turn
                address = ("127.0.0.1", int(one.server.address.rpartition(":")[2]))
                shown = await asyncio.to_thread(ssl.get_server_certificate, address)
                assert shown == (tmp_path / "cert.pem").read_text()
                for text in bearers:
                    async with connect(text) as new:
                        assert len(await new.models()) > 0
            stop.set()
            steps = await stepping
            page = await asyncio.to_thread(metrics_with_tls, one.server, authority)
    assert min(steps) >= 5
    # The client library would try again: no call and no request was refused to begin with.
    assert failures(page) == []
    assert "stepstate_tls_reload_failed 0.0\n" in page


def metrics_with_tls(server: Server, authority: Authority) -> str:
    time.sleep(SHARED_SECONDS)
    context = ssl.create_default_context(cafile=authority.file)
    port = server.metrics_address.rpartition(":")[2]
    with urlopen(f"https://localhost:{port}/metrics", context=context) as page:
        return page.read().decode()


def failures(page: str) -> list[str]:
    """The lines that count calls which ended with an error, and refused requests."""
    counted = re.findall(
        r"^(?:grpc_server_handled_total|stepstate_requests_refused_total)\{.* [1-9].*$",
        page,
        re.MULTILINE,
    )
    return [line for line in counted if 'grpc_code="OK"' not in line]
