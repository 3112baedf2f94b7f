"""Who calls: the peers of a server, and what each of them makes it hold.

The server is shared between tenants, and the share of each between its peers: a `PeerGroup` has
what the peers of a tenant have together. Where nobody is known, each peer is a group of its own.
Where some are, all who have proved nothing are one group, with memory of its own: they take nothing
from tenants, and a few of them leave room for the health checks of others.

A peer is one connection, or the client that a trusted proxy names (see `addresses`).
Peers and groups are known while they have calls.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import grpc

from stepstate.budget import MemoryAccount, MemoryBudget
from stepstate.errors import TooManyCalls
from stepstate.identity import ANONYMOUS, UNIDENTIFIED, Identity
from stepstate.sessions import Source
from stepstate.tenants import LimitTable, Share, SourceQueue, Tenant, TenantTable
from stepstate.transport.addresses import Network, client_name
from stepstate.transport.authentication import current_principal

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

MAX_PEERS = 65_536
"""More than there are descriptors for connections; it bounds what proxies name."""
UNIDENTIFIED_SHARE = 16
"""Callers who have proved nothing may hold a 16th of what all others may, beside it."""
UNIDENTIFIED_BYTES = 32 * 2**20
"""At least so much: hundreds of calls."""

Key = tuple[str | None, str]


class PeerGroup:
    """The peers of one tenant, or all of no tenant; or one peer, where nobody is known.

    Args:
        key: its place in the table.
        tenant: whose limits its calls keep.
        memory: what it makes the server hold.
    """

    __slots__ = (
        "calls", "credit", "due", "key", "memory", "open", "refusals", "running", "share", "turns",
        "weight",
    )  # fmt: skip

    def __init__(self, key: Key, tenant: Tenant, memory: MemoryAccount) -> None:
        self.key = key
        self.share = Share(tenant)
        """Of the queues of sessions."""
        self.weight = tenant.limits.weight
        self.memory = memory
        self.calls = 0
        """RPCs that have not ended."""
        self.open: Counter[str] = Counter()
        """The same, by kind."""
        self.refusals = 0
        """Refused calls that wait until they are answered; see `admission`."""
        self.running = 0
        """Long calls of it that have their turn."""
        self.due = 0.0
        """When it has its next turn for a long call; see `admission`."""
        self.credit = 1.0
        """What it may still have handled in this round of the loop; see `shares`."""
        self.turns: SourceQueue[asyncio.Future[None]] | None = None
        """Its messages that wait for another round; None: none ever did."""


class Peer:
    """One client: a connection, or an address behind a proxy.

    Args:
        key: its tenant, if that is known, and its name.
        group: those with whom it shares.
        memory: what it, or its group, makes the server hold.
        receiving: what it takes while requests of it are received.
    """

    __slots__ = ("calls", "group", "key", "memory", "name", "receiving", "source")

    def __init__(
        self, key: Key, group: PeerGroup, *, memory: MemoryAccount, receiving: MemoryAccount
    ) -> None:
        self.key = key
        _, self.name = key
        self.group = group
        self.memory = memory
        self.receiving = receiving
        self.source = Source(group.share)
        """What it has in the queues of sessions."""
        self.calls = 0
        """RPCs that have not ended."""


current_peer: ContextVar[Peer] = ContextVar("current_peer")
"""The peer of the RPC that this task serves."""


class PeerTable:
    """The peers that have calls.

    Args:
        memory: what they may hold together.
        receiving: what may be taken while their requests are received.
        trusted_proxies: networks of proxies that say whose calls they forward.
        tenants: have the limits.
    """

    def __init__(
        self,
        memory: MemoryBudget,
        receiving: MemoryBudget,
        trusted_proxies: Sequence[Network] = (),
        tenants: TenantTable | None = None,
    ) -> None:
        self.tenants = tenants or TenantTable()
        self._memory = memory
        self._receiving = receiving
        self._trusted = tuple(trusted_proxies)
        self._peers: dict[Key, Peer] = {}
        self._groups: dict[Key, PeerGroup] = {}
        self._unidentified_memory = MemoryBudget(
            max(UNIDENTIFIED_BYTES, memory.limit // UNIDENTIFIED_SHARE)
        )
        self._unidentified = PeerGroup(
            (UNIDENTIFIED.tenant, ""),
            self.tenants.outside(),
            MemoryAccount(self._unidentified_memory),
        )
        self.weight = 0.0
        """Of all groups together."""
        self.count = 0
        """Peers that have calls."""

    def join(self, context: Context) -> Peer:
        """The peer of an RPC that begins; it `leave`s when gRPC is done with the RPC.

        Raises:
            TooManyCalls: there are too many peers.
        """
        name = self.name_of(context)
        identity = current_principal.get().identity
        key = (None if identity is ANONYMOUS else identity.tenant, name)
        peer = self._peers.get(key)
        if peer is None:
            if len(self._peers) >= MAX_PEERS:
                raise TooManyCalls("clients of this server", 0, 0, MAX_PEERS)
            peer = self._peers[key] = self._new(key, identity)
            self.count += 1
        peer.calls += 1
        peer.group.calls += 1
        return peer

    def name_of(self, context: Context) -> str:
        """The address that a call came from, also through a trusted proxy."""
        name = context.peer()
        if self._trusted:
            name = client_name(name, tuple(context.invocation_metadata() or ()), self._trusted)
        return name

    def _new(self, key: Key, identity: Identity) -> Peer:
        group, receiving = self._group(key, identity), MemoryAccount(self._receiving)
        own = group is self._unidentified  # each of these has an account of its own
        memory = MemoryAccount(self._unidentified_memory) if own else group.memory
        return Peer(key, group, memory=memory, receiving=receiving)

    def _group(self, peer: Key, identity: Identity) -> PeerGroup:
        key = peer if peer[0] is None else (peer[0], "")
        group = self._groups.get(key)
        if group is None:
            known = identity is not UNIDENTIFIED
            group = self._tenant_group(key, identity.tenant) if known else self._unidentified
            self._groups[key] = group
            self.weight += group.weight
        return group

    def _tenant_group(self, key: Key, name: str) -> PeerGroup:
        tenant = self.tenants.get(name)
        memory = MemoryAccount(self._memory, tenant)
        tenant.accounts.add(memory)
        return PeerGroup(key, tenant, memory)

    def leave(self, peer: Peer) -> None:
        """An RPC of a peer has ended."""
        group = peer.group
        peer.calls -= 1
        group.calls -= 1
        if not peer.calls:
            del self._peers[peer.key]
            self.count -= 1
        if not group.calls:
            del self._groups[group.key]
            group.share.tenant.accounts.discard(group.memory)
            self.weight = self.weight - group.weight if self._groups else 0.0

    def set_limits(self, limits: LimitTable) -> None:
        """Changes the limits of all tenants."""
        self.tenants.set(limits)
        for group in self._groups.values():
            group.weight = group.share.weight
            group.memory.read_limit()
        self.weight = sum(group.weight for group in self._groups.values())
