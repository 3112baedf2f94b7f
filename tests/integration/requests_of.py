"""Every request of the contract and of Triton's protocol, and which of its fields name something.

Rule 1: every RPC has a valid request in `REQUESTS`, and every text, bytes and integer in a request
        is in `FIELDS`. A test fails for those that are not: whoever adds one says what it names.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import grpc
import numpy as np
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from tritonclient.grpc import service_pb2 as triton

from stepstate.transport.triton import TritonService
from stepstate.v1 import stepstate_pb2 as pb
from tests.integration.triton import infer

STEPSTATE = pb.DESCRIPTOR.services_by_name["StepstateService"]
TRITON = triton.DESCRIPTOR.services_by_name["GRPCInferenceService"]
METHODS: Mapping[str, MethodDescriptor] = {
    method.name: method
    for method in (*STEPSTATE.methods, *TRITON.methods)
    if method.containing_service is STEPSTATE or hasattr(TritonService, method.name)
}
"""The RPCs that a server offers, by name."""
ROWS = 2
"""Applied to every session before it is asked for."""
X = (0.5, 0.25, -0.5)
MODEL = "lstm"


@dataclass(frozen=True, slots=True)
class Own:
    """A session of the caller's."""

    id: str
    """A number, so that it can be that of a Triton sequence, too."""
    snapshot: bytes = b""


class Names(enum.Enum):
    """What a field of a request names."""

    SESSION = "session"
    """A session, by its id."""
    SNAPSHOT = "snapshot"
    """A session, by what was exported of it."""
    MODEL = "model"
    NOTHING = "nothing"
    """It is a number, an option, a value, or a name that means something to the client only."""


_MESSAGES = {
    "stepstate.v1": {
        Names.SESSION: (
            "Binding.session_id CloseSessionRequest.session_id ExportSessionRequest.session_id "
            "ForecastRequest.session_id ForkSessionRequest.session_id "
            "ForkSessionRequest.new_session_id GetSessionRequest.session_id "
            "ImportSessionRequest.session_id ListSessionsRequest.page_token "
            "OpenSessionRequest.session_id ResetAccuracyRequest.session_id "
            "RestoreSessionRequest.session_id StepRequest.session_id "
            "StreamExportRequest.session_id StreamImportRequest.session_id"
        ),
        Names.SNAPSHOT: "ImportSessionRequest.snapshot StreamImportRequest.data",
        Names.MODEL: "GetModelRequest.model ListSessionsRequest.model OpenSessionRequest.model",
        Names.NOTHING: (
            "Binding.handle ForecastRequest.horizon GetModelRequest.version "
            "ListModelsRequest.page_size ListModelsRequest.page_token "
            "ListSessionsRequest.page_size ListTenantsRequest.page_size "
            "ListTenantsRequest.page_token OpenSessionRequest.version Scenario.name "
            "StepRequest.advance StepRequest.t StreamImportRequest.size "
            "StreamPackedRequest.handles StreamPackedRequest.id StreamPackedRequest.t "
            "StreamPackedRequest.x"
        ),
    },
    "inference": {
        Names.SESSION: (  # as the parameter `sequence_id`
            "InferParameter.int64_param InferParameter.uint64_param InferParameter.string_param"
        ),
        Names.MODEL: (
            "ModelConfigRequest.name ModelInferRequest.model_name ModelMetadataRequest.name "
            "ModelReadyRequest.name ModelStatisticsRequest.name"
        ),
        Names.NOTHING: (
            "InferTensorContents.bytes_contents InferTensorContents.int64_contents "
            "InferTensorContents.int_contents InferTensorContents.uint64_contents "
            "InferTensorContents.uint_contents ModelConfigRequest.version "
            "ModelInferRequest.InferInputTensor.ParametersEntry.key "
            "ModelInferRequest.InferInputTensor.datatype ModelInferRequest.InferInputTensor.name "
            "ModelInferRequest.InferInputTensor.shape "
            "ModelInferRequest.InferRequestedOutputTensor.ParametersEntry.key "
            "ModelInferRequest.InferRequestedOutputTensor.name "
            "ModelInferRequest.ParametersEntry.key ModelInferRequest.id "
            "ModelInferRequest.model_version ModelInferRequest.raw_input_contents "
            "ModelMetadataRequest.version ModelReadyRequest.version "
            "ModelStatisticsRequest.version RepositoryIndexRequest.repository_name"
        ),
    },
}
FIELDS: Mapping[str, Names] = {
    f"{package}.{field}": names
    for package, classes in _MESSAGES.items()
    for names, fields in classes.items()
    for field in fields.split()
}
"""What every text, bytes and integer in a request names, by its full name."""

Path = tuple[FieldDescriptor, ...]
"""From a request to one of its fields."""


def paths(method: MethodDescriptor) -> Iterator[Path]:
    """The texts, bytes and integers in an RPC's request."""
    yield from _paths(method.input_type, ())


