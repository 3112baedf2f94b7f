"""How the event loop is shared between groups of peers (see `peers`), round by round.

The loop handles in each round what has come since the last one. A peer with a thousand busy
streams would have a thousand messages handled in every round, and a step of another peer, which
takes about ten rounds from its arrival to its reply, would wait for ten thousand of them. So a
group may have its share of a round handled, in proportion to its weight, and what is more waits for
the next rounds; of its peers in turn. A message that costs more than a share is handled at once,
and paid back before the group's next one: deficit round robin (M. Shreedhar and G. Varghese,
"Efficient fair queuing using deficit round-robin", 1995).

A peer that is alone pays nothing.
"""

from __future__ import annotations

import asyncio

from stepstate.tenants import SourceQueue
from stepstate.transport.peers import Peer, PeerGroup, PeerTable

ROUND_COST = 16
"""Of the messages of all peers in one round: a millisecond or two of work."""
COST_BYTES = 2**10
"""Bytes of a message that cost as much as a short message in all."""
CALL_COST = 4
"""Of a call with one request, beside its bytes: as a message of a stream costs 1."""
PACKED_ROW_COST = 1 / 16
"""Of a packed row, beside the bytes of its message."""
REFUSAL_COST = 6
"""Of a message, or a packed row, that is answered with an error, beside that."""


class LoopShares:
    """What each group may have handled in this round of the event loop.

    Args:
        peers: those that share it.
    """

    def __init__(self, peers: PeerTable) -> None:
        self._peers = peers
        self._replenishing: dict[PeerGroup, None] = {}  # they have not all of their credit
        self._ticking = False

    def take(self, peer: Peer, cost: int) -> asyncio.Future[None] | None:
        """Pays for a message; it is handled now, or when the returned future is done."""
        if self._peers.count == 1:
            return None
        turn, group = None, peer.group
        if group.credit > 0 and not (group.turns and group.turns.turns):
            group.credit -= cost
        else:
            turn = asyncio.get_running_loop().create_future()
            if group.turns is None:
                group.turns = SourceQueue()
            group.turns.put(peer, turn, cost)
        self._replenish(group)
        return turn

    def charge(self, peer: Peer, cost: float) -> None:
        """Pays for more, of a message that was handled and cost more than its bytes said."""
        if self._peers.count > 1:
            peer.group.credit -= cost
            self._replenish(peer.group)

    async def pause(self, peer: Peer, cost: int = ROUND_COST) -> None:
        """Lets others have their share in the midst of long work: about a round's until now."""
        turn = self.take(peer, cost)
        await (asyncio.sleep(0) if turn is None else turn)

    def _replenish(self, group: PeerGroup) -> None:
        self._replenishing[group] = None
        if not self._ticking:
            self._ticking = True
            asyncio.get_running_loop().call_soon(self._tick)

    def _tick(self) -> None:
        """A round has passed: each group gets its share."""
        one = max(1.0, ROUND_COST / (self._peers.weight or 1.0))
        for group in list(self._replenishing):
            share = one * group.weight
            group.credit = min(share, group.credit + share)
            while group.credit > 0 and group.turns and group.turns.turns:
                turn, cost = group.turns.first()
                group.turns.take()
                if not turn.done():  # else its call was cancelled
                    group.credit -= cost
                    turn.set_result(None)
            if group.credit == share:
                del self._replenishing[group]
        self._ticking = bool(self._replenishing)
        if self._ticking:
            asyncio.get_running_loop().call_soon(self._tick)


def cost_of(data: bytes) -> int:
    """Of a message of a stream."""
    return 1 + len(data) // COST_BYTES
