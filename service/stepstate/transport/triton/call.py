"""One ModelInfer request: its sequence, what it asks for, and its reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from stepstate.errors import InvalidField
from stepstate.models import EPOCH, Manifest, Model
from stepstate.sessions import OpenOptions, ReplyTo, ResidentSession, Step
from stepstate.stores import MissingPolicy
from stepstate.transport.convert import REPLY_BYTES
from stepstate.transport.interceptor import SENT
from stepstate.transport.steps import make_step, non_finite
from stepstate.transport.triton.tensors import (
    ONLY_Y,
    InputRows,
    Shapes,
    decode_rows,
    outputs_of,
    reply_width,
    traced,
    wanted,
)

FINAL = "triton_final_response"
ASKS_FOR_FINAL = "triton_enable_empty_final_response"
_UNSIGNED = 2**64
_KINDS_OF_ID = ("int64_param", "uint64_param", "string_param")

Parameters = Mapping[str, "pb.InferParameter"]


@dataclass(slots=True, eq=False)
class InferCall:
    """A request; its tensors are read once its model is known."""

    request: pb.ModelInferRequest
    session_id: str
    """The sequence id as text."""
    start: bool
    end: bool
    t: int | None
    """The parameter step_t."""
    final: bool
    """Its reply has to say that it is the last one of the request: all are."""
    outputs: Sequence[str] = field(init=False, default=ONLY_Y)
    """The names of the outputs wanted."""
    rows: InputRows | None = field(init=False, default=None)
    """x, once it is read for a model."""
    _inspect: bool = field(init=False, default=False)
    _read_for: Manifest | None = field(init=False, default=None)

    @classmethod
    def of(cls, request: pb.ModelInferRequest) -> InferCall:
        """Reads the parameters of a request.

        Raises:
            InvalidField: there is no sequence id, or a parameter is of another type.
        """
        parameters = request.parameters  # each access to a field of a message makes an object
        session_id = _sequence_id(request, parameters)
        start = _flag(parameters, "sequence_start")
        end = _flag(parameters, "sequence_end")
        t = _count(parameters, "step_t") if "step_t" in parameters else None
        if start and t:
            raise InvalidField("step_t", f"is {t}, but a sequence starts at 0")
        return cls(request, session_id, start, end, t, _flag(parameters, ASKS_FOR_FINAL))

    @property
    def plain(self) -> bool:
        """Whether it neither starts nor ends its sequence."""
        return not self.start and not self.end

    def check(self, session: ResidentSession) -> None:
        """Refuses a session that is of another model.

        Raises:
            InvalidField: a sequence id is the id of a session, and those of all models are one set.
        """
        record, request = session.record, self.request
        if record.model == request.model_name and request.model_version in ("", record.version):
            return
        if not request.model_name:  # the client leaves the model to the server
            return
        raise InvalidField(
            "sequence_id",
            f"{self.session_id!r} is the id of a session of model {record.model}/{record.version}, "
            f"not of {request.model_name[:64]}/{request.model_version[:64] or '-'}: ids are those "
            "of sessions, for all models together; choose another",
        )

    def read(self, manifest: Manifest) -> InputRows:
        """Reads x and the names of the outputs for a model.

        Raises:
            InvalidField: they are not what the model takes and has.
        """
        if self.rows is None or self._read_for is not manifest:
            self.outputs = wanted(self.request)
            self._inspect = traced(self.outputs, manifest)
            self.rows = decode_rows(self.request, manifest)
            self._read_for = manifest
        return self.rows

    def payload(self, manifest: Manifest) -> tuple[bytes, Sequence[str]]:
        """What a retry of this request repeats: x and the outputs wanted."""
        return np.asarray(self.read(manifest).x, "<f4").tobytes(), self.outputs

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
        step.held_bytes = max(step.held_bytes, SENT * reply_bytes)
        return step

    def opening(self, model: Model, now: float) -> OpenOptions:
        """The session that its start opens; one that needs a start time and has none begins now.

        Args:
            model: the one that it names.
            now: Unix seconds.

        Raises:
            InvalidField, NonFiniteInput: its rows could not be applied, so it opens no session.
        """
        manifest = model.manifest
        rows, missing = self.read(manifest), _missing(self.request.parameters)
        if not rows.finite and (missing is MissingPolicy.REJECT or np.isinf(rows.x).any()):
            takes_nan = missing is not MissingPolicy.REJECT
            raise non_finite(self.session_id, manifest, rows.x, takes_nan=takes_nan)
        start_time = _time(self.request.parameters)
        if start_time is None and manifest.needs_time:
            interval = manifest.step_interval or timedelta(seconds=1)
            moment = datetime.fromtimestamp(now, UTC)
            start_time = moment - (moment - EPOCH) % interval
        return OpenOptions(
            self.session_id, manifest.name, manifest.version, None, start_time, missing=missing
        )

    def reply(self, step: Step) -> pb.ModelInferResponse:
        """The reply to its step, which was applied."""
        response = pb.ModelInferResponse()
        self.put_reply(response, step)
        return response

    def put_reply(self, response: pb.ModelInferResponse, step: Step) -> None:
        """Makes a message the reply to its step."""
        record = step.session.record
        flat = self.rows is not None and self.rows.flat
        shapes, contents = outputs_of(step, self.outputs, flat=flat)
        response.CopyFrom(_frame(record.model, record.version, shapes, final=self.final))
        response.id = self.request.id
        response.raw_output_contents.extend(contents)
        if step.missing_rows:
            response.parameters["imputed_rows"].int64_param = step.missing_rows
        if self.t is not None:
            parameters = response.parameters
            parameters["step_t"].int64_param = step.t_after
            parameters["durable_t"].int64_param = step.durable_t
            parameters["replayed"].bool_param = step.replayed


@lru_cache(maxsize=256)
def _frame(model: str, version: str, shapes: Shapes, *, final: bool) -> pb.ModelInferResponse:
    """What many replies have in common: a copy takes a third of the time of building it."""
    response = pb.ModelInferResponse(model_name=model, model_version=version)
    for name, shape in shapes:
        response.outputs.add(name=name, datatype="FP32", shape=shape)
    if final:
        response.parameters[FINAL].bool_param = True
    return response


def _sequence_id(request: pb.ModelInferRequest, parameters: Parameters) -> str:
    if "sequence_id" in parameters:
        given = parameters["sequence_id"]
        number = given.int64_param or given.uint64_param
        if number:  # Triton's ids have no sign; some clients' integers do
            return str(number % _UNSIGNED)
        if given.string_param:
            return str(given.string_param)
        if given.WhichOneof("parameter_choice") not in _KINDS_OF_ID:
            raise InvalidField("sequence_id", "is neither an integer nor a string")
    raise InvalidField(
        "sequence_id",
        f"inference request to model {request.model_name[:64]!r} must specify a non-zero or "
        "non-empty correlation ID",
    )


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


def _time(parameters: Parameters) -> datetime | None:
    """The parameter start_time: ISO 8601, UTC where it says no zone."""
    if "start_time" not in parameters:
        return None
    try:
        return datetime.fromisoformat(parameters["start_time"].string_param)
    except ValueError as error:
        raise InvalidField("start_time", f"is not an ISO 8601 time: {error}") from error


def _missing(parameters: Parameters) -> MissingPolicy:
    """The parameter missing: what a NaN in x means to the sequence; by default it is refused."""
    if "missing" not in parameters:
        return MissingPolicy.REJECT
    text = parameters["missing"].string_param
    try:
        return MissingPolicy(text)
    except ValueError as error:
        known = ", ".join(policy.value for policy in MissingPolicy)
        raise InvalidField("missing", f"is {text[:64]!r}, expected one of {known}") from error
