"""TLS handshakes in bulk, a third finished, a third cut and a third slow, and what they leave.

Usage: python -m tests.conformance.handshakes [--count 15000] [--loop asyncio]
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import multiprocessing
import socket
import ssl
import struct
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import uvloop

from stepstate.h2grpc import H2Server
from stepstate.h2grpc.frames import CLIENT_PREFACE, settings
from stepstate.h2grpc.lifetime import ConnectionTimes
from tests.certificates import Authority, Certificate

HANDSHAKE_SECONDS = 2.0
"""Of the server: slow handshakes are ended then."""
SLOW_AT_A_TIME = 200
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of a socket that ends its connection with a reset."""
MIB = 2**20

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


@contextmanager
def server_process(
    certificate: Certificate, loop_factory: LoopFactory
) -> Iterator[tuple[int, Callable[[], float]]]:
    """A server without methods, in a process of its own: its port, and what measures it.

    That is MiB of resident memory after free memory was given back, as `stepstate.trim` does it.
    """
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_run, args=(certificate, loop_factory, theirs))
    process.start()

    def measure() -> float:
        ours.send(None)
        resident: float = ours.recv()
        return resident

    try:
        yield ours.recv(), measure
    finally:
        process.kill()
        process.join()


def _run(certificate: Certificate, loop_factory: LoopFactory, pipe: Connection) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(_serve(certificate, pipe))


async def _serve(certificate: Certificate, pipe: Connection) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.file, certificate.key)
    server = H2Server(times=ConnectionTimes(handshake=HANDSHAKE_SECONDS))
    port = server.add_secure_port("127.0.0.1:0", lambda: context)
    await server.start()
    pipe.send(port)
    asyncio.get_running_loop().add_reader(pipe.fileno(), _measure, pipe)
    await server.wait_for_termination()


def _measure(pipe: Connection) -> None:
    pipe.recv()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pipe.send(psutil.Process().memory_info().rss / MIB)


class Clients:
    """Begins handshakes, one after the other.

    Args:
        port: of the server.
        authority: of its certificate.
    """

    def __init__(self, port: int, authority: Authority) -> None:
        self._address = ("127.0.0.1", port)
        self._context = ssl.create_default_context(cafile=authority.file)
        self._context.set_alpn_protocols(["h2"])
        self._slow: deque[socket.socket] = deque()

    def run(self, count: int) -> None:
        """Begins as many handshakes, a third of each kind, and waits for the end of all."""
        for place in range(count // 3):
            self._finish()
            self._cut(place)
            self._dawdle(place)
        while self._slow:
            self._end_slow()

    def _finish(self) -> None:
        with (
            socket.create_connection(self._address) as plain,
            self._context.wrap_socket(plain, server_hostname="localhost") as tls,
        ):
            tls.send(CLIENT_PREFACE + settings({}))
            assert tls.recv(2**16), "the server's SETTINGS"

    def _cut(self, place: int) -> None:
        """Ends a connection within the handshake: at one of three places, in one of two ways."""
        hello = self._hello()
        with socket.create_connection(self._address) as plain:
            plain.send(hello if place % 3 else hello[: len(hello) // 2])
            if place % 3 == 2:
                plain.recv(100)
            if place % 2:
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    def _dawdle(self, place: int) -> None:
        """Begins a handshake and says no more."""
        plain = socket.create_connection(self._address)
        plain.send(self._hello() if place % 2 else self._hello()[:9])
        self._slow.append(plain)
        if len(self._slow) > SLOW_AT_A_TIME:
            self._end_slow()

    def _end_slow(self) -> None:
        """Waits until the server has ended the oldest."""
        with self._slow.popleft() as plain, suppress(ConnectionResetError):
            while plain.recv(2**16):
                pass

    def _hello(self) -> bytes:
        outgoing = ssl.MemoryBIO()
        tls = self._context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
        with suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        return outgoing.read()


def memory_after(count: int, loop_factory: LoopFactory, authority: Authority) -> Iterator[float]:
    """MiB of a server after a fifth of so many handshakes, two fifths, and so on."""
    certificate = authority.issue("server", "DNS:localhost")
    with server_process(certificate, loop_factory) as (port, measure):
        clients = Clients(port, authority)
        for _ in range(5):
            clients.run(count // 5)
            yield measure()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=15_000)
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    options = parser.parse_args()
    factories = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        for mib in memory_after(options.count, factories[options.loop], authority):
            print(f"{mib:.1f} MiB after {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
