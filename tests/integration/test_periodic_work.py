"""What a server does again and again goes on, whatever happens to one time of it."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepstate import server as server_module
from stepstate.auth import Credentials
from stepstate.config import ServerConfig
from stepstate.errors import StoreUnavailable
from stepstate.server import Server, running_server
from stepstate.sessions import SessionService
from stepstate.sessions.monitored_store import MonitoredStore
from stepstate.trim import Trimmer
from tests.credentials import token
from tests.integration.wire import HANG

WORK = {
    SessionService: ("sweep", "heartbeat"),
    MonitoredStore: ("check",),
    Trimmer: ("look",),
    Credentials: ("refresh",),
    Server: ("_report_store_health",),
}
"""By the class that has it."""
PERIODS = [
    "CREDENTIALS_CHECK_SECONDS",
    "HEARTBEAT_SECONDS",
    "STORE_CHECK_SECONDS",
    "SWEEP_SECONDS",
    "TICK_SECONDS",
    "TRIM_SECONDS",
]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), StoreUnavailable("it is away")])
async def test_it_goes_on_after_an_error(
    config: ServerConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
):
    for period in PERIODS:
        monkeypatch.setattr(server_module, period, 0.01)
    failed = Counter[str]()

    def failing(name: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def fail(*arguments: object) -> object:
            if not serving:
                return do(*arguments)
            failed[name] += 1
            raise error

        return fail

    serving = False
    for owner, names in WORK.items():
        for name in names:
            monkeypatch.setattr(owner, name, failing(name, getattr(owner, name)))
    token(tokens := tmp_path / "tokens")
    async with running_server(replace(config, tokens_file=str(tokens))):
        serving = True
        async with asyncio.timeout(HANG):
            while min(failed[name] for names in WORK.values() for name in names) < 3:
                await asyncio.sleep(0.01)
        serving = False
    bugs = [line for line in caplog.records if line.levelno >= logging.ERROR]
    assert bool(bugs) is not isinstance(error, StoreUnavailable)
