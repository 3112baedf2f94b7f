"""Every text, list and run of bytes that a request can carry has a bound."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.timestamp_pb2 import Timestamp

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.attacks.processes import Memory
from tests.chaos.restartable import restartable_server
from tests.conftest import ELECTRICITY
from tests.integration.wire import HANG, draw, opened, raw_stub, request

SERVICE = pb.DESCRIPTOR.services_by_name["StepstateService"]
MIB = 2**20
ITEMS = 2**18
"""Of a repeated field: a megabyte of floats."""
KEPT = 20 * MIB
"""What allocators may keep after all these requests."""

FieldPath = tuple[FieldDescriptor, ...]

INVALID, UNKNOWN, CORRUPT = "INVALID_ARGUMENT", "NOT_FOUND", "DATA_LOSS"
ANSWERS = {
    "OpenSession": {"session_id": INVALID, "model": UNKNOWN, "version": UNKNOWN},
    "GetSession": {"session_id": INVALID},
    "ListSessions": {"page_token": INVALID, "model": INVALID},
    "RestoreSession": {"session_id": INVALID},
    "CloseSession": {"session_id": INVALID},
    "Step": {"session_id": INVALID, "x": INVALID},
    "StreamSteps": {"session_id": INVALID, "x": INVALID},
    "StreamPacked": {
        "bindings": INVALID,
        "bindings.session_id": INVALID,
        "handles": INVALID,
        "t": INVALID,
        "x": INVALID,
    },
    "ForkSession": {"session_id": INVALID, "new_session_id": INVALID},
    "ExportSession": {"session_id": INVALID},
    "ImportSession": {"snapshot": CORRUPT, "session_id": INVALID},
    "StreamExport": {"session_id": INVALID},
    "StreamImport": {"data": INVALID, "session_id": INVALID},
    "Forecast": {
        "session_id": INVALID,
        "quantiles": INVALID,
        "scenarios": INVALID,
        "scenarios.name": INVALID,
        "scenarios.x": INVALID,
    },
    "ResetAccuracy": {"session_id": INVALID},
    "ListModels": {"page_token": INVALID},
    "GetModel": {"model": UNKNOWN, "version": UNKNOWN},
    "ListTenants": {"page_token": INVALID},
}
"""To a request with one field that is far too long, all else being right."""


async def test_what_is_too_long_is_refused_and_not_kept(tmp_path: Path):
    """A new field of the contract needs a bound, and a line above."""
    options = [("grpc.max_send_message_length", 64 * MIB)]
    store = f"sqlite:{tmp_path / 'sessions.db'}"
    async with (
        restartable_server(tmp_path, "--models", str(ELECTRICITY), "--store", store) as server,
        grpc.aio.insecure_channel(server.address, options=options) as channel,
        raw_stub(server.address) as stub,
    ):
        memory = Memory(server.process.pid)
        good = await _good_requests(stub)
        answers = await _answers(channel, good)
        for method in SERVICE.methods:
            assert answers[method.name] == ANSWERS[method.name], method.name
        before = memory.now()  # allocators have grown by now
        await _answers(channel, good)
        async with asyncio.timeout(HANG):
            while memory.now() > before + KEPT:
                await asyncio.sleep(0.1)
        for method in SERVICE.methods:
            answer = await _answer(channel, method, good[method.name])
            # Only an expired session can be restored, and this one is open.
            assert answer in {"OK", "ALREADY_EXISTS"}, method.name


async def _good_requests(stub: StepstateServiceStub) -> dict[str, Message]:
    """A request of each method that would be served."""
    start_time = Timestamp(seconds=967_420_800)
    for name in ("a", "closed"):
        await opened(stub, name, "electricity", start_time=start_time)
    row = draw(1, 1)
    await stub.Step(request("a", None, row))
    data = (await stub.ExportSession(pb.ExportSessionRequest(session_id="a"))).snapshot
    packed = pb.StreamPackedRequest(handles=bytes(4), x=row.tobytes())
    packed.bindings.add(session_id="a")
    forecast = pb.ForecastRequest(session_id=["a"], horizon=2)
    forecast.scenarios.add(name="one", x=row.ravel())
    special = {
        "OpenSession": pb.OpenSessionRequest(model="electricity", start_time=start_time),
        "CloseSession": pb.CloseSessionRequest(session_id="closed"),
        "ListSessions": pb.ListSessionsRequest(),
        "ListModels": pb.ListModelsRequest(),
        "GetModel": pb.GetModelRequest(model="electricity"),
        "ListTenants": pb.ListTenantsRequest(),
        "Step": request("a", None, row),
        "StreamSteps": request("a", None, row),
        "StreamPacked": packed,
        "ImportSession": pb.ImportSessionRequest(snapshot=data, session_id="b"),
        "StreamImport": pb.StreamImportRequest(data=data, size=len(data), session_id="b"),
        "Forecast": forecast,
    }
    return {
        method.name: special.get(method.name) or _class(method.input_type)(session_id="a")
        for method in SERVICE.methods
    }


async def _answers(
    channel: grpc.aio.Channel, good: dict[str, Message]
) -> dict[str, dict[str, str]]:
    """The code that each field gets when it is far too long, by method."""
    return {
        method.name: {
            ".".join(field.name for field in path): await _answer(
                channel, method, _lengthened(good[method.name], path)
            )
            for path in _long_fields(method.input_type)
        }
        for method in SERVICE.methods
    }


def _long_fields(message: Descriptor, before: FieldPath = ()) -> Iterator[FieldPath]:
    """The fields of a message, and of those inside it, that can be of any length."""
    for field in message.fields:
        path = (*before, field)
        if field.is_repeated or field.type in (field.TYPE_STRING, field.TYPE_BYTES):
            yield path
        if field.message_type is not None:
            yield from _long_fields(field.message_type, path)


def _lengthened(message: Message, path: FieldPath) -> Message:
    """A copy of a message with at least a megabyte in one field."""
    copied = _class(message.DESCRIPTOR)()
    copied.CopyFrom(message)
    *outer, field = path
    place: Message = copied
    for one in outer:
        inner = getattr(place, one.name)
        place = inner[0] if one.is_repeated else inner
    many = {
        field.TYPE_STRING: "x" * MIB,
        field.TYPE_BYTES: b"x" * MIB,
    }
    if not field.is_repeated:
        setattr(place, field.name, many[field.type])
    elif field.message_type is not None:
        getattr(place, field.name).extend([_class(field.message_type)()] * ITEMS)
    else:
        value = "x" if field.type == field.TYPE_STRING else 0.5
        getattr(place, field.name).extend([value] * ITEMS)
    return copied


async def _answer(channel: grpc.aio.Channel, method: MethodDescriptor, message: Message) -> str:
    """The code of a call with one request, or in its reply."""
    kinds = ("unary", "stream")
    kind = f"{kinds[method.client_streaming]}_{kinds[method.server_streaming]}"
    make: Callable[..., object] = getattr(channel, kind)
    call = make(
        f"/{SERVICE.full_name}/{method.name}",
        request_serializer=_class(method.input_type).SerializeToString,
        response_deserializer=_class(method.output_type).FromString,
    )(iter([message]) if method.client_streaming else message)
    try:
        reply = await (call.read() if method.server_streaming else call)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    error = getattr(reply, "error", None)  # of a message on a stream
    if rows := getattr(reply, "errors", None):
        error = rows[0].status
    number = error.code if error else 0
    return next(code.name for code in grpc.StatusCode if code.value[0] == number)


def _class(descriptor: Descriptor) -> type[Message]:
    return GetMessageClass(descriptor)
