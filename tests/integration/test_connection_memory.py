"""What connections of the lean transport make a server keep is bounded, and is released."""

from __future__ import annotations

import asyncio
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
from hpack import Encoder
from hyperframe.frame import DataFrame, Frame, HeadersFrame, SettingsFrame, WindowUpdateFrame

from stepstate.budget import MemoryBudget
from stepstate.h2grpc import H2Server
from stepstate.h2grpc.connection import OUTPUT_BYTES
from stepstate.h2grpc.lifetime import ConnectionTimes
from stepstate.h2grpc.server import WRITE_BUFFER_BYTES
from stepstate.server import Server
from stepstate.transport import Receiver, ReceivingMemory
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.attacks.http2 import RawConnection, frame, raw_connection
from tests.integration.wire import STREAM, draw, opened, refused, request, until

IMPORT = "/stepstate.v1.StepstateService/ImportSession"
LARGEST_WINDOW = 2**31 - 1
MIB = 2**20
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


async def all_released(budget: MemoryBudget) -> None:
    async def nothing() -> bool:
        return not budget.used

    await until(nothing)


async def send_parts(connection: RawConnection, count: int, part: bytes) -> list[int]:
    """Begins as many calls, and sends the same on each."""
    streams = [connection.open(STREAM) for _ in range(count)]
    for stream in streams:
        await connection.send(stream, part)
    await connection.flush()
    return streams


async def test_parts_of_messages_on_many_streams_are_bounded_and_released(
    server: Server, stub: StepstateServiceStub
):
    """What does not fit ends its call; others go on, and the end of the connections frees all."""
    await opened(stub, "a")
    server.receiver.windows.shared, server.receiver.windows.little = 4 * MIB, 100_000
    part = frame(bytes(60_000))[:40_000]
    async with AsyncExitStack() as stack:
        connections = [
            await stack.enter_async_context(raw_connection(server.address)) for _ in range(3)
        ]
        for connection in connections:
            await send_parts(connection, 100, part)
            assert server.receiver.windows.used <= server.receiver.windows.shared + 3 * 100_000

        async def some_ended() -> bool:
            return all(connection.ended for connection in connections)

        await until(some_ended)
        codes = {code for connection in connections for code in connection.ended.values()}
        assert codes <= {str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]), "reset"}
        assert 2 * server.receiver.windows.used > 3 * MIB
        assert (await stub.Step(request("a", 0, draw(3_000)))).t == 3_000
    await all_released(server.receiver.windows)


async def test_a_call_without_room_for_its_message_is_told_when_to_try_again(
    server: Server, stub: StepstateServiceStub, monkeypatch: pytest.MonkeyPatch
):
    await opened(stub, "a")
    monkeypatch.setattr(server.receiver.windows, "shared", 1_000)
    monkeypatch.setattr(server.receiver.windows, "little", 0)
    refusal = await refused(stub.Step(request("a", 0, draw(2_000))))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MEMORY_LIMIT")
    assert refusal.retry_seconds == 0.5
    async with raw_connection(server.address) as connection:
        (stream,) = await send_parts(connection, 1, frame(request("a", 0, draw(2_000))))
        await connection.until_ended([stream])
    assert connection.ended[stream] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    monkeypatch.undo()
    assert (await stub.Step(request("a", 0, draw(2_000)))).t == 2_000
    await all_released(server.receiver.windows)


async def test_large_messages_wait_for_each_other_and_all_come(server: Server):
    rests = server.receiver.budget
    rests.shared, rests.little = 8 * MIB, 0
    message = frame(pb.ImportSessionRequest(snapshot=bytes(2 * MIB)))
    most = 0
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        connections = [
            await stack.enter_async_context(raw_connection(server.address)) for _ in range(4)
        ]
        for connection in connections:
            streams = [connection.open(IMPORT) for _ in range(4)]
            for stream in streams:
                group.create_task(connection.send(stream, message, end=True))

        async def all_ended() -> bool:
            nonlocal most
            most = max(most, rests.used)
            return sum(len(connection.ended) for connection in connections) == 16

        await until(all_ended)
    codes = {code for connection in connections for code in connection.ended.values()}
    assert codes == {str(grpc.StatusCode.DATA_LOSS.value[0])}  # all of it came: it is no snapshot
    assert 4 * MIB < most <= rests.shared
    await all_released(rests)


