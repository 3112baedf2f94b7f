"""Both clients and the commands on a server with TLS: how they get in, and why they do not."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from stepstate import server as composition
from stepstate import tls as server_tls
from stepstate.cli import main
from stepstate.client import Tls
from stepstate.config import ServerConfig
from stepstate.errors import InvalidField, ServerUnreachable, SessionUnknown, Unauthenticated
from stepstate.server import Server, running_server
from tests.certificates import Authority, Certificate
from tests.credentials import revoke, token
from tests.integration.clients import Connect
from tests.integration.wire import HANG, TOLERANCE, draw, largest_difference
from tests.networks import Network

pytestmark = pytest.mark.transports


@pytest.fixture
def stranger(program: Callable[[str], str], tmp_path: Path) -> Authority:
    """Another authority, which nobody trusts."""
    (tmp_path / "stranger").mkdir()
    return Authority(tmp_path / "stranger", program("openssl"))


@pytest.fixture(autouse=True)
def checks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition, "CREDENTIALS_CHECK_SECONDS", 0.02)


async def test_clients_and_their_certificates_get_in(
    connect: Connect, mutual: ServerConfig, authority: Authority, certificate: Certificate
):
    tls = Tls(authority.file, certificate.file, certificate.key)
    async with running_server(mutual) as server:
        for target in (server.address, f"grpcs://{server.address}"):
            async with connect(target, tls=tls) as client:
                session = await client.open("lstm")
                ys = [y async for y in session.stream([[0.0] * 3] * 4)]
                assert len(ys) == 4


async def test_a_name_that_is_not_the_targets_may_be_given(
    connect: Connect, with_tls: ServerConfig, authority: Authority
):
    made = authority.issue("elsewhere", "DNS:elsewhere.example")
    config = replace(with_tls, tls_cert=str(made.file), tls_key=str(made.key))
    async with running_server(config) as server:
        tls = Tls(authority.file, server_name="elsewhere.example")
        async with connect(server.address, tls=tls) as client:
            assert len(await client.models()) == 6


# Those that do not get in.


async def why(connect: Connect, server: Server, tls: Tls | None, scheme: str = "") -> str:
    """What a client says that can't reach a server."""
    target = scheme + server.address
    async with connect(target, tls=tls, connect_timeout=0.3, timeout=HANG) as client:
        with pytest.raises(ServerUnreachable, match="no server has answered there yet") as refused:
            await client.models()
    return str(refused.value)


async def test_tls_where_the_client_expects_none_is_told(connect: Connect, with_tls, mutual):
    for config in (with_tls, mutual):
        async with running_server(config) as server:
            assert "the server speaks TLS there: use grpcs://" in await why(connect, server, None)


async def test_plain_text_where_the_client_expects_tls_is_told(connect: Connect, config, authority):
    async with running_server(config) as server:
        said = await why(connect, server, Tls(authority.file))
        assert "the server speaks no TLS there: use grpc://" in said


async def test_an_authority_that_is_not_trusted_is_told(connect: Connect, with_tls, stranger):
    async with running_server(with_tls) as server:
        for tls, scheme in ((Tls(stranger.file), ""), (None, "grpcs://")):
            said = await why(connect, server, tls, scheme)
            assert "of an authority that this client does not trust: give the file" in said


async def test_a_command_says_it_in_one_line(with_tls: ServerConfig):
    async with running_server(with_tls) as server:
        command = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "stepstate.cli", "sessions", "list"),
            *("--server", f"grpcs://{server.address}"),
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await command.communicate()
    assert command.returncode == 1
    lines = said.decode().splitlines()
    assert len(lines) == 1
    assert "this client does not trust" in lines[0]


async def test_a_certificate_for_another_name_is_told(connect: Connect, with_tls, authority):
    made = authority.issue("elsewhere", "DNS:elsewhere.example")
    config = replace(with_tls, tls_cert=str(made.file), tls_key=str(made.key))
    async with running_server(config) as server:
        said = await why(connect, server, Tls(authority.file))
        assert "the certificate of the server is for another name" in said


async def test_an_expired_certificate_is_told(
    connect: Connect, with_tls, authority, program, monkeypatch: pytest.MonkeyPatch
):
    """It has expired while the server ran: it would not start with it."""
    program("faketime")
    made = authority.issue("old", "IP:127.0.0.1", age_days=4)
    monkeypatch.setattr(server_tls, "_check_times", lambda *_: 0.0)
    config = replace(with_tls, tls_cert=str(made.file), tls_key=str(made.key))
    async with running_server(config) as server:
        said = await why(connect, server, Tls(authority.file))
        assert "the certificate of the server has expired" in said


async def test_a_missing_certificate_of_the_client_is_told(connect: Connect, mutual, authority):
    async with running_server(mutual) as server:
        said = await why(connect, server, Tls(authority.file))
        assert "the server wants a certificate of the client: give its files" in said


