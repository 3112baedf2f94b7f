"""Servicers of `grpc.aio` run on the lean transport: both servers give the same outcome.

Where they differ on purpose, `DIFFERENT` says so; docs/decisions.md says why.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest

from tests.integration.parity import (
    LIMIT,
    SERVERS,
    Case,
    Notes,
    on_grpcio,
    on_lean,
    outcome_of,
    serving,
)

CODE = grpc.StatusCode
BINARY = ("grpc-status-details-bin", b"\x00\xff\x10")
TRAILING = (("x-end", "1"), ("x-end", "2"), BINARY)


class Status(grpc.Status):
    code = CODE.DATA_LOSS
    details = "lost"
    trailing_metadata = TRAILING


def name_of(error: BaseException) -> str:
    return type(error).__name__


# Methods with one response


async def answers(notes: Notes, request: str, context: Any) -> str:
    notes.begin(context)
    notes(context.code(), context.details(), tuple(context.trailing_metadata()), context.done())
    return request * 2


async def looks_around(notes: Notes, _request: str, context: Any) -> str:
    notes.begin(context)
    metadata = context.invocation_metadata()
    notes(type(metadata).__name__, [(one.key, one.value) for one in metadata])
    notes(re.sub(r"\d+$", "port", context.peer()), context.cancelled(), context.done())
    left = context.time_remaining()
    notes(left is None or 4 < left <= 5, context.peer_identities(), context.peer_identity_key())
    return "x"


async def sets_all(notes: Notes, _request: str, context: Any) -> None:
    notes.begin(context)
    context.set_code(CODE.NOT_FOUND)
    context.set_details("no ä, 100 %\n")
    context.set_trailing_metadata(TRAILING)
    notes(context.code(), context.details(), tuple(context.trailing_metadata()))


async def sets_a_number(notes: Notes, _request: str, context: Any) -> None:
    notes.begin(context)
    context.set_code(7)
    notes(context.code())


async def sets_nonsense(notes: Notes, _request: str, context: Any) -> None:
    notes.begin(context)
    context.set_code("nonsense")


async def returns_none(notes: Notes, _request: str, context: Any) -> None:
    notes.begin(context)


async def raises(notes: Notes, _request: str, context: Any) -> None:
    notes.begin(context)
    context.set_trailing_metadata(TRAILING)
    context.set_details("not these")
    raise ValueError("wrong ä")


async def raises_with_a_code(notes: Notes, _request: str, context: Any) -> None:
    notes.begin(context)
    context.set_code(CODE.OUT_OF_RANGE)
    raise ValueError("far")


async def cancels_itself(notes: Notes, _request: str, context: Any) -> None:
    notes.begin(context)
    raise asyncio.CancelledError


async def aborts(notes: Notes, _request: str, context: Any) -> None:
    notes.begin(context)
    await context.abort(CODE.ABORTED, "stop ä", TRAILING)


async def aborts_with_what_was_set(notes: Notes, _request: str, context: Any) -> None:
    notes.begin(context)
    context.set_details("set before")
    context.set_trailing_metadata(TRAILING)
    await context.abort(CODE.ABORTED)


async def aborts_with_status(notes: Notes, _request: str, context: Any) -> None:
    notes.begin(context)
    await context.abort_with_status(Status())


async def aborts_twice(notes: Notes, _request: str, context: Any) -> None:
    notes.begin(context)
    try:
        await context.abort(CODE.ABORTED, "first")
    except grpc.aio.AbortError as error:
        notes(str(error), context.done(), context.code(), context.details())
    try:
        await context.abort(CODE.INTERNAL, "second")
    except grpc.aio.UsageError as error:
        notes(str(error))


async def goes_on_after_an_abort(notes: Notes, _request: str, context: Any) -> str:
    """The status leaves at once."""
    notes.begin(context)
    try:
        await context.abort(CODE.ABORTED, "at once")
    except grpc.aio.AbortError:
        await notes.until("the client has its status")
    for attempt in (context.write("late"), context.read(), context.send_initial_metadata(())):
        try:
            await attempt
        except grpc.aio.BaseError as error:
            notes(name_of(error))
    return "late"


async def sends_headers(notes: Notes, _request: str, context: Any) -> str:
    notes.begin(context)
    context.set_trailing_metadata([("x-end", b"bytes")])
    await context.send_initial_metadata((("x-begin", "1"), ("x-more-bin", b"\x01\x02")))
    try:
        await context.send_initial_metadata((("x-begin", "2"),))
    except grpc.aio.UsageError as error:
        notes(str(error))
    try:
        context.set_compression(grpc.Compression.Gzip)
    except RuntimeError as error:
        notes(name_of(error))
    return "x"


async def sets_bad_trailers(notes: Notes, _request: str, context: Any) -> str:
    notes.begin(context)
    for bad in (5, [5], [(5, "a")], [("x-a", 5)], {"x-a": "b"}):
        try:
            context.set_trailing_metadata(bad)
        except TypeError as error:
            notes(name_of(error))
    return "x"


async def compresses(notes: Notes, request: str, context: Any) -> str:
    notes.begin(context)
    context.set_compression(grpc.Compression.Gzip if request == "gzip" else grpc.Compression.Deflate)
    return "long " * 1000


# Methods with many responses


async def generates(notes: Notes, request: str, context: Any) -> AsyncIterator[str]:
    notes.begin(context)
    for place in range(100):
        yield f"{request}{place}"
    context.set_trailing_metadata(TRAILING)


async def generates_and_raises(notes: Notes, _request: str, context: Any) -> AsyncIterator[str]:
    notes.begin(context)
    yield "1"
    yield "2"
    raise KeyError("three")


async def generates_and_aborts(notes: Notes, _request: str, context: Any) -> AsyncIterator[str]:
    notes.begin(context)
    yield "1"
    try:
        await context.abort(CODE.ABORTED, "two", TRAILING)
    finally:
        notes("finally")
    yield "2"


async def generates_no_string(notes: Notes, _request: str, context: Any) -> AsyncIterator[Any]:
    notes.begin(context)
    yield "1"
    yield 2


async def writes(notes: Notes, _request: str, context: Any) -> None:
    notes.begin(context)
    context.set_compression(grpc.Compression.Gzip)
    for place in range(4):
        if place % 2:
            context.disable_next_message_compression()
        await context.write(f"{place}" * 1000)
    try:
        await context.send_initial_metadata((("x-late", "1"),))
    except grpc.aio.UsageError as error:
        notes(str(error))
    context.set_code(CODE.RESOURCE_EXHAUSTED)
    context.set_details("enough")


async def writes_after_an_abort(notes: Notes, _request: str, context: Any) -> None:
    notes.begin(context)
    try:
        await context.abort(CODE.ABORTED, "over")
    except grpc.aio.AbortError:
        await context.write("late")


async def writes_much(notes: Notes, _request: str, context: Any) -> None:
    notes.begin(context)
    await context.write("y" * 6_000_000)


async def sleeps(notes: Notes, _request: str, context: Any) -> None:
    notes.begin(context)
    try:
        notes("ready")
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        notes("cancelled")
        raise


async def writes_to_who_does_not_read(notes: Notes, _request: str, context: Any) -> None:
    notes.begin(context)
    try:
        await context.write("y" * 300_000)
        notes("ready")
        for _ in range(20):
            await context.write("y" * 300_000)
    except asyncio.CancelledError:
        notes("cancelled")
        raise


async def swallows_cancellation(notes: Notes, _request: str, context: Any) -> None:
    notes.begin(context)
    try:
        notes("ready")
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        notes("cancelled")
    await context.write("to nobody")
    notes("not here")


async def generates_for_nobody(notes: Notes, _request: str, context: Any) -> AsyncIterator[str]:
    notes.begin(context)
    try:
        notes("ready")
        while True:
            await asyncio.sleep(0.001)
            yield "y"
    finally:
        notes("finally")


# Methods with many requests


async def joins(notes: Notes, requests: AsyncIterator[str], context: Any) -> str:
    notes.begin(context)
    return "+".join([request async for request in requests])


async def reads(notes: Notes, _requests: AsyncIterator[str], context: Any) -> str:
    notes.begin(context)
    found = []
    while (request := await context.read()) is not grpc.aio.EOF:
        found.append(request)
    notes(await context.read() is grpc.aio.EOF)
    return "+".join(found)


async def reads_one(notes: Notes, requests: AsyncIterator[str], context: Any) -> str:
    notes.begin(context)
    return await anext(aiter(requests))


async def reads_on(notes: Notes, _requests: AsyncIterator[str], context: Any) -> str:
    notes.begin(context)
    try:
        notes(await context.read(), "ready")
        await context.read()
    except asyncio.CancelledError:
        notes("cancelled")
        raise
    return "x"


async def echoes(notes: Notes, requests: AsyncIterator[str], context: Any) -> AsyncIterator[str]:
    notes.begin(context)
    async for request in requests:
        yield request
        yield request.upper()


async def reads_and_writes(notes: Notes, _requests: AsyncIterator[str], context: Any) -> None:
    notes.begin(context)
    await context.write("first")
    while (request := await context.read()) is not grpc.aio.EOF:
        await context.write(request)


# Interceptors


class Noting(grpc.aio.ServerInterceptor):
    def __init__(self, notes: Notes, name: str) -> None:
        self._notes = notes
        self._name = name

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        metadata = dict(details.invocation_metadata)
        self._notes(self._name, details.method, metadata.get("x-a"))
        handler = await continuation(details)
        self._notes(handler is not None)
        return handler


class Replacing(grpc.aio.ServerInterceptor):
    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        async def refuses(_request: Any, context: Any) -> None:
            await context.abort(CODE.UNAUTHENTICATED, "who are you?")

        return grpc.unary_unary_rpc_method_handler(refuses)


class Raising(grpc.aio.ServerInterceptor):
    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        raise LookupError("no such thing")


ONE, MANY, IN, BOTH = "unary_unary", "unary_stream", "stream_unary", "stream_stream"
THREE = (b"a", b"b", b"c")
METADATA = (("x-a", "1"), ("x-b-bin", b"\x00\x01"), ("x-a", "2"), ("x-empty", ""))
CASES = {
    "a response": Case(ONE, answers),
    "what a method sees": Case(ONE, looks_around, metadata=METADATA),
    "what a method sees of a deadline": Case(ONE, looks_around, timeout=5),
    "a code, and no response": Case(ONE, sets_all),
    "a number as a code": Case(ONE, sets_a_number),
    "nonsense as a code": Case(ONE, sets_nonsense),
    "no response": Case(ONE, returns_none),
    "an error": Case(ONE, raises),
    "an error after a code": Case(ONE, raises_with_a_code),
    "a method that cancels itself": Case(ONE, cancels_itself),
    "an abort": Case(ONE, aborts),
    "an abort with what was set": Case(ONE, aborts_with_what_was_set),
    "an abort with a status": Case(ONE, aborts_with_status),
    "two aborts": Case(ONE, aborts_twice),
    "life after an abort": Case(ONE, goes_on_after_an_abort),
    "headers": Case(ONE, sends_headers),
    "trailers that are none": Case(ONE, sets_bad_trailers),
    "a request that can't be parsed": Case(ONE, answers, sends=[b"\xff"], begins=False),
    "gzip": Case(ONE, compresses, sends=[b"gzip"]),
    "deflate": Case(ONE, compresses, sends=[b"deflate"]),
    "a request in gzip": Case(ONE, answers, sends=[b"a" * 999], compression=grpc.Compression.Gzip),
    "a request in deflate": Case(
        ONE, answers, sends=[b"a" * 999], compression=grpc.Compression.Deflate
    ),
    "an unknown method": Case(ONE, answers, path="/parity.Test/Other", begins=False),
    "an unknown service": Case(ONE, answers, path="/parity.Other/Call", begins=False),
    "a generator": Case(MANY, generates),
    "a generator that raises": Case(MANY, generates_and_raises),
    "a generator that aborts": Case(MANY, generates_and_aborts),
    "a response of another type": Case(MANY, generates_no_string),
    "writes": Case(MANY, writes),
    "a write after an abort": Case(MANY, writes_after_an_abort),
    "a long response": Case(MANY, writes_much),
    "a client that cancels a sleeper": Case(MANY, sleeps, cancels=True),
    "a client that cancels a writer": Case(MANY, writes_to_who_does_not_read, cancels=True),
    "a client that cancels a reader": Case(IN, reads_on, cancels=True, half_close=False),
    "a client that cancels a generator": Case(MANY, generates_for_nobody, cancels=True),
    "a method that swallows its cancellation": Case(MANY, swallows_cancellation, cancels=True),
    "a deadline that passes in a sleep": Case(MANY, sleeps, timeout=0.3),
    "a deadline that passes in a write": Case(
        MANY, writes_to_who_does_not_read, timeout=0.3, reads=False
    ),
    "a deadline that passes in a read": Case(IN, reads_on, timeout=0.3, half_close=False),
    "an iterator": Case(IN, joins, sends=THREE),
    "an iterator over nothing": Case(IN, joins, sends=()),
    "reads": Case(IN, reads, sends=THREE),
    "requests that nobody reads": Case(IN, reads_one, sends=THREE, half_close=False),
    "both ways": Case(BOTH, echoes, sends=THREE),
    "both ways by read and write": Case(BOTH, reads_and_writes, sends=THREE),
    "interceptors": Case(
        ONE, answers, metadata=METADATA, interceptors=lambda n: [Noting(n, "1"), Noting(n, "2")]
    ),
    "an interceptor with another handler": Case(
        ONE, answers, interceptors=lambda n: [Noting(n, "1"), Replacing()], begins=False
    ),
    "an interceptor that raises": Case(
        ONE, answers, interceptors=lambda _: [Raising()], begins=False
    ),
    "an interceptor of an unknown method": Case(
        ONE, answers, path="/a/b", interceptors=lambda n: [Noting(n, "1")], begins=False
    ),
}


@pytest.mark.parametrize("name", CASES)
async def test_both_servers_give_the_same_outcome(name: str):
    want = await outcome_of(on_grpcio, CASES[name])
    assert await outcome_of(on_lean, CASES[name]) == want
