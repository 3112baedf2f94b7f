"""Which calls are accepted, and which long ones have their turn.

Rule 1: a group of peers (see `peers`) has at most as many open calls of a kind as are still free of
        `MAX_OPEN`, so that a few greedy ones leave room for others (see `budget`), and a tenant at
        most as many as its limits say. More are refused before their request is read.
Rule 2: at most `MAX_RUNNING` long calls work at a time, and a group has at most as many of these
        turns as are free. The others wait, and their groups take turns: with twice the weight a
        group has twice as many. So do the peers of a group.
Rule 3: after one has begun, the event loop makes some rounds before the next one does: what steps
        have to do comes in between.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from stepstate.budget import CallMemory, MemoryUse, call_memory
from stepstate.errors import TooManyCalls
from stepstate.metrics import Metrics
from stepstate.transport.methods import LONG, SHORT, STREAM, CallKind
from stepstate.transport.peers import Peer, PeerGroup, PeerTable, current_peer
from stepstate.transport.shares import CALL_COST, LoopShares

if TYPE_CHECKING:
    from stepstate.transport.peers import Context

    _Turns = deque[asyncio.Future[None]]


MAX_OPEN = {SHORT: 32_768, LONG: 4_096, STREAM: 131_072}
"""Of all peers; one alone may have half: a connection with one stream for each session."""
MAX_RUNNING = 16
"""The store answers one after the other: so many of the longest pages delay a save by 0.1 s."""
MAX_REFUSALS = 256
"""Of a group, that wait: nothing else bounds what these take."""
ROUNDS_BETWEEN = 4
"""Rounds of the event loop, as between two chunks of long requests (see `engine.engine`)."""
CALL_BYTES = 32 * 2**10
"""What an open call may take. Idle streams: 9 to 12 KiB on the lean transport, 15 to 49 on grpcio;
metadata at their limit add up to 80."""


class CallAdmission:
    """Counts the calls of each peer, and gives the long ones their turns.

    Args:
        peers: knows who calls.
        metrics: shows the counts.
    """

    def __init__(self, peers: PeerTable, metrics: Metrics) -> None:
        self.shares = LoopShares(peers)
        """Shares the event loop between the peers."""
        self.tenants = peers.tenants
        """The tenants that have calls, and others."""
        self._peers = peers
        self.name_of = peers.name_of
        self._metrics = metrics
        self._open = dict.fromkeys(CallKind, 0)
        self.running = 0
        """Long calls that have their turn."""
        self._waiting: dict[PeerGroup, OrderedDict[Peer, _Turns]] = {}
        self._now = 0.0  # when the last turn was due; a group with weight 1 has one in each unit
        self._rounds = 0

    def begin(
        self,
        context: Context,
        kind: CallKind,
        when_done: Callable[[Callable[[object], None]], None],
    ) -> None:
        """Counts a call until gRPC is done with it: sets `current_peer` and `call_memory`.

        Args:
            context: of the call.
            kind: how long it takes.
            when_done: has a function called when gRPC is done with it.

        Raises:
            TooManyCalls, MemoryLimit, TenantLimitReached: it is refused.
        """
        peer = self._peers.join(context)
        current_peer.set(peer)
        memory = CallMemory(peer.memory)
        tenant, limit = peer.source.tenant, "streams" if kind is STREAM else "calls"
        counted = 0

        def end(_: object) -> None:
            if counted:
                tenant.release(limit)
            self._count(peer, kind, -counted)
            memory.close()
            self._peers.leave(peer)
            self._metrics.peers = self._peers.count

        when_done(end)
        self._metrics.peers = self._peers.count
        free, held = MAX_OPEN[kind] - self._open[kind], peer.group.open[kind]
        if held >= free:
            raise TooManyCalls(f"open {kind} calls", held, free, MAX_OPEN[kind])
        memory.reserve(MemoryUse.CALLS, CALL_BYTES)
        tenant.hold(limit)
        counted = 1
        self._count(peer, kind, counted)
        call_memory.set(memory)

    async def pay_unidentified(self, context: Context) -> None:
        """As `pay_refusal`, of a call that has no principal: with all others of that kind."""
        with suppress(TooManyCalls):
            peer = self._peers.join(context)
            current_peer.set(peer)
            try:
                await self.pay_refusal()
            finally:
                self._peers.leave(peer)

    async def pay_refusal(self) -> None:
        """Has a refused call wait for its share of the event loop, as one that is served does.

        Otherwise whoever asks again at once would be refused as fast as it asks.
        """
        peer = current_peer.get(None)
        if peer is None or peer.group.refusals >= MAX_REFUSALS:
            return
        peer.group.refusals += 1
        try:
            await self.shares.pause(peer, CALL_COST)
        finally:
            peer.group.refusals -= 1

    def _count(self, peer: Peer, kind: CallKind, more: int) -> None:
        peer.group.open[kind] += more
        self._open[kind] += more
        self._metrics.calls[kind, "open"] = self._open[kind]

    def in_turn(self, behavior: Callable[[Any, Context], Awaitable[Any]]) -> Callable[..., Any]:
        """A handler that waits for its turn once its request is there."""

        async def taking_turns(request: Any, context: Context) -> Any:
            async with self.turn():
                return await behavior(request, context)

        return taking_turns

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits until the peer of this task may do long work; the block is its turn."""
        peer = current_peer.get()
        if self._rounds or self._waiting or not self._may_run(peer.group):
            await self._wait(peer)
        else:
            self._start(peer.group)
        try:
            yield
        finally:
            self._finish(peer.group)

    async def _wait(self, peer: Peer) -> None:
        future = asyncio.get_running_loop().create_future()
        group = peer.group
        if group not in self._waiting:
            self._waiting[group] = OrderedDict()
            group.due = self._now + 1 / group.weight
        self._waiting[group].setdefault(peer, deque()).append(future)
        self._count_waiting(1)
        self._start_next()
        try:
            await future
        except asyncio.CancelledError:
            if future.cancelled():
                self._withdraw(peer, future)
            else:  # it was cancelled just after it got its turn
                self._finish(group)
            raise

    def _withdraw(self, peer: Peer, future: asyncio.Future[None]) -> None:
        peers = self._waiting.get(peer.group)
        if peers is None or future not in peers.get(peer, ()):
            return
        peers[peer].remove(future)
        self._count_waiting(-1)
        if not peers[peer]:
            del peers[peer]
        if not peers:
            del self._waiting[peer.group]

    def _count_waiting(self, more: int) -> None:
        self._metrics.calls[LONG, "waiting"] += more

    def _may_run(self, group: PeerGroup) -> bool:
        return group.running < MAX_RUNNING - self.running

    def _start(self, group: PeerGroup) -> None:
        group.running += 1
        self.running += 1
        self._rounds = ROUNDS_BETWEEN
        asyncio.get_running_loop().call_soon(self._pass_round)

    def _finish(self, group: PeerGroup) -> None:
        group.running -= 1
        self.running -= 1
        self._start_next()

    def _pass_round(self) -> None:
        self._rounds -= 1
        if self._rounds:
            asyncio.get_running_loop().call_soon(self._pass_round)
        else:
            self._start_next()

    def _start_next(self) -> None:
        """Gives the next group a turn, unless a round has to pass or all turns are taken."""
        while not self._rounds:
            ready = filter(self._may_run, self._waiting)
            group = min(ready, key=lambda group: group.due, default=None)
            if group is None:
                return
            future = self._take(group)
            if not future.cancelled():
                self._start(group)
                future.set_result(None)

    def _take(self, group: PeerGroup) -> asyncio.Future[None]:
        """The first of a group that waits; what follows of its peer is behind the other peers."""
        peers = self._waiting[group]
        peer, futures = peers.popitem(last=False)
        future = futures.popleft()
        self._count_waiting(-1)
        self._now = max(self._now, group.due)
        group.due = self._now + 1 / group.weight
        if futures:
            peers[peer] = futures
        if not peers:
            del self._waiting[group]
        return future
