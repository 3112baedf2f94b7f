"""Calls with bearer tokens: who gets in, what those who don't are told, and how streams end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.grpc import service_pb2 as triton_pb

from stepstate.auth import CertificateRule, make_token
from stepstate.auth.attempts import BURST
from stepstate.client import AsyncClient, Client, convert
from stepstate.config import ServerConfig
from stepstate.errors import PermissionDenied, TooManyAuthFailures, Unauthenticated
from stepstate.identity import Scope
from stepstate.server import Server, running_server
from stepstate.transport.methods import METHODS
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.certificates import Authority, Certificate
from tests.credentials import AUDIENCE, ISSUER, Provider, bearer, revoke, token
from tests.integration.triton import infer, triton_stub
from tests.integration.wire import raw_stub, sample, scrape

pytestmark = pytest.mark.transports

ROW = np.full((1, 3), 0.5, "f4")
OPENED = (
    'grpc_server_started_total{grpc_method="OpenSession",'
    'grpc_service="stepstate.v1.StepstateService"'
)
OPEN_STREAMS = 'stepstate_calls{kind="stream",state="open"}'
SOON = timedelta(seconds=5)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.json"
    token(path, "first")
    return path


@pytest.fixture
async def server(config: ServerConfig, file: Path) -> AsyncIterator[Server]:
    async with running_server(replace(config, tokens_file=str(file))) as running:
        yield running


async def step(server: Server, *metadata: tuple[str, str]) -> None:
    async with AsyncClient(server.address, metadata=metadata) as client:
        session = await client.open("lstm")
        await session.step((0.5, 0.5, 0.5))


async def cause_of(server: Server, *metadata: tuple[str, str]) -> str:
    with pytest.raises(Unauthenticated) as refused:
        await step(server, *metadata)
    return refused.value.cause


async def reread(server: Server) -> None:
    assert server.credentials is not None
    await server.credentials.refresh()


async def test_a_token_lets_in_what_its_scopes_allow(server: Server, file: Path):
    good, reader = token(file), token(file, "reader", scopes="read")
    await reread(server)
    await step(server, *bearer(good))
    async with AsyncClient(server.address, metadata=bearer(reader)) as client:
        assert await client.models()
        with pytest.raises(PermissionDenied, match=r"reader#\w+ lacks the scope step"):
            await client.open("lstm")


async def test_everyone_else_is_told_why(server: Server, file: Path):
    gone, old = token(file, "gone"), token(file, "old", expires=datetime.now(UTC))
    revoke(file, gone)
    other = token(file.with_name("other.json"))
    await reread(server)
    assert await cause_of(server) == "missing"
    assert await cause_of(server, *bearer(gone)) == "revoked"
    assert await cause_of(server, *bearer(old)) == "expired"
    assert await cause_of(server, *bearer(other)) == "unknown_token"
    assert await cause_of(server, *bearer(other[:-1] + "!")) == "malformed"
    assert await cause_of(server, *bearer(other), *bearer(other)) == "malformed"
    assert await cause_of(server, ("authorization", f"Basic {other}")) == "malformed"


async def test_what_is_public_needs_no_token(server: Server):
    async with grpc.aio.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1


async def test_what_triton_calls_open_needs_no_token(server: Server, file: Path):
    async with triton_stub(server.address) as triton:
        assert (await triton.ServerLive(triton_pb.ServerLiveRequest())).live
        assert (await triton.ServerReady(triton_pb.ServerReadyRequest())).ready
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await triton.ModelInfer(infer("lstm", 7, ROW, sequence_start=True))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = bearer(token(file))
        await reread(server)
        await triton.ModelInfer(infer("lstm", 7, ROW, sequence_start=True), metadata=metadata)


@pytest.mark.parametrize("reflection", [True, False])
async def test_reflection_has_a_switch_and_needs_no_token(
    config: ServerConfig, file: Path, *, reflection: bool
):
    chosen = replace(config, tokens_file=str(file), reflection=reflection)
    async with (
        running_server(chosen) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        if reflection:
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            names = {one.name for one in (await call.read()).list_services_response.service}
            assert "stepstate.v1.StepstateService" in names
            await call.done_writing()
        wanted = grpc.StatusCode.OK if reflection else grpc.StatusCode.UNIMPLEMENTED
        assert await call.code() is wanted


@pytest.mark.parametrize("scopes", ["", "read"])
async def test_clients_raise_the_servers_error_and_do_not_try_again(
    server: Server, file: Path, scopes: str
):
    metadata = bearer(token(file, scopes=scopes)) if scopes else ()
    wanted = PermissionDenied if scopes else Unauthenticated
    await reread(server)
    async with AsyncClient(server.address, metadata=metadata) as client:
        with pytest.raises(wanted):
            await client.open("lstm")
    with Client(server.address, metadata=metadata) as sync, pytest.raises(wanted):
        await asyncio.to_thread(sync.open, "lstm")
    page = await scrape(server.metrics_address)
    assert sample(page, OPENED) == 2


async def refusal(stub: StepstateServiceStub) -> grpc.aio.AioRpcError:
    """What a call with a made-up token ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.ListModels(pb.ListModelsRequest(), metadata=bearer(make_token()))
    return refused.value


