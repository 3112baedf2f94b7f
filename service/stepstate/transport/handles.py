"""What a packed stream's handles mean, and where their sessions sit.

N rows of a message.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from stepstate.engine import Floats
from stepstate.errors import InvalidField
from stepstate.sessions import RowBatch, SessionRef
from stepstate.v1 import stepstate_pb2 as pb

MAX_HANDLES = 262_144
"""Of a stream; their table then takes some 8 MB."""


class HandleTable:
    """The sessions of one stream by their handles.

    Args:
        ids: by handle; None: not bound. The list is not changed any more: rows that wait keep
            what was meant when they came.
        seats: [2, handles]: handle in the session table and generation; 0: not known.
        bound: [handles]: whether there is an id.
    """

    def __init__(
        self,
        ids: Sequence[str | None],
        seats: NDArray[np.int64],
        bound: NDArray[np.bool_],
    ) -> None:
        self.ids = ids
        self._seats = seats
        self._bound = bound

    @classmethod
    def none(cls) -> HandleTable:
        """Those of a new stream."""
        return cls((), np.zeros((2, 0), np.int64), np.zeros(0, np.bool_))

    def __len__(self) -> int:
        return len(self.ids)

    def with_(self, bindings: Iterable[pb.Binding]) -> HandleTable:
        """These, and handles with a new meaning.

        Raises:
            InvalidField: one is too large.
        """
        new = {binding.handle: binding.session_id for binding in bindings}
        if not new:
            return self
        largest = max(new)
        if largest >= MAX_HANDLES:
            raise InvalidField(
                "bindings",
                f"has handle {largest}, expected less than {MAX_HANDLES}: use those of closed "
                "sessions again, or open another stream",
            )
        more = max(0, largest + 1 - len(self))
        ids = [*self.ids, *([None] * more)]
        seats = np.pad(self._seats, ((0, 0), (0, more)))
        for handle, session_id in new.items():
            ids[handle] = session_id
        bound = np.pad(self._bound, (0, more))
        seats[:, list(new)] = 0
        bound[list(new)] = True
        return HandleTable(ids, seats, bound)

    def seat(self, handle: int, session_id: str, seat: SessionRef | None) -> None:
        """Notes where the session of a handle sits, if the handle still means it."""
        if seat is not None and self.ids[handle] == session_id:
            self._seats[:, handle] = seat.handle, seat.generation

    def columns(
        self, handles: NDArray[np.int64], t: NDArray[np.int64] | None, x: Floats
    ) -> RowBatch:
        """Rows [N] of handles, with what is known of where they go.

        Raises:
            InvalidField: a handle is not bound.
        """
        bound = handles < len(self)
        bound[bound] = self._bound[handles[bound]]
        if not bound.all():
            raise InvalidField(
                "handles",
                f"has {handles[bound.argmin()]} for row {bound.argmin()}, which is not bound to a "
                "session: send a binding with it, or before it",
            )
        table_handles, generations = self._seats[:, handles]
        return RowBatch(table_handles, generations, t, x)
