"""Keys of an identity provider: read over https, rotated, and unmoved by tokens with any `kid`."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import logging
import secrets
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from stepstate.auth import JwtSettings, KeyFile, KeyRing, KeyUrl, WebTokens, digest_of
from stepstate.auth import signing_keys as module
from stepstate.errors import CredentialsInvalid, KeysUnavailable, Unauthenticated
from tests.certificates import Authority, Certificate
from tests.credentials import AUDIENCE, ISSUER, JwksServer, Provider

CROWD = 10_000


class Clock:
    """Seconds that a test moves on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def provider() -> Provider:
    return Provider("first")


@pytest.fixture
def server(
    provider: Provider,
    certificate: Certificate,
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[JwksServer]:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    with JwksServer(provider, certificate) as serving:
        yield serving


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def keys(server: JwksServer, clock: Clock) -> AsyncIterator[KeyRing]:
    ring = KeyRing(KeyUrl(server.url), clock)
    await ring.read_now()
    assert server.asked == 1
    yield ring
    server.answers.set()
    await ring.refresh(force=True)  # nothing is under way when the loop ends


@pytest.fixture
def tokens(keys: KeyRing) -> WebTokens:
    return WebTokens(JwtSettings(ISSUER, AUDIENCE), keys)


async def call(tokens: WebTokens, text: str) -> str:
    """What becomes of a token: the name of its identity, or why it is refused."""
    try:
        identity = await tokens.verify(text, digest_of(text))
    except (Unauthenticated, KeysUnavailable) as error:
        return error.cause
    return identity.name


def with_random_kid(text: str) -> str:
    """A JWT with another key's name: anybody can make it."""
    rest = text.partition(".")[2]
    head = json.dumps({"alg": "ES256", "kid": secrets.token_hex(16)}).encode()
    return f"{base64.urlsafe_b64encode(head).rstrip(b'=').decode()}.{rest}"


async def test_a_key_that_was_added_is_found(
    tokens: WebTokens, provider: Provider, clock: Clock, server: JwksServer
):
    provider.add("second")
    text = provider.token("second")
    assert await call(tokens, text) == "keys_unavailable"  # it has just been read
    clock.now += 31
    assert await call(tokens, text) == "jwt:meter-1"
    assert server.asked == 2


async def test_random_kids_cost_one_reading_and_delay_nobody(
    tokens: WebTokens, keys: KeyRing, provider: Provider, clock: Clock, server: JwksServer
):
    known, fresh = provider.token(), [provider.token(sub=str(one)) for one in range(100)]
    assert await call(tokens, known) == "jwt:meter-1"
    crowd = [with_random_kid(rest) for rest in fresh * (CROWD // len(fresh))]
    clock.now += 31
    server.answers.clear()  # the provider is slow
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    calls = [asyncio.create_task(call(tokens, text)) for text in crowd]
    await asyncio.sleep(0)  # all of them have come
    for one, text in enumerate(fresh):  # keys that are known wait for nothing
        assert await call(tokens, text) == f"jwt:{one}"
    assert tokens.find(digest_of(known)) is not None
    assert sum(not one.done() for one in calls) == module.MAX_WAITING
    server.answers.set()
    told = await asyncio.gather(*calls)
    assert set(told) == {"unknown_key", "keys_unavailable"}
    assert told.count("unknown_key") == module.MAX_WAITING
    assert server.asked == 2
    del calls, told
    await asyncio.sleep(0)
    gc.collect()
    clock.now += 29
    assert {await call(tokens, text) for text in crowd[:100]} == {"keys_unavailable"}
    assert server.asked == 2
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert held < 2 * 2**20  # of it, 100 tokens that were accepted
    assert keys.find("first") is not None


async def test_a_dead_provider_stops_nobody_whose_key_is_known(
    tokens: WebTokens,
    provider: Provider,
    clock: Clock,
    server: JwksServer,
    caplog: pytest.LogCaptureFixture,
):
    server.status = 500
    for _ in range(3):
        clock.now += 301
        await tokens.keys.refresh(force=True)
        assert tokens.keys.stale
        assert await call(tokens, provider.token()) == "jwt:meter-1"
    said = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(said) == 1
    assert "500" in said[0].getMessage()
    provider.add("second")
    assert await call(tokens, provider.token("second")) == "keys_unavailable"
    clock.now += 31
    with pytest.raises(KeysUnavailable, match="can't be read") as told:
        await tokens.keys.fetch_for_unknown()
    assert 1 <= told.value.retry_after_seconds <= 30
    server.status = 200
    clock.now += 31
    await tokens.keys.refresh(force=True)
    assert not tokens.keys.stale
    assert await call(tokens, provider.token("second")) == "jwt:meter-1"


async def test_keys_are_read_from_time_to_time(
    keys: KeyRing, clock: Clock, provider: Provider, server: JwksServer
):
    del provider.keys["first"]
    provider.add("second")
    clock.now += 299
    await keys.refresh()
    clock.now += 2
    await keys.refresh()
    async with asyncio.timeout(20):
        while keys.find("second") is None:
            await asyncio.sleep(0.01)
    assert keys.find("first") is None  # it was withdrawn
    assert server.asked == 2


async def test_a_slow_provider_is_not_waited_for(
    keys: KeyRing, clock: Clock, server: JwksServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "FETCH_SECONDS", 0.05)
    server.answers.clear()
    clock.now += 31
    with pytest.raises(KeysUnavailable, match=r"does not answer|can't be read"):
        await keys.fetch_for_unknown()


@pytest.mark.parametrize(
    "answer",
    [
        (302, b"{}", "302"),
        (404, b"{}", "404"),
        (200, b"<html>", "no JWK set"),
        (200, b'{"keys": []}', "no public key"),
        (200, b" " * (module.MAX_BYTES + 1), "more than 1048576 bytes"),
    ],
)
async def test_what_is_no_set_of_keys_changes_nothing(
    keys: KeyRing,
    server: JwksServer,
    caplog: pytest.LogCaptureFixture,
    answer: tuple[int, bytes, str],
):
    server.status, body, problem = answer
    server.body = lambda: body
    await keys.refresh(force=True)
    assert keys.stale
    assert keys.find("first") is not None
    assert problem in caplog.text


async def test_a_server_that_has_another_certificate_is_not_believed(
    server: JwksServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(CredentialsInvalid, match="CERTIFICATE_VERIFY_FAILED"):
        await KeyRing(KeyUrl(server.url)).read_now()


async def test_a_file_is_read_when_it_changes(tmp_path: Path, provider: Provider):
    path = tmp_path / "jwks.json"
    path.write_bytes(provider.jwks())
    keys = KeyRing(KeyFile(str(path)))
    await keys.read_now()
    tokens = WebTokens(JwtSettings(ISSUER, AUDIENCE), keys)
    provider.add("second")
    text = provider.token("second")
    assert await call(tokens, text) == "unknown_key"
    path.write_bytes(provider.jwks())
    assert await call(tokens, text) == "jwt:meter-1"  # at once
    path.write_bytes(b"{}")
    with pytest.raises(KeysUnavailable) as told:
        await keys.fetch_for_unknown()
    assert told.value.retry_after_seconds == 1


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(CredentialsInvalid, match=r"--jwt-jwks .*/none: can't be read"):
        asyncio.run(KeyRing(KeyFile(str(tmp_path / "none"))).read_now())
