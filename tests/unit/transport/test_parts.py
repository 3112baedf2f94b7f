from __future__ import annotations

from contextlib import suppress

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from stepstate.errors import InvalidField
from stepstate.transport.parts import MAX_REST_BYTES, PART_BYTES, parser
from stepstate.transport.triton.lengths import VALUES

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
