"""One message of a packed stream: its rows as columns, and the outcome of each.

N rows of a message, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stepstate.engine import Floats
from stepstate.errors import InvalidField, StepstateError, without_frames
from stepstate.models import Model
from stepstate.sessions import (
    ID_LENGTH,
    PackedStep,
    ReplyTo,
    ResidentSession,
    RowBatch,
    SessionRef,
    Step,
)
from stepstate.transport.convert import REPLY_BYTES
from stepstate.transport.status import status_of
from stepstate.transport.steps import make_step
from stepstate.v1 import stepstate_pb2 as pb

MAX_ROWS = 4096
"""Sixteen of the largest forwards; and the reply stays readable if every row is refused."""
MAX_HANDLES = 262_144
"""Of a stream; their table then takes some 8 MB beside the ids."""
MAX_BINDINGS = 16_384
"""Of a message: some 50 ms of work, in which nobody else is served."""
HANDLE_BYTES = 32
"""Of a handle in the table, with what a stream keeps of it."""
ROW_BYTES = 128
"""What a message takes for a row, beside its x and its reply."""
REPLAYED, IMPUTED, FALLBACK = 1, 2, 4
_LARGEST_T = 2**63 - 1


@dataclass(frozen=True, slots=True)
class HandleMeaning:
    """What some handles [K] mean: see `HandleTable`."""

    handles: NDArray[np.int64]
    ids: NDArray[np.object_]
    refs: NDArray[np.int64]
    bound: NDArray[np.bool_]


class HandleTable:
    """The sessions of one stream by the handles that its client has bound.

    A message looks its rows up when it is read, so it keeps the meaning that its handles have then.
    """

    def __init__(self) -> None:
        self._ids: NDArray[np.object_] = np.zeros(0, np.object_)
        self._refs: NDArray[np.int64] = np.zeros((2, 0), np.int64)  # as `SessionRef`; 0: none
        self._bound: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._id_bytes = 0

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return HANDLE_BYTES * len(self) + self._id_bytes

    def growth(self, bindings: Sequence[pb.Binding]) -> int:
        """How many bytes more it takes with these bindings, at most.

        Raises:
            InvalidField: there are too many, a handle is too large, or an id too long.
        """
        if len(bindings) > MAX_BINDINGS:
            raise InvalidField(
                "bindings",
                f"holds {len(bindings)}, expected at most {MAX_BINDINGS}: send several messages",
            )
        largest = max(binding.handle for binding in bindings)
        if largest >= MAX_HANDLES:
            raise InvalidField(
                "bindings",
                f"has handle {largest}, expected less than {MAX_HANDLES}: use those of closed "
                "sessions again, or open another stream",
            )
        longest = max(bindings, key=lambda binding: len(binding.session_id))
        if len(longest.session_id) > ID_LENGTH:
            raise InvalidField(
                "bindings",
                f"has an id of {len(longest.session_id)} characters for handle {longest.handle}, "
                f"expected at most {ID_LENGTH}",
            )
        ids = sum(_id_bytes(binding.session_id) for binding in bindings)
        return HANDLE_BYTES * (self._length(largest) - len(self)) + ids

    def bind(self, bindings: Sequence[pb.Binding]) -> HandleMeaning:
        """Adds bindings; returns what their handles meant, for `put_back`."""
        new = {binding.handle: binding.session_id for binding in bindings}
        more = self._length(max(new)) - len(self)
        if more:
            self._ids = np.concatenate((self._ids, np.full(more, None, np.object_)))
            self._refs = np.pad(self._refs, ((0, 0), (0, more)))
            self._bound = np.pad(self._bound, (0, more))
        handles, ids = np.fromiter(new, np.int64), np.array([*new.values()], np.object_)
        before = HandleMeaning(
            handles, self._ids[handles], self._refs[:, handles], self._bound[handles]
        )
        none, all_bound = np.zeros((2, len(new)), np.int64), np.ones(len(new), np.bool_)
        self.put_back(HandleMeaning(handles, ids, none, all_bound))
        return before

    def put_back(self, meaning: HandleMeaning) -> None:
        """Gives handles [K] the meaning that they had."""
        handles = meaning.handles
        self._id_bytes += sum(map(_id_bytes, meaning.ids)) - sum(map(_id_bytes, self._ids[handles]))
        self._ids[handles] = meaning.ids
        self._refs[:, handles] = meaning.refs
        self._bound[handles] = meaning.bound

    def put_ref(self, handle: int, session_id: str, ref: SessionRef | None) -> None:
        """Keeps the reference to the session of a handle, if the handle is still bound to it."""
        if ref is not None and self._ids[handle] == session_id:
            self._refs[:, handle] = ref.handle, ref.generation

    def ids(self, handles: NDArray[np.int64]) -> NDArray[np.object_]:
        """The session ids of handles [N].

        Raises:
            InvalidField: one is not bound.
        """
        known = handles < len(self)
        if known.all():
            known = self._bound[handles]
        if not known.all():
            raise InvalidField(
                "handles",
                f"has {handles[known.argmin()]} for row {known.argmin()}, which is not bound to a "
                "session: send a binding with it, or before it",
            )
        ids: NDArray[np.object_] = self._ids[handles]
        return ids

    def refs(self, handles: NDArray[np.int64]) -> NDArray[np.int64]:
        """References [2, N] to the sessions of bound handles [N], as far as they are known."""
        return self._refs[:, handles]

    def _length(self, largest: int) -> int:
        """How long it is with this handle: it grows in powers of two."""
        return max(len(self), 1 << largest.bit_length())


class PackedRequest:
    """Rows [N] of sessions of one model.

    Args:
        request_id: the client's id of the message.
        handles: of each row, as the stream has bound them.
        batch: the rows.
        ids: [N], of their sessions.
    """

    def __init__(
        self,
        request_id: int,
        handles: NDArray[np.int64],
        batch: RowBatch,
        ids: NDArray[np.object_],
    ) -> None:
        count = len(handles)
        self.handles = handles
        self.batch = batch
        self.model: Model | None = None
        """Of all rows, once the session of one was found."""
        self.rest: NDArray[np.int64] = np.arange(count)
        """Rows that have not started."""
        self.left = count
        """Rows without an outcome."""
        self.held_bytes = ROW_BYTES * count + batch.x.nbytes
        """What it takes, with its reply as far as that is known."""
        self.errors: dict[int, StepstateError] = {}
        """Why rows were refused."""
        self._request_id = request_id
        self._ids = ids
        self._misfit: InvalidField | None = None
        self._y: Floats = np.zeros((0, 0), np.float32)
        self._t: NDArray[np.uint64] = np.zeros(count, np.uint64)
        self._durable_t: NDArray[np.uint64] = np.zeros(count, np.uint64)
        self._flags: NDArray[np.uint8] = np.zeros(count, np.uint8)

    @classmethod
    def read(cls, request: pb.StreamPackedRequest, table: HandleTable) -> PackedRequest:
        """Reads a message.

        Raises:
            InvalidField: the columns do not fit together, or a handle is not bound.
        """
        handles = _column(request.handles, "handles", "<u4").astype(np.int64)
        count = len(handles)
        if count > MAX_ROWS:
            raise InvalidField("handles", f"names {count} rows, expected at most {MAX_ROWS}")
        t = None
        if request.t:
            t = np.minimum(_column(request.t, "t", "<u8"), _LARGEST_T).astype(np.int64)
            if len(t) != count:
                raise InvalidField("t", f"holds {len(t)} numbers, expected {count} or none")
        x = _column(request.x, "x", "<f4")
        if len(x) % max(1, count) or (len(x) > 0) != (count > 0):
            raise InvalidField("x", f"holds {len(x)} values, not {count} rows of the same width")
        x = x.reshape(count, -1) if count else x.reshape(0, 0)
        ids = table.ids(handles)
        in_table, generations = table.refs(handles)
        return cls(request.id, handles, RowBatch(in_table, generations, t, x.copy()), ids)

    def __len__(self) -> int:
        return len(self.handles)

    def session_id(self, row: int) -> str:
        """Of a row."""
        session_id: str = self._ids[row]
        return session_id

    def fits(self, model: Model) -> bool:
        """Whether the rows can be of a model; the first model that is asked for becomes theirs."""
        if self.model is None:
            self.model = model
            self._misfit = self._misfit_of(model)
            width = model.manifest.output_width if self._misfit is None else 0
            self._y = np.full((len(self), width), np.nan, np.float32)
        return self.model is model and self._misfit is None

    def step(self, row: int, session: ResidentSession, reply_to: ReplyTo) -> Step:
        """A row as a step of its own.

        Raises:
            InvalidField, NonFiniteInput.
        """
        if not self.fits(session.model):
            raise self._misfit or self._other_model(session)
        x = self.batch.x[row]
        finite = bool(np.isfinite(x).all())
        t = None if self.batch.t is None else int(self.batch.t[row])
        return make_step(session, x.tolist(), 1, finite=finite, t=t, reply_to=reply_to)

    def put_pack(self, rows: NDArray[np.int64], pack: PackedStep) -> None:
        """Takes the outcome of rows that went together."""
        assert self.model is not None
        if len(pack.y):
            self._y[rows] = pack.y
            self._t[rows] = pack.at + 1
            self._durable_t[rows] = pack.durable_t
            self._flags[rows[pack.at < self.model.manifest.lag_rows]] = FALLBACK
        for place, error in pack.errors:
            self._set_error(int(rows[place]), error)
        self.left -= len(rows)

    def put_step(self, row: int, step: Step) -> None:
        """Takes the outcome of a row that was a step of its own."""
        if step.error is not None:
            self.put_error(row, step.error)
            return
        fallback = step.t_after <= step.session.model.manifest.lag_rows
        self._y[row] = np.frombuffer(step.y, "<f4")
        self._t[row], self._durable_t[row] = step.t_after, step.durable_t
        self._flags[row] = (
            REPLAYED * step.replayed + IMPUTED * (step.missing_rows > 0) + FALLBACK * fallback
        )
        self.left -= 1

    def put_error(self, row: int, error: StepstateError) -> None:
        """Takes the refusal of a row."""
        self._set_error(row, error)
        self.left -= 1

    def response(self) -> pb.StreamPackedResponse:
        """The reply, once no row is left."""
        response = pb.StreamPackedResponse(
            id=self._request_id,
            y=self._y.astype("<f4", copy=False).tobytes() if len(self.errors) < len(self) else b"",
            t=self._t.astype("<u8", copy=False).tobytes(),
            durable_t=self._durable_t.astype("<u8", copy=False).tobytes(),
            flags=self._flags.tobytes() if self._flags.any() else b"",
        )
        for row in sorted(self.errors):
            response.errors.add(row=row, status=status_of(self.errors[row]))
        return response

    def _set_error(self, row: int, error: StepstateError) -> None:
        self.errors[row] = without_frames(error)
        self._t[row] = self._durable_t[row] = self._flags[row] = 0
        if len(self._y):
            self._y[row] = np.nan

    def _misfit_of(self, model: Model) -> InvalidField | None:
        """Why no row can be of a model."""
        manifest, width = model.manifest, self.batch.x.shape[1]
        if width != manifest.input_width:
            return InvalidField(
                "x",
                f"holds {width} values a row; {model.key} takes rows of "
                f"{manifest.input_width}: send {manifest.input_width} for each handle",
            )
        if reply_bytes(len(self), manifest.output_width) > REPLY_BYTES:
            most = REPLY_BYTES // reply_bytes(1, manifest.output_width)
            return InvalidField(
                "handles",
                f"names {len(self)} rows; of {model.key} at most {most} a message",
            )
        return None

    def _other_model(self, session: ResidentSession) -> InvalidField:
        assert self.model is not None
        return InvalidField(
            "handles",
            f"names session {session.session_id!r} of {session.model.key} beside rows of "
            f"{self.model.key}: send the rows of each model in messages of their own",
        )


def reply_bytes(rows: int, output_width: int) -> int:
    """Bytes of the columns of a reply."""
    return rows * (4 * output_width + 17)


def _id_bytes(session_id: str | None) -> int:
    """What an id takes; None: a handle that is not bound."""
    if session_id is None:
        return 0
    return 64 + len(session_id) * (1 if session_id.isascii() else 4)


def _column(data: bytes, field: str, dtype: str) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    if len(data) % size:
        raise InvalidField(field, f"holds {len(data)} bytes, expected a multiple of {size}")
    return np.frombuffer(data, dtype)
