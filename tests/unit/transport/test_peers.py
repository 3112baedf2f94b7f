"""Whose a call is: the connection, or the client that a trusted proxy names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import copy_context
from ipaddress import ip_address, ip_network

import pytest

from stepstate.budget import MemoryBudget, MemoryUse
from stepstate.config import ConfigError, ServerConfig
from stepstate.errors import MemoryLimit, TenantLimitReached, TooManyCalls
from stepstate.identity import Identity, Scope
from stepstate.metrics import Metrics
from stepstate.tenants import LimitTable, TenantLimits, TenantTable
from stepstate.transport import peers
from stepstate.transport.addresses import address_of, client_name
from stepstate.transport.admission import CALL_BYTES, CallAdmission
from stepstate.transport.authentication import STRANGER, Principal, current_principal
from stepstate.transport.peers import UNIDENTIFIED_SHARE, PeerTable
from stepstate.transport.shares import CALL_COST, ROUND_COST
from tests.unit.transport.contexts import CallContext

PROXY = "ipv4:10.0.0.7:51724"
TRUSTED = (ip_network("10.0.0.0/24"), ip_network("fd00::/8"))


@pytest.mark.parametrize(
    ("connection", "address"),
    [
        ("ipv4:127.0.0.1:51724", "127.0.0.1"),
        ("ipv6:[::1]:51724", "::1"),
        ("ipv6:%5B::1%5D:51724", "::1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:51724", "fe80::1"),
        ("ipv6:%5B::ffff:10.0.0.7%5D:51724", "10.0.0.7"),
        ("unix:/run/stepstate.sock", None),
        ("unix:", None),
        ("unix-abstract:10.0.0.7:1", None),
        ("ipv4:somewhere:80", None),
        ("", None),
    ],
)
def test_the_address_of_a_connection(connection, address):
    assert address_of(connection) == (address and ip_address(address))


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        (["203.0.113.9"], "forwarded:203.0.113.9"),
        (["198.51.100.1, 203.0.113.9"], "forwarded:203.0.113.9"),  # the first the client wrote
        (["198.51.100.1", "203.0.113.9"], "forwarded:203.0.113.9"),
        (["203.0.113.9, 10.0.0.8,10.0.0.9"], "forwarded:203.0.113.9"),  # over two more proxies
        (["203.0.113.9, fd00::8"], "forwarded:203.0.113.9"),
        (["2001:DB8:0::9"], "forwarded:2001:db8::9"),
        (["::ffff:203.0.113.9"], "forwarded:203.0.113.9"),
        (["10.0.0.8"], PROXY),  # of the proxy itself
        ([], PROXY),
        ([""], PROXY),
        (["unknown"], PROXY),
        (["203.0.113.9, unknown"], PROXY),
        (["203.0.113.9,"], PROXY),
        (["junk, 203.0.113.9"], "forwarded:203.0.113.9"),
        (["9" * 8000], PROXY),
    ],
)
def test_a_trusted_proxy_names_the_client(headers, name):
    metadata = [("user-agent", "x"), *(("x-forwarded-for", value) for value in headers)]
    assert client_name(PROXY, metadata, TRUSTED) == name


@pytest.mark.parametrize(
    "connection", ["ipv4:10.0.1.7:51724", "ipv6:%5B::1%5D:1", "unix:", "unix:/run/a"]
)
def test_who_is_not_trusted_can_name_nobody(connection):
    assert client_name(connection, [("x-forwarded-for", "203.0.113.9")], TRUSTED) == connection


def test_a_peer_is_known_while_it_has_calls():
    table = PeerTable(MemoryBudget(2**30), MemoryBudget(2**30), TRUSTED)
    first = table.join(CallContext(PROXY, forwarded_for="203.0.113.9"))
    again = table.join(CallContext("ipv4:10.0.0.8:1", forwarded_for="203.0.113.9"))
    other = table.join(CallContext("ipv4:192.0.2.1:1", forwarded_for="203.0.113.9"))
    assert first is again
    assert other is not first
    assert table.count == 2
    table.leave(first)
    table.leave(other)
    assert table.count == 1
    table.leave(again)
    assert not table.count


def test_there_are_only_so_many(monkeypatch):
    monkeypatch.setattr(peers, "MAX_PEERS", 3)
    table = PeerTable(MemoryBudget(2**30), MemoryBudget(2**30), TRUSTED)
    known = [table.join(CallContext(PROXY, forwarded_for=f"203.0.113.{n}")) for n in range(3)]
    with pytest.raises(TooManyCalls, match="clients of this server"):
        table.join(CallContext(PROXY, forwarded_for="203.0.113.9"))
    assert table.join(CallContext(PROXY, forwarded_for="203.0.113.1")) is known[1]
    table.leave(known[0])
    table.join(CallContext(PROXY, forwarded_for="203.0.113.9"))


def test_trusted_proxies_are_addresses_and_networks():
    config = ServerConfig(trusted_proxies="10.0.0.7, fd00::/8,")
    assert config.trusted_networks == (ip_network("10.0.0.7/32"), ip_network("fd00::/8"))
    for wrong in ("10.0.0.7/24", "envoy", "10.0.0.7;10.0.0.8", "10.0.0.0/33"):
        with pytest.raises(ConfigError, match="trusted_proxies"):
            ServerConfig(trusted_proxies=wrong)


@pytest.fixture
def as_tenant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Says whose the next calls are."""

    def become(name: str) -> None:
        identity = Identity("somebody", name, frozenset(Scope))
        current_principal.set(Principal(identity, "of another tenant"))

    return become


