"""A protocol against a server that is a few lines: refusals, crashes and lost connections."""

from __future__ import annotations

import random
from collections import deque
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest

from stepstate import errors
from stepstate.client import SessionInfo
from stepstate.client._protocol import retry
from stepstate.client._protocol.replay import AS_SENT, AT_ONCE_ROWS, RESUME_ROWS, SentRequest
from stepstate.client._protocol.session import BaseSession
from stepstate.client._protocol.steps import MAX_BYTES, WINDOW, StepProtocol
from tests.unit.client.test_types import ONE
from tests.unit.rig import Clock

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
STALE = errors.StaleOwner("a", 0)
FULL = errors.QueueFull("rows", 1)


def info(t: int = 0, durable_t: int = 0, durability: str = "async") -> SessionInfo:
    return SessionInfo(
        session_id="a",
        model="m",
        version="1",
        fingerprint="",
        t=t,
        idle_timeout=timedelta(days=1),
        start_time=None,
        open_time=EPOCH,
        expire_time=EPOCH,
        durable_t=durable_t,
        durability=durability,
    )


def session_at(t: int | None = None, *, at: int = 0, resume_rows: int = RESUME_ROWS, **known: str):
    return BaseSession(ONE, info(at, **known), t=t, resume_rows=resume_rows)


def row(value: float, count: int = 1) -> np.ndarray:
    return np.full((count, 1), value, np.float32)


@pytest.fixture
def ticking(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=clock))
    return clock