def _paths(message: object, before: Path) -> Iterator[Path]:
    for field in message.fields:  # type: ignore[attr-defined]
        path = (*before, field)
        if field.message_type is None:
            if field.type in _TEXTS or field.cpp_type in _INTEGERS:
                yield path
        elif field.message_type.file.package != "google.protobuf":
            yield from _paths(field.message_type, path)


_TEXTS = {FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES}
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
}


@dataclass(frozen=True, slots=True)
class Case:
    """One field of a request of an RPC, that names something."""

    method: MethodDescriptor
    variant: int
    """Which request in `REQUESTS`."""
    path: Path
    names: Names
    every: bool = True
    """Whether all elements of a repeated field name it, or the last one only."""

    def __str__(self) -> str:
        where = ".".join(field.name for field in self.path)
        return f"{self.method.name}.{self.variant}.{where}{'' if self.every else '.last'}"

    @property
    def needs_own(self) -> bool:
        """Whether the request is about a session of the caller's, too."""
        value = b"1" if self.names is Names.SNAPSHOT else "1"
        return self.request(_OWN, value) != self.request(Own("2", b"2"), value)

    def request(self, own: Own, value: str | bytes) -> Message:
        """The request, of the caller's session `own` but for the field."""
        request = REQUESTS[self.method.name](own)[self.variant]
        _put(request, self.path, value, every=self.every)
        if isinstance(request, pb.StreamImportRequest):
            request.size = len(request.data)
        return request


def cases(*wanted: Names) -> list[Case]:
    """Every field of every RPC that names such a thing.

    Each is in the first request of `REQUESTS`, and in those of the others that have it set.
    """
    found = []
    for method in METHODS.values():
        requests = REQUESTS[method.name](_OWN)
        for path in paths(method):
            names = FIELDS.get(path[-1].full_name)
            if names in wanted:
                found += _cases(method, path, names, requests)
    return found


def _cases(
    method: MethodDescriptor, path: Path, names: Names, requests: Sequence[Message]
) -> Iterator[Case]:
    one = Case(method, 0, path, names)
    yield one
    for variant, request in enumerate(requests):
        other = replace(one, variant=variant)
        if variant and other.request(_OWN, _OWN.id) == request:
            yield other
        last = replace(other, every=False)
        if names is Names.SESSION and last.request(_OWN, "1") != other.request(_OWN, "1"):
            yield last


_OWN = Own("0", b"0")


def _put(message: Message, path: Path, value: str | bytes, *, every: bool) -> None:
    field, rest = path[0], path[1:]
    if not rest:
        _set(message, field, value, every=every)
    elif field.message_type.GetOptions().map_entry:
        if rest[0].name == "value":
            _put(getattr(message, field.name)["sequence_id"], rest[1:], value, every=every)
    elif field.is_repeated:
        elements = getattr(message, field.name)
        if not elements:
            elements.add()
        for element in elements if every else elements[-1:]:
            _put(element, rest, value, every=every)
    else:
        _put(getattr(message, field.name), rest, value, every=every)


def _set(message: Message, field: FieldDescriptor, value: str | bytes, *, every: bool) -> None:
    made = int(value) if field.cpp_type in _INTEGERS else value
    if not field.is_repeated:
        setattr(message, field.name, made)
        return
    before = getattr(message, field.name)
    after = [made] * len(before) if every else [*before[:-1], made]
    del before[:]
    before.extend(after)


def _step(own: Own) -> list[Message]:
    return [
        pb.StepRequest(session_id=own.id, x=X, t=ROWS),  # the next row, as its owner would send it
        pb.StepRequest(session_id=own.id, x=X),
        pb.StepRequest(session_id=own.id, x=X, t=0),  # a retry of its first
        pb.StepRequest(session_id=own.id, x=X * 3, t=ROWS, last_only=True),
        pb.StepRequest(session_id=own.id, advance=2, last_only=True),
    ]


def _packed(own: Own) -> list[Message]:
    handles = np.array([0, 1], "<u4").tobytes()
    bound = [pb.Binding(handle=handle, session_id=own.id) for handle in (0, 1)]
    x = np.array([X, X], "<f4").tobytes()
    counted = np.array([ROWS, ROWS + 1], "<u8").tobytes()
    return [
        pb.StreamPackedRequest(id=1, bindings=bound, handles=handles, x=x),
        pb.StreamPackedRequest(id=1, bindings=bound, handles=handles, x=x, t=counted),
    ]


def _infer(own: Own) -> list[Message]:
    x = np.array([X], "<f4")
    plain = {"model": MODEL, "sequence_id": int(own.id), "x": x, "request_id": "r"}
    return [
        infer(**plain),
        infer(**plain, sequence_end=True),
        infer(**plain, step_t=ROWS, sequence_end=True),
        infer(**plain, sequence_start=True),
        infer(**plain, sequence_start=True, sequence_end=True, step_t=0),
    ]


