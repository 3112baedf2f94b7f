"""Faults, as context managers and calls by name: what networks, clients and strangers do."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import grpc
import numpy as np

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.wire import HANG, blocker, draw, opened, raw_stub, request
from tests.processes import ServerProcess


class Relay:
    """A TCP relay before a server, whose connections can be cut and held at will."""

    def __init__(self, target: str) -> None:
        self.address = ""
        self.connections = 0
        self.withheld = asyncio.Event()
        """Set when bytes came that are held."""
        self.redirect(target)
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._pass_replies = asyncio.Event()
        self._pass_requests = asyncio.Event()
        self._pass_replies.set()
        self._pass_requests.set()
        self._cut_in: int | None = None

    def redirect(self, target: str) -> None:
        """Leads the connections that are made from now on to another address."""
        self._target = target.rpartition(":")

    def cut(self) -> None:
        """Breaks every connection at once, in both directions, as a reset."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def cut_after(self, count: int) -> None:
        """Breaks every connection when so many more bytes went through, either way."""
        self._cut_in = count

    def hold_replies(self) -> None:
        """Lets no more bytes of the server through; `withheld` tells when some came."""
        self.withheld.clear()
        self._pass_replies.clear()

    def hold_requests(self) -> None:
        """Lets no more bytes of the clients through; `withheld` tells when some came."""
        self.withheld.clear()
        self._pass_requests.clear()

    def release(self) -> None:
        """Lets everything through again."""
        self._pass_replies.set()
        self._pass_requests.set()

    def lose(self) -> None:
        """Breaks the connections; what was held never arrives."""
        self.cut()
        self.release()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relays one connection."""
        self.connections += 1
        self._writers.add(writer)
        self._watch(asyncio.current_task())
        host, _, port = self._target
        try:
            server_reader, server_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(server_writer)
        pumps = (
            self._pump(reader, server_writer, self._pass_requests),
            self._pump(server_reader, writer, self._pass_replies),
        )
        for pump in pumps:
            self._watch(asyncio.create_task(pump))

    def _watch(self, task: asyncio.Task[None] | None) -> None:
        """Keeps a task, so that `end` can cancel it."""
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        passing: asyncio.Event,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                if not passing.is_set():
                    self.withheld.set()
                await passing.wait()
                if self._cut_in is not None:
                    data, self._cut_in = data[: self._cut_in], self._cut_in - len(data)
                writer.write(data)
                await writer.drain()
                if self._cut_in is not None and self._cut_in <= 0:
                    self._cut_in = None
                    self.cut()
        writer.close()

    async def end(self) -> None:
        """Cuts everything and waits until it is gone."""
        self.cut()
        self.release()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def relay(target: str) -> AsyncIterator[Relay]:
    """A relay before a server."""
    made = Relay(target)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        server.close()
        await made.end()
        await server.wait_closed()


# Storms: each comes over a server by its address, and passes.


async def cancelled_calls(address: str) -> None:
    """Calls and streams of one session, given up at every moment, amid a batch too."""
    moments = np.random.default_rng(1)
    async with raw_stub(address) as stub:
        session_id = (
            await stub.OpenSession(pb.OpenSessionRequest(model="lstm"))
        ).session.session_id
        for _ in range(15):
            calls: list[grpc.aio.Call] = [
                stub.Step(request(session_id, None, draw(rows))) for rows in (1, 1, 1, 1, 50, 2_000)
            ]
            calls += [stub.StreamSteps() for _ in range(4)]
            for stream in calls[6:]:
                await stream.write(request(session_id, None, draw(1)))
            for call in moments.permutation(np.array(calls, object)):
                await asyncio.sleep(0.001 if moments.random() < 0.2 else 0)
                call.cancel()
        await closed(stub, session_id)


async def closed(stub: StepstateServiceStub, session_id: str) -> None:
    await asyncio.wait_for(stub.CloseSession(pb.CloseSessionRequest(session_id=session_id)), HANG)


async def long_requests_given_up(address: str) -> None:
    """Requests that would run for a quarter of a minute, cancelled as soon as they run."""
    async with raw_stub(address) as stub:
        session_id = (
            await stub.OpenSession(pb.OpenSessionRequest(model="lstm"))
        ).session.session_id
        for _ in range(5):
            calls = [stub.Step(blocker(session_id, rows=50_000)) for _ in range(3)]
            await asyncio.sleep(0.01)
            for call in calls:
                call.cancel()
        await closed(stub, session_id)


async def broken_connections(address: str) -> None:
    """Streams whose connection breaks after every number of bytes."""
    async with relay(address) as way:
        for count in range(1, 4_000, 400):
            way.cut_after(count)
            with contextlib.suppress(grpc.aio.AioRpcError):
                async with raw_stub(way.address) as stub:
                    await opened(stub, f"broken-{count}")
                    stream = stub.StreamSteps()
                    for t in range(50):
                        await stream.write(request(f"broken-{count}", t, draw(1)))
                        await stream.read()
                    way.cut()
        async with raw_stub(address) as stub:
            for count in range(1, 4_000, 400):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await closed(stub, f"broken-{count}")


async def garbage_on_the_port(address: str) -> None:
    """Strangers: random bytes, HTTP/1, TLS, a broken HTTP/2 and connections that say nothing."""
    host, _, port = address.rpartition(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    said = [
        b"",
        os.urandom(10_000),
        b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(500),
        preface + os.urandom(2_000),
        preface + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" + b"\xff" * 5_000,
        preface,
    ]
    writers = []
    for text in said * 3:
        _, writer = await asyncio.open_connection(host, int(port))
        writers.append(writer)
        with contextlib.suppress(OSError):
            writer.write(text)
            await writer.drain()
    for writer in writers:
        writer.transport.abort()


async def malformed_messages(address: str) -> None:
    """Bytes that are no message, on every RPC."""
    names = ("OpenSession", "GetSession", "ListSessions", "CloseSession", "Step", "ListModels")
    async with grpc.aio.insecure_channel(address) as channel:
        for name in (*names, "GetModel", "Nope"):
            for data in (b"\xff", b"\x0a\xff\xff\xff\x7f", os.urandom(300), b"\x08" * 1_000):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await channel.unary_unary(f"/stepstate.v1.StepstateService/{name}")(data)
        stream = channel.stream_stream("/stepstate.v1.StepstateService/StreamSteps")()
        for _ in range(200):
            await stream.write(os.urandom(50))
            await stream.read()
        stream.cancel()


async def huge_ids(address: str) -> None:
    """Ids of 10 MB, in calls and in a stream."""
    name = "x" * 10_000_000
    async with raw_stub(address) as stub:
        stream = stub.StreamSteps()
        for _ in range(2):
            for call in (
                stub.Step(pb.StepRequest(session_id=name, x=[0.0] * 3)),
                stub.OpenSession(pb.OpenSessionRequest(session_id=name, model="lstm")),
                stub.OpenSession(pb.OpenSessionRequest(model=name)),
                stub.ListSessions(pb.ListSessionsRequest(page_token=name)),
            ):
                await refused_somehow(call)
            await stream.write(pb.StepRequest(session_id=name, x=[0.0] * 3))
            reply = await stream.read()
            assert reply.HasField("error")
        stream.cancel()


async def messages_over_the_limit(address: str) -> None:
    """Requests of 17 MB, which end their call or stream."""
    huge = pb.StepRequest(session_id="x" * 17 * 2**20, x=[0.0] * 3)
    async with raw_stub(address) as stub:
        await refused_somehow(stub.Step(huge))
        stream = stub.StreamSteps()
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stream.write(huge)
            await stream.read()
        stream.cancel()


async def thousands_of_metadata_keys(address: str) -> None:
    """Calls with 10,000 keys of metadata."""
    metadata = tuple((f"key-{place}", "value") for place in range(10_000))
    async with raw_stub(address) as stub:
        await refused_somehow(
            stub.Step(pb.StepRequest(session_id="nope", x=[0.0] * 3), metadata=metadata)
        )


async def refused_somehow(call: grpc.aio.UnaryUnaryCall) -> None:
    try:
        await asyncio.wait_for(call, HANG)
    except grpc.aio.AioRpcError as error:
        assert error.code() is not grpc.StatusCode.UNKNOWN, error  # noqa: PT017
        assert "Traceback" not in str(error.details())  # noqa: PT017
    else:
        raise AssertionError("was accepted")


async def abandoned_streams(address: str) -> None:
    """Clients that send and vanish without reading a reply."""
    async with relay(address) as way, raw_stub(address) as plain:
        for place in range(8):
            await opened(plain, f"left-{place}")
            async with raw_stub(way.address) as stub:
                stream = stub.StreamSteps()
                for _ in range(200):
                    await stream.write(request(f"left-{place}", None, draw(1), inspect=True))
                way.cut()
        for place in range(8):
            await closed(plain, f"left-{place}")


async def sessions_opened_and_closed(address: str) -> None:
    """More sessions than there is room for, closed again, some with their replies long."""
    async with raw_stub(address) as stub:

        async def one(place: int) -> None:
            session_id = f"brief-{place}"
            try:
                await opened(stub, session_id)
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # noqa: PT017
                return
            await stub.Step(request(session_id, 0, draw(200)))
            await closed(stub, session_id)

        await asyncio.gather(*map(one, range(120)))


STORMS = (
    cancelled_calls,
    long_requests_given_up,
    broken_connections,
    garbage_on_the_port,
    malformed_messages,
    huge_ids,
    messages_over_the_limit,
    thousands_of_metadata_keys,
    abandoned_streams,
    sessions_opened_and_closed,
)


# Faults that last for a block.


@asynccontextmanager
async def full_table(address: str, limit: int) -> AsyncIterator[None]:
    """No room for a session inside the block."""
    async with raw_stub(address) as stub:
        made = []
        for place in range(limit):
            try:
                made.append(await opened(stub, f"full-{place}"))
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # noqa: PT017
                break
        else:
            raise AssertionError("the table has no limit")
        yield
        for session_id in made:
            await closed(stub, session_id)


@asynccontextmanager
async def slow_readers(address: str, count: int) -> AsyncIterator[None]:
    """Streams that send large requests as fast as they may and read nothing inside the block."""
    async with raw_stub(address, ("grpc.http2.bdp_probe", 0)) as stub:
        names = [await opened(stub, f"slow-{place}") for place in range(count)]
        streams = [stub.StreamSteps() for _ in names]

        async def send(place: int) -> None:
            while True:
                await streams[place].write(request(names[place], None, draw(400)))

        sending = [asyncio.create_task(send(place)) for place in range(count)]
        try:
            yield
        finally:
            for task, stream in zip(sending, streams, strict=True):
                stream.cancel()
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)
        for name in names:
            await closed(stub, name)


CLIENT = """
import asyncio, io, sys
import numpy as np
from stepstate.client import AsyncClient

async def main(target, session_id):
    x = np.load(io.BytesIO(sys.stdin.buffer.read()))
    async with AsyncClient(target) as client:
        session = await client.open("lstm", session_id=session_id)
        async for y in session.stream(x):
            print(session.t, *y, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@contextmanager
def client_process(
    address: str, session_id: str, x: np.ndarray
) -> Iterator[subprocess.Popen[bytes]]:
    """A client of its own process that streams rows and prints t and y; killed at the end."""
    command: Sequence[str] = [sys.executable, "-c", CLIENT, address, session_id]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        data = io.BytesIO()
        np.save(data, x)
        process.stdin.write(data.getvalue())
        process.stdin.close()
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()


def terminate(server: ServerProcess) -> None:
    """What an orchestrator does to stop a server."""
    server.process.send_signal(signal.SIGTERM)
