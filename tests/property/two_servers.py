"""Two servers that get the same requests: one in the shortest bytes, one with an unknown field.

A one-row request in the shortest bytes may be recognized by them (`transport/row_codec.py`). With
an unknown field it is parsed by protobuf. Nobody may be able to tell which of both happened.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import grpc
import numpy as np
from google.rpc import status_pb2

from stepstate.budget import MemoryUse
from stepstate.config import ServerConfig
from stepstate.server import Server, running_server
from stepstate.sessions.snapshots.format import Snapshot, decode
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.packed import REPLAYED, packed, read
from tests.integration.wire import TOLERANCE, raw_stub
from tests.property.pipelined import Pipelined, PipelinedCall

CONNECTIONS = 2
_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
"""Until when an expired session is kept, by the system's clock."""


class Message(NamedTuple):
    """A request on its way."""

    connection: int
    stream: str
    data: bytes


@dataclass(slots=True)
class Side:
    """A server and its clients.

    Args:
        server: in this process.
        stub: for unary calls and packed messages.
        connections: for streams.
        suffix: of each request.
    """

    server: Server
    stub: StepstateServiceStub
    connections: Sequence[Pipelined]
    suffix: bytes
    calls: dict[tuple[int, str], PipelinedCall] = field(default_factory=dict)
    """The open streams, by connection and name."""

    async def send(
        self, messages: Sequence[Message], *, lost: str = "", last: str = ""
    ) -> dict[str, list[bytes]]:
        """Sends messages in one write for each connection; returns the replies of each stream.

        Args:
            messages: in their order.
            lost: a stream that is cancelled in the same write; it is not waited for.
            last: a stream that is half-closed in the same write; it ends well.
        """
        streams = [(message.connection, message.stream) for message in messages]
        for key, message in zip(streams, messages, strict=True):
            if key not in self.calls:
                self.calls[key] = self.connections[message.connection].begin()
            self.calls[key].put(message.data)
        before = {key: len(self.calls[key].replies) for key in streams}
        for key in before:
            if key[1] == lost:
                self.calls.pop(key).reset()
            elif key[1] == last:
                self.calls[key].end()
        for connection in self.connections:
            connection.flush()
        found = {}
        for key, sent in Counter(key for key in streams if key[1] != lost).items():
            call = self.calls[key]
            await call.answered(before[key] + sent)
            found["connection {} {}".format(*key)] = call.replies[before[key] :]
            if key[1] == last:
                assert await self.calls.pop(key).ended() == "0"
        return found

    async def end_calls(self) -> None:
        """Half-closes every stream; all end well."""
        ended, self.calls = list(self.calls.values()), {}
        for call in ended:
            call.end()
        for connection in self.connections:
            connection.flush()
        assert {await call.ended() for call in ended} <= {"0"}

    def reset_calls(self) -> None:
        """Cancels what is left when something has failed."""
        for call in self.calls.values():
            call.reset()
        self.calls = {}
        for connection in self.connections:
            connection.flush()

    async def step(self, message: bytes) -> bytes:
        """A unary step: its reply, or its status."""
        try:
            request = pb.StepRequest.FromString(message)
            reply = await self.stub.Step(request)
        except grpc.aio.AioRpcError as error:
            return refusal(request.session_id, problem(error))
        return reply.SerializeToString()

    async def packed_step(self, message: bytes) -> bytes:
        """The same step in a packed message."""
        request = pb.StepRequest.FromString(message)
        call = self.stub.StreamPacked()
        t = [request.t] if request.HasField("t") else None
        row = np.array(request.x, np.float32)[None]
        await call.write(packed([0], t, row, bind={0: request.session_id}))
        outcome = read(await call.read())
        call.cancel()
        if outcome.errors or outcome.error:
            return refusal(request.session_id, repr((outcome.errors, outcome.error)))
        return pb.StepResponse(
            session_id=request.session_id,
            t=int(outcome.t[0]),
            y=outcome.y[0],
            durable_t=int(outcome.durable_t[0]),
            replayed=bool(outcome.flags[0] & REPLAYED),
        ).SerializeToString()

    async def save(self, session_id: str, *, release: bool) -> None:
        """Saves a session, if it is open and there is a store; with `release` it is spilled."""
        sessions = self.server.sessions
        session = sessions.table.get(session_id)
        if session is None or not sessions.store.backend.durable:
            return
        if release:
            sessions.table.begin_spill(session)
        await sessions.writer.save([session], release=release)
        if release:
            sessions.table.remove(session)

    async def replace(self, session_id: str, name: str) -> str:
        """Closes a session and opens it under another id: it takes its handle and its slot."""
        try:
            export = await self.stub.ExportSession(pb.ExportSessionRequest(session_id=session_id))
        except grpc.aio.AioRpcError as error:
            return problem(error)
        await self.stub.CloseSession(pb.CloseSessionRequest(session_id=session_id))
        anew = pb.ImportSessionRequest(snapshot=export.snapshot, session_id=name)
        return await told(self.stub.ImportSession(anew))

    def numbers(self, session_id: str) -> tuple[float, ...]:
        """What the table has of a resident session."""
        table = self.server.sessions.table
        session = table.get(session_id)
        if session is None:
            return ()
        handle = session.handle
        return table.t[handle], table.durable_t[handle], table.expires_at[handle]

    def t(self, session_id: str) -> int | None:
        """Rows applied to a resident session."""
        session = self.server.sessions.table.get(session_id)
        return None if session is None else self.server.sessions.t(session)

    def counted(self) -> dict[str, int]:
        """How the steps of all models ended, by model and result."""
        metrics = self.server._metrics  # noqa: SLF001 - they are compared between two servers
        return {
            f"{scheduler.model.key} {result}": count
            for scheduler in self.server.sessions.schedulers.values()
            for result, count in metrics.model(
                scheduler.model.manifest.name, scheduler.model.manifest.version
            ).steps.items()
        }

    def held(self) -> dict[str, int]:
        """What must be nothing when nothing is under way."""
        sessions = self.server.sessions
        return {
            "requests": sessions._admission.queued_requests,  # noqa: SLF001 - no one else tells
            "rows": sessions.queued_rows,
            "busy": int(sessions.table.busy_array.sum()),
            "slots": sessions.leaked_slots,
            "bytes": self.server.memory.used - self.server.memory.by_use[MemoryUse.REPLAY],
        }

    async def snapshot(self, session_id: str) -> Snapshot | str:
        """A session as it would be moved to another server, or why it can't be."""
        try:
            reply = await self.stub.ExportSession(pb.ExportSessionRequest(session_id=session_id))
        except grpc.aio.AioRpcError as error:
            return problem(error)
        return decode(reply.snapshot)


