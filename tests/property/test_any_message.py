"""Whatever well-formed messages say, no call of either API ends as an internal error.

Every field takes values at the ends of its type, of every kind, and such as are right elsewhere.
Two sessions are there for the calls that need one, and all can be listed after each example.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as triton_pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.hypothesis_profiles import examples
from tests.integration.triton import infer
from tests.processes import server_process

NATIVE = pb.DESCRIPTOR.services_by_name["StepstateService"].methods
OPEN = next(method for method in NATIVE if method.name == "OpenSession")
TRITON = [
    method
    for method in triton_pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
    if method.name.startswith("Model")
]
SURPRISES = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED}
DEADLINE = 20.0
WHOLE = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
names = st.sampled_from(["a", "b", "c", "lstm", "1", "x", "y", "FP32", "hold", "", "a" * 300])
times = st.sampled_from(
    ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-01-01", "noon"]
)
PARAMETERS = ("sequence_id", "sequence_start", "sequence_end", "step_t", "start_time", "missing")


def scalars(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """Values of a field that holds no message."""
    if field.cpp_type in WHOLE:
        least, most = WHOLE[field.cpp_type]
        ends = [least, least + 1, most, most - 1, most // 2, 0, 1, 2]
        return st.sampled_from(ends) | st.integers(least, most)
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return st.floats(width=32)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return st.integers(0, 4) | st.just(99)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.integers(0, 6).map(lambda count: bytes(4 * count)) | st.binary(max_size=24)
    return names | times | st.text(max_size=5)


def values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    kind = field.message_type
    if kind is None:
        one = scalars(field)
    elif kind.GetOptions().map_entry:
        found = values(kind.fields_by_name["value"])
        return st.dictionaries(st.sampled_from(PARAMETERS), found, max_size=4)
    else:
        one = messages(kind)
    return st.lists(one, max_size=3) if field.is_repeated else one


def messages(kind: Descriptor) -> st.SearchStrategy[Message]:
    """Any message of a type."""
    fields = {field.name: st.deferred(lambda field=field: values(field)) for field in kind.fields}
    make = GetMessageClass(kind)
    return st.fixed_dictionaries({}, optional=fields).map(lambda given: make(**given))


def with_a_row(message: Message) -> Message:
    """A request for steps whose row fits, so that what else it says is looked at."""
    row = np.ones(3, "<f4")
    if isinstance(message, pb.StepRequest):
        message.x[:] = row
        message.session_id, message.advance = "a", 0
    elif isinstance(message, pb.StreamPackedRequest):
        del message.bindings[:]
        message.bindings.add(handle=1, session_id="b")
        message.handles, message.x = np.uint32(1).tobytes(), row.tobytes()
    return message


def of(method: MethodDescriptor) -> st.SearchStrategy[tuple[MethodDescriptor, list[Message]]]:
    """Calls of a method."""
    anything = messages(method.input_type)
    fitting = anything.map(with_a_row)
    if method.input_type is triton_pb.ModelInferRequest.DESCRIPTOR:
        fitting = st.builds(
            lambda **parameters: infer("lstm", "c", np.ones(3, "<f4"), **parameters),
            start_time=times,
            sequence_start=st.booleans(),
            sequence_end=st.booleans(),
        )
    sent = st.lists(anything | fitting, min_size=1, max_size=3)
    return st.tuples(st.just(method), sent)


STEPS = [method for method in [*NATIVE, *TRITON] if "Step" in method.name or "Infer" in method.name]
calls = st.sampled_from([*NATIVE, *TRITON, *STEPS, *STEPS]).flatmap(of)


@pytest.fixture(scope="module")
def channel(model_root: Path) -> Iterator[grpc.Channel]:
    options = ("--models", str(model_root), "--store", "memory:", "--max-sessions", "1000")
    with (
        server_process(*options, "--log-level", "ERROR") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        yield channel


def outcome(
    channel: grpc.Channel, method: MethodDescriptor, sent: list[Message]
) -> grpc.StatusCode:
    """What a call comes to: a code, or that of an error within a stream."""
    native = method in NATIVE
    stub = StepstateServiceStub(channel) if native else GRPCInferenceServiceStub(channel)
    request = iter(sent) if method.client_streaming else sent[0]
    try:
        replies = getattr(stub, method.name)(request, timeout=DEADLINE)
        text = "".join(map(str, replies)) if method.server_streaming else ""
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.INTERNAL if "internal error" in text else grpc.StatusCode.OK


@examples(200)
@given(calls)
def test_no_message_is_an_internal_error(channel, call):
    method, sent = call
    stub = StepstateServiceStub(channel)
    for name in ("a", "b"):
        request = pb.OpenSessionRequest(session_id=name, model="lstm", missing=2)
        outcome(channel, OPEN, [request])
    assert outcome(channel, method, sent) not in SURPRISES
    listed = stub.ListSessions(pb.ListSessionsRequest(page_size=1000), timeout=DEADLINE)
    assert {session.status for session in listed.sessions} <= {pb.SESSION_STATUS_OPEN}
