"""A server with TLS: who gets in, on both ports, and how its files are replaced."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import urllib.request
from dataclasses import replace
from pathlib import Path
from urllib.error import HTTPError

import grpc
import pytest

from stepstate import server as server_module
from stepstate import tls as server_tls
from stepstate.config import ServerConfig
from stepstate.errors import TlsInvalid
from stepstate.server import Server, build_server, running_server
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.certificates import Authority, Certificate, install

pytestmark = pytest.mark.transports

EXPIRY = "stepstate_tls_certificate_expiry_timestamp_seconds"
REFUSED = grpc.StatusCode.UNAVAILABLE


class Channel:
    """A connection of its own to a server, with a certificate or without."""

    def __init__(
        self, server: Server, authority: Authority, own: Certificate | None = None
    ) -> None:
        pair = (own.key.read_bytes(), own.file.read_bytes()) if own else (None, None)
        credentials = grpc.ssl_channel_credentials(authority.file.read_bytes(), *pair)
        port = server.address.rpartition(":")[2]
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.aio.secure_channel(f"localhost:{port}", credentials, options=options)
        self.stub = StepstateServiceStub(self.channel)

    async def __aenter__(self) -> StepstateServiceStub:
        return self.stub

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()


async def models(server: Server, authority: Authority, own: Certificate | None = None) -> int:
    """How many models a new connection is told of."""
    async with Channel(server, authority, own) as stub:
        return len((await stub.ListModels(pb.ListModelsRequest(), timeout=20)).models)


async def page(
    server: Server, authority: Authority, path: str = "/metrics", own: Certificate | None = None
) -> str:
    """A page of the metrics port."""
    context = ssl.create_default_context(cafile=authority.file)
    if own is not None:
        context.load_cert_chain(own.file, own.key)

    def get() -> str:
        url = f"https://{server.metrics_address}{path}"
        with urllib.request.urlopen(url, context=context, timeout=20) as answer:
            return answer.read().decode()

    return await asyncio.to_thread(get)


async def presented(server: Server, authority: Authority) -> str:
    """The common name of the certificate that a new connection gets."""
    context = ssl.create_default_context(cafile=authority.file)
    context.set_alpn_protocols(["h2"])
    port = int(server.address.rpartition(":")[2])
    _, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=context, server_hostname="localhost"
    )
    tls = writer.get_extra_info("ssl_object")
    assert tls.selected_alpn_protocol() == "h2"
    writer.transport.abort()
    return dict(part[0] for part in tls.getpeercert()["subject"])["commonName"]


async def test_both_ports_speak_tls(with_tls: ServerConfig, authority: Authority):
    async with running_server(with_tls) as server:
        assert await models(server, authority) == 6
        metrics = await page(server, authority)
        expiry = float(metrics.split(f"\n{EXPIRY} ")[1].splitlines()[0])
        assert expiry == server.tls.current.expires_at
        assert "stepstate_tls_reload_failed 0.0\n" in metrics
        assert await page(server, authority, "/healthz") == "SERVING\n"


async def test_plain_text_is_not_answered_on_either_port(with_tls: ServerConfig):
    async with running_server(with_tls) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await StepstateServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=20)
        assert refused.value.code() is REFUSED
        with pytest.raises(OSError):  # noqa: PT011 - closed, reset or unreadable
            url = f"http://{server.metrics_address}/metrics"
            await asyncio.to_thread(urllib.request.urlopen, url, timeout=20)


async def test_where_clients_need_a_certificate_none_gets_in_without(
    mutual: ServerConfig, authority: Authority, certificate: Certificate, tmp_path: Path
):
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other").issue("stranger")
    async with running_server(mutual) as server:
        assert await models(server, authority, certificate) == 6
        for own in (None, stranger):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await models(server, authority, own)
            assert refused.value.code() is REFUSED


async def test_metrics_need_a_certificate_too_and_health_does_not(
    mutual: ServerConfig, authority: Authority, certificate: Certificate
):
    async with running_server(mutual) as server:
        assert EXPIRY in await page(server, authority, own=certificate)
        with pytest.raises(HTTPError, match="403"):
            await page(server, authority)
        assert await page(server, authority, "/healthz") == "SERVING\n"


async def test_a_certificate_may_be_optional(
    mutual: ServerConfig, authority: Authority, certificate: Certificate, transport: str
):
    if transport == "grpcio":
        pytest.skip("it can't: see test_config")
    async with running_server(replace(mutual, tls_client_auth="optional")) as server:
        assert await models(server, authority) == 6
        assert await models(server, authority, certificate) == 6
        assert EXPIRY in await page(server, authority)


async def test_a_server_with_files_that_do_not_fit_does_not_start(
    with_tls: ServerConfig, authority: Authority
):
    """Nor does it make the file of its store."""
    wrong = replace(with_tls, tls_key=str(authority.issue("another").key))
    with pytest.raises(TlsInvalid, match="not the key of the certificate"):
        await build_server(wrong)
    store = Path(wrong.store.removeprefix("sqlite:"))
    assert store.name not in await asyncio.to_thread(os.listdir, store.parent)


async def replaced(server: Server, made: Certificate) -> None:
    """New files are there, and the server has looked at them."""
    files, before = server.tls.current.files, server.tls.current
    install(made, files.certificate, files.key)
    while server.tls.current is before and not server.tls.reload_failed:
        await asyncio.sleep(0.01)


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_tls, "POLL_SECONDS", 0.02)


async def test_a_new_certificate_is_served_and_open_streams_go_on(
    with_tls: ServerConfig, authority: Authority, looks_often
):
    async with running_server(with_tls) as server, Channel(server, authority) as stub:
        await stub.OpenSession(pb.OpenSessionRequest(session_id="s", model="lstm"))
        stream = stub.StreamSteps()
        for t in range(20):
            if t == 10:
                renewed = authority.issue("renewed", "DNS:localhost,IP:127.0.0.1")
                await replaced(server, renewed)
            await stream.write(pb.StepRequest(session_id="s", x=[0.0] * 3))
            assert (await stream.read()).t == t + 1
        assert await presented(server, authority) == "renewed"
        assert await models(server, authority) == 6
        stream.cancel()


async def test_new_files_that_do_not_fit_are_not_served(
    with_tls: ServerConfig, authority: Authority, looks_often
):
    async with running_server(with_tls) as server:
        renewed = authority.issue("renewed", "DNS:localhost,IP:127.0.0.1")
        await replaced(server, replace(renewed, key=authority.issue("another").key))
        assert await presented(server, authority) == "server"
        assert "stepstate_tls_reload_failed 1.0\n" in await page(server, authority)


async def test_a_new_authority_of_clients_counts_at_once(
    mutual: ServerConfig, authority: Authority, certificate: Certificate, tmp_path: Path
):
    """Those who were trusted before get in no more."""
    trusted = tmp_path / "clients.crt"
    shutil.copy(authority.file, trusted)
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    async with running_server(replace(mutual, tls_client_ca=str(trusted))) as server:
        assert await models(server, authority, certificate) == 6
        shutil.copy(other.file, trusted)
        assert await asyncio.to_thread(server.tls.reload)
        assert await models(server, authority, other.issue("new")) == 6
        with pytest.raises(grpc.aio.AioRpcError):
            await models(server, authority, certificate)


async def test_who_has_a_certificate_of_a_withdrawn_authority_does_not_stay_connected(
    mutual: ServerConfig, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """grpcio ends no connection but for its age; nothing ends when an authority is added."""
    monkeypatch.setattr(server_module, "AGE_GRACE_SECONDS", 1.0)
    trusted, both = tmp_path / "clients.crt", authority.file.read_text()
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    both += other.file.read_text()
    trusted.write_text(authority.file.read_text())
    age = 4.0 if mutual.transport == "grpcio" else 0.0
    config = replace(mutual, tls_client_ca=str(trusted), max_connection_age=age)
    old, new = authority.issue("old"), other.issue("new")
    async with running_server(config) as server, Channel(server, authority, old) as withdrawn:
        await withdrawn.OpenSession(pb.OpenSessionRequest(session_id="s", model="lstm"))
        stream = withdrawn.StreamSteps()
        await stream.write(pb.StepRequest(session_id="s", x=[0.0] * 3))
        assert (await stream.read()).t == 1
        trusted.write_text(both)
        assert await asyncio.to_thread(server.tls.reload)
        async with Channel(server, authority, new) as kept:
            await asyncio.sleep(1.5)  # connections are looked at every second
            await stream.write(pb.StepRequest(session_id="s", x=[0.0] * 3))
            assert (await stream.read()).t == 2
            trusted.write_text(other.file.read_text())
            assert await asyncio.to_thread(server.tls.reload)
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await asyncio.wait_for(stream.read(), 20)
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
            with pytest.raises(grpc.aio.AioRpcError):
                await withdrawn.ListModels(pb.ListModelsRequest(), timeout=20)
            assert await kept.ListModels(pb.ListModelsRequest(), timeout=20)
