"""Hundreds of raw clients at once, of every kind, and the verdict over what they were given."""

from __future__ import annotations

import asyncio
import itertools
import operator
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import grpc

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.chaos.checker import check, total
from tests.chaos.clients import (
    CALL_SECONDS,
    CHANNEL,
    PAUSE_SECONDS,
    Asking,
    RawClient,
    Refused,
    SharedPackedStream,
    SharedStream,
    Streaming,
    by_call,
    call_error,
)
from tests.chaos.competitors import History
from tests.chaos.ledger import Complaint, Ledger, Tally
from tests.integration.wire import HANG
from tests.networks import Network

DURABILITIES = {
    "none": pb.DURABILITY_NONE,
    "async": pb.DURABILITY_ASYNC,
    "sync": pb.DURABILITY_SYNC,
}
CONNECTIONS = 4
SESSIONS_A_STREAM = 25
"""Sessions on one shared stream."""
THINK_SECONDS = 0.15
"""With 200 sessions some 1,000 rows/s, which leaves two cores room for what else they do."""

Stubs = Sequence[StepstateServiceStub]
Kind = Callable[[Ledger, "Fleet"], RawClient]


def calling(ledger: Ledger, fleet: Fleet) -> RawClient:
    """One call after the other, of up to three rows."""
    ask = by_call(*fleet.any_connection())
    return Asking(ledger, ask, max_rows=3, think_seconds=fleet.think_seconds)


def impatient(ledger: Ledger, fleet: Fleet) -> RawClient:
    """Calls, half of which are cancelled, and then made again."""
    ask = by_call(*fleet.any_connection(), patience=0.01)
    return Asking(ledger, ask, max_rows=3, think_seconds=fleet.think_seconds)


def streaming(ledger: Ledger, fleet: Fleet) -> RawClient:
    """A stream of its own with some requests in flight."""
    stub = random.choice(fleet.any_connection())
    return Streaming(ledger, stub, max_rows=2, think_seconds=fleet.think_seconds)


def sharing(ledger: Ledger, fleet: Fleet) -> RawClient:
    """A stream that it shares with others."""
    return Asking(ledger, fleet.shared_stream().ask, max_rows=1, think_seconds=fleet.think_seconds)


def packed(ledger: Ledger, fleet: Fleet) -> RawClient:
    """A packed stream that it shares with others."""
    return Asking(
        ledger, fleet.shared_packed_stream().ask, max_rows=1, think_seconds=fleet.think_seconds
    )


EVERY_KIND: tuple[Kind, ...] = (calling, streaming, sharing, packed)