@asynccontextmanager
async def running_side(config: ServerConfig, suffix: bytes) -> AsyncIterator[Side]:
    """A server in this process, with its clients."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running_server(config))
        stub = await stack.enter_async_context(raw_stub(server.address))
        connections = [await Pipelined.connect(server.address) for _ in range(CONNECTIONS)]
        yield Side(server, stub, connections, suffix)
        for connection in connections:
            await connection.close()


def assert_same_replies(
    found: Mapping[str, Sequence[bytes]], expected: Mapping[str, Sequence[bytes]], *, exact: bool
) -> None:
    """Replies of each session on each stream are the same, in their order."""
    assert found.keys() == expected.keys()
    for stream, replies in found.items():
        ours, theirs = by_session(replies), by_session(expected[stream])
        assert ours.keys() == theirs.keys()
        for session_id, mine in ours.items():
            assert len(mine) == len(theirs[session_id])
            for one, other in zip(mine, theirs[session_id], strict=True):
                assert_same_reply(one, other, exact=exact)


def by_session(replies: Sequence[bytes]) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = defaultdict(list)
    for reply in replies:
        found[pb.StepResponse.FromString(reply).session_id].append(reply)
    return found


def assert_same_reply(one: bytes, other: bytes, *, exact: bool) -> None:
    """Bytes are equal, but for outputs that were computed in batches of different sizes."""
    one, other = (re.sub(_TIME.encode(), bytes(20), reply) for reply in (one, other))
    if one == other:
        return
    mine, theirs = map(pb.StepResponse.FromString, (one, other))
    assert not exact, f"{mine} is not {theirs}"
    assert len(mine.y) == len(theirs.y), f"{mine} is not {theirs}"
    np.testing.assert_allclose(mine.y, theirs.y, rtol=TOLERANCE, atol=TOLERANCE)
    if not mine.layers:
        assert len(one) == len(other)
    for reply in (mine, theirs):
        reply.ClearField("y")
        reply.ClearField("layers")
    assert mine == theirs, f"{mine} is not {theirs}"


def assert_same_session(one: Snapshot | str, other: Snapshot | str, *, exact: bool) -> None:
    """Sessions are the same, with all that they remember."""
    if isinstance(one, str) or isinstance(other, str):
        assert one == other
        return
    tolerance = 0.0 if exact else 10 * TOLERANCE
    assert dataclasses.replace(one.record, open_time=other.record.open_time) == other.record
    assert (one.t, one.stepped_at) == (other.t, other.stepped_at)
    np.testing.assert_allclose(one.state, other.state, rtol=tolerance, atol=tolerance)
    assert np.array_equal(one.window.stamps, other.window.stamps)
    np.testing.assert_allclose(one.window.ring, other.window.ring, rtol=tolerance, atol=tolerance)
    assert len(one.window.replies) == len(other.window.replies)
    for long, same in zip(one.window.replies, other.window.replies, strict=True):
        assert (long.t, long.rows, long.digest) == (same.t, same.rows, same.digest)


def refusal(session_id: str, why: str) -> bytes:
    """What became of a step that was not streamed, as a reply of a stream."""
    error = status_pb2.Status(message=why)
    return pb.StepResponse(session_id=session_id, error=error).SerializeToString()


def problem(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code()} {re.sub(_TIME, '', error.details() or '')}"


async def told(call: Awaitable[object]) -> str:
    """What became of a unary call."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return problem(error)
    return "done"
