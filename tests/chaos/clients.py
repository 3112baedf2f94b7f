"""Raw clients: they know the contract only, and believe nothing.

A client keeps its rows, sends a request until it is answered, and goes back to where it is
sent: what the project's own client must do too, without a line of it.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc
import numpy as np

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.chaos.ledger import Complaint, Ledger
from tests.integration.wire import DETAILS_KEY, HANG, Refusal, refusal_in, refusal_of_call

CHANNEL = (
    ("grpc.use_local_subchannel_pool", 1),
    # A server that was killed is back within two seconds.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 200),
)
CALL_SECONDS = HANG / 2
PAUSE_SECONDS = 0.05
LATER = ("QUEUE_FULL", "DRAINING", "STORE_UNAVAILABLE", "STALE_OWNER")
"""Nothing was applied, or it is found out by sending the same request again."""


class Broken(Exception):
    """The connection ended before an answer."""


@dataclass(eq=False)
class Refused(Exception):
    """The server refused the request."""

    refusal: Refusal


Ask = Callable[[pb.StepRequest], Awaitable[pb.StepResponse]]
"""Sends a request and waits for its reply. Raises `Broken`, `Refused`."""


def call_error(error: grpc.aio.AioRpcError) -> Exception:
    """The server's own refusal; whatever else gRPC calls a failure is a broken connection."""
    if DETAILS_KEY in dict(error.trailing_metadata() or ()):
        return Refused(refusal_of_call(error))
    return Broken(f"{error.code()}: {error.details()}")


def by_call(*stubs: StepstateServiceStub, patience: float | None = None) -> Ask:
    """Asks by unary calls, each of any of the servers.

    Args:
        stubs: of the servers.
        patience: with it, every other call is given up at a random moment within these seconds.
    """

    async def ask(request: pb.StepRequest) -> pb.StepResponse:
        call = random.choice(stubs).Step(request, timeout=CALL_SECONDS, wait_for_ready=True)
        if patience is not None and random.random() < 0.5:
            asyncio.get_running_loop().call_later(random.uniform(0, patience), call.cancel)
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise call_error(error) from error
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():
                raise
            raise Broken("given up") from None

    return ask


