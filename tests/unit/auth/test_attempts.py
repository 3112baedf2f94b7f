"""Failures of a client are limited, and so is what is kept of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepstate.auth import Credentials, TokenFile, make_token
from stepstate.auth import attempts as module
from stepstate.auth.attempts import BURST, AuthAttempts
from stepstate.errors import TooManyAuthFailures, Unauthenticated
from tests.credentials import token


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_client_may_fail_often_and_then_once_a_second():
    clock = Clock()
    attempts = AuthAttempts(clock)
    for _ in range(BURST):
        attempts.check("a")
        attempts.failed("a")
    with pytest.raises(TooManyAuthFailures) as refused:
        attempts.check("a")
    assert refused.value.retry_after_seconds == 1.0
    attempts.check("b")  # another one is not held up
    clock.now += 0.5
    with pytest.raises(TooManyAuthFailures) as refused:
        attempts.check("a")
    assert refused.value.retry_after_seconds == 0.5
    clock.now += 0.5
    attempts.check("a")
    attempts.failed("a")
    with pytest.raises(TooManyAuthFailures):
        attempts.check("a")
    clock.now += BURST
    for _ in range(BURST):
        attempts.check("a")
        attempts.failed("a")


def test_few_clients_are_remembered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_CLIENTS", 3)
    attempts = AuthAttempts(Clock())
    for name in "abcab":
        attempts.failed(name)
    attempts.failed("d")
    assert len(attempts) == 3
    for _ in range(BURST - 2):
        attempts.failed("a")
    with pytest.raises(TooManyAuthFailures):  # not forgotten: it failed later than c
        attempts.check("a")


async def test_nobody_is_locked_out_by_others_with_the_same_address(tmp_path: Path):
    file = tmp_path / "tokens.json"
    good = token(file)
    credentials = Credentials(tokens=TokenFile(str(file)))
    for _ in range(BURST):
        with pytest.raises(Unauthenticated):
            await credentials.verify([f"Bearer {make_token()}"], {}, "nat")
    with pytest.raises(TooManyAuthFailures):
        await credentials.verify([f"Bearer {make_token()}"], {}, "nat")
    assert credentials.known([f"Bearer {good}"], {}) is not None
