"""Targets: what comes in calls. Requests of every RPC, packed columns, Triton's requests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from tritonclient.grpc import service_pb2 as triton_pb

from stepstate.errors import StepstateError
from stepstate.models import load_catalog
from stepstate.transport import convert, parse_stepstate
from stepstate.transport.packed_request import HandleTable, PackedRequest
from stepstate.transport.status import status_of
from stepstate.transport.triton.call import InferCall, RequestHead
from stepstate.transport.triton.service import SERVICE as TRITON
from stepstate.transport.triton.service import _parser as parse_triton
from stepstate.v1 import stepstate_pb2 as pb
from tests.fuzz.target import Target

NATIVE = pb.DESCRIPTOR.services_by_name["StepstateService"]
MODEL = next(iter(load_catalog(Path(__file__).parents[2] / "models")))
MAX_GROWTH = 2**20
"""Bytes for a table of handles; the server reserves them before it binds."""
DECODERS: dict[str, Callable[..., object]] = {
    "OpenSession": partial(convert.decode_opening, tenant="acme"),
    "ForkSession": partial(convert.decode_fork, tenant="acme"),
    "ImportSession": partial(convert.decode_import, tenant="acme"),
    "StreamImport": partial(convert.decode_import, tenant="acme"),
    "Forecast": convert.decode_forecast,
}
"""By method, what looks at its request before the sessions do."""


def methods() -> list[tuple[MethodDescriptor, Callable[[bytes], Message]]]:
    """All RPCs of both APIs, with the parser of their requests."""
    found = [(one, parse_stepstate(GetMessageClass(one.input_type))) for one in NATIVE.methods]
    found += [(one, parse_triton(GetMessageClass(one.input_type))) for one in TRITON.methods]
    return found


METHODS = methods()


def refused(error: StepstateError) -> None:
    """An error has to fit a status."""
    assert len(status_of(error).SerializeToString()) < 8192


def run_message(data: bytes) -> None:
    """A request of any RPC: the first byte says of which."""
    method, parse = METHODS[data[0] % len(METHODS)] if data else METHODS[0]
    try:
        message = parse(data[1:])
        DECODERS.get(method.name, str)(message)
    except StepstateError as error:
        refused(error)
    except DecodeError:
        pass


def run_packed(data: bytes) -> None:
    """A packed message on a stream that has bound some handles."""
    table = HandleTable()
    with suppress(DecodeError):
        request = pb.StreamPackedRequest.FromString(data)
        try:
            table.bind([pb.Binding(handle=one, session_id=str(one)) for one in range(4)])
            meaning = None
            if request.bindings and table.growth(request.bindings) < MAX_GROWTH:
                meaning = table.bind(request.bindings)
            packed = PackedRequest.read(request, table)
            assert len(packed) == len(request.handles) // 4
            packed.response().SerializeToString()
            if meaning is not None:
                table.put_back(meaning)
        except StepstateError as error:
            refused(error)


def run_infer(data: bytes) -> None:
    """A request of Triton's."""
    with suppress(DecodeError):
        try:
            request = parse_triton(triton_pb.ModelInferRequest)(data)
            call = InferCall.of(request, RequestHead.of(request), "acme")
            _ = call.plain, call.held_bytes
            call.opening(MODEL, 1.8e9)
            call.read(MODEL.manifest)
            call.digest(MODEL.manifest)
        except StepstateError as error:
            refused(error)


def message_seeds() -> tuple[bytes, ...]:
    opening = pb.OpenSessionRequest(session_id="a", model="electricity", interval_level=0.9)
    opening.idle_timeout.FromSeconds(60)
    opening.start_time.FromJsonString("2026-01-01T00:00:00Z")
    forecast = pb.ForecastRequest(session_id=["a", "b"], horizon=3, quantiles=[0.1, 0.9])
    forecast.scenarios.add(name="s", x=[1.0, 2.0])
    fork = pb.ForkSessionRequest(session_id="a", new_session_id="b", durability=2)
    listing = pb.ListSessionsRequest(page_size=3, page_token="~4142", model="electricity")
    steps = pb.StepRequest(session_id="a", t=3, x=[1.0, 2.0], advance=1)
    sent = {
        "OpenSession": opening,
        "Forecast": forecast,
        "ForkSession": fork,
        "ListSessions": listing,
        "Step": steps,
        "ImportSession": pb.ImportSessionRequest(snapshot=bytes(40), session_id="b"),
    }
    places = {method.name: place for place, (method, _) in enumerate(METHODS)}
    seeds = [bytes([places[name]]) + one.SerializeToString() for name, one in sent.items()]
    return (*seeds, *(bytes([place]) for place in range(len(METHODS))))


def packed_seeds() -> tuple[bytes, ...]:
    columns = {
        "handles": np.arange(3, dtype="<u4").tobytes(),
        "t": np.arange(3, dtype="<u8").tobytes(),
        "x": np.ones(6, "<f4").tobytes(),
    }
    bound = pb.StreamPackedRequest(bindings=[pb.Binding(handle=9, session_id="a")])
    whole = pb.StreamPackedRequest(id=1, **columns)
    return bound.SerializeToString(), whole.SerializeToString()


def infer_seeds() -> tuple[bytes, ...]:
    request = triton_pb.ModelInferRequest(model_name="electricity", id="1")
    request.inputs.add(name="x", datatype="FP32", shape=[1, MODEL.manifest.input_width])
    request.raw_input_contents.append(bytes(4 * MODEL.manifest.input_width))
    request.parameters["sequence_id"].int64_param = 7
    request.parameters["sequence_start"].bool_param = True
    request.parameters["start_time"].string_param = "2026-01-01T00:00:00Z"
    raw = request.SerializeToString()
    del request.raw_input_contents[:]
    request.inputs[0].contents.fp32_contents.extend([0.0] * MODEL.manifest.input_width)
    return raw, request.SerializeToString()


TARGETS = {
    "messages": Target(run_message, message_seeds()),
    "packed": Target(run_packed, packed_seeds()),
    "triton": Target(run_infer, infer_seeds()),
}
