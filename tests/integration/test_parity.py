"""Servicers of `grpc.aio` run on the lean transport: both servers give the same outcome.

Where they differ on purpose, `DIFFERENT` says so; docs/decisions.md says why.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest

from stepstate.h2grpc import Call
from stepstate.h2grpc.stream import Http2Stream
from tests.integration.parity import (
    HANG,
    LIMIT,
    SERVERS,
    Case,
    Notes,
    Outcome,
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
    notes(left is None or 3 < left < 6, context.peer_identities(), context.peer_identity_key())
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
    context.set_compression(grpc.Compression[request])
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
UNREAD = Case(IN, reads_one, sends=THREE, half_close=False)
"""Requests that nobody reads. The outcome is not compared: a client of `grpc.aio` that still writes
when the server ends the call reports INTERNAL now and then."""

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
    "gzip": Case(ONE, compresses, sends=[b"Gzip"]),
    "deflate": Case(ONE, compresses, sends=[b"Deflate"]),
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


def ends_with(outcome: Outcome, *last: object) -> Outcome:
    """The outcome if the method had noted this at the end."""
    return replace(outcome, notes=[note for note in outcome.notes if note not in last] + [*last])


DIFFERENT: dict[str, tuple[Callable[[Outcome], Outcome], str]] = {
    name: (change, why)
    for names, change, why in (
        (
            ("a code, and no response", "a number as a code", "nonsense as a code"),
            lambda outcome: replace(outcome, replies=[]),
            "grpcio sends an empty message before a status that is an error",
        ),
        (
            ("a method that cancels itself",),
            lambda outcome: replace(outcome, details=""),
            "grpcio sends no status, and the client makes one up",
        ),
        (
            (
                "a client that cancels a reader",
                "a client that cancels a writer",
                "a deadline that passes in a write",
                "a deadline that passes in a read",
            ),
            lambda outcome: ends_with(outcome, "cancelled", "over"),
            "grpcio ends a read like the end of the requests, and a write with an error",
        ),
        (
            ("a client that cancels a generator",),
            lambda outcome: ends_with(outcome, "finally", "over"),
            "grpcio leaves the end of a generator to Python's collector",
        ),
    )
    for name in names
}
"""What grpcio's outcome would be here, and why it is another."""


@pytest.mark.parametrize("name", CASES)
async def test_both_servers_give_the_same_outcome(name: str):
    want = await outcome_of(on_grpcio, CASES[name])
    if name in DIFFERENT:
        want = DIFFERENT[name][0](want)
    assert await outcome_of(on_lean, CASES[name]) == want


@pytest.fixture(params=SERVERS)
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return SERVERS[request.param]


async def test_a_request_over_the_limit_is_refused(make: Callable[..., Any]):
    case = Case(ONE, answers, sends=[b"a" * (LIMIT + 1)], begins=False)
    outcome = await outcome_of(make, case)
    assert outcome.code is CODE.RESOURCE_EXHAUSTED
    assert str(LIMIT) in (outcome.details or "")


async def test_stop_without_grace_cancels_all_calls_at_once(make: Callable[..., Any]):
    notes = Notes()
    async with (
        serving(make, MANY, functools.partial(sleeps, notes)) as (server, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        call = channel.unary_stream("/parity.Test/Call")(b"a")
        await notes.until("ready")
        await server.stop(None)
        await notes.until("over")
        assert notes.all == ["ready", "cancelled", "over"]
        assert await call.code() in (CODE.UNAVAILABLE, CODE.CANCELLED)
        assert not await server.wait_for_termination()
        await server.stop(None)


async def test_stop_with_grace_lets_calls_end_and_takes_no_more(make: Callable[..., Any]):
    notes = Notes()

    async def waits(_request: str, context: Any) -> str:
        notes.begin(context)
        notes("ready")
        await notes.until("go on")
        return "x"

    async with (
        serving(make, ONE, waits) as (server, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        method = channel.unary_unary("/parity.Test/Call")
        call = method(b"a")
        await notes.until("ready")
        stopping = asyncio.create_task(server.stop(HANG))
        assert await server.wait_for_termination(0.1)
        assert await method(b"late").code() is CODE.UNAVAILABLE
        notes("go on")
        assert await call == b"x"
        await channel.close()
        await stopping
        assert not await server.wait_for_termination()


async def test_a_shorter_grace_ends_a_longer_one(make: Callable[..., Any]):
    notes = Notes()
    async with (
        serving(make, MANY, functools.partial(sleeps, notes)) as (server, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        channel.unary_stream("/parity.Test/Call")(b"a")
        await notes.until("ready")
        stopping = asyncio.create_task(server.stop(6 * HANG))
        await asyncio.sleep(0.05)
        async with asyncio.timeout(HANG):
            await server.stop(None)
            await stopping
        await notes.until("over")
        assert notes.all == ["ready", "cancelled", "over"]


async def test_a_server_is_started_once(make: Callable[..., Any]):
    server = make()
    port = server.add_insecure_port("127.0.0.1:0")
    with pytest.raises(RuntimeError):
        server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.start()
    await server.stop(None)
    with pytest.raises(grpc.aio.UsageError):
        await server.start()


async def test_interceptors_have_the_type_of_grpc_aio(make: Callable[..., Any]):
    with pytest.raises(ValueError, match="ServerInterceptor"):
        make([object()])


async def test_sync_methods_are_refused_on_the_lean_transport(caplog: pytest.LogCaptureFixture):
    """So is what generated code has for a method that a servicer does not implement.

    grpcio runs them in a pool of threads.
    """

    def sync(_notes: Notes, request: str, _context: Any) -> str:
        return request

    outcome = await outcome_of(on_lean, Case(ONE, sync, begins=False))
    assert (outcome.code, outcome.details) == (CODE.UNIMPLEMENTED, "Method not implemented!")
    assert "/parity.Test/Call" in caplog.text


@pytest.mark.parametrize("ending", ["over", "aborted", "raised", "cancelled", "expired", "unread"])
async def test_an_ended_call_leaves_nothing_to_the_garbage_collector(
    ending: str, monkeypatch: pytest.MonkeyPatch
):
    # A test keeps what was logged, with the error and its frames.
    monkeypatch.setattr(logging.getLogger("stepstate.h2grpc.call"), "disabled", True)
    case = {
        "over": CASES["both ways"],
        "aborted": CASES["a generator that aborts"],
        "raised": CASES["an error"],
        "cancelled": CASES["a client that cancels a writer"],
        "expired": CASES["a deadline that passes in a sleep"],
        "unread": UNREAD,
    }[ending]
    await outcome_of(on_lean, case)  # caches are filled
    gc.collect()
    gc.disable()
    try:
        await outcome_of(on_lean, case)
        async with asyncio.timeout(HANG):
            while any(type(one) in (Call, Http2Stream) for one in gc.get_objects()):
                await asyncio.sleep(0.01)
    finally:
        gc.enable()
