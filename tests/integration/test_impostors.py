"""Credentials that are somebody else's, made up, or sent in a weaker way than the server's."""

from __future__ import annotations

import asyncio
import ssl
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from stepstate.auth import CertificateRule, make_token
from stepstate.client import AsyncClient, Tls
from stepstate.config import ServerConfig
from stepstate.errors import SessionUnknown, SnapshotUntrusted, StepstateError, Unauthenticated
from stepstate.identity import Scope
from stepstate.server import Server, running_server
from stepstate.v1 import stepstate_pb2 as pb
from tests.certificates import Authority, Certificate
from tests.credentials import bearer, revoke, token
from tests.integration.wire import raw_stub, refused

pytestmark = pytest.mark.transports

ROW = (0.5, 0.25, -0.5)
GUESSES = 60


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


@pytest.fixture
def theirs(authority: Authority) -> Certificate:
    """The certificate of a client of tenant b."""
    return authority.issue("client-of-b")


def target_of(server: Server) -> str:
    return f"grpcs://localhost:{server.address.rpartition(':')[2]}"


async def test_a_token_of_one_tenant_with_the_certificate_of_another_is_the_tokens(
    mutual: ServerConfig, tokens: Path, authority: Authority, theirs: Certificate
):
    """Never a mix of both, and never the certificate's if the token proves nothing."""
    mine, gone = token(tokens, "one", tenant="a"), token(tokens, "gone", tenant="a")
    revoke(tokens, gone)
    rules = (CertificateRule("CN:client-of-b", "b", frozenset({Scope.STEP, Scope.READ})),)
    config = replace(mutual, tokens_file=str(tokens))
    tls = Tls(authority.file, theirs.file, theirs.key)
    async with running_server(config, certificates=rules) as server:
        target = target_of(server)
        async with (
            AsyncClient(target, tls=tls, token=mine) as swapped,
            AsyncClient(target, tls=tls) as of_b,
            AsyncClient(target, tls=tls, token=gone) as revoked,
        ):
            await swapped.open("lstm", session_id="of-a")
            await of_b.open("lstm", session_id="of-b")
            assert [one.session_id async for one in swapped.sessions()] == ["of-a"]
            assert [one.session_id async for one in of_b.sessions()] == ["of-b"]
            with pytest.raises(SessionUnknown):
                await swapped.info("of-b")
            with pytest.raises(Unauthenticated, match="revoked"):
                await revoked.info("of-b")


async def test_tokens_that_are_guessed_are_refused_and_their_owners_are_not(
    config: ServerConfig, tokens: Path
):
    good = token(tokens)
    async with running_server(replace(config, tokens_file=str(tokens))) as server:
        reasons = set()
        async with (
            AsyncClient(server.address, token=good) as owner,
            raw_stub(server.address) as stub,
        ):
            await owner.open("lstm", session_id="mine")
            for _ in range(GUESSES):
                guess = stub.GetSession(
                    pb.GetSessionRequest(session_id="mine"), metadata=bearer(make_token())
                )
                reasons.add((await refused(guess)).reason)
            assert (await owner.info("mine")).t == 0
        assert reasons == {"UNAUTHENTICATED", "TOO_MANY_AUTH_FAILURES"}


async def test_a_snapshot_of_another_tenant_becomes_a_session_of_its_importer_and_touches_no_other(
    config: ServerConfig, tokens: Path, tmp_path: Path
):
    """Whoever has its bytes has its data; without the server's signature it is nothing."""
    keys = tmp_path / "keys"
    keys.write_text("k" * 40)
    keys.chmod(0o600)
    a, b = (token(tokens, name, tenant=name) for name in "ab")
    config = replace(config, tokens_file=str(tokens), snapshot_key=str(keys))
    async with (
        running_server(config) as server,
        AsyncClient(server.address, token=a) as of_a,
        AsyncClient(server.address, token=b) as of_b,
    ):
        session = await of_a.open("lstm", session_id="meter")
        await session.step(ROW)
        snapshot = await of_a.export("meter")
        await session.step(ROW)
        replayed = await of_b.restore(snapshot)
        await replayed.step(ROW)
        await replayed.close()
        assert (await of_a.info("meter")).t == 2
        with pytest.raises(SessionUnknown):
            await of_b.info("meter-of-nobody")
        for changed in (snapshot[40:], snapshot[:-1] + bytes([snapshot[-1] ^ 1])):
            with pytest.raises(SnapshotUntrusted):
                await of_b.restore(changed, session_id="forged")


async def greeted(port: int, authority: Authority, version: ssl.TLSVersion) -> str:
    """The TLS of a connection that speaks no other version."""
    context = ssl.create_default_context(cafile=authority.file)
    context.set_ciphers("ALL:@SECLEVEL=0")  # or this client would not speak the old ones
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=context, server_hostname="localhost"
    )
    found = str(writer.get_extra_info("ssl_object").version())
    writer.transport.abort()
    return found


async def test_old_versions_of_tls_are_refused_on_both_ports(
    with_tls: ServerConfig, authority: Authority
):
    old, new = ssl.TLSVersion, ("TLSv1_2", "TLSv1_3")
    async with running_server(with_tls) as server:
        for address in (server.address, server.metrics_address):
            port = int(address.rpartition(":")[2])
            for name in new:
                assert await greeted(port, authority, old[name]) == name.replace("_", ".")
            for name in ("TLSv1", "TLSv1_1"):
                with pytest.raises(OSError):  # noqa: PT011 - an alert, or a reset
                    await greeted(port, authority, old[name])


async def test_a_client_that_expects_no_tls_sends_its_token_to_nobody_else(
    with_tls: ServerConfig, tokens: Path
):
    """To a port with TLS, plain text is noise: no call begins, and the token is in no log."""
    good = token(tokens)
    async with running_server(replace(with_tls, tokens_file=str(tokens))) as server:
        host = f"127.0.0.1:{server.address.rpartition(':')[2]}"
        async with AsyncClient(host, tls=False, token=good, connect_timeout=2.0) as client:
            with pytest.raises(StepstateError, match="TLS"):
                await client.models()
