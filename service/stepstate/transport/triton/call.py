"""One ModelInfer request: its sequence, what it asks for, and its reply.

A request keeps what it needs of its message, and not the message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from stepstate.errors import InvalidField, without_frames
from stepstate.identity import SessionKey, session_key
from stepstate.models import EPOCH, Manifest, Model
from stepstate.sessions import OpenOptions, ReplyTo, ResidentSession, Step, check_id
from stepstate.stores import MissingPolicy, SessionRecord
from stepstate.transport.bidi import STEP_BYTES
from stepstate.transport.convert import REPLY_BYTES
from stepstate.transport.interceptor import SENT
from stepstate.transport.steps import make_step, non_finite
from stepstate.transport.triton.lengths import MAX_TEXT_BYTES, check_lengths
from stepstate.transport.triton.tensors import (
    FP32,
    ONLY_Y,
    InputRows,
    InputTensor,
    Shapes,
    decode_rows,
    outputs_of,
    read_tensor,
    reply_width,
    traced,
    wanted,
    y_shapes,
)

FINAL = "triton_final_response"
ASKS_FOR_FINAL = "triton_enable_empty_final_response"
_UNSIGNED = 2**64
_KINDS_OF_ID = ("int64_param", "uint64_param", "string_param")
_FEW_OUTPUTS = 16
_NAME_BYTES = MAX_TEXT_BYTES + 64
"""Of the name of an output, with what Python takes for a text; short ones take 60."""

Parameters = Mapping[str, "pb.InferParameter"]


@dataclass(slots=True, eq=False)
class RequestHead:
    """What a reply repeats of its request, an error too."""

    request_id: str
    model: str
    version: str
    final: bool
    """The reply has to say that it is the last one of the request: all are."""

    @classmethod
    def of(cls, request: pb.ModelInferRequest) -> RequestHead:
        """The head of a request, which may be refused: too long texts are cut."""
        parameters, most = request.parameters, MAX_TEXT_BYTES
        return cls(
            request.id[:most],
            request.model_name[:most],
            request.model_version[:most],
            ASKS_FOR_FINAL in parameters and parameters[ASKS_FOR_FINAL].bool_param,
        )


@dataclass(slots=True, eq=False)
class InferBody:
    """What a request asks for."""

    tensor: InputTensor
    outputs: Sequence[str]
    """The names of the outputs wanted."""
    start_time: str | None = None
    """The parameters start_time and missing of a start."""
    missing: str | None = None


@dataclass(slots=True, eq=False)
class InferCall:
    """A request; its tensor becomes rows once its model is known."""

    head: RequestHead
    session_id: str
    """The sequence id as text."""
    start: bool
    end: bool
    t: int | None
    """The parameter step_t."""
    tenant: str
    """Whose sequence it is."""
    _body: InferBody | InvalidField
    """Or why it is refused, which is said in its turn."""
    rows: InputRows | None = field(init=False, default=None)
    """x, once it is read for a model."""
    _inspect: bool = field(init=False, default=False)
    _read_for: Manifest | None = field(init=False, default=None)

    @classmethod
    def of(cls, request: pb.ModelInferRequest, head: RequestHead, tenant: str) -> InferCall:
        """Reads a request of a tenant.

        Raises:
            InvalidField: a field is too long, there is no sequence id, or a parameter is of another
                type.
        """
        parameters = request.parameters  # each access to a field of a message makes an object
        session_id = _sequence_id(request, parameters)
        start = _flag(parameters, "sequence_start")
        end = _flag(parameters, "sequence_end")
        t = _count(parameters, "step_t") if "step_t" in parameters else None
        if start and t:
            raise InvalidField("step_t", f"is {t}, but a sequence starts at 0")
        _flag(parameters, ASKS_FOR_FINAL)
        call = cls(head, session_id, start, end, t, tenant, _read(request, start=start))
        if request.ByteSize() - call._value_bytes > MAX_TEXT_BYTES:  # else no field can be longer
            check_lengths(request)
        return call

    @property
    def key(self) -> SessionKey:
        """Of its session."""
        return session_key(self.tenant, self.session_id)

    @property
    def body(self) -> InferBody:
        """What it asks for.

        Raises:
            InvalidField: nothing that could be served.
        """
        if isinstance(self._body, InvalidField):
            raise replace(self._body)  # a copy: a traceback would lead back here
        return self._body

    @property
    def outputs(self) -> Sequence[str]:
        """The names of the outputs wanted; see `body`."""
        return self.body.outputs

    @property
    def held_bytes(self) -> int:
        """About what it takes while it waits."""
        return STEP_BYTES + self._value_bytes + self._names_bytes

    @property
    def _names_bytes(self) -> int:
        return _NAME_BYTES * len(self._body.outputs) if isinstance(self._body, InferBody) else 0

    @property
    def _value_bytes(self) -> int:
        return len(self._body.tensor.data) if isinstance(self._body, InferBody) else 0

    @property
    def plain(self) -> bool:
        """Whether it neither starts nor ends its sequence."""
        return not self.start and not self.end

    def check(self, session: ResidentSession) -> None:
        """Refuses a session that is of another model.

        Raises:
            InvalidField: a sequence id is the id of a session, and those of all models are one set.
        """
        record, head = session.record, self.head
        if record.model == head.model and head.version in ("", record.version):
            return
        if not head.model:  # the client leaves the model to the server
            return
        raise InvalidField(
            "sequence_id",
            f"{self.session_id!r} is the id of a session of model {record.model}/{record.version}, "
            f"not of {head.model[:64]}/{head.version[:64] or '-'}: ids are those of sessions, for "
            "all models together; choose another",
        )

    def read(self, manifest: Manifest) -> InputRows:
        """Reads x and the names of the outputs for a model.

        Raises:
            InvalidField: they are not what the model takes and has.
        """
        body = self.body
        if self.rows is None or self._read_for is not manifest:
            self._inspect = traced(body.outputs, manifest)
            self.rows = decode_rows(body.tensor, manifest)
            self._read_for = manifest
        return self.rows

    def digest(self, manifest: Manifest) -> bytes:
        """Of what a retry repeats: x, its shape and the outputs wanted.

        Raises:
            InvalidField: as `read`.
        """
        rows = self.read(manifest)
        asked = repr((rows.count, rows.flat, tuple(self.outputs)))
        digest = blake2b(asked.encode(), digest_size=16)
        digest.update(np.ascontiguousarray(rows.x, "<f4").data)
        return digest.digest()

    def step(self, session: ResidentSession, reply_to: ReplyTo) -> Step:
        """The step that it asks for.

        Raises:
            InvalidField, NonFiniteInput.
        """
        self.check(session)
        manifest = session.model.manifest
        rows = self.read(manifest)
        reply_bytes = 4 * rows.count * reply_width(self.outputs, manifest)
        if reply_bytes > REPLY_BYTES:
            raise InvalidField(
                "outputs",
                f"would take {reply_bytes} bytes, more than {REPLY_BYTES}: ask for fewer, or send "
                "fewer rows a request",
            )
        step = make_step(
            session,
            rows.x,
            rows.count,
            finite=rows.finite,
            t=self.t,
            reply_to=reply_to,
            inspect=self._inspect,
        )
        step.held_bytes = max(step.held_bytes, SENT * reply_bytes) + self._names_bytes
        return step

    def opening(self, model: Model, now: float) -> OpenOptions:
        """The session that its start opens; one that needs a start time and has none begins now.

        Args:
            model: the one that it names.
            now: Unix seconds.

        Raises:
            InvalidField, NonFiniteInput: its rows could not be applied, so it opens no session.
        """
        manifest, body = model.manifest, self.body
        rows, missing = self.read(manifest), _missing(body.missing)
        if not rows.finite and (missing is MissingPolicy.REJECT or np.isinf(rows.x).any()):
            takes_nan = missing is not MissingPolicy.REJECT
            raise non_finite(self.session_id, manifest, rows.x, takes_nan=takes_nan)
        start_time = _time(body.start_time)
        if start_time is None and manifest.needs_time:
            interval = manifest.step_interval or timedelta(seconds=1)
            moment = datetime.fromtimestamp(now, UTC)
            start_time = moment - (moment - EPOCH) % interval
        return OpenOptions(
            self.session_id,
            manifest.name,
            manifest.version,
            None,
            start_time,
            missing=missing,
            tenant=self.tenant,
        )

    def reply(self, step: Step) -> pb.ModelInferResponse:
        """The reply to its step, which was applied."""
        response = pb.ModelInferResponse()
        self.put_reply(response, step)
        return response

    def row_reply(self, session: ResidentSession) -> pb.ModelInferResponse | None:
        """Its reply but for y, if requests may repeat it with another id and another x.

        None: it is more than a row of float32 in and y out. It has been read for the model.
        """
        rows, tensor = self.rows, self.body.tensor
        one_row = rows is not None and rows.count == 1 and tensor.raw and tensor.dtype is FP32
        if rows is None or not one_row or self.t is not None or self.outputs is not ONLY_Y:
            return None
        shapes = y_shapes(session.model.manifest.output_width, 1, flat=rows.flat)
        response = pb.ModelInferResponse()
        self._put_frame(response, session.record, shapes)
        return response

    def put_reply(self, response: pb.ModelInferResponse, step: Step) -> None:
        """Makes a message the reply to its step."""
        flat = self.rows is not None and self.rows.flat
        shapes, contents = outputs_of(step, self.outputs, flat=flat)
        self._put_frame(response, step.session.record, shapes)
        response.raw_output_contents.extend(contents)
        if step.missing_rows:
            response.parameters["imputed_rows"].int64_param = step.missing_rows
        if self.t is not None:
            parameters = response.parameters
            parameters["step_t"].int64_param = step.t_after
            parameters["durable_t"].int64_param = step.durable_t
            parameters["replayed"].bool_param = step.replayed

    def _put_frame(
        self, response: pb.ModelInferResponse, record: SessionRecord, shapes: Shapes
    ) -> None:
        frame = _frame if len(shapes) <= _FEW_OUTPUTS else _new_frame  # no client fills the cache
        response.CopyFrom(frame(record.model, record.version, shapes, final=self.head.final))
        response.id = self.head.request_id


def _read(request: pb.ModelInferRequest, *, start: bool) -> InferBody | InvalidField:
    """What a request asks for, or why it is refused."""
    try:
        names = ("start_time", "missing") if start else ()
        texts = [_text(request.parameters, name) for name in names]
        return InferBody(read_tensor(request), wanted(request), *texts)
    except InvalidField as error:
        return without_frames(error)


def _new_frame(model: str, version: str, shapes: Shapes, *, final: bool) -> pb.ModelInferResponse:
    """What many replies have in common."""
    response = pb.ModelInferResponse(model_name=model, model_version=version)
    for name, shape in shapes:
        response.outputs.add(name=name, datatype="FP32", shape=shape)
    if final:
        response.parameters[FINAL].bool_param = True
    return response


_frame = lru_cache(maxsize=256)(_new_frame)  # a copy takes a third of the time of building it


def _sequence_id(request: pb.ModelInferRequest, parameters: Parameters) -> str:
    """The sequence id, as the id of a session.

    Raises:
        InvalidField: there is none, or no session can have it.
    """
    if "sequence_id" in parameters:
        given = parameters["sequence_id"]
        number = given.int64_param or given.uint64_param
        if number:  # Triton's ids have no sign; some clients' integers do
            return str(number % _UNSIGNED)
        if given.string_param:
            return _checked_id(given.string_param)
        if given.WhichOneof("parameter_choice") not in _KINDS_OF_ID:
            raise InvalidField("sequence_id", "is neither an integer nor a string")
    raise InvalidField(
        "sequence_id",
        f"inference request to model {request.model_name[:64]!r} must specify a non-zero or "
        "non-empty correlation ID",
    )


def _checked_id(text: str) -> str:
    try:
        check_id(text)
    except InvalidField as error:
        raise InvalidField("sequence_id", error.problem) from None
    return text


def _flag(parameters: Parameters, name: str) -> bool:
    if name not in parameters:  # to look at it would add it
        return False
    given = parameters[name]
    if given.bool_param:
        return True
    if not given.HasField("bool_param"):
        raise InvalidField(name, "is not a bool")
    return False


def _count(parameters: Parameters, name: str) -> int:
    given = parameters[name]
    kind = given.WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param") or getattr(given, kind) < 0:
        raise InvalidField(name, "is not an integer of 0 or more")
    return int(getattr(given, kind))


def _text(parameters: Parameters, name: str) -> str | None:
    return parameters[name].string_param[:MAX_TEXT_BYTES] if name in parameters else None


def _time(text: str | None) -> datetime | None:
    """The parameter start_time: ISO 8601, UTC where it says no zone."""
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise InvalidField("start_time", f"is {text[:64]!r}, expected an ISO 8601 time") from None


def _missing(text: str | None) -> MissingPolicy:
    """The parameter missing: what a NaN in x means to the sequence; by default it is refused."""
    if text is None:
        return MissingPolicy.REJECT
    try:
        return MissingPolicy(text)
    except ValueError:
        known = ", ".join(policy.value for policy in MissingPolicy)
        raise InvalidField("missing", f"is {text[:64]!r}, expected one of {known}") from None