async def test_a_message_that_stalls_gives_way_to_one_that_waits(server: Server):
    rests = server.receiver.budget
    rests.shared, rests.little = 5 * MIB, 0
    message = frame(pb.ImportSessionRequest(snapshot=bytes(3 * MIB)))
    async with raw_connection(server.address) as stalling, raw_connection(server.address) as other:
        stalled = stalling.open(IMPORT)
        await stalling.send(stalled, message[:100_000])
        await stalling.flush()
        waiting = other.open(IMPORT)
        await other.send(waiting, message, end=True)
        await other.until_ended([waiting])
        await stalling.until_ended([stalled])
    assert other.ended[waiting] == str(grpc.StatusCode.DATA_LOSS.value[0])
    assert stalling.ended[stalled] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    await all_released(rests)


class _Endless(grpc.GenericRpcHandler):
    """A service whose one method sends messages without an end."""

    def service(self, _details: grpc.HandlerCallDetails) -> Any:
        async def send(_: bytes, context: Any) -> None:
            while True:
                await context.write(bytes(10_000))

        return grpc.unary_stream_rpc_method_handler(send)


@asynccontextmanager
async def endless_server(receiver: Receiver, stalled: float) -> AsyncIterator[tuple[H2Server, str]]:
    server = H2Server(
        times=ConnectionTimes(stalled=stalled), memory=lambda: ReceivingMemory(receiver)
    )
    server.add_generic_rpc_handlers([_Endless()])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def begin_endless(address: str, streams: int) -> socket.socket:
    """Opens all windows and begins as many calls, on a socket that nobody reads."""
    encoder = Encoder()
    headers = [(":method", "POST"), (":scheme", "http"), (":path", "/endless"), ("te", "trailers")]
    headers.append(("content-type", "application/grpc"))
    windows = {SettingsFrame.INITIAL_WINDOW_SIZE: LARGEST_WINDOW}
    frames: list[Frame] = [SettingsFrame(settings=windows)]
    frames.append(WindowUpdateFrame(0, window_increment=LARGEST_WINDOW - 65_535))
    for stream in range(1, 2 * streams, 2):
        frames.append(HeadersFrame(stream, encoder.encode(headers), flags=["END_HEADERS"]))
        frames.append(DataFrame(stream, frame(b""), flags=["END_STREAM"]))
    host, _, port = address.rpartition(":")
    client = socket.create_connection((host, int(port)))
    client.sendall(PREFACE + b"".join(one.serialize() for one in frames))
    return client


async def test_a_client_that_never_reads_fills_no_more_than_its_buffer_and_is_ended():
    receiver = Receiver(0)
    budget = receiver.windows
    async with endless_server(receiver, stalled=2.5) as (server, address):
        with begin_endless(address, 50):
            await until_true(lambda: budget.used > WRITE_BUFFER_BYTES)
            (connection,) = server.connections
            most = 0
            while server.connections:
                most = max(most, connection.unread_bytes)
                await asyncio.sleep(0.01)
        assert WRITE_BUFFER_BYTES < most <= WRITE_BUFFER_BYTES + 2 * OUTPUT_BYTES
        await until_true(lambda: not server.tasks)
    assert not budget.used


async def test_a_client_that_reads_late_gets_everything_in_order():
    async with endless_server(Receiver(0), stalled=60.0) as (server, address):
        with begin_endless(address, 3) as client:
            await until_true(lambda: any(one.unread_bytes for one in server.connections))
            client.settimeout(10.0)
            received = bytearray()
            while len(received) < 12 * MIB:
                received += await asyncio.to_thread(client.recv, MIB)
        await until_true(lambda: not server.connections)
    whole = frame(bytes(10_000)) * 2_000
    assert all(whole.startswith(data) for data in data_of_streams(bytes(received)))


async def test_a_client_that_never_reads_is_ended_at_once_when_memory_is_short():
    receiver = Receiver(0)
    budget = receiver.windows
    budget.shared, budget.little = 1000, 0
    async with endless_server(receiver, stalled=60.0) as (server, address):
        with begin_endless(address, 5) as client:

            def is_cut() -> bool:
                try:
                    client.send(SettingsFrame().serialize())
                except OSError:
                    return True
                return False

            await until_true(is_cut)
            assert not server.connections
    assert not budget.used


def data_of_streams(received: bytes) -> list[bytes]:
    data: dict[int, bytearray] = defaultdict(bytearray)
    position, view = 0, memoryview(received)
    while len(received) - position >= 9:
        one, length = Frame.parse_frame_header(view[position : position + 9])
        if isinstance(one, DataFrame):
            data[one.stream_id] += view[position + 9 : position + 9 + length]
        position += 9 + length
    return list(map(bytes, data.values()))


async def until_true(true: Callable[[], bool]) -> None:
    async def now() -> bool:
        return true()

    await until(now)
