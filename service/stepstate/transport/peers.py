"""Who calls: the peers of a server, and what each of them makes it hold.

A peer is one connection, as gRPC names it ("ipv4:127.0.0.1:51724"). The clients of a proxy share
its connections: there, each client address that the proxy names in `x-forwarded-for` is a peer.
Only trusted proxies are asked: anyone can send the header.

A peer is known while it has calls.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Sequence
from contextvars import ContextVar
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import grpc

from stepstate.budget import MemoryAccount, MemoryBudget
from stepstate.errors import TooManyCalls
from stepstate.sessions import Source

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address

MAX_PEERS = 65_536
"""More than there are descriptors for connections; it bounds what proxies name."""
_FORWARDED = "x-forwarded-for"


class Peer:
    """One client: a connection, or an address behind a proxy.

    Args:
        name: for the log.
        memory: what it makes the server hold.
        receiving: what it takes while requests of it are received.
    """

    __slots__ = (
        "calls", "credit", "memory", "name", "open", "receiving", "running", "source", "turns",
    )  # fmt: skip

    def __init__(self, name: str, memory: MemoryAccount, receiving: MemoryAccount) -> None:
        self.name = name
        self.memory = memory
        self.receiving = receiving
        self.source = Source()
        """What it has in the queues of sessions."""
        self.calls = 0
        """RPCs that have not ended."""
        self.open: Counter[str] = Counter()
        """The same, by kind."""
        self.running = 0
        """Long calls of it that have their turn."""
        self.credit = 1
        """What it may still have handled in this round of the loop; see `shares`."""
        self.turns: deque[tuple[int, asyncio.Future[None]]] | None = None
        """Its messages that wait for another round, with what each costs; None: none ever did."""


current_peer: ContextVar[Peer] = ContextVar("current_peer")
"""The peer of the RPC that this task serves."""


class PeerTable:
    """The peers that have calls.

    Args:
        memory: what they may hold together.
        receiving: what may be taken while their requests are received.
        trusted_proxies: networks of proxies that say whose calls they forward.
    """

    def __init__(
        self,
        memory: MemoryBudget,
        receiving: MemoryBudget,
        trusted_proxies: Sequence[Network] = (),
    ) -> None:
        self._memory = memory
        self._receiving = receiving
        self._trusted = tuple(trusted_proxies)
        self._peers: dict[str, Peer] = {}
        self.count = 0
        """Peers that have calls."""

    def join(self, context: Context) -> Peer:
        """The peer of an RPC that begins; it `leave`s when gRPC is done with the RPC.

        Raises:
            TooManyCalls: there are too many peers.
        """
        name = context.peer()
        if self._trusted:
            name = client_name(name, tuple(context.invocation_metadata() or ()), self._trusted)
        peer = self._peers.get(name)
        if peer is None:
            if len(self._peers) >= MAX_PEERS:
                raise TooManyCalls("clients of this server", 0, 0, MAX_PEERS)
            accounts = MemoryAccount(self._memory), MemoryAccount(self._receiving)
            peer = self._peers[name] = Peer(name, *accounts)
            self.count += 1
        peer.calls += 1
        return peer

    def leave(self, peer: Peer) -> None:
        """An RPC of a peer has ended."""
        peer.calls -= 1
        if not peer.calls:
            del self._peers[peer.name]
            self.count -= 1


def client_name(
    connection: str,
    metadata: Sequence[tuple[str, str | bytes]],
    trusted: tuple[Network, ...],
) -> str:
    """The name of the peer that a call is from.

    It is the last address of `x-forwarded-for` that is not itself a trusted proxy: what is before
    it the client may have written. Where no such address can be read, it is the connection.

    Args:
        connection: the name that gRPC has for it.
        metadata: of the call.
        trusted: networks of proxies.
    """
    if not _is_trusted(connection, trusted):
        return connection
    given = [str(value) for key, value in metadata if key == _FORWARDED]
    for text in reversed(",".join(given).split(",")):
        try:
            address = _plain(ip_address(text.strip()))
        except ValueError:
            return connection
        if not _within(address, trusted):
            return f"forwarded:{address}"
    return connection


@lru_cache(maxsize=4096)
def _is_trusted(connection: str, trusted: tuple[Network, ...]) -> bool:
    address = address_of(connection)
    return address is not None and _within(address, trusted)


def address_of(connection: str) -> Address | None:
    """The address in gRPC's name of a connection; None: it has none, as of a unix socket.

    The forms are "ipv4:1.2.3.4:5", "ipv6:[::1]:5" (with `%5B` and `%5D` for the brackets) and
    "unix:PATH" (grpc/doc/naming.md).
    """
    scheme, _, rest = connection.partition(":")
    if scheme not in ("ipv4", "ipv6"):
        return None
    host = unquote(rest).rpartition(":")[0].strip("[]").partition("%")[0]  # without a zone
    try:
        return _plain(ip_address(host))
    except ValueError:
        return None


def _plain(address: Address) -> Address:
    """IPv4 as such, also where a socket for both shows it as "::ffff:1.2.3.4"."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _within(address: Address, networks: tuple[Network, ...]) -> bool:
    return any(address in network for network in networks)
