"""The rows that a session's client keeps, to send them again to a server that was rolled back.

Rule 1: the kept rows are one run without a gap, `start` to `end`.
Rule 2: rows that the server reports as durable are dropped; over the limit, the oldest are.
Rule 3: rows put at a t that is kept already replace those and all after them. No I/O.

D inputs a row.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from stepstate.client.types import Floats
from stepstate.errors import RowsMissing

RESUME_ROWS = 200_000
"""Twice the rows that a server with default settings lets a session have unsaved."""
AT_ONCE_ROWS = 4_096
"""Some tens of milliseconds of a server's work."""
AT_ONCE_BYTES = 2**20
"""A sixteenth of a server's limit for one request."""
AS_SENT = 32
"""The newest requests are sent again unchanged: a server remembers the replies of so many, and
another client may ask for those again, with the same requests."""

_t_of = attrgetter("t")


@dataclass(slots=True, eq=False)
class SentRequest:
    """The rows of one request: `count` rows from `t` on, float32 [count, D] as bytes."""

    t: int
    count: int
    data: bytes
    inspect: bool = False
    last_only: bool = False

    @property
    def end(self) -> int:
        """t of the row after them."""
        return self.t + self.count

    def between(self, first: int, end: int) -> SentRequest:
        """Its rows from first on, before end."""
        if first <= self.t and end >= self.end:
            return self
        width = len(self.data) // self.count
        first, end = max(first, self.t), min(end, self.end)
        data = self.data[(first - self.t) * width : (end - self.t) * width]
        return SentRequest(first, end - first, data, self.inspect, self.last_only)


class ReplayBuffer:
    """Rows of one session, from the oldest that a server may need again to the last one sent.

    Args:
        session_id: for errors.
        width: D.
        limit: most rows kept.
        t: the first row to come.
    """

    def __init__(self, session_id: str, width: int, limit: int, t: int = 0) -> None:
        self.start = self.end = t
        self._session_id = session_id
        self._width = width
        self._limit = limit
        self._kept: deque[SentRequest] = deque()
        self._at_once = max(1, min(AT_ONCE_ROWS, AT_ONCE_BYTES // (4 * width)))

    def __len__(self) -> int:
        """Rows kept."""
        return self.end - self.start

    def put(self, sent: SentRequest) -> None:
        """Keeps rows that are about to be sent."""
        if sent.t != self.end:
            self._cut(sent.t)
        self._kept.append(sent)
        self.end = sent.t + sent.count
        if self.end - self.start > self._limit:
            self.drop_before(self.end - self._limit)

    def drop_before(self, t: int) -> None:
        """Drops the rows before t."""
        if t <= self.start:
            return
        self.start = min(t, self.end)
        kept = self._kept
        while kept and kept[0].t + kept[0].count <= t:
            kept.popleft()

    def holds(self, first: int, last: int) -> bool:
        """Whether all the rows first to last, both included, are kept."""
        return first > last or (self.start <= first and last < self.end)

    def check(self, first: int, last: int) -> None:
        """Checks that the rows first to last, both included, are kept.

        Raises:
            RowsMissing: it names the first run of rows that are not kept.
        """
        if self.holds(first, last):
            return
        if not self.start <= first < self.end:
            end = self.start - 1 if first < self.start < self.end else last
            raise RowsMissing(self._session_id, first, min(end, last))
        raise RowsMissing(self._session_id, self.end, last)

    def rows(self, first: int, last: int) -> Floats:
        """The rows first to last, both included [last - first + 1, D].

        Raises:
            RowsMissing: some are not kept.
        """
        self.check(first, last)
        return np.frombuffer(self._data(first, last + 1), "<f4").reshape(-1, self._width)

    def again(self, t: int, end: int) -> SentRequest:
        """The next request that sends the rows from t to end again; they must be kept.

        The newest `AS_SENT` requests before end are sent unchanged; older rows go many at once.
        """
        place = bisect_right(self._kept, t, key=_t_of) - 1
        after = bisect_left(self._kept, end, key=_t_of)
        as_sent = max(0, after - AS_SENT)
        if place >= as_sent:
            return self._kept[place].between(t, end)
        until = min(t + self._at_once, self._kept[as_sent].t)
        return SentRequest(t, until - t, self._data(t, until), inspect=False, last_only=True)

    def last(self, t: int, end: int) -> SentRequest:
        """The last request for rows before end, without its rows before t."""
        place = bisect_left(self._kept, end, key=_t_of) - 1
        return self._kept[place].between(t, end)

    def copy(self, session_id: str, *, limit: int) -> ReplayBuffer:
        """The same rows, for a fork of the session."""
        made = ReplayBuffer(session_id, self._width, limit, self.start)
        made.end = self.end
        made._kept = self._kept.copy()
        made.drop_before(self.end - limit)
        return made

    def _data(self, first: int, end: int) -> bytes:
        place = max(0, bisect_right(self._kept, first, key=_t_of) - 1)
        parts = []
        while first < end:
            part = self._kept[place].between(first, end)
            parts.append(part.data)
            first, place = part.end, place + 1
        return b"".join(parts)

    def _cut(self, t: int) -> None:
        """Drops the rows from t on; all rows if t is not next to them."""
        kept = self._kept
        if not self.start <= t < self.end:
            kept.clear()
            self.start = t
        while kept and kept[-1].t >= t:
            kept.pop()
        if kept and kept[-1].end > t:
            kept.append(kept.pop().between(0, t))
        self.end = t
