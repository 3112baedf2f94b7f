"""The bytes of ModelStreamInfer requests that repeat the one before, without protobuf.

The requests of a sequence differ in their id and in the values of x, and so do their replies:

    request   names  id  content, the same for all                        x
    reply     names  id  parameters and outputs, the same for all, too    y

    names    model_name, model_version, if they are not empty
    content  parameters (the sequence is one of them), inputs, outputs, and what precedes x
    x, y     the one item of raw_input_contents, raw_output_contents, without tag and length

Once protobuf has parsed one of them, another one with the same names and the same content means the
same, with the id and the x that it has. To compare them costs a fraction of parsing a message.

Rule 1: a request that is recognized means to protobuf what it means here. Two messages one after
        the other are one message, with the fields of both; so what is learned from is cut into
        parts that are messages, and the content must have neither an id nor an x of its own.
Rule 2: a reply has the bytes that protobuf serializes. Whatever else a reply may hold (an error,
        imputed rows, step_t) makes it one for protobuf.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from contextlib import suppress

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from stepstate.transport.row_codec import varint
from stepstate.v1.floats import packed_header

_STRING = 2  # the wire type: its length comes first
_NAME = pb.ModelInferRequest.MODEL_NAME_FIELD_NUMBER << 3 | _STRING
_VERSION = pb.ModelInferRequest.MODEL_VERSION_FIELD_NUMBER << 3 | _STRING
_ID = pb.ModelInferRequest.ID_FIELD_NUMBER << 3 | _STRING  # of a reply too
_X = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
_Y = pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER
_REPLY = bytes((pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER << 3 | _STRING,))
_ONE_BYTE = 128
"""A length below it is one byte."""
MAX_CONTENT_BYTES = 512
"""Clients send some 150; what is kept of a sequence is bounded by it."""


def id_span(request: bytes) -> tuple[int, int]:
    """Where the id of a request begins, with its tag, and where it ends.

    Raises:
        IndexError: it is too short to be one.
    """
    start = end = 0
    for tag in (_NAME, _VERSION, _ID):
        start = end
        if request[end] == tag and 0 < request[end + 1] < _ONE_BYTE:
            end += 2 + request[end + 1]
    return start, end


class InferCodec:
    """The one-row requests of a sequence, and the replies to them.

        start, end = id_span(request)
        if request[:start] == codec.names and request[end : -codec.x_bytes] == codec.content:
            x, reply = request[-codec.x_bytes :], codec.reply_head(request[start:end]) + y

    The id has to be ASCII: protobuf refuses what is not UTF-8.

    Args:
        names: as above.
        content: as above.
        x_bytes: of x.
        reply: to one of the requests, but for y.
        y_bytes: of y.
    """

    __slots__ = ("_after_id", "_names", "_reply_bytes", "content", "names", "x_bytes")

    def __init__(
        self, names: bytes, content: bytes, x_bytes: int, reply: pb.ModelInferResponse, y_bytes: int
    ) -> None:
        self.names = names
        self.content = content
        self.x_bytes = x_bytes
        before_id = pb.ModelInferResponse(
            model_name=reply.model_name, model_version=reply.model_version
        )
        after_id = pb.ModelInferResponse(parameters=reply.parameters, outputs=reply.outputs)
        self._names = before_id.SerializeToString()
        self._after_id = after_id.SerializeToString() + packed_header(_Y, y_bytes)
        self._reply_bytes = len(self._names) + len(self._after_id) + y_bytes

    @classmethod
    def learn(
        cls, request: bytes, x: bytes, reply: pb.ModelInferResponse, y_bytes: int
    ) -> InferCodec | None:
        """The codec of the requests that repeat one; None: they would not be recognized.

        Args:
            request: as it came; protobuf has parsed it.
            x: of it, the one item of raw_input_contents.
            reply: to it, but for y.
            y_bytes: of y.
        """
        header = packed_header(_X, len(x))
        start, end = id_span(request)
        content = request[end : -len(x)]
        if len(content) > MAX_CONTENT_BYTES or not request.endswith(header + x):
            return None
        with suppress(DecodeError):
            rest = content.removesuffix(header)
            own = pb.ModelInferRequest.FromString(rest)
            same_id = request[start + 2 : end] == reply.id.encode()
            # An empty id in the content would be the last one, and would show in the size alone.
            has_no_id = not own.id and own.ByteSize() == len(rest)
            if same_id and has_no_id and not own.raw_input_contents:
                return cls(request[:start], content, len(x), reply, y_bytes)
        return None

    def reply_head(self, request_id: bytes) -> bytes:
        """All of a reply before y.

        Args:
            request_id: the field of the request that holds it, which a reply has too.
        """
        size = varint(self._reply_bytes + len(request_id))
        return b"".join((_REPLY, size, self._names, request_id, self._after_id))