class Fleet:
    """Clients, each with its ledger.

    Args:
        servers: stubs of each server, several connections to each.
        think_seconds: of each client between two requests.
    """

    def __init__(self, servers: Sequence[Stubs], think_seconds: float) -> None:
        self.think_seconds = think_seconds
        self.clients: list[RawClient] = []
        self.kinds: defaultdict[Kind, list[Ledger]] = defaultdict(list)
        self._servers = servers
        self._tasks: list[asyncio.Task[None]] = []
        self._shared_streams: list[SharedStream] = []
        self._sharing = itertools.count()
        self._shared_packed_streams: list[SharedPackedStream] = []
        self._packed = itertools.count()

    @property
    def ledgers(self) -> list[Ledger]:
        """Of all clients."""
        return [client.ledger for client in self.clients]

    def any_connection(self) -> list[StepstateServiceStub]:
        """One stub of each server."""
        return [random.choice(stubs) for stubs in self._servers]

    def shared_stream(self) -> SharedStream:
        """A shared stream that is not full."""
        if next(self._sharing) % SESSIONS_A_STREAM == 0:
            self._shared_streams.append(SharedStream(random.choice(self.any_connection())))
        return self._shared_streams[-1]

    def shared_packed_stream(self) -> SharedPackedStream:
        """A shared packed stream that is not full."""
        if next(self._packed) % SESSIONS_A_STREAM == 0:
            self._shared_packed_streams.append(
                SharedPackedStream(random.choice(self.any_connection()))
            )
        return self._shared_packed_streams[-1]

    async def launch(
        self,
        count: int,
        durabilities: Sequence[str],
        *,
        kinds: Sequence[Kind] = EVERY_KIND,
        model: str = "lstm",
    ) -> None:
        """Opens sessions, and starts a client for each."""
        ledgers = [
            Ledger(f"s{place}", seed=place, durability=durabilities[place % len(durabilities)])
            for place in range(count)
        ]
        await asyncio.gather(*(self.open(ledger, model) for ledger in ledgers))
        for place, ledger in enumerate(ledgers):
            kind = kinds[place // len(durabilities) % len(kinds)]
            self.kinds[kind].append(ledger)
            self.clients.append(kind(ledger, self))
        self._tasks = [asyncio.create_task(client.run()) for client in self.clients]

    async def open(self, ledger: Ledger | History, model: str = "lstm") -> None:
        """Opens a session, however often that takes."""
        request = pb.OpenSessionRequest(
            session_id=ledger.session_id,
            model=model,
            durability=DURABILITIES[ledger.durability],
        )
        again = False
        while True:
            try:
                call = self.any_connection()[0].OpenSession
                await call(request, timeout=CALL_SECONDS, wait_for_ready=True)
            except grpc.aio.AioRpcError as error:
                why = call_error(error)
                if isinstance(why, Refused) and why.refusal.reason == "SESSION_EXISTS" and again:
                    return
                if isinstance(why, Refused) and why.refusal.retry_seconds is None:
                    raise Complaint(f"opening: {why.refusal}") from error
                again = True
                await asyncio.sleep(PAUSE_SECONDS)
            else:
                return

    async def progress(self, rows: int, *, share: float = 1.0, of: str = "") -> None:
        """Waits until sessions, or a share of them, were answered so many more rows.

        Args:
            rows: how many more.
            share: of the sessions.
            of: the durability of those that are meant; empty: all.

        Raises:
            Complaint: a client has one.
        """
        meant = [ledger for ledger in self.ledgers if of in ("", ledger.durability)]
        goals = [ledger.t + rows for ledger in meant]
        wanted = int(share * len(goals))
        async with asyncio.timeout(2 * HANG):
            while sum(map(operator.ge, [one.t for one in meant], goals)) < wanted:
                self._listen()
                await asyncio.sleep(0.01)

    async def durable(self) -> None:
        """Waits until every session has rows that are reported as durable."""
        async with asyncio.timeout(HANG):
            while not all(ledger.durable_t for ledger in self.ledgers):
                await self.last(0.02)

    def rows(self, of: str = "") -> int:
        """Rows acknowledged to the sessions of a durability, or to all."""
        return sum(ledger.t for ledger in self.ledgers if of in ("", ledger.durability))

    async def rows_at_standstill(self, of: str = "") -> int:
        """Their rows, when they get no answers any more."""
        async with asyncio.timeout(HANG):
            before = -1
            while before != self.rows(of):
                before = self.rows(of)
                await self.last(0.4)
        return before

    def keep_to(self, server: int) -> None:
        """From now on nothing is asked of the others."""
        self._servers = [self._servers[server]]

    async def last(self, seconds: float) -> None:
        """Lets the load go on for a while."""
        await asyncio.sleep(seconds)
        self._listen()

    async def finish(self, network: Network) -> Tally:
        """Stops all clients, and checks what they were given."""
        await self.settle()
        return await self.check(self.ledgers, network)

    async def settle(self) -> None:
        """Stops all clients when everything they sent is answered."""
        for client in self.clients:
            client.stopping = True
        async with asyncio.timeout(2 * HANG):
            await asyncio.gather(*self._tasks)

    async def check(self, ledgers: Sequence[Ledger], network: Network) -> Tally:
        """Compares sessions with their ledgers, and with the offline run.

        Each is sent one row more before: its output tells what the state is by then.
        """
        await asyncio.gather(*(self._one_more(ledger) for ledger in ledgers))
        ts = await asyncio.gather(*(self.where(ledger.session_id) for ledger in ledgers))
        return total(check(ledger, network, t) for ledger, t in zip(ledgers, ts, strict=True))

    async def where(self, session_id: str) -> int:
        """The rows that a session has, as a server says."""
        request = pb.GetSessionRequest(session_id=session_id)
        call = self.any_connection()[0].GetSession
        reply = await call(request, timeout=CALL_SECONDS, wait_for_ready=True)
        return reply.session.t

    async def end(self) -> None:
        """Gives all clients up."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for shared_stream in (*self._shared_streams, *self._shared_packed_streams):
            await shared_stream.close()

    async def _one_more(self, ledger: Ledger) -> None:
        ask = by_call(*self.any_connection())
        client = Asking(ledger, ask, max_rows=1, think_seconds=0.0)
        ledger.request(ledger.t, 1)
        client.stopping = True
        await asyncio.wait_for(client.run(), HANG)

    def _listen(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()


@asynccontextmanager
async def fleet(*addresses: str, think_seconds: float = THINK_SECONDS) -> AsyncIterator[Fleet]:
    """Clients of one server, or of several that share a store."""
    async with AsyncExitStack() as stack:

        async def connected(address: str) -> StepstateServiceStub:
            channel = grpc.aio.insecure_channel(address, options=list(CHANNEL))
            return StepstateServiceStub(await stack.enter_async_context(channel))

        servers = [[await connected(one) for _ in range(CONNECTIONS)] for one in addresses]
        made = Fleet(servers, think_seconds)
        try:
            yield made
        finally:
            await made.end()