async def test_failures_are_counted_and_limited_by_address(server: Server, file: Path):
    good = token(file)
    await reread(server)
    async with raw_stub(server.address) as stub:
        failures, refused = 0, await refusal(stub)
        while refused.code() is grpc.StatusCode.UNAUTHENTICATED:
            failures, refused = failures + 1, await refusal(stub)
        assert failures >= BURST  # a slow machine forgets some of them meanwhile
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        error = convert.from_rpc(refused, "")
        assert isinstance(error, TooManyAuthFailures)
        assert 0 < error.retry_after_seconds <= 1
        await stub.ListModels(pb.ListModelsRequest(), metadata=bearer(good))  # the same address
    page = await scrape(server.metrics_address)
    assert sample(page, 'stepstate_auth_failures_total{reason="unknown_token"}') == failures
    assert sample(page, 'stepstate_auth_failures_total{reason="limited"}') == 1
    assert sample(page, 'stepstate_credentials_stale{source="tokens"}') == 0


async def test_no_credential_is_in_what_the_server_writes(
    server: Server, file: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    gone = token(file, "gone")
    revoke(file, gone)
    secrets = [token(file), gone, make_token(), "x" * 80 + "." + "y" * 80 + ".z"]
    await reread(server)
    for secret in secrets:
        with suppress(Unauthenticated):
            await step(server, *bearer(secret))
    page = await scrape(server.metrics_address)
    written = caplog.text + page + repr([vars(record) for record in caplog.records])
    assert "gone#" in written
    for secret in secrets:
        assert secret not in written
        assert secret[12:40] not in written


STREAMS = ("StreamSteps", "StreamPacked", "StreamImport")


@pytest.mark.parametrize("way", ["revoked", "expired"])
async def test_open_streams_end_with_their_token(server: Server, file: Path, way: str):
    text = token(file, expires=datetime.now(UTC) + SOON if way == "expired" else None)
    await reread(server)
    await step(server, *bearer(text))
    async with raw_stub(server.address) as stub, triton_stub(server.address) as triton:
        await stub.OpenSession(
            pb.OpenSessionRequest(session_id="a", model="lstm"), metadata=bearer(text)
        )
        streams = [getattr(stub, name) for name in STREAMS] + [triton.ModelStreamInfer]
        calls = [stream(metadata=bearer(text)) for stream in streams]
        await calls[0].write(pb.StepRequest(session_id="a", x=(0.5, 0.5, 0.5)))
        assert (await calls[0].read()).t == 1
        await asyncio.sleep(0.2)  # all of them have begun
        if way == "revoked":
            revoke(file, text)
        async with asyncio.timeout(20):
            for call in calls:
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
                assert way in await call.details()


UNARY = [
    method
    for service in (
        pb.DESCRIPTOR.services_by_name["StepstateService"],
        triton_pb.DESCRIPTOR.services_by_name["GRPCInferenceService"],
    )
    for method in service.methods
    if method.name in METHODS
    and METHODS[method.name].scopes
    and not (method.client_streaming or method.server_streaming)
]


async def test_calls_without_a_request_end_with_their_token_too(server: Server, file: Path):
    """Of every method: what is sent after that is not served."""
    text = token(file, scopes="step read admin")
    await reread(server)
    await step(server, *bearer(text))
    async with grpc.aio.insecure_channel(server.address) as channel:
        calls = [
            channel.stream_unary(f"/{method.containing_service.full_name}/{method.name}")(
                metadata=bearer(text)
            )
            for method in UNARY
        ]
        open_calls = 'stepstate_calls{kind="short",state="open"}'
        async with asyncio.timeout(20):
            while sample(await scrape(server.metrics_address), open_calls) < len(UNARY) / 2:
                await asyncio.sleep(0.1)
            await asyncio.sleep(0.2)  # all of them have begun
            revoke(file, text)
            for call in calls:
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
                assert "revoked" in await call.details()


async def test_what_a_stream_had_accepted_is_answered_before_it_ends(server: Server, file: Path):
    text = token(file)
    await reread(server)
    async with AsyncClient(server.address, metadata=bearer(text)) as client:
        session = await client.open("lstm", session_id="a")
        stepped = 0
        with pytest.raises(Unauthenticated) as refused:
            async with asyncio.timeout(20):
                async for _ in client.stream((session, (0.5, 0.5, 0.5)) for _ in range(1_000_000)):
                    stepped += 1
                    if stepped == 100:
                        revoke(file, text)
        assert refused.value.cause == "revoked"
        assert stepped == session.t
    other = token(file)
    await reread(server)
    async with AsyncClient(server.address, metadata=bearer(other)) as client:
        assert (await client.info("a")).t == stepped


SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024))


