"""Rows that are recognized by their bytes and rows that are parsed come to the same.

Two servers get the same operations, one after the other, each with all its messages in one write.
Their replies have the same bytes, and so have the sessions afterwards.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from stepstate import server as server_module
from stepstate.config import ServerConfig
from stepstate.sessions import SingleRow
from stepstate.sessions.snapshots.writer import SnapshotWriter
from stepstate.transport.steps import StepStream
from stepstate.uptime import UptimeClock
from stepstate.v1 import stepstate_pb2 as pb
from tests.hypothesis_profiles import examples
from tests.property.requests import REPLAY_ROWS, UNKNOWN_FIELD, WAYS, SessionClient, write_models
from tests.property.two_servers import (
    CONNECTIONS,
    Message,
    Side,
    assert_same_replies,
    assert_same_session,
    running_side,
    told,
)
from tests.unit.rig import Clock

SHORT_IDLE_SECONDS, LONG_IDLE_SECONDS = 5, 3600
SESSIONS = 4
LIMITS = {"replay_rows": REPLAY_ROWS, "chunk_rows": 8, "batch_rows": 6, "backlog_rows": 20}
"""So low that all of them are reached."""
START = Timestamp(seconds=1_700_000_000)


class Pair:
    """Both servers, on a loop and a clock of their own."""

    def __init__(self, runner: asyncio.Runner, clock: Clock, sides: tuple[Side, Side]) -> None:
        self.runner = runner
        self.clock = clock
        self.sides = sides
        self.numbers = itertools.count()
        self.fast_rows = 0
        """Applied on the fast path."""

    @property
    def durable(self) -> bool:
        """Whether they have a store that outlives them."""
        return self.sides[0].server.sessions.store.backend.durable


@pytest.fixture(scope="module", params=["memory:", "sqlite:"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """Time passes, and what is due is saved and swept, only where an operation says so."""
    root = tmp_path_factory.mktemp("both")
    write_models(root / "models")
    config = ServerConfig(
        models=root / "models",
        listen="127.0.0.1:0",
        metrics_listen="127.0.0.1:0",
        snapshot_interval=3600.0,
        drain_seconds=5.0,
        **LIMITS,
    )
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as runner:
        patch.setattr(server_module, "UPTIME", UptimeClock(clock))
        frozen = SimpleNamespace(time=clock, perf_counter=time.perf_counter)
        patch.setattr(server_module, "time", frozen)
        patch.setattr(server_module, "SWEEP_SECONDS", 3600.0)
        patch.setattr(server_module, "HEARTBEAT_SECONDS", 3600.0)
        patch.setattr(SnapshotWriter, "request_flush", lambda _: None)
        stack = AsyncExitStack()

        def start(name: str, suffix: bytes) -> Side:
            store = f"sqlite:{root / name}.db" if request.param == "sqlite:" else request.param
            side = running_side(replace(config, store=store), suffix)
            return runner.run(stack.enter_async_context(side))

        both = Pair(runner, clock, (start("straight", b""), start("parsed", UNKNOWN_FIELD)))
        deliver_row = StepStream.deliver_row

        def noted(stream: StepStream, row: SingleRow, y: bytes, durable_t: int) -> None:
            both.fast_rows += 1
            deliver_row(stream, row, y, durable_t)

        patch.setattr(StepStream, "deliver_row", noted)
        yield both
        runner.run(stack.aclose())
        assert both.fast_rows > 100


@dataclass(frozen=True, slots=True)
class Options:
    """Of a session."""

    model: str
    durability: pb.Durability
    missing: pb.MissingPolicy
    idle_seconds: int


@dataclass(frozen=True, slots=True)
class Row:
    """A message: of which session, in which way, on its own stream or on one with others."""

    session: int
    way: str
    shared: bool


@dataclass(frozen=True, slots=True)
class Read:
    """Messages that are sent at once."""

    rows: tuple[Row, ...]
    swapped: bool
    """Whether sessions have changed their connection."""
    lost: int | None
    """The session whose stream is cancelled with them."""
    last: int | None
    """The session whose stream is half-closed with them."""


@dataclass(frozen=True, slots=True)
class Between:
    """Something else that is done, while nothing is under way."""

    session: int
    what: str


Operations = Sequence[Read | Between]


class Story:
    """The sessions of one example, and what is done with them on both servers.

    Args:
        pair: the servers.
        options: of each session.
        exact: outputs have the same bits, since all rows are alone in their batch.
        connections: that are used. With two, each has its share of the loop, and the order of
            messages on several streams is not promised.
    """

    def __init__(
        self, pair: Pair, options: Sequence[Options], *, exact: bool, connections: int
    ) -> None:
        number = next(pair.numbers)
        self._pair = pair
        self._options = options
        self._exact = exact
        self._connections = connections
        self._clients = [
            SessionClient(f"s{number}-{seed}", one.model, seed, one.missing > 1)
            for seed, one in enumerate(options)
        ]
        self._cancels = False

    async def tell(self, operations: Operations) -> None:
        before = [side.counted() for side in self._pair.sides]
        try:
            for place in range(SESSIONS):
                await self.open(place)
            for operation in operations:
                self._look()
                if isinstance(operation, Read):
                    await self._read(operation)
                else:
                    await BETWEEN[operation.what](self, operation.session)
            await self._compare(before)
        finally:
            for side in self._pair.sides:
                side.reset_calls()
        for one in self._clients:
            await self._both(lambda side, name=one.name: close(side, name))

    def _look(self) -> None:
        """What clients know of t when all is answered."""
        for one in self._clients:
            t = self._pair.sides[0].t(one.name)
            one.t = one.t if t is None else t

    async def _both(self, do: Callable[[Side], object]) -> None:
        """Does something on both servers; it comes to the same."""
        ours, theirs = [await do(side) for side in self._pair.sides]
        assert ours == theirs

    # Messages

    async def _read(self, read: Read) -> None:
        shared = {row.session: row.shared for row in reversed(read.rows)}
        if self._connections == 1:
            messages = [self._message(read, row, shared=row.shared) for row in read.rows]
        else:
            messages = [self._message(read, row, shared=shared[row.session]) for row in read.rows]
        gone, ended = (
            "" if place is None else self._clients[place].name for place in (read.lost, read.last)
        )
        await self._send(messages, lost=gone, last=ended if ended != gone else "")
        lost = [message for message in messages if message.stream == gone]
        if lost:  # some of its rows were applied, and are replayed now
            self._cancels = True
            await self._send(lost, clean=without_history)

    def _message(self, read: Read, row: Row, *, shared: bool) -> Message:
        """A message; a stream that is cancelled has nothing but rows, and all of its session."""
        one, lost = self._clients[row.session], row.session == read.lost
        return Message(
            (row.session + read.swapped) % self._connections,
            "shared" if shared and not lost else one.name,
            WAYS["row" if lost else row.way](one),
        )

    async def _send(
        self,
        messages: Sequence[Message],
        *,
        lost: str = "",
        last: str = "",
        clean: Callable[[bytes], bytes] = bytes,
    ) -> None:
        found = []
        for side in self._pair.sides:
            sent = [message._replace(data=message.data + side.suffix) for message in messages]
            replies = await side.send(sent, lost=lost, last=last)
            found.append({stream: list(map(clean, some)) for stream, some in replies.items()})
        assert_same_replies(*found, exact=self._exact)

    # What is done between

    async def open(self, place: int) -> None:
        one, options = self._clients[place], self._options[place]
        one.t = 0
        request = pb.OpenSessionRequest(
            session_id=one.name,
            model=options.model,
            start_time=START,
            durability=options.durability if self._pair.durable else pb.DURABILITY_NONE,
            missing=options.missing,
            idle_timeout=Duration(seconds=options.idle_seconds),
        )
        await self._both(lambda side: told(side.stub.OpenSession(request)))

    async def close(self, place: int) -> None:
        await self._both(lambda side: close(side, self._clients[place].name))

    async def restore(self, place: int) -> None:
        request = pb.RestoreSessionRequest(session_id=self._clients[place].name)
        await self._both(lambda side: told(side.stub.RestoreSession(request)))

    async def wait(self, _: int) -> None:
        self._pair.clock.advance(SHORT_IDLE_SECONDS / 2)
        server_module.UPTIME.heartbeat()
        await self._both(lambda side: side.server.sessions.heartbeat())

    async def sweep(self, _: int) -> None:
        await self._both(lambda side: side.server.sessions.sweep())

    async def save(self, place: int) -> None:
        await self._both(lambda side: side.save(self._clients[place].name, release=False))

    async def spill(self, place: int) -> None:
        await self._both(lambda side: side.save(self._clients[place].name, release=True))

    async def replace(self, place: int) -> None:
        """Opens one like it in its place, with another id; its stream still names the closed one.

        Then the other one is forgotten, so that rows of the closed one must be refused.
        """
        one = self._clients[place]
        await self._both(lambda side: side.replace(one.name, f"{one.name}-"))

    async def take_over(self, place: int) -> None:
        """The session goes on under another id."""
        await self.replace(place)
        self._clients[place].name += "-"

    async def _step_by(self, place: int, step: Callable[[Side, bytes], object]) -> None:
        message = WAYS["row"](self._clients[place])
        found = [{"": [await step(side, message + side.suffix)]} for side in self._pair.sides]
        assert_same_replies(*found, exact=self._exact)

    async def step_alone(self, place: int) -> None:
        await self._step_by(place, Side.step)

    async def step_packed(self, place: int) -> None:
        await self._step_by(place, Side.packed_step)

    # The end

    async def _compare(self, before: Sequence[dict[str, int]]) -> None:
        for side in self._pair.sides:
            await side.end_calls()
        for one in self._clients:
            ours, theirs = [side.numbers(one.name) for side in self._pair.sides]
            assert ours == theirs
            found = [await side.snapshot(one.name) for side in self._pair.sides]
            assert_same_session(*found, exact=self._exact)
        for side in self._pair.sides:
            assert not any(side.held().values()), side.held()
        ours, theirs = (
            {what: count - old[what] for what, count in side.counted().items()}
            for side, old in zip(self._pair.sides, before, strict=True)
        )
        assert ours == theirs or self._cancels


BETWEEN = {
    "wait": Story.wait,
    "sweep": Story.sweep,
    "open": Story.open,
    "close": Story.close,
    "restore": Story.restore,
    "save": Story.save,
    "spill": Story.spill,
    "replace": Story.replace,
    "take over": Story.take_over,
    "unary step": Story.step_alone,
    "packed step": Story.step_packed,
}


async def close(side: Side, session_id: str) -> str:
    return await told(side.stub.CloseSession(pb.CloseSessionRequest(session_id=session_id)))


def without_history(reply: bytes) -> bytes:
    """A reply without what tells whether its row was applied before."""
    message = pb.StepResponse.FromString(reply)
    message.ClearField("replayed")
    message.ClearField("durable_t")
    return message.SerializeToString()


options = st.builds(
    Options,
    st.sampled_from(["lstm", "lstm", "lstm", "gru", "projected", "timed", "sensor1", "steep"]),
    st.sampled_from([pb.DURABILITY_NONE, *[pb.DURABILITY_ASYNC] * 2, pb.DURABILITY_SYNC]),
    st.sampled_from([*[pb.MISSING_POLICY_REJECT] * 2, pb.MISSING_POLICY_HOLD, 2]),
    st.sampled_from([SHORT_IDLE_SECONDS, LONG_IDLE_SECONDS]),
)
sessions = st.integers(0, SESSIONS - 1)
seldom = st.sampled_from([*[False] * 5, True])
seldom_one = st.none() | st.none() | st.none() | sessions
ways = st.sampled_from([*["row"] * 3 * len(WAYS), *WAYS])
rows = st.builds(Row, sessions, ways, seldom)
between = st.builds(Between, sessions, st.sampled_from([*BETWEEN, "wait", "save", "open", "open"]))
one_row = st.builds(Read, st.tuples(rows), seldom, seldom_one, seldom_one)
reads = st.builds(
    Read, st.lists(rows, min_size=1, max_size=16).map(tuple), seldom, seldom_one, seldom_one
)


four = st.tuples(*[options] * SESSIONS)
connections = st.integers(1, CONNECTIONS)


@examples(40)
@given(
    opened=four,
    connections=connections,
    operations=st.lists(one_row | one_row | between, min_size=20, max_size=60),
)
def test_rows_one_by_one_are_the_same_to_the_bit(
    pair: Pair, opened: tuple[Options, ...], connections: int, operations: list[Read | Between]
) -> None:
    story = Story(pair, opened, exact=True, connections=connections)
    pair.runner.run(story.tell(operations))


@examples(80)
@given(
    opened=four,
    connections=connections,
    operations=st.lists(reads | reads | between, min_size=8, max_size=20),
)
def test_rows_that_come_together_are_the_same(
    pair: Pair, opened: tuple[Options, ...], connections: int, operations: list[Read | Between]
) -> None:
    """Several rows of a session, of several models, on several streams and connections."""
    story = Story(pair, opened, exact=False, connections=connections)
    pair.runner.run(story.tell(operations))