class SharedStream:
    """Many sessions on one stream, each with one request at a time; a new stream when it broke."""

    def __init__(self, stub: StepstateServiceStub) -> None:
        self._stub = stub
        self._stream: grpc.aio.StreamStreamCall | None = None
        self._reading: asyncio.Task[None] | None = None
        self._asked: dict[str, asyncio.Future[pb.StepResponse]] = {}
        self._writing = asyncio.Lock()  # grpc.aio takes one write at a time

    async def ask(self, request: pb.StepRequest) -> pb.StepResponse:
        """See `Ask`."""
        if self._stream is None:
            self._stream = self._connect()
            self._reading = asyncio.create_task(self._read(self._stream))
        stream = self._stream
        reply = self._asked[request.session_id] = asyncio.get_running_loop().create_future()
        try:
            await self._send(stream, request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the reader hears of it too
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():
                raise
        return await reply

    async def close(self) -> None:
        """Ends the stream."""
        if self._stream is not None:
            self._stream.cancel()
            await self._reading

    def _connect(self) -> grpc.aio.StreamStreamCall:
        return self._stub.StreamSteps(wait_for_ready=True)

    async def _send(self, stream: grpc.aio.StreamStreamCall, request: pb.StepRequest) -> None:
        async with self._writing:
            await stream.write(request)

    async def _read(self, stream: grpc.aio.StreamStreamCall) -> None:
        broken: Exception = Broken("the stream ended")
        try:
            while (reply := await stream.read()) is not grpc.aio.EOF:
                self._answer(reply)
        except grpc.aio.AioRpcError as error:
            broken = call_error(error)
        except asyncio.CancelledError:
            pass
        self._stream = None
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(broken)
        self._asked.clear()

    def _answer(self, reply: pb.StepResponse) -> None:
        asked = self._asked.pop(reply.session_id)
        if asked.done():
            return
        if reply.HasField("error"):
            asked.set_exception(Refused(refusal_in(reply)))
        else:
            asked.set_result(reply)


class SharedPackedStream(SharedStream):
    """The same by columns: what many sessions ask at once goes in one message."""

    def __init__(self, stub: StepstateServiceStub) -> None:
        super().__init__(stub)
        self._handles: dict[str, int] = {}
        self._queued: list[pb.StepRequest] = []
        self._sent: dict[int, list[pb.StepRequest]] = {}

    def _connect(self) -> grpc.aio.StreamStreamCall:
        self._handles, self._queued, self._sent = {}, [], {}
        return self._stub.StreamPacked(wait_for_ready=True)

    async def _send(self, stream: grpc.aio.StreamStreamCall, request: pb.StepRequest) -> None:
        self._queued.append(request)
        async with self._writing:
            if stream is self._stream and self._queued:  # not sent with another's
                await stream.write(self._message())

    def _message(self) -> pb.StreamPackedRequest:
        rows, self._queued = self._queued, []
        message = pb.StreamPackedRequest(id=random.getrandbits(60))
        for row in rows:
            if row.session_id not in self._handles:
                handle = self._handles[row.session_id] = len(self._handles)
                message.bindings.add(handle=handle, session_id=row.session_id)
        handles = [self._handles[row.session_id] for row in rows]
        message.handles = np.array(handles, "<u4").tobytes()
        message.t = np.array([row.t for row in rows], "<u8").tobytes()
        message.x = np.array([row.x for row in rows], "<f4").tobytes()
        self._sent[message.id] = rows
        return message

    def _answer(self, reply: pb.StreamPackedResponse) -> None:
        rows = self._sent.pop(reply.id)
        errors = {one.row: one.status for one in reply.errors}
        if reply.HasField("error"):
            errors = dict.fromkeys(range(len(rows)), reply.error)
        y = np.frombuffer(reply.y, "<f4").reshape(len(rows), -1)
        t, durable_t = (
            np.frombuffer(column, "<u8").tolist() for column in (reply.t, reply.durable_t)
        )
        flags = np.frombuffer(reply.flags or bytes(len(rows)), np.uint8).tolist()
        for place, row in enumerate(rows):
            one = pb.StepResponse(session_id=row.session_id)
            if place in errors:
                one.error.CopyFrom(errors[place])
            else:
                one.t, one.durable_t, one.replayed = (
                    t[place],
                    durable_t[place],
                    flags[place] & 1 > 0,
                )
                one.y.extend(y[place].tolist())
            super()._answer(one)


class RawClient:
    """One session's client: steps until it is stopped, and misses nothing.

    Args:
        ledger: what it knows.
        max_rows: of one request.
        think_seconds: between an answer and the next request, about.
    """

    def __init__(self, ledger: Ledger, *, max_rows: int, think_seconds: float) -> None:
        self.ledger = ledger
        self.stopping = False
        self._max_rows = max_rows
        self._think_seconds = think_seconds
        self._t = ledger.t

    async def run(self) -> None:
        """Steps until `stopping`; then everything that was sent is answered.

        Raises:
            Complaint: the server broke a promise.
        """
        raise NotImplementedError

    def _request(self, t: int) -> pb.StepRequest:
        return self.ledger.request(t, random.randint(1, self._max_rows))

    @property
    def _done(self) -> bool:
        """Whether there is nothing to send any more: what was sent once is sent to the end."""
        return not self._wants(self._t)

    def _wants(self, t: int) -> bool:
        return not self.stopping or t in self.ledger.requests

    def _answered(self, t: int, reply: pb.StepResponse) -> None:
        self.ledger.answered(t, reply)
        self._t = reply.t

    async def _refused(self, refusal: Refusal) -> None:
        if refusal.reason == "STEP_AHEAD":
            self._t = int(refusal.metadata["expected_t"])
            self.ledger.sent_back(self._t)
        elif refusal.reason in LATER:
            await asyncio.sleep(min(refusal.retry_seconds or PAUSE_SECONDS, 5 * PAUSE_SECONDS))
        else:
            raise Complaint(f"refused at t={self._t}: {refusal}")

    async def _think(self) -> None:
        await asyncio.sleep(random.uniform(0, 2 * self._think_seconds))


class Asking(RawClient):
    """Sends one request after the other."""

    def __init__(self, ledger: Ledger, ask: Ask, **options: float) -> None:
        super().__init__(ledger, **options)
        self._ask = ask

    async def run(self) -> None:
        """See `RawClient.run`."""
        while not self._done:
            t = self._t
            try:
                self._answered(t, await self._ask(self._request(t)))
            except Broken:
                await asyncio.sleep(random.uniform(0, PAUSE_SECONDS))
            except Refused as refused:
                await self._refused(refused.refusal)
            else:
                await self._think()


class Streaming(RawClient):
    """Has some requests in flight on a stream of its own."""

    DEPTH = 6

    def __init__(self, ledger: Ledger, stub: StepstateServiceStub, **options: float) -> None:
        super().__init__(ledger, **options)
        self._stub = stub

    async def run(self) -> None:
        """See `RawClient.run`."""
        while not self._done:
            stream = self._stub.StreamSteps(wait_for_ready=True)
            try:
                await self._talk(stream)
            except Broken:
                await asyncio.sleep(random.uniform(0, PAUSE_SECONDS))
            except Refused as refused:
                await self._refused(refused.refusal)
            finally:
                stream.cancel()

    async def _talk(self, stream: grpc.aio.StreamStreamCall) -> None:
        in_flight: deque[int] = deque()
        t = self._t
        open_ = True
        while True:
            while open_ and len(in_flight) < self.DEPTH and self._wants(t):
                request = self._request(t)
                open_ = await self._write(stream, request)
                in_flight.append(t)
                t += self.ledger.requests[t]
            if not in_flight:
                return
            self._answered(in_flight.popleft(), await self._read(stream))
            await self._think()

    @staticmethod
    async def _write(stream: grpc.aio.StreamStreamCall, request: pb.StepRequest) -> bool:
        """Whether it could be written; if not, replies that came before are still to be read."""
        try:
            await stream.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return False
        return True

    @staticmethod
    async def _read(stream: grpc.aio.StreamStreamCall) -> pb.StepResponse:
        try:
            reply = await stream.read()
        except grpc.aio.AioRpcError as error:
            raise call_error(error) from error
        if reply is grpc.aio.EOF:
            raise Broken("the stream ended")
        if reply.HasField("error"):
            raise Refused(refusal_in(reply))
        return reply