async def test_a_certificate_that_the_server_does_not_trust_is_told(
    connect: Connect, mutual, authority, stranger, program
):
    program("faketime")
    strange, old = stranger.issue("strange"), authority.issue("old", age_days=4)
    async with running_server(mutual) as server:
        for own in (strange, old):
            said = await why(connect, server, Tls(authority.file, own.file, own.key))
            assert "the server refuses the certificate of this client" in said


# Tokens.


async def test_a_token_comes_from_its_file_and_is_renewed(
    connect: Connect, with_tls: ServerConfig, authority: Authority, tmp_path: Path
):
    tokens, file = tmp_path / "tokens.json", tmp_path / "token"
    first, second = token(tokens), token(tokens)
    file.write_text(first)
    config = replace(with_tls, tokens_file=str(tokens))
    async with running_server(config) as server:
        target = f"grpcs://{server.address}"
        async with connect(target, tls=Tls(authority.file), token=file) as client:
            assert len(await client.models()) == 6
            revoke(tokens, first)
            await server.credentials.refresh()
            with pytest.raises(Unauthenticated, match="revoked"):
                await client.models()
            file.write_text(second)
            assert len(await client.models()) == 6


async def test_a_function_that_gives_no_token_any_more_is_told(
    connect: Connect, config: ServerConfig, tmp_path: Path
):
    """By calls and by streams, at once: gRPC would not send what it is given, and not say why."""
    tokens = tmp_path / "tokens.json"
    given = [token(tokens)]
    async with (
        running_server(replace(config, tokens_file=str(tokens))) as server,
        connect(server.address, token=lambda: f"{given[-1]}\n") as client,
    ):
        session = await client.open("lstm")
        await session.step([0.0] * 3)
        given.append("two words")
        with pytest.raises(InvalidField, match="token"):
            await client.models()
        with pytest.raises(InvalidField, match="token"):
            await client.open("lstm")
        del given[-1]
        await session.step([0.0] * 3)


async def test_an_admin_acts_on_the_sessions_of_a_tenant(
    connect: Connect, config: ServerConfig, tmp_path: Path
):
    tokens = tmp_path / "tokens.json"
    admin = token(tokens, "admin", scopes="step read admin")
    member = token(tokens, "member", tenant="acme")
    async with running_server(replace(config, tokens_file=str(tokens))) as server:
        async with connect(server.address, token=member) as client:
            await client.open("lstm", session_id="theirs")
        async with connect(server.address, token=admin, tenant="acme") as client:
            assert (await client.info("theirs")).t == 0
        async with connect(server.address, token=admin) as client:
            with pytest.raises(SessionUnknown):
                await client.info("theirs")


@pytest.mark.parametrize("path", ["stream", "pack"])
async def test_what_was_begun_with_a_token_goes_on_with_its_successor(
    connect: Connect, config: ServerConfig, networks: dict[str, Network], tmp_path: Path, path: str
):
    tokens, file, x = tmp_path / "tokens.json", tmp_path / "token", draw(4)
    first, second = token(tokens), token(tokens)
    file.write_text(first)
    async with (
        running_server(replace(config, tokens_file=str(tokens))) as server,
        connect(server.address, token=file) as client,
    ):

        async def renew() -> None:
            file.write_text(second)
            revoke(tokens, first)
            await server.credentials.refresh()
            await asyncio.sleep(0.2)  # the server ends what was begun with the first one

        session = await client.open("lstm")
        ys = []
        if path == "pack":
            async with client.packed([session]) as pack:
                for row in x:
                    ys.append((await pack.step(row[None])).y[0])
                    await renew()
        else:
            async for y in session.stream(list(x)):
                ys.append(y)
                await renew()
    assert largest_difference(np.array(ys), networks["lstm"].offline(x)) <= TOLERANCE


# Commands.


async def test_commands_get_in_with_files_and_show_no_secret(
    mutual: ServerConfig, authority: Authority, certificate: Certificate, tmp_path: Path
):
    tokens, file = tmp_path / "tokens.json", tmp_path / "token"
    text = token(tokens)
    file.write_text(text)
    options = ["--ca-file", authority.file, "--cert-file", certificate.file]
    options += ["--key-file", certificate.key]
    async with running_server(replace(mutual, tokens_file=str(tokens))) as server:
        where = ["--server", f"grpcs://{server.address}", *options]
        assert "SERVING" in await command("health", *where)
        assert "lstm/1" in await command("models", *where, "--token-file", file)
        refused = await command("models", *where)
        assert "asks for a credential" in refused
        unprotected = await command("models", "--target", "10.0.0.1:1", "--token-file", file)
        assert "grpcs://10.0.0.1:1" in unprotected
        assert text not in unprotected


async def command(*arguments: object) -> str:
    """What a command prints, on both of its outputs."""
    done = await asyncio.to_thread(CliRunner().invoke, main, [*map(str, arguments)])
    return done.output
