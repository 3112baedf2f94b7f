from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from stepstate.errors import InvalidField
from stepstate.transport.parts import MAX_REST_BYTES, PART_BYTES, parser
from stepstate.transport.registration import REST_BYTES, parse_stepstate
from stepstate.transport.triton.lengths import VALUES
from stepstate.v1 import stepstate_pb2
from stepstate.v1.stepstate_pb2 import DESCRIPTOR

MANY = MAX_REST_BYTES // PART_BYTES + 1
parse = parser(pb.ModelInferRequest, VALUES)


def request(values: int = 4 * 2**20) -> pb.ModelInferRequest:
    made = pb.ModelInferRequest(model_name="lstm", raw_input_contents=[bytes(values)])
    made.inputs.add(name="x", shape=[1, 3])
    return made


def test_long_values_are_parsed():
    assert parse(request().SerializeToString()) == request()
    typed = request(0)
    typed.inputs[0].contents.fp32_contents.extend([1.0] * 10**6)
    assert parse(typed.SerializeToString()) == typed


@pytest.mark.parametrize("name", ["inputs", "outputs", "raw_input_contents"])
def test_many_empty_parts_are_refused_beside_long_values(name):
    made = request()
    field = getattr(made, name)
    for _ in range(MANY):
        field.append(b"") if name == "raw_input_contents" else field.add()
    with pytest.raises(InvalidField, match=f"^{name}: "):
        parse(made.SerializeToString())


def test_a_long_text_is_refused_with_its_field():
    made = request()
    made.inputs[0].name = "a" * MAX_REST_BYTES
    with pytest.raises(InvalidField, match=r"^inputs\.name: "):
        parse(made.SerializeToString())


def test_values_of_another_kind_are_not_long():
    made = request(0)
    made.inputs[0].contents.int_contents.extend([1] * MAX_REST_BYTES)
    with pytest.raises(InvalidField, match=r"^inputs\.contents\.int_contents: "):
        parse(made.SerializeToString())


@pytest.mark.parametrize("data", [b"\x80" * 2**20, b"\xff" * 2**20, b"\x0b" * 2**20])
def test_what_is_no_message_is_refused_soon(data):
    with pytest.raises((InvalidField, DecodeError)):
        parse(data)


@given(st.binary(max_size=40), st.integers(0, 2**20))
def test_a_damaged_message_is_refused_or_parsed_and_nothing_else(noise, at):
    data = request(2**17).SerializeToString()
    at %= len(data)
    with suppress(InvalidField, DecodeError):
        parse(data[:at] + noise + data[at + len(noise) :])


def empty_parts(field: FieldDescriptor, count: int) -> bytes:
    """A field repeated with nothing in it: 2 bytes each."""
    return bytes((field.number << 3 | 2, 0)) * count


def repeated_parts() -> Iterator[tuple[type[Message], FieldDescriptor]]:
    for method in DESCRIPTOR.services_by_name["StepstateService"].methods:
        for field in method.input_type.fields:
            if field.is_repeated and field.type in (field.TYPE_MESSAGE, field.TYPE_STRING):
                yield GetMessageClass(method.input_type), field


@pytest.mark.parametrize(("request_type", "field"), list(repeated_parts()))
def test_many_empty_parts_of_the_contract_are_refused(request_type, field):
    parse_native = parse_stepstate(request_type)
    assert parse_native(empty_parts(field, 1000)).ByteSize() == 2000
    with pytest.raises(InvalidField, match=f"^{field.name}: "):
        parse_native(empty_parts(field, REST_BYTES))


def test_the_longest_requests_of_the_contract_are_parsed():
    x = stepstate_pb2.StepRequest(session_id="a", x=[0.5] * 4_000_000)
    assert len(parse_stepstate(stepstate_pb2.StepRequest)(x.SerializeToString()).x) == 4_000_000
    ids = stepstate_pb2.ForecastRequest(session_id=["a" * 128] * 10_000)
    ids.scenarios.add(x=[0.5] * 1_000_000)
    again = parse_stepstate(stepstate_pb2.ForecastRequest)(ids.SerializeToString())
    assert len(again.session_id) == 10_000
    rows = stepstate_pb2.StreamPackedRequest(x=bytes(4 * 2**20))
    for handle in range(10_000):
        rows.bindings.add(handle=handle, session_id="s-" + "a" * 32)
    assert parse_stepstate(stepstate_pb2.StreamPackedRequest)(rows.SerializeToString()) == rows
