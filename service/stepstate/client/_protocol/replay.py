"""The rows that a session's client keeps, to send them again to a server that was set back.

Rule 1: what is kept is one run of rows without a hole, `start` to `end`.
Rule 2: rows that the server calls durable are dropped; beyond the limit, the oldest are.
Rule 3: rows put at a t that is kept already replace those and all after them.

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
"""Twice what a server lets a session be behind in its store, by its defaults."""
AT_ONCE_ROWS = 4_096
"""Some tens of milliseconds of a server's work."""
AT_ONCE_BYTES = 2**20
"""A sixteenth of what a server takes in one request."""
AS_SENT = 32
"""The newest requests go again as they were: so many a server remembers the replies of, and
somebody may ask for those again, with the same requests."""

_t_of = attrgetter("t")


@dataclass(slots=True, eq=False)
class SentRequest:
    """The rows of one request: `count` of them from `t` on, float32 [count, D] as bytes."""

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
    """Rows of one session, from the oldest that may be asked for again to the last one sent.

    Args:
        session_id: named in errors.
        width: D.
        limit: most rows kept.
        t: where it begins.
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
            self.forget(self.end - self._limit)

    def forget(self, t: int) -> None:
        """Drops the rows before t."""
        if t <= self.start:
            return
        self.start = min(t, self.end)
        kept = self._kept
        while kept and kept[0].t + kept[0].count <= t:
            kept.popleft()

    def holds(self, first: int, last: int) -> bool:
        """Whether it has all the rows first to last, both included."""
        return first > last or (self.start <= first and last < self.end)

    def check(self, first: int, last: int) -> None:
        """Raises what is missing of the rows first to last, both included.

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
            RowsMissing: as `check`.
        """
        self.check(first, last)
        return np.frombuffer(self._data(first, last + 1), "<f4").reshape(-1, self._width)

    def again(self, t: int, end: int) -> SentRequest:
        """The request to send next for the rows from t on, before end; they must be kept.

        The newest `AS_SENT` requests before end go as they were sent, what is
        older goes many rows at once.
        """
        place = bisect_right(self._kept, t, key=_t_of) - 1
        after = bisect_left(self._kept, end, key=_t_of)
        as_sent = max(0, after - AS_SENT)
        if place >= as_sent:
            return self._kept[place].between(t, end)
        until = min(t + self._at_once, self._kept[as_sent].t)
        return SentRequest(t, until - t, self._data(t, until), inspect=False, last_only=True)

    def last(self, t: int, end: int) -> SentRequest:
        """The last request for rows before end, as it was sent, less its rows before t."""
        place = bisect_left(self._kept, end, key=_t_of) - 1
        return self._kept[place].between(t, end)

    def copy(self, session_id: str, *, limit: int) -> ReplayBuffer:
        """The same rows, for a session that goes on from here apart."""
        made = ReplayBuffer(session_id, self._width, limit, self.start)
        made.end = self.end
        made._kept = self._kept.copy()
        made.forget(self.end - limit)
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
        """Drops the rows from t on; all of them where t is not next to what is kept."""
        kept = self._kept
        if not self.start <= t < self.end:
            kept.clear()
            self.start = t
        while kept and kept[-1].t >= t:
            kept.pop()
        if kept and kept[-1].end > t:
            kept.append(kept.pop().between(0, t))
        self.end = t