def test_the_peers_of_a_tenant_are_one_group_and_others_are_each_their_own(as_tenant):
    """An admin's calls are its own tenant's, whatever tenant they act on."""

    def run() -> None:
        limits = LimitTable(tenants={"a": TenantLimits(weight=3, memory_bytes=1000)})
        memory = MemoryBudget(2**30)
        table = PeerTable(memory, MemoryBudget(2**30), tenants=TenantTable(limits))
        nobody = [table.join(CallContext(f"ipv4:127.0.0.1:{n}")) for n in range(2)]
        as_tenant("a")
        first, again, second = (table.join(CallContext(f"ipv4:127.0.0.1:{n}")) for n in (0, 0, 1))
        as_tenant("b")
        other = table.join(CallContext("ipv4:127.0.0.1:0"))
        assert first is again
        assert first is not nobody[0]
        assert first.group is second.group
        assert first.source is not second.source
        assert len({peer.group for peer in (*nobody, first, other)}) == 4
        assert table.weight == 1 + 1 + 3 + 1
        assert first.source.tenant is table.tenants.get("a")
        first.memory.charge(MemoryUse.CALLS, 900)
        with pytest.raises(TenantLimitReached, match="memory_bytes = 1000"):
            second.memory.reserve(MemoryUse.CALLS, 200)
        other.memory.reserve(MemoryUse.CALLS, 200)
        assert table.tenants.get("a").used("memory_bytes") == 900
        table.set_limits(LimitTable(defaults=TenantLimits(weight=0.5)))
        assert table.weight == 4 * 0.5
        second.memory.reserve(MemoryUse.CALLS, 200)
        first.memory.release(MemoryUse.CALLS, 1100)
        other.memory.release(MemoryUse.CALLS, 200)
        for peer in (*nobody, first, again, second, other):
            table.leave(peer)
        assert (table.count, table.weight) == (0, 0)
        assert not table.tenants.get("a").accounts

    copy_context().run(run)


def test_callers_who_have_proved_nothing_take_nothing_from_tenants():
    """Whatever they hold, they are one group of no tenant, and their memory is their own."""

    def run() -> None:
        limits = LimitTable(defaults=TenantLimits(weight=5, calls=0, streams=0, memory_bytes=0))
        memory = MemoryBudget(2**30)
        table = PeerTable(memory, MemoryBudget(2**30), tenants=TenantTable(limits))
        current_principal.set(STRANGER)
        peers = [table.join(CallContext(f"ipv4:127.0.0.1:{n}")) for n in range(20)]
        assert len({peer.group for peer in peers}) == 1
        assert table.weight == 1
        assert peers[0].source.tenant not in table.tenants
        peers[0].source.tenant.hold("streams", 100)
        for peer in peers[:-1]:
            with pytest.raises(MemoryLimit):
                while True:
                    peer.memory.reserve(MemoryUse.CALLS, CALL_BYTES)
        peers[-1].memory.reserve(MemoryUse.CALLS, CALL_BYTES)  # there is room for a check of health
        held = sum(peer.memory.held for peer in peers)
        assert memory.limit // 64 <= held <= memory.limit // UNIDENTIFIED_SHARE
        assert not memory.used
        table.set_limits(LimitTable(defaults=TenantLimits(weight=2)))
        assert table.weight == 1
        for peer in peers:
            table.leave(peer)
        assert table.weight == 0

    copy_context().run(run)


async def test_calls_that_are_refused_for_their_credential_wait_for_one_share_of_the_loop():
    """However many connections they come from."""
    current_principal.set(STRANGER)
    table = PeerTable(MemoryBudget(2**30), MemoryBudget(2**30))
    admission, rounds = CallAdmission(table, Metrics()), 0

    async def refuse(connection: int) -> None:
        await admission.pay_unidentified(CallContext(f"ipv4:127.0.0.1:{connection}"))

    refusals = asyncio.gather(*(refuse(number) for number in range(100)))
    while not refusals.done():
        await asyncio.sleep(0)
        rounds += 1
    assert rounds > 100 * CALL_COST // ROUND_COST
    assert not table.count
