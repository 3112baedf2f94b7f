"""A method on `grpc.aio.server()` and on `H2Server`, and what its client and itself see."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from stepstate.h2grpc import H2Server, Http2Limits

SERVICE = "parity.Test"
LIMIT = 100_000
"""Bytes of the longest request."""
HANG = 10.0
KINDS = {
    "unary_unary": grpc.unary_unary_rpc_method_handler,
    "unary_stream": grpc.unary_stream_rpc_method_handler,
    "stream_unary": grpc.stream_unary_rpc_method_handler,
    "stream_stream": grpc.stream_stream_rpc_method_handler,
}
# A client that does not read takes no more than 64 KiB.
CLIENT = [("grpc.http2.bdp_probe", 0), ("grpc.max_receive_message_length", -1)]


def on_grpcio(interceptors: Sequence[grpc.aio.ServerInterceptor] = ()) -> grpc.aio.Server:
    options = [("grpc.max_receive_message_length", LIMIT), ("grpc.so_reuseport", 0)]
    return grpc.aio.server(interceptors=interceptors, options=options)


def on_lean(interceptors: Sequence[grpc.aio.ServerInterceptor] = ()) -> H2Server:
    return H2Server(interceptors, limits=Http2Limits(message_bytes=LIMIT))


SERVERS: dict[str, Callable[..., Any]] = {"grpcio": on_grpcio, "lean": on_lean}


class Notes:
    """What a method saw of its call, in order."""

    def __init__(self) -> None:
        self.all: list[object] = []

    def __call__(self, *facts: object) -> None:
        self.all += facts

    def begin(self, context: Any) -> None:
        """Notes when the call is over."""
        context.add_done_callback(lambda _: self("over"))

    async def until(self, fact: object) -> None:
        async with asyncio.timeout(HANG):
            while fact not in self.all:
                await asyncio.sleep(0.002)


@dataclass(frozen=True)
class Case:
    """A call: its method, and what its client does."""

    kind: str
    method: Callable[..., Any]
    """Called with `Notes`, the request or requests, and the context; it calls `Notes.begin`."""
    sends: Sequence[bytes] = (b"a",)
    half_close: bool = True
    timeout: float | None = None
    metadata: Sequence[tuple[str, str | bytes]] = ()
    cancels: bool = False
    """When the method has noted "ready"."""
    reads: bool = True
    compression: grpc.Compression | None = None
    interceptors: Callable[[Notes], list[grpc.aio.ServerInterceptor]] = lambda _: []
    path: str = f"/{SERVICE}/Call"
    begins: bool = True
    """Whether the method is called."""


@dataclass
class Outcome:
    """What a client got, and what the method noted."""

    code: grpc.StatusCode | None = None
    details: str | None = None
    initial: list[tuple[str, str | bytes]] = field(default_factory=list)
    trailing: list[tuple[str, str | bytes]] = field(default_factory=list)
    replies: list[bytes] = field(default_factory=list)
    notes: list[object] = field(default_factory=list)


def encode(message: Any) -> bytes:
    """grpcio's serializers get strings as bytes."""
    data: bytes = message if isinstance(message, bytes) else message.encode()
    return data


@asynccontextmanager
async def serving(
    make: Callable[..., Any],
    kind: str,
    method: Callable[..., Any],
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> AsyncIterator[tuple[Any, str]]:
    """A server with one method, and its address."""
    server = make(interceptors)
    handlers = {"Call": KINDS[kind](method, bytes.decode, encode)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield server, address
    finally:
        await server.stop(None)


async def outcome_of(make: Callable[..., Any], case: Case) -> Outcome:
    notes = Notes()
    method = functools.partial(case.method, notes)
    async with (
        asyncio.timeout(HANG),
        serving(make, case.kind, method, case.interceptors(notes)) as (_, address),
        grpc.aio.insecure_channel(address, CLIENT, compression=case.compression) as channel,
    ):
        outcome = await _call(channel, case, notes)
        notes("the client has its status")
        if case.begins:
            await notes.until("over")
    outcome.notes = [note for note in notes.all if note != "the client has its status"]
    return outcome


async def _call(channel: grpc.aio.Channel, case: Case, notes: Notes) -> Outcome:
    """A call. How many responses it has is nothing that a client says."""
    outcome, options = Outcome(), {"timeout": case.timeout, "metadata": case.metadata}
    call: Any
    if case.kind.startswith("unary"):
        call = channel.unary_stream(case.path)(case.sends[0], **options)
    else:
        call = channel.stream_stream(case.path)(**options)
        for message in case.sends:
            await _tolerate(call.write(message))
        if case.half_close:
            await _tolerate(call.done_writing())
    if case.cancels:
        await notes.until("ready")
        call.cancel()
    while case.reads:
        reply = await _tolerate(call.read())
        if reply in (None, grpc.aio.EOF):
            break
        outcome.replies.append(reply)
    outcome.code = await call.code()
    outcome.details = await call.details()
    if not case.cancels:
        outcome.initial = _own(await call.initial_metadata())
        outcome.trailing = _own(await call.trailing_metadata())
    return outcome


async def _tolerate(doing: Awaitable[Any]) -> Any:
    """What is awaited; None if the call has ended."""
    try:
        return await doing
    except (grpc.aio.AioRpcError, asyncio.CancelledError, asyncio.InvalidStateError):
        return None


def _own(metadata: Any) -> list[tuple[str, str | bytes]]:
    """What the method sent."""
    return [(key, value) for key, value in metadata or () if key.startswith(("x-", "grpc-status-"))]
