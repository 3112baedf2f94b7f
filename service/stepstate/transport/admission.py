"""Which calls are accepted, and which long ones have their turn.

Rule 1: a peer has at most as many open calls of a kind as are still free of `MAX_OPEN`, so that a
        few greedy peers leave room for others (see `budget`). More are refused before their
        request is read.
Rule 2: at most `MAX_RUNNING` long calls work at a time, and a peer has at most as many of these
        turns as are free. The others wait, and their peers take turns.
Rule 3: after one has begun, the event loop makes some rounds before the next one does: what steps
        have to do comes in between.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from stepstate.budget import CallMemory, MemoryUse, call_memory
from stepstate.errors import TooManyCalls
from stepstate.metrics import Metrics
from stepstate.transport.peers import Peer, PeerTable, current_peer
from stepstate.transport.shares import LoopShares

if TYPE_CHECKING:
    from stepstate.transport.peers import Context


class CallKind(StrEnum):
    """How long a call takes."""

    SHORT = "short"
    """Rows of one session, or one look into memory or the store."""
    LONG = "long"
    """A millisecond of work and more, or a long reply."""
    STREAM = "stream"
    """As long as its client likes."""


SHORT, LONG, STREAM = CallKind
KINDS = {
    "OpenSession": SHORT,
    "GetSession": SHORT,
    "ListSessions": LONG,
    "RestoreSession": SHORT,
    "CloseSession": SHORT,
    "ResetAccuracy": SHORT,
    "ForkSession": SHORT,
    "ExportSession": LONG,
    "ImportSession": LONG,
    "StreamExport": STREAM,  # what is long in these two takes a turn of its own
    "StreamImport": STREAM,
    "Step": SHORT,
    "StreamSteps": STREAM,
    "StreamPacked": STREAM,
    "Forecast": LONG,
    "ListModels": LONG,
    "GetModel": SHORT,
    # Triton
    "ServerLive": SHORT,
    "ServerReady": SHORT,
    "ModelReady": SHORT,
    "ServerMetadata": SHORT,
    "ModelMetadata": LONG,
    "ModelConfig": LONG,
    "ModelInfer": SHORT,
    "ModelStreamInfer": STREAM,
    "ModelStatistics": LONG,
    "RepositoryIndex": LONG,
    # Health, reflection
    "Check": SHORT,
    "Watch": STREAM,
    "ServerReflectionInfo": STREAM,
}
"""By method: their names are unique over all services."""

MAX_OPEN = {SHORT: 32_768, LONG: 4_096, STREAM: 131_072}
"""Of all peers; one alone may have half: a connection with one stream for each session."""
MAX_RUNNING = 16
"""The store answers one after the other: so many of the longest pages delay a save by 0.1 s."""
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
        self._peers = peers
        self._metrics = metrics
        self._open = dict.fromkeys(CallKind, 0)
        self.running = 0
        """Long calls that have their turn."""
        self._waiting: OrderedDict[Peer, deque[asyncio.Future[None]]] = OrderedDict()
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
            TooManyCalls, MemoryLimit: it is refused.
        """
        peer = self._peers.join(context)
        memory = CallMemory(peer.memory)
        counted = 0

        def end(_: object) -> None:
            self._count(peer, kind, -counted)
            memory.close()
            self._peers.leave(peer)
            self._metrics.peers = self._peers.count

        when_done(end)
        self._metrics.peers = self._peers.count
        free = MAX_OPEN[kind] - self._open[kind]
        if peer.open[kind] >= free:
            raise TooManyCalls(f"open {kind} calls", peer.open[kind], free, MAX_OPEN[kind])
        memory.reserve(MemoryUse.CALLS, CALL_BYTES)
        counted = 1
        self._count(peer, kind, counted)
        current_peer.set(peer)
        call_memory.set(memory)

    def _count(self, peer: Peer, kind: CallKind, more: int) -> None:
        peer.open[kind] += more
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
        if self._rounds or self._waiting or not self._may_run(peer):
            await self._wait(peer)
        else:
            self._start(peer)
        try:
            yield
        finally:
            self._finish(peer)

    async def _wait(self, peer: Peer) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(peer, deque()).append(future)
        self._count_waiting(1)
        self._start_next()
        try:
            await future
        except asyncio.CancelledError:
            if future.cancelled():
                self._withdraw(peer, future)
            else:  # it was cancelled just after it got its turn
                self._finish(peer)
            raise

    def _withdraw(self, peer: Peer, future: asyncio.Future[None]) -> None:
        futures = self._waiting.get(peer)
        if futures is not None and future in futures:
            futures.remove(future)
            self._count_waiting(-1)
            if not futures:
                del self._waiting[peer]

    def _count_waiting(self, more: int) -> None:
        self._metrics.calls[LONG, "waiting"] += more

    def _may_run(self, peer: Peer) -> bool:
        return peer.running < MAX_RUNNING - self.running

    def _start(self, peer: Peer) -> None:
        peer.running += 1
        self.running += 1
        self._rounds = ROUNDS_BETWEEN
        asyncio.get_running_loop().call_soon(self._pass_round)

    def _finish(self, peer: Peer) -> None:
        peer.running -= 1
        self.running -= 1
        self._start_next()

    def _pass_round(self) -> None:
        self._rounds -= 1
        if self._rounds:
            asyncio.get_running_loop().call_soon(self._pass_round)
        else:
            self._start_next()

    def _start_next(self) -> None:
        """Gives the next peer a turn, unless a round has to pass or all turns are taken."""
        while not self._rounds:
            peer = next(filter(self._may_run, self._waiting), None)
            if peer is None:
                return
            future = self._take(peer)
            if not future.cancelled():
                self._start(peer)
                future.set_result(None)

    def _take(self, peer: Peer) -> asyncio.Future[None]:
        """The first of a peer that waits; its next one is behind those of the others."""
        futures = self._waiting.pop(peer)
        future = futures.popleft()
        self._count_waiting(-1)
        if futures:
            self._waiting[peer] = futures
        return future
