"""Where the lean transport listens."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from stepstate.h2grpc import H2Server, listening
from stepstate.h2grpc.listening import listen


@contextmanager
def listened(address: str) -> Iterator[list[socket.socket]]:
    found = listen(address)
    try:
        yield found
    finally:
        for listener in found:
            listener.close()


def can_connect(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=20):
            return True
    except OSError:
        return False


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_an_address_is_listened_on(host: str):
    with listened(f"{host}:0") as (listener,):
        assert can_connect(host.strip("[]"), listener.getsockname()[1])


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_a_wildcard_takes_both_families(host: str):
    with listened(f"{host}:0") as (listener,):
        port = listener.getsockname()[1]
        assert can_connect("127.0.0.1", port)
        assert can_connect("::1", port)


@pytest.mark.parametrize(
    ("host", "peer"), [("127.0.0.1", r"ipv4:127\.0\.0\.1:\d+"), ("[::1]", r"ipv6:\[::1\]:\d+")]
)
async def test_a_client_of_a_wildcard_has_the_address_of_its_own_family(host: str, peer: str):
    async def who(_request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return context.peer().encode()

    server = H2Server()
    methods = {"Who": grpc.unary_unary_rpc_method_handler(who)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Peer", methods)])
    port = server.add_insecure_port("[::]:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"{host}:{port}") as channel:
        assert re.fullmatch(peer, (await channel.unary_unary("/test.Peer/Who")(b"")).decode())
    await server.stop(None)


async def test_a_server_that_was_not_started_gives_its_port_back():
    server = H2Server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.stop(None)
    with listened(f"127.0.0.1:{port}"):
        pass


def test_without_ipv6_the_wildcard_is_that_of_ipv4(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with listened("0.0.0.0:0") as (listener,):
        assert can_connect("127.0.0.1", listener.getsockname()[1])


def resolve_to(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    """Every name has these addresses."""
    families = [socket.AF_INET6 if ":" in host else socket.AF_INET for host in hosts]
    found = [
        (family, socket.SOCK_STREAM, 6, "", (host, 0))
        for family, host in zip(families, hosts, strict=True)
    ]
    monkeypatch.setattr(listening.socket, "getaddrinfo", lambda *_, **__: found)


def test_a_name_is_listened_on_at_all_its_addresses_with_one_port(monkeypatch):
    resolve_to(monkeypatch, "127.0.0.1", "127.0.0.2", "::1", "127.0.0.1")
    with listened("name:0") as listeners:
        hosts, ports = zip(*(one.getsockname()[:2] for one in listeners), strict=True)
    assert hosts == ("127.0.0.1", "127.0.0.2", "::1")
    assert len(set(ports)) == 1


def test_an_address_that_this_machine_does_not_have_is_passed_over(monkeypatch):
    resolve_to(monkeypatch, "192.0.2.1", "127.0.0.1")
    with listened("name:0") as (listener,):
        assert listener.getsockname()[0] == "127.0.0.1"


def test_a_name_is_not_listened_on_where_one_of_its_addresses_is_taken(monkeypatch):
    """Its other addresses are free again."""
    with listened("127.0.0.2:0") as (taken,):
        resolve_to(monkeypatch, "127.0.0.1", "127.0.0.2")
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match="in use"):
            listen(f"name:{port}")
    with listened(f"name:{port}") as listeners:
        assert len(listeners) == 2


def test_two_never_share_a_port():
    """Not even between `listen` and the first accept, or with SO_REUSEPORT on the other side."""
    with listened("127.0.0.1:0") as (first,), socket.socket() as second:
        port = first.getsockname()[1]
        with pytest.raises(RuntimeError, match=rf"^127.0.0.1:{port}: .*in use"):
            listen(f"127.0.0.1:{port}")
        second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(OSError, match="in use"):
            second.bind(("127.0.0.1", port))


def test_a_port_can_be_listened_on_again_while_old_connections_wait_for_their_end():
    with listened("127.0.0.1:0") as (first,):
        port = first.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        first.accept()[0].close()  # this side closes first: TIME_WAIT is its own
        client.close()
    with listened(f"127.0.0.1:{port}") as (again,):
        assert again.getsockname()[1] == port


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:99999", "127.0.0.1:-1", "127.0.0.1", "192.0.2.1:0", "a..b:1"],
)
def test_what_can_not_be_listened_on_is_named(address: str):
    with pytest.raises(RuntimeError, match=f"^{address}: ."):
        listen(address)
