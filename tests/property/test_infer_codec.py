"""Triton's requests that repeat one are recognized, nothing else is, and replies are protobuf's."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from stepstate.transport.triton.infer_codec import MAX_CONTENT_BYTES, InferCodec, id_span
from tests.hypothesis_profiles import examples
from tests.integration.triton import put

NAME, VERSION, X = "lstm", "1", bytes(range(1, 13))
Y = b"12345678"
OUTPUT = pb.ModelInferRequest.InferRequestedOutputTensor(name="y")

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ids = st.text(st.characters(max_codepoint=127), max_size=127)
values = st.booleans() | st.integers(-(2**63), 2**64 - 1) | texts
parameters = st.dictionaries(texts, values, max_size=5)


def rows(width: int) -> st.SearchStrategy[tuple[bytes, ...]]:
    """Two rows as bytes."""
    return st.tuples(*[st.binary(min_size=4 * width, max_size=4 * width)] * 2)


def parts_of(
    names: tuple[str, str], request_id: str, given: dict[str, object], x: bytes
) -> list[bytes]:
    """A request as messages with one field each, in the order of clients."""
    parts = [
        pb.ModelInferRequest(model_name=names[0]),
        pb.ModelInferRequest(model_version=names[1]),
        pb.ModelInferRequest(id=request_id),
    ]
    for name, value in given.items():
        parts.append(pb.ModelInferRequest())
        put(parts[-1], name, value)
    tensor = pb.ModelInferRequest.InferInputTensor(
        name="x", datatype="FP32", shape=[1, len(x) // 4]
    )
    parts.append(pb.ModelInferRequest(inputs=[tensor], outputs=[OUTPUT]))
    parts.append(pb.ModelInferRequest(raw_input_contents=[x]))
    return [part.SerializeToString() for part in parts]


def reply_to(request_id: str, *, final: bool) -> pb.ModelInferResponse:
    """But for y."""
    reply = pb.ModelInferResponse(model_name=NAME, model_version=VERSION, id=request_id)
    reply.outputs.add(name="y", datatype="FP32", shape=[1, 2])
    if final:
        reply.parameters["triton_final_response"].bool_param = True
    return reply


def learned(request: bytes, *, final: bool = True) -> InferCodec | None:
    parsed = pb.ModelInferRequest.FromString(request)
    x = parsed.raw_input_contents[0] if parsed.raw_input_contents else b"none"
    return InferCodec.learn(request, x, reply_to(parsed.id, final=final), len(Y))


def is_recognized(codec: InferCodec, request: bytes) -> bool:
    try:
        start, end = id_span(request)
    except IndexError:
        return False
    return (
        request[:start] == codec.names
        and request[end : -codec.x_bytes] == codec.content
        and request[start:end].isascii()
    )


@examples(200)
@given(
    names=st.tuples(texts, texts),
    given=parameters,
    two=st.tuples(ids, ids),
    two_x=st.integers(1, 40).flatmap(rows),
    final=st.booleans(),
)
@example(names=("", ""), given={}, two=("", "a"), two_x=(X, X), final=False)
@example(names=("a" * 127, "b" * 127), given={}, two=("c" * 127, ""), two_x=(X, X), final=True)
def test_what_repeats_a_request_is_recognized_and_answered_as_by_protobuf(
    names: tuple[str, str],
    given: dict[str, object],
    two: tuple[str, str],
    two_x: tuple[bytes, bytes],
    *,
    final: bool,
) -> None:
    requests = [b"".join(parts_of(names, one, given, x)) for one, x in zip(two, two_x, strict=True)]
    codec = learned(requests[0], final=final)
    assert codec is not None
    for request_id, x, request in zip(two, two_x, requests, strict=True):
        assert is_recognized(codec, request)
        assert request[-codec.x_bytes :] == x
        reply = pb.ModelStreamInferResponse(infer_response=reply_to(request_id, final=final))
        reply.infer_response.raw_output_contents.append(Y)
        start, end = id_span(request)
        assert codec.reply_head(request[start:end]) + Y == reply.SerializeToString()


PARTS = parts_of((NAME, VERSION), "17", {"sequence_id": 5, "sequence_end": False}, X)
ID_PLACE = 2
UNKNOWN = b"\xc2\x3e\x01a"
changes = st.sampled_from(
    [
        b"",
        UNKNOWN,
        *PARTS,
        pb.ModelInferRequest(id="18").SerializeToString(),
        pb.ModelInferRequest(id="é").SerializeToString(),
        b"\x1a\x00",
        b"\x1a\x01\xff",
        b"\x1a\x81\x00a",
        b"\x0a\x84\x00lstm",
        pb.ModelInferRequest(model_name="gru").SerializeToString(),
        pb.ModelInferRequest(raw_input_contents=[X[:4]]).SerializeToString(),
    ]
)
payloads = st.one_of(
    st.lists(st.tuples(st.integers(0, len(PARTS) - 1), changes), max_size=3).map(
        lambda spots: b"".join(
            b"".join(change for at, change in spots if at == place) + part
            for place, part in enumerate(PARTS)
        )
    ),
    st.permutations(PARTS).map(b"".join),
    st.lists(st.sampled_from(PARTS) | changes, min_size=1, max_size=8).map(b"".join),
)


def cut(payload: bytes, at: int, data: bytes) -> bytes:
    place = at % (len(payload) + 1)
    return payload[:place] + data + payload[place + len(data) :]


@examples(600)
@given(first=payloads, second=payloads, at=st.integers(0, 200), data=st.binary(max_size=2))
@example(b"".join(PARTS), b"".join(PARTS), 0, b"")
def test_what_is_recognized_means_the_same_to_protobuf(
    first: bytes, second: bytes, at: int, data: bytes
) -> None:
    """Whatever is learned from."""
    codec = None
    try:
        want = pb.ModelInferRequest.FromString(first)
        codec = learned(first)
    except Exception:  # noqa: BLE001 - no message: nothing is learned from it
        pass
    payload = cut(second, at, data)
    if codec is None or not is_recognized(codec, payload):
        return
    got = pb.ModelInferRequest.FromString(payload)
    start, end = id_span(payload)
    want.id = payload[start + 2 : end].decode()
    want.raw_input_contents[:] = [payload[-codec.x_bytes :]]
    assert got == want


def test_a_request_is_learned_from_and_those_with_other_fields_are_not_recognized() -> None:
    codec = learned(b"".join(PARTS))
    assert codec is not None
    for place in range(len(PARTS) + 1):
        assert not is_recognized(codec, b"".join([*PARTS[:place], UNKNOWN, *PARTS[place:]]))
    for place in range(len(PARTS)):
        if place != ID_PLACE:
            assert not is_recognized(codec, b"".join(PARTS[:place] + PARTS[place + 1 :]))


@pytest.mark.parametrize(
    "request_",
    [
        b"".join([*PARTS, UNKNOWN]),
        b"".join([PARTS[-1], *PARTS[:-1]]),
        b"".join([*PARTS[:-1], PARTS[ID_PLACE], PARTS[-1]]),  # it would repeat the id
        b"".join([*PARTS[:-1], PARTS[-1], PARTS[-1]]),
        b"".join(parts_of((NAME, VERSION), "a" * 128, {}, X)),
        b"".join(parts_of((NAME, VERSION), "1", {"a": "b" * MAX_CONTENT_BYTES}, X)),
        b"".join([*PARTS[:-1], b"\xc2\x3e\x0e" + PARTS[-1]]),  # x in a field of another kind
    ],
)  # fmt: skip
def test_nothing_is_learned_from_a_request_in_another_form(request_: bytes) -> None:
    assert learned(request_) is None