async def test_a_client_that_reads_nothing_does_not_keep_its_stream(server: Server, file: Path):
    text = token(file)
    await reread(server)
    async with raw_stub(server.address, *SMALL_WINDOW) as stub:
        await stub.OpenSession(
            pb.OpenSessionRequest(session_id="a", model="lstm"), metadata=bearer(text)
        )
        call = stub.StreamSteps(metadata=bearer(text))

        async def write() -> None:
            with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                while True:
                    await call.write(pb.StepRequest(session_id="a", x=[0.5] * 3000))

        writing = asyncio.create_task(write())
        held, before = await replies_held(server), -1.0
        async with asyncio.timeout(30):
            while not held or held != before:  # until nothing leaves any more
                await asyncio.sleep(0.3)
                before, held = held, await replies_held(server)
        revoke(file, text)
        await no_open_streams(server)
        writing.cancel()


async def test_an_export_that_nobody_reads_does_not_go_on_either(server: Server, file: Path):
    text = token(file)
    await reread(server)
    async with raw_stub(server.address, *SMALL_WINDOW) as stub:
        await stub.OpenSession(
            pb.OpenSessionRequest(session_id="a", model="lstm"), metadata=bearer(text)
        )
        for _ in range(32):  # whose replies are in the snapshot
            rows = pb.StepRequest(session_id="a", x=[0.5] * 3000)
            await stub.Step(rows, metadata=bearer(text))
        call = stub.StreamExport(pb.StreamExportRequest(session_id="a"), metadata=bearer(text))
        async with asyncio.timeout(30):
            while not await replies_held(server):
                await asyncio.sleep(0.1)
        revoke(file, text)
        await no_open_streams(server)
        call.cancel()


async def no_open_streams(server: Server) -> None:
    """Waits until there is none."""
    async with asyncio.timeout(30):
        while sample(await scrape(server.metrics_address), OPEN_STREAMS):
            await asyncio.sleep(0.1)


async def replies_held(server: Server) -> float:
    """Bytes that are reserved for replies that have not left."""
    return sample(await scrape(server.metrics_address), 'stepstate_memory_bytes{use="replies"}')


async def test_jwts_of_a_provider_let_in_and_its_new_keys_too(config: ServerConfig, tmp_path: Path):
    file, provider = tmp_path / "jwks.json", Provider("first")
    file.write_bytes(provider.jwks())
    settings = {"jwt_issuer": ISSUER, "jwt_audience": AUDIENCE, "jwt_jwks": str(file)}
    async with running_server(replace(config, **settings)) as server:
        await step(server, *bearer(provider.token()))
        provider.add("second")
        file.write_bytes(provider.jwks())
        await step(server, *bearer(provider.token("second")))
        assert await cause_of(server, *bearer(provider.token(exp=1))) == "expired"
        assert await cause_of(server, *bearer(Provider("first").token())) == "bad_signature"
        async with raw_stub(server.address) as stub:
            call = stub.StreamSteps(metadata=bearer(provider.token("first")))
            await asyncio.sleep(0.2)
            del provider.keys["first"]
            file.write_bytes(provider.jwks())
            async with asyncio.timeout(20):
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_certificates_are_identities_by_rules(
    config: ServerConfig,
    authority: Authority,
    certificate: Certificate,
    file: Path,
):
    own = authority.issue("meter-1", "URI:spiffe://acme.test/meters/1")
    other = authority.issue("stranger")
    rules = [CertificateRule("URI:spiffe://acme.test/meters/*", "acme", frozenset({Scope.READ}))]
    chosen = replace(
        config,
        tls_cert=str(certificate.file),
        tls_key=str(certificate.key),
        tls_client_ca=str(authority.file),
        tokens_file=str(file),
    )
    async with running_server(chosen, certificates=rules) as server:
        assert await told(server, authority, own) is None
        assert await told(server, authority, other) == "unmapped_certificate"
        assert await told(server, authority, own, *bearer(make_token())) == "unknown_token"
        assert await told(server, authority, other, *bearer(token(file))) in (None, "unknown_token")


async def told(
    server: Server, authority: Authority, own: Certificate, *metadata: tuple[str, str]
) -> str | None:
    """Why a client with a certificate is refused; None: it is not."""
    pair = own.key.read_bytes(), own.file.read_bytes()
    credentials = grpc.ssl_channel_credentials(authority.file.read_bytes(), *pair)
    target = f"localhost:{server.address.rpartition(':')[2]}"
    own_connection = (("grpc.use_local_subchannel_pool", 1),)
    async with AsyncClient(
        target, credentials=credentials, metadata=metadata, options=own_connection
    ) as client:
        try:
            await client.models()
        except Unauthenticated as error:
            return error.cause
    return None
