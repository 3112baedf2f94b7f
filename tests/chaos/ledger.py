"""What one client knows for sure of its session: every row it sent, every output it was given."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from stepstate.v1 import stepstate_pb2 as pb
from tests.integration.wire import TOLERANCE

INPUTS = 3
_BLOCK = 256


class Complaint(AssertionError):
    """The server said something that no promise allows."""


@dataclass(slots=True)
class Tally:
    """What was counted, of one session or of many."""

    sessions: int = 0
    rows: int = 0
    """Acknowledged, each counted once."""
    lost: int = 0
    """Acknowledged rows that no crash may take, and that the server asked for again or left out."""
    twice: int = 0
    """Rows that the state holds twice, or that are in t and were never acknowledged."""
    wrong: int = 0
    """Sessions whose outputs are not those of the offline run, for whatever reason."""
    rolled_back: int = 0
    """Acknowledged rows of async sessions that the server asked for again, as it may."""
    repeated: int = 0
    """Rows that were answered again."""
    pause: float = 0.0
    """The longest time, in seconds, from when a client first wanted a row to its answer."""

    def add(self, other: Tally) -> None:
        """Takes another's counts in."""
        for name in ("sessions", "rows", "lost", "twice", "wrong", "rolled_back", "repeated"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.pause = max(self.pause, other.pause)


@dataclass(slots=True, eq=False)
class Ledger:
    """The truth about one session.

    Row t is made from the seed, so a client that was killed has the same rows again.
    Requests are remembered by the t that they begin at: sent again, they hold the same rows.
    """

    session_id: str
    seed: int
    durability: str
    given: list[bytes] = field(default_factory=list)
    """The output of each row, as it was given first."""
    durable_t: int = 0
    requests: dict[int, int] = field(default_factory=dict)
    """Rows of the request that begins at t."""
    wanted_at: dict[int, float] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    _blocks: list[np.ndarray] = field(default_factory=list)

    @property
    def t(self) -> int:
        """Rows acknowledged."""
        return len(self.given)

    def rows(self, first: int, count: int) -> np.ndarray:
        """Rows x [count, D] from number `first` on."""
        while len(self._blocks) * _BLOCK < first + count:
            random = np.random.default_rng([self.seed, len(self._blocks)])
            self._blocks.append(random.standard_normal((_BLOCK, INPUTS)).astype(np.float32))
        begin, end = first // _BLOCK, (first + count - 1) // _BLOCK + 1
        some = np.concatenate(self._blocks[begin:end])
        return some[first - begin * _BLOCK :][:count]

    def request(self, t: int, count: int) -> pb.StepRequest:
        """The request that begins at t: the same one whenever it is asked for."""
        count = self.requests.setdefault(t, count)
        self.wanted_at.setdefault(t, time.monotonic())
        return pb.StepRequest(session_id=self.session_id, t=t, x=np.ravel(self.rows(t, count)))

    def answered(self, t: int, reply: pb.StepResponse) -> None:
        """Takes the reply to the request that began at t.

        Raises:
            Complaint: it can't be true.
        """
        count = self.requests[t]
        self._check_numbers(t, count, reply)
        width = 4 * len(reply.y) // count
        data = np.asarray(reply.y, "<f4").tobytes()
        for place in range(count):
            self._keep(t + place, data[place * width : (place + 1) * width])
        if reply.replayed:
            self.tally.repeated += count
        wanted_at = self.wanted_at.pop(t, None)
        if wanted_at is not None:
            self.tally.pause = max(self.tally.pause, time.monotonic() - wanted_at)

    def sent_back(self, t: int) -> None:
        """The server is at t, and asks for the rows from there on.

        Raises:
            Complaint: rows that were never sent are in it, or half of a request.
        """
        if t not in self.requests:
            self._complain(f"it is at {t}, inside a request, or after rows never sent")
        self.tally.rolled_back += max(0, self.t - t)
        safe = self.t if self.durability == "sync" else self.durable_t
        self.tally.lost += max(0, safe - t)

    def _check_numbers(self, t: int, count: int, reply: pb.StepResponse) -> None:
        after = t + count
        if t > self.t or reply.t != after:
            self._complain(f"{count} rows at {t} were answered with t={reply.t}, of {self.t} given")
        if self.durability == "none" and reply.durable_t:
            self._complain(f"durable_t={reply.durable_t} without durability")
        if self.durability == "sync" and reply.durable_t < after:
            self._complain(f"acknowledged up to {after}, and durable up to {reply.durable_t} only")
        if not reply.replayed and reply.durable_t > after:
            self._complain(f"durable up to {reply.durable_t}, which is after t={after}")
        self.durable_t = max(self.durable_t, reply.durable_t)

    def _keep(self, t: int, y: bytes) -> None:
        if t == self.t:
            self.given.append(y)
            return
        if self.durability == "sync" and y != self.given[t]:
            self._complain(f"row {t} was answered again with other bytes")
        first, again = np.frombuffer(self.given[t], "<f4"), np.frombuffer(y, "<f4")
        if np.abs(first - again).max() > TOLERANCE:
            self._complain(f"row {t} was answered again with other numbers")

    def _complain(self, problem: str) -> None:
        raise Complaint(f"session {self.session_id}: {problem}")