REQUESTS: Mapping[str, Callable[[Own], Sequence[Message]]] = {
    "OpenSession": lambda own: [
        pb.OpenSessionRequest(session_id=own.id, model=MODEL),
        pb.OpenSessionRequest(session_id=own.id, model=MODEL, version="1"),
    ],
    "GetSession": lambda own: [pb.GetSessionRequest(session_id=own.id)],
    "ListSessions": lambda own: [
        pb.ListSessionsRequest(),
        pb.ListSessionsRequest(show_expired=True, model=MODEL, page_size=1),
    ],
    "RestoreSession": lambda own: [pb.RestoreSessionRequest(session_id=own.id)],
    "CloseSession": lambda own: [pb.CloseSessionRequest(session_id=own.id)],
    "ResetAccuracy": lambda own: [pb.ResetAccuracyRequest(session_id=own.id)],
    "ForkSession": lambda own: [
        pb.ForkSessionRequest(session_id=own.id, new_session_id=f"{own.id}1")
    ],
    "ExportSession": lambda own: [pb.ExportSessionRequest(session_id=own.id)],
    "ImportSession": lambda own: [pb.ImportSessionRequest(snapshot=own.snapshot)],
    "StreamExport": lambda own: [pb.StreamExportRequest(session_id=own.id)],
    "StreamImport": lambda own: [pb.StreamImportRequest(data=own.snapshot, size=len(own.snapshot))],
    "Step": _step,
    "StreamSteps": _step,
    "StreamPacked": _packed,
    "Forecast": lambda own: [
        pb.ForecastRequest(session_id=[own.id]),
        pb.ForecastRequest(
            session_id=[own.id, own.id], horizon=1, scenarios=[pb.Scenario(name="s")]
        ),
    ],
    "ListModels": lambda own: [pb.ListModelsRequest()],
    "ListTenants": lambda own: [pb.ListTenantsRequest()],
    "GetModel": lambda own: [
        pb.GetModelRequest(model=MODEL),
        pb.GetModelRequest(model=MODEL, version="1"),
    ],
    "ServerLive": lambda own: [triton.ServerLiveRequest()],
    "ServerReady": lambda own: [triton.ServerReadyRequest()],
    "ServerMetadata": lambda own: [triton.ServerMetadataRequest()],
    "ModelReady": lambda own: [triton.ModelReadyRequest(name=MODEL)],
    "ModelMetadata": lambda own: [triton.ModelMetadataRequest(name=MODEL)],
    "ModelConfig": lambda own: [triton.ModelConfigRequest(name=MODEL, version="1")],
    "ModelStatistics": lambda own: [triton.ModelStatisticsRequest(name=MODEL)],
    "RepositoryIndex": lambda own: [triton.RepositoryIndexRequest()],
    "ModelInfer": _infer,
    "ModelStreamInfer": _infer,
}
"""By RPC, valid requests about a session of the caller's."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that a caller is told."""

    code: grpc.StatusCode
    message: str
    details: bytes
    replies: tuple[bytes, ...]


async def call(
    channel: grpc.aio.Channel,
    method: MethodDescriptor,
    request: Message | None,
    metadata: Sequence[tuple[str, str]],
) -> Outcome:
    """Makes a call with one request. Times and epochs in its replies are left out.

    None: a stream that sends nothing, for one that is refused when it begins: where a write meets
    the end of a call, grpcio's client loses the status.
    """
    path = f"/{method.containing_service.full_name}/{method.name}"
    kind = f"{'stream' if method.client_streaming else 'unary'}_" + (
        "stream" if method.server_streaming else "unary"
    )
    begin = getattr(channel, kind)(path, lambda made: made.SerializeToString(), None)
    sent: object = request
    if method.client_streaming:
        sent = _nothing() if request is None else iter([request])
    under_way = begin(sent, metadata=metadata)
    replies = []
    try:
        if method.server_streaming:
            replies = [data async for data in under_way]
        else:
            replies = [await under_way]
    except grpc.aio.AioRpcError:
        pass
    trailing = dict(await under_way.trailing_metadata() or ())
    return Outcome(
        await under_way.code(),
        await under_way.details(),
        bytes(trailing.get("grpc-status-details-bin", b"")),
        tuple(without_times(method, data) for data in replies),
    )


async def _nothing() -> AsyncIterator[Message]:
    await asyncio.Event().wait()
    yield pb.StepRequest()


def without_times(method: MethodDescriptor, data: bytes) -> bytes:
    """A reply but for what differs from call to call and from server to server."""
    reply = GetMessageClass(method.output_type).FromString(data)
    _clear(reply)
    return bytes(reply.SerializeToString(deterministic=True))


def _clear(message: Message) -> None:
    for field, value in message.ListFields():
        if field.full_name in _OF_THE_MOMENT:
            message.ClearField(field.name)
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for one in value if field.is_repeated else [value]:
                _clear(one)


_OF_THE_MOMENT = {
    f"stepstate.v1.Session.{name}"
    for name in ("open_time", "expire_time", "purge_time", "epoch", "owner")
} | {"stepstate.v1.StreamExportResponse.data", "stepstate.v1.ExportSessionResponse.snapshot"}
