"""How the event loop is shared between peers, round by round.

The loop handles in each round what has come since the last one. A peer with a thousand busy
streams would have a thousand messages handled in every round, and a step of another peer, which
takes about ten rounds from its arrival to its reply, would wait for ten thousand of them. So a peer
may have its share of a round handled, and what is more waits for the next rounds. A message that
costs more than a share is handled at once, and paid back before the peer's next one: deficit round
robin (M. Shreedhar and G. Varghese, "Efficient fair queuing using deficit round-robin", 1995).

A peer that is alone pays nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque

from stepstate.transport.peers import Peer, PeerTable

ROUND_COST = 16
"""Of the messages of all peers in one round: a millisecond or two of work."""
COST_BYTES = 2**10
"""Bytes of a message that cost as much as a short message in all."""
CALL_COST = 4
"""Of a call with one request, beside its bytes: as a message of a stream costs 1."""


class LoopShares:
    """What each peer may have handled in this round of the event loop.

    Args:
        peers: those that share it.
    """

    def __init__(self, peers: PeerTable) -> None:
        self._peers = peers
        self._short: dict[Peer, None] = {}  # they have not all of their credit
        self._ticking = False

    def take(self, peer: Peer, cost: int) -> asyncio.Future[None] | None:
        """Pays for a message; it is handled now, or when the returned future is done."""
        if self._peers.count == 1:
            return None
        turn = None
        if peer.credit > 0 and not peer.turns:
            peer.credit -= cost
        else:
            turn = asyncio.get_running_loop().create_future()
            if peer.turns is None:
                peer.turns = deque()
            peer.turns.append((cost, turn))
        self._short[peer] = None
        if not self._ticking:
            self._ticking = True
            asyncio.get_running_loop().call_soon(self._tick)
        return turn

    def _tick(self) -> None:
        """A round has passed: each peer gets its share."""
        share = max(1, ROUND_COST // max(1, self._peers.count))
        for peer in list(self._short):
            peer.credit = min(share, peer.credit + share)
            while peer.turns and peer.credit > 0:
                cost, turn = peer.turns.popleft()
                if not turn.done():  # else its call was cancelled
                    peer.credit -= cost
                    turn.set_result(None)
            if peer.credit == share:
                del self._short[peer]
        self._ticking = bool(self._short)
        if self._ticking:
            asyncio.get_running_loop().call_soon(self._tick)


def cost_of(data: bytes) -> int:
    """Of a message of a stream."""
    return 1 + len(data) // COST_BYTES
