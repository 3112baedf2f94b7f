"""Who calls: the peers of a server, and what each of them makes it hold.

A peer is one connection, as gRPC names it ("ipv4:127.0.0.1:51724"). It is known while it has calls.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import grpc

from stepstate.budget import MemoryAccount, MemoryBudget

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]


class Peer:
    """One client's connection.

    Args:
        name: as gRPC names it.
        memory: what it makes the server hold.
    """

    __slots__ = ("calls", "memory", "name")

    def __init__(self, name: str, memory: MemoryAccount) -> None:
        self.name = name
        self.memory = memory
        self.calls = 0
        """RPCs that have not ended."""


current_peer: ContextVar[Peer] = ContextVar("current_peer")
"""The peer of the RPC that this task serves."""


class PeerTable:
    """The peers that have calls.

    Args:
        memory: what they may hold together.
    """

    def __init__(self, memory: MemoryBudget) -> None:
        self._memory = memory
        self._peers: dict[str, Peer] = {}

    def __len__(self) -> int:
        return len(self._peers)

    def join(self, context: Context) -> Peer:
        """The peer of an RPC that begins. It is known until gRPC is done with the RPC."""
        name = context.peer()
        peer = self._peers.get(name)
        if peer is None:
            peer = self._peers[name] = Peer(name, MemoryAccount(self._memory))
        peer.calls += 1
        context.add_done_callback(self._leave(peer))  # type: ignore[arg-type] # a protocol's name
        return peer

    def _leave(self, peer: Peer) -> Callable[[Context], None]:
        def leave(_: object) -> None:
            peer.calls -= 1
            if not peer.calls:
                del self._peers[peer.name]

        return leave