class FakeServer:
    """One session: rows applied, what is remembered of replies, and what is saved of both."""

    def __init__(self) -> None:
        self.rows: list[float] = []
        self.remembered: dict[tuple[int, bytes, bool], None] = {}
        self.saved = (0, dict(self.remembered))
        self.most = 0
        """Most rows in one request."""

    def step(self, sent: SentRequest) -> int:
        """Applies a request; returns durable_t."""
        t, key = len(self.rows), (sent.t, sent.data, sent.last_only)
        self.most = max(self.most, sent.count)
        if sent.t > t:
            raise errors.StepAhead("a", sent.t, t)
        if sent.t < t:
            if key in self.remembered:
                return self.saved[0]
            if any(at <= sent.t < at + len(data) // 4 for at, data, _ in self.remembered):
                raise errors.StepMismatch("a", sent.t, t)
            raise errors.StepTooOld("a", sent.t, t)
        self.rows += np.frombuffer(sent.data, np.float32).tolist()
        self.remembered[key] = None
        for old in list(self.remembered)[:-32]:
            del self.remembered[old]
        return self.saved[0]

    def save(self) -> None:
        self.saved = len(self.rows), dict(self.remembered)

    def crash(self) -> None:
        t, self.remembered = self.saved[0], dict(self.saved[1])
        del self.rows[t:]


class Line:
    """A connection between a protocol and a server, and the application behind the protocol."""

    def __init__(self, kept: BaseSession, server: FakeServer, *, window: int = WINDOW) -> None:
        self.window = window
        self.protocol = StepProtocol(kept, timeout=10.0, window=window)
        self.server = server
        self.requests: deque[SentRequest] = deque()
        self.replies: deque[int | errors.StepstateError] = deque()
        self.answered: deque[SentRequest] = deque()
        self.got: list[SentRequest] = []

    def send(self) -> bool:
        if not self.protocol.sendable:
            return False
        self.requests.append(self.protocol.next())
        return True

    def serve(self, refusal: errors.StepstateError | None = None) -> bool:
        if not self.requests:
            return False
        sent = self.requests.popleft()
        try:
            if refusal is not None:
                raise refusal
            self.replies.append(self.server.step(sent))
        except errors.StepstateError as error:
            self.replies.append(error)
        return True

    def receive(self) -> bool:
        if not self.replies:
            return False
        reply = self.replies.popleft()
        if isinstance(reply, errors.StepstateError):
            self.protocol.refused(reply)
        else:
            sent = self.protocol.answered(reply)
            if sent is not None:
                self.answered.append(sent)
                self.protocol.undelivered += 1
        return True

    def take(self) -> bool:
        if not self.answered:
            return False
        self.got.append(self.answered.popleft())
        self.protocol.undelivered -= 1
        self.protocol.session.t = self.got[-1].end
        return True

    def break_(self) -> None:
        self.requests.clear()
        self.replies.clear()
        self.protocol.lost()

    def settle(self) -> None:
        """Goes on until nothing is left to do."""
        while self.send() or self.serve() or self.receive() or self.take():
            assert self.protocol.error is None, self.protocol.error
            if self.protocol.pause:
                self.protocol.resume()
        assert not len(self.protocol)


def fed(line: Line, count: int) -> Line:
    """After so many rows were answered, the first row being 0.0."""
    for _ in range(count):
        line.protocol.add(row(float(len(line.server.rows))))
        line.settle()
    return line


# One way at a time.


def test_a_server_that_was_set_back_is_sent_what_it_lacks_and_nobody_hears_of_it():
    line = fed(Line(session_at(), FakeServer()), 60)
    line.server.saved = 11, {}
    line.server.crash()
    line.protocol.add(row(60.0))
    line.settle()
    assert line.server.rows == [float(t) for t in range(61)]
    assert [sent.t for sent in line.got] == list(range(61))
    assert line.server.most == 60 - AS_SENT - 11


def test_many_rows_go_in_bounded_requests_one_at_a_time():
    line = Line(session_at(), FakeServer())
    line.protocol.add(row(1.0, 10_000))
    line.settle()
    fed(line, AS_SENT)
    line.server.saved = 0, {}
    line.server.crash()
    line.protocol.add(row(2.0))
    line.send()
    line.serve()
    line.receive()
    line.send()
    assert not line.protocol.sendable
    line.settle()
    assert len(line.server.rows) == 10_000 + AS_SENT + 1
    assert line.server.most == 10_000
    assert len(line.got) == AS_SENT + 2
    assert AT_ONCE_ROWS < 10_000


def test_what_was_sent_behind_a_refused_request_is_sent_again():
    line = Line(session_at(), FakeServer())
    for value in range(5):
        line.protocol.add(row(value))
    while line.send():
        pass
    line.serve(FULL)
    while line.serve():
        pass
    for _ in range(4):
        line.receive()
        assert (line.protocol.pause, line.protocol.sendable) == (0.0, False)
    line.receive()
    assert line.protocol.pause >= FULL.retry_after_seconds
    assert not line.protocol.sendable
    line.protocol.resume()
    line.settle()
    assert line.server.rows == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_answers_behind_a_refused_request_are_asked_for_again():
    """A server that lost the session, and took it over again amid what was in flight."""
    line = fed(Line(session_at(), FakeServer()), 3)
    for value in (3.0, 4.0):
        line.protocol.add(row(value))
        line.send()
    line.server.step(line.requests[0])  # by way of the other server
    line.serve(STALE)
    line.serve()
    line.receive()
    line.receive()
    assert [sent.t for sent in line.got] == [0, 1, 2]
    assert not line.answered
    line.protocol.resume()
    line.settle()
    assert [sent.t for sent in line.got] == [0, 1, 2, 3, 4]
    assert line.server.rows == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_connection_lost_amid_a_replay_goes_on_where_it_was():
    line = fed(Line(session_at(), FakeServer()), 100)
    line.server.saved = 0, {}
    line.server.crash()
    line.protocol.add(row(100.0))
    for _ in range(2):  # the refusal, then the first part
        line.send()
        line.serve()
        line.receive()
    before = len(line.server.rows)
    assert before == 100 - AS_SENT
    line.send()
    line.break_()
    line.settle()
    assert line.server.rows == [float(t) for t in range(101)]


def test_a_crash_amid_a_replay_begins_it_anew():
    line = fed(Line(session_at(), FakeServer()), 100)
    for saved in (20, 20, 60):
        line.server.saved = saved, {}
        line.server.crash()
        if not len(line.protocol):
            line.protocol.add(row(100.0))
        for _ in range(3):
            line.send()
            line.serve()
            line.receive()
        line.server.rows += [float(t) for t in range(len(line.server.rows), 70)]
    line.settle()
    assert line.server.rows == [float(t) for t in range(101)]


def test_rows_that_reached_it_in_other_requests_are_passed_over():
    line = fed(Line(session_at(), FakeServer()), 100)
    line.server.saved = 10, {}
    line.server.crash()
    line.protocol.add(row(100.0))
    line.send()
    line.serve()
    line.receive()
    line.server.rows += [float(t) for t in range(10, 80)]  # and nothing of it is remembered
    line.settle()
    assert line.server.rows == [float(t) for t in range(101)]


def test_rows_before_durable_t_are_not_kept():
    line = fed(Line(session_at(), FakeServer()), 50)
    line.server.save()
    fed(line, 1)
    kept = line.protocol.session
    assert (kept.durable_t, kept.replay_buffer.start, kept.t) == (50, 50, 51)


# What can't be gone on with.


def refused_for_good(line: Line, error: errors.StepstateError) -> None:
    line.send()
    line.replies.append(error)
    line.receive()


def test_missing_rows_are_named():
    line = fed(Line(session_at(resume_rows=30), FakeServer()), 100)
    line.server.saved = 50, {}
    line.server.crash()
    line.protocol.add(row(100.0))
    line.send()
    line.serve()
    line.receive()
    assert isinstance(line.protocol.error, errors.RowsMissing)
    assert (line.protocol.error.first, line.protocol.error.last) == (50, 70)
    assert not line.protocol.sendable
    assert line.server.rows == [float(t) for t in range(50)]


@pytest.mark.parametrize("known", [{}, {"durability": "none"}, {"durability": ""}])
def test_rows_that_were_never_here_are_missing(known: dict[str, str]):
    line = Line(session_at(t=9, at=5, **known), FakeServer())
    line.server.rows = [0.0] * 5
    line.protocol.add(row(1.0))
    line.send()
    line.serve()
    line.receive()
    assert isinstance(line.protocol.error, errors.RowsMissing)
    assert (line.protocol.error.first, line.protocol.error.last) == (5, 8)


def test_nothing_is_kept_of_a_session_that_can_not_be_resumed():
    line = fed(Line(session_at(durability="none"), FakeServer()), 50)
    assert len(line.protocol.session.replay_buffer) == 0


@pytest.mark.parametrize(
    "error",
    [
        errors.NonFiniteInput("a", 0, "a", "nan"),
        errors.StepMismatch("a", 0, 5),
        errors.StepTooOld("a", 0, 50),
        errors.SessionClosed("a", 3),
        errors.Internal("ab"),
    ],
)
def test_other_refusals_end_it(error: errors.StepstateError):
    line = Line(session_at(), FakeServer())
    line.protocol.add(row(1.0))
    refused_for_good(line, error)
    assert line.protocol.error is error
    assert line.protocol.ending
    with pytest.raises(type(error)):
        line.protocol.rest()
    assert line.protocol.drop() == 4


def test_an_error_of_the_application_comes_after_the_answers_before_it():
    line = Line(session_at(), FakeServer())
    for value in range(3):
        line.protocol.add(row(value))
    wrong = errors.InvalidField("x", "is wrong")
    line.protocol.end(wrong)
    assert line.protocol.ending
    for _ in range(3):
        assert line.protocol.error is None
        line.send()
        line.serve()
        line.receive()
    assert line.protocol.error is wrong
    alone = StepProtocol(session_at(), timeout=1.0)
    alone.end(wrong)
    assert alone.error is wrong


def test_rows_too_large_for_a_message_are_refused():
    protocol = StepProtocol(session_at(), timeout=1.0)
    with pytest.raises(errors.InvalidField, match="send several"):
        protocol.add(row(1.0, 4 * 2**20))
    protocol.add(row(1.0, MAX_BYTES // 4))
    assert len(protocol) == 1


# Time.


@pytest.mark.parametrize("error", [STALE, FULL, errors.ServerUnreachable("host:1", "gone")])
def test_it_gives_up_when_nothing_brings_it_on_for_the_timeout(
    ticking: Clock, error: errors.StepstateError
):
    protocol = StepProtocol(session_at(), timeout=10.0)
    protocol.add(row(1.0))
    began, waits = ticking(), 0
    while True:
        protocol.next()
        protocol.refused(error)
        if protocol.error is not None:
            break
        waits += 1
        ticking.advance(protocol.rest())
    assert protocol.error is error
    assert 8.0 < ticking() - began <= 10.0
    assert waits > 8


def test_every_answer_sets_the_clock_back(ticking: Clock):
    line = fed(Line(session_at(), FakeServer(), window=1), 100)
    line.server.saved = 0, {}
    line.server.crash()
    line.protocol.add(row(100.0))
    began = ticking()
    while len(line.protocol):
        for refusal in (FULL, None):
            line.send()
            line.serve(refusal)
            line.receive()
            ticking.advance(3.0 if refusal else 0.0)
            line.protocol.rest()
    assert ticking() - began > 60.0
    assert line.server.rows == [float(t) for t in range(101)]


def test_a_server_that_is_set_back_without_end_is_given_up(ticking: Clock):
    line = fed(Line(session_at(), FakeServer(), window=1), 3)
    line.protocol.add(row(3.0))
    while line.protocol.error is None:
        sent = line.protocol.next()
        line.protocol.refused(errors.StepAhead("a", sent.t + 1, 0))
        if line.protocol.error is None:
            ticking.advance(line.protocol.rest())
    assert isinstance(line.protocol.error, errors.StepAhead)


def test_a_request_may_take_what_is_left(ticking: Clock):
    protocol = StepProtocol(session_at(), timeout=10.0)
    protocol.add(row(1.0))
    assert protocol.left == 10.0
    protocol.next()
    ticking.advance(4.0)
    protocol.refused(FULL)
    ticking.advance(protocol.rest())
    assert protocol.left < 6.0
    protocol.next()
    assert protocol.answered(0) is not None
    assert protocol.left == 10.0
    ticking.advance(60.0)
    assert protocol.left == 0.001


# The session_at.


def test_a_place_that_the_server_tells_is_taken_unless_it_can_be_brought_up():
    kept = fed(Line(session_at(), FakeServer()), 20).protocol.session
    kept.update(info(8))
    assert kept.t == 20
    kept.update(info(25))
    assert kept.t == 25
    kept.update(info(25, durable_t=22))
    assert (kept.durable_t, kept.replay_buffer.start) == (22, 20)
    kept.update(info(8))
    assert kept.t == 8


def test_a_fork_keeps_the_same_rows_apart():
    source = fed(Line(session_at(), FakeServer()), 20).protocol.session
    fork = session_at(at=12)
    fork.continue_from(source, resume_rows=100)
    assert (fork.t, fork.replay_buffer.start, fork.replay_buffer.end) == (20, 0, 20)
    none = session_at(at=12, durability="none")
    none.continue_from(source, resume_rows=100)
    assert (none.t, len(none.replay_buffer)) == (20, 0)


# All ways at once.


class Trouble:
    """An application with rows to apply, and everything that can happen meanwhile."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.items = [row(float(n), chance.choice([1, 1, 1, 1, 2, 40])) for n in range(200)]
        self.starts = np.cumsum([0] + [len(item) for item in self.items]).tolist()
        self.server = FakeServer()
        self.line = Line(session_at(), self.server, window=chance.choice([1, 4, WINDOW]))
        self.given = 0
        self.got: list[SentRequest] = []

    @property
    def done(self) -> bool:
        return self.line.protocol.session.t == self.starts[-1]

    def happen(self) -> None:
        """One thing."""
        before = len(self.line.got)
        line = self.line
        chances = {
            self.add: 4,
            line.send: 6,
            line.serve: 6,
            line.receive: 6,
            line.take: 3,
            self.refuse: 0.3,
            self.server.save: 0.5,
            self.crash: 0.15,
            line.break_: 0.2,
            self.leave: 0.05,
        }
        self.chance.choices(list(chances), list(chances.values()))[0]()
        assert line.protocol.error is None, line.protocol.error
        if line.protocol.pause:
            line.protocol.resume()
        self.got += line.got[before:]

    def add(self) -> None:
        if self.given < len(self.items):
            self.line.protocol.add(self.items[self.given], last_only=True)
            self.given += 1

    def refuse(self) -> None:
        passing = [FULL, STALE, errors.StoreUnavailable("away"), errors.Draining()]
        self.line.serve(self.chance.choice(passing))

    def crash(self) -> None:
        self.server.crash()
        self.line.break_()

    def leave(self) -> None:
        """The application goes on from its t; some of what was in flight happens all the same."""
        while self.chance.random() < 0.5 and self.line.serve():
            pass
        kept = self.line.protocol.session
        self.line = Line(kept, self.server, window=self.line.window)
        self.given = self.starts.index(kept.t)


@pytest.mark.parametrize("seed", range(200))
def test_whatever_happens_each_row_is_applied_once_and_answered_once(seed: int):
    trouble = Trouble(seed)
    while not trouble.done:
        trouble.happen()
    assert [sent.t for sent in trouble.got] == trouble.starts[:-1]
    rows, want = trouble.server.rows, np.concatenate(trouble.items)[:, 0].tolist()
    assert rows == want[: len(rows)]  # it may have been set back after its last answer
    rest = trouble.line.protocol.session.replay_buffer.rows(len(rows), len(want) - 1)
    assert rest[:, 0].tolist() == want[len(rows) :]
