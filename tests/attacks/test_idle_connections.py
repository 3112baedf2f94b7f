"""What a connection with one idle stream costs: `pytest -m long -s` on this file prints it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hpack import Encoder
from hyperframe.frame import DataFrame, Frame, HeadersFrame, SettingsFrame

from tests.attacks.harness import Ground
from tests.attacks.http2 import frame
from tests.attacks.processes import Memory
from tests.chaos.restartable import RestartableServer
from tests.integration.wire import STREAM, draw, opened, raw_stub, request

pytestmark = [pytest.mark.attacks, pytest.mark.long]

CONNECTIONS, WARM = 10_000, 200
KIB = 1024
MAX_BYTES = {"lean": 40 * KIB, "grpcio": 400 * KIB}
"""Of a connection; of grpcio's it is only made sure that it is measured."""


@contextmanager
def idle_connections(address: str, count: int) -> Iterator[None]:
    """As many connections, each with one stream, on which one step was answered."""
    headers = [(":method", "POST"), (":scheme", "http"), (":path", STREAM), (":authority", "x")]
    headers += [("te", "trailers"), ("content-type", "application/grpc")]
    step = frame(request("idle", None, draw(1)))
    begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"".join(
        one.serialize()
        for one in (
            SettingsFrame(),
            SettingsFrame(flags=["ACK"]),
            HeadersFrame(1, Encoder().encode(headers), flags=["END_HEADERS"]),
            DataFrame(1, step),
        )
    )
    host, _, port = address.rpartition(":")
    with ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(socket.create_connection((host, int(port))))
            client.sendall(begin)
            client.settimeout(60.0)
            received = b""
            while not _has_data(received):
                received += client.recv(4096)
        yield


def _has_data(received: bytes) -> bool:
    """Whether a whole DATA frame has come."""
    while len(received) >= 9:
        one, length = Frame.parse_frame_header(memoryview(received)[:9])
        if isinstance(one, DataFrame):
            return True
        received = received[9 + length :]
    return False


@pytest.mark.parametrize("transport", MAX_BYTES)
async def test_an_idle_connection_costs_little(tmp_path: Path, transport: str):
    ground = Ground.of(tmp_path)
    options = ("--models", str(ground.models), "--store", "memory:", "--transport", transport)
    server = RestartableServer(*options, log=tmp_path / "server.log")
    try:
        await server.start()
        memory = Memory(server.process.pid)
        async with raw_stub(server.address) as stub:
            await opened(stub, "idle")
        with idle_connections(server.address, WARM):
            pass
        before = memory.now()
        with idle_connections(server.address, CONNECTIONS):
            each = (memory.now() - before) // CONNECTIONS
            print(f"{transport}: {each / KIB:.1f} KiB a connection")
            assert each <= MAX_BYTES[transport]
    finally:
        server.kill_if_running()
