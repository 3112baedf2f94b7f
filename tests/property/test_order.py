"""What arrives first for a session is first in its line, by every door, whatever is asked for.

Requests arrive at the real doors, without sockets between, while the store answers after delays
that Hypothesis chooses: at any point of an opening, a load, a spill, a takeover or a close. Carried
out one by one in the order of their arrival they have one outcome each, and that is demanded:
outputs are compared with the network's, run over the rows in that order.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any
from unittest.mock import patch

import grpc
import numpy as np
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as triton_pb

from stepstate.budget import MemoryAccount
from stepstate.errors import StepstateError
from stepstate.h2grpc import MessageSink
from stepstate.metrics import RpcMetrics
from stepstate.stores import Durability
from stepstate.transport import StepstateServicer, bidi
from stepstate.transport.bidi import AnyStream
from stepstate.transport.packed import PackedStream
from stepstate.transport.steps import StepStream
from stepstate.transport.triton.service import TritonService
from stepstate.transport.triton.stream import InferStream
from stepstate.v1 import stepstate_pb2 as pb
from tests.hypothesis_profiles import examples
from tests.integration.packed import packed
from tests.integration.triton import infer, tensor
from tests.integration.wire import refusal_of
from tests.networks import make_network
from tests.unit.rig import Clock, Lasting, Rig, model_of, opening
from tests.unit.transport.contexts import called

NETWORK = make_network("ordered", hidden=4, layers=1, seed=13)
NETWORK.manifest["outputs"] = [{"name": name, "horizons": [1]} for name in ("y0", "y1")]
MODEL = model_of(NETWORK)
NAMES = ("a", "b", "c")
SHORT_IDLE_SECONDS = 5.0
HANG = 3.0
CLOSE = 1e-4
STEPS = ("Step", "StreamSteps", "StreamPacked", "ModelInfer", "ModelStreamInfer")
TWO_ROWS = "StreamPacked twice"
STREAMS: dict[str, tuple[type[Message], type[Message]]] = {
    "StreamSteps": (pb.StepRequest, pb.StepResponse),
    "StreamPacked": (pb.StreamPackedRequest, pb.StreamPackedResponse),
    "ModelStreamInfer": (triton_pb.ModelInferRequest, triton_pb.ModelStreamInferResponse),
}
KINDS = (
    *STEPS,
    TWO_ROWS,
    *("OpenSession", "CloseSession", "ExportSession", "ForkSession", "Forecast", "GetSession"),
    *("RestoreSession", "ResetAccuracy"),
    *("ModelInfer start", "ModelStreamInfer start", "ModelInfer end", "ModelStreamInfer end"),
)
STATES = ("unknown", "resident", "spilled", "elsewhere", "expired")
GONE = {"SESSION_UNKNOWN", "SESSION_CLOSED", "SESSION_EXPIRED", "SEQUENCE_NOT_STARTED"}


class Delayed(Lasting):
    """Does what it is asked, and answers it, some turns of the loop later."""

    def __init__(self, clock: Clock, delays: Sequence[int]) -> None:
        super().__init__(clock)
        self._delays = deque(delays)

    async def _pause(self) -> None:
        self._delays.rotate()
        for _ in range(self._delays[0]):
            await asyncio.sleep(0)

    async def create(self, record, **options):
        await self._pause()
        made = await super().create(record, **options)
        await self._pause()
        return made

    async def acquire(self, session_id, **options):
        await self._pause()
        found = await super().acquire(session_id, **options)
        await self._pause()
        return found

    async def find(self, session_id):
        await self._pause()
        return await super().find(session_id)

    async def save(self, saves):
        await self._pause()
        verdicts = await super().save(saves)
        await self._pause()
        return verdicts

    async def expire(self, saves, *, delete_at):
        await self._pause()
        verdicts = await super().expire(saves, delete_at=delete_at)
        await self._pause()
        return verdicts

    async def restore(self, key, epoch, **options):
        await self._pause()
        restored = await super().restore(key, epoch, **options)
        await self._pause()
        return restored

    async def end(self, session_id, epoch, ending):
        await self._pause()
        ended = await super().end(session_id, epoch, ending)
        await self._pause()
        return ended


@dataclass(frozen=True)
class Arrival:
    """A request, as Hypothesis chooses it."""

    kind: str
    name: str
    pause: int
    """Turns of the loop until the next one arrives; 0: in the same turn, if by another call."""
    gives_up: int
    """Turns after which its caller gives up; 0: it does not."""

    @property
    def may_give_up(self) -> bool:
        return self.gives_up > 0 and self.kind in (
            "Step",
            "ModelInfer",
            "ExportSession",
            "Forecast",
        )


class Wire:
    """The two sides of a streaming call, without a wire.

    What its client has sent comes although the call is paused, as with HTTP/2, and every other
    reply waits before it leaves.
    """

    def __init__(self, request: type[Message], reply: type[Message]) -> None:
        self.counts = RpcMetrics()
        self.decode = request.FromString
        self.replies: list[Any] = []
        self._reply = reply
        self._sent: deque[Any] = deque()
        self._sink: MessageSink | None = None

    @staticmethod
    def encode(reply: Message | bytes) -> bytes:
        return reply if isinstance(reply, bytes) else reply.SerializeToString()

    # The client's side

    def write(self, message: Any) -> None:
        """Sends a message, or `grpc.aio.EOF`."""
        self._sent.append(message)
        asyncio.get_running_loop().call_soon(self._hand_over)

    def _hand_over(self) -> None:
        while self._sent and self._sink is not None:
            message = self._sent.popleft()
            if message is grpc.aio.EOF:
                self._sink.half_closed()
            else:
                self._sink.received(message.SerializeToString())

    # The server's side: see `MessageChannel`

    def attach(self, sink: MessageSink) -> None:
        self._sink = sink
        self._hand_over()

    def detach(self) -> None:
        self._sink = None

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def send(self, reply: bytes) -> bool:
        self.replies.append(self._reply.FromString(reply))
        left = bool(len(self.replies) % 2)
        if not left:
            asyncio.get_running_loop().call_soon(self._leave)
        return left

    def _leave(self) -> None:
        if self._sink is not None:
            self._sink.writable()


@dataclass
class Doors:
    """A server's doors, and the calls that are open."""

    rig: Rig
    rows: np.ndarray
    calls: dict[int, asyncio.Task[Any]] = field(default_factory=dict)
    asked: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        backend = called(self.rig)
        self.native = StepstateServicer(backend)
        self.triton = TritonService(backend, MemoryAccount(self.rig.memory))
        self.wires = {kind: Wire(*types) for kind, types in STREAMS.items()}
        streams: list[AnyStream] = [
            StepStream(backend, self.wires["StreamSteps"]),
            PackedStream(backend, self.wires["StreamPacked"]),
            InferStream(
                backend,
                self.wires["ModelStreamInfer"],
                self.triton.sequences,
                self.triton.expected,
            ),
        ]
        self.streams = [asyncio.create_task(stream.run()) for stream in streams]
        self.wires["StreamPacked"].write(
            packed([], None, np.zeros((0, 3)), bind=dict(enumerate(NAMES)))
        )

    def arrive(self, place: int, kind: str, name: str) -> None:
        """Lets request number `place` arrive."""
        kind, _, flag = kind.partition(" ")
        x = self.rows[place]
        if kind in self.wires:
            self.asked[kind].append((place, name))
            self.wires[kind].write(self._message(place, kind, name, flag))
        elif kind == "ModelInfer":
            request = infer("ordered", name, x, **_flags(flag))
            self.calls[place] = asyncio.create_task(self.triton.ModelInfer(request, None))
        else:
            request = getattr(pb, f"{kind}Request")()
            if kind == "Forecast":
                request.session_id.append(name)
                request.horizon = 1
            elif kind == "OpenSession":
                request.session_id, request.durability = name, pb.DURABILITY_SYNC
            else:
                request.session_id = name
            if kind == "Step":
                request.x.extend(x.tolist())
            if kind == "ForkSession":
                request.new_session_id = f"fork-{place}"
            self.calls[place] = asyncio.create_task(getattr(self.native, kind)(request, None))

    def _message(self, place: int, kind: str, name: str, flag: str) -> Any:
        x = self.rows[place]
        if kind == "StreamSteps":
            return pb.StepRequest(session_id=name, x=x)
        if kind == "StreamPacked":
            handle = NAMES.index(name)
            if flag:  # the second row waits until the first is done
                return packed([handle, handle], None, np.stack((x, -x)), id=place)
            return packed([handle], None, x, id=place)
        return infer("ordered", name, x, request_id=str(place), **_flags(flag))

    async def outcomes(self) -> dict[int, object]:
        """Of every request: y, a t, or the reason of an error."""
        for wire in self.wires.values():
            wire.write(grpc.aio.EOF)
        async with asyncio.timeout(HANG):
            await asyncio.gather(*self.streams)
            results = await asyncio.gather(*self.calls.values(), return_exceptions=True)
        found = dict(zip(self.calls, map(_told, results), strict=True))
        for name in NAMES:  # replies of one session come in the order of its requests
            places = [place for place, asked in self.asked["StreamSteps"] if asked == name]
            replies = [r for r in self.wires["StreamSteps"].replies if r.session_id == name]
            for place, reply in zip(places, replies, strict=True):
                found[place] = _reason(reply.error) if reply.HasField("error") else _y(reply.y)
        for reply in self.wires["StreamPacked"].replies[1:]:
            failed = [_reason(error.status) for error in reply.errors]
            found[reply.id] = failed[0] if failed else _y(np.frombuffer(reply.y, "<f4")[-2:])
        for name in NAMES:
            places = [place for place, asked in self.asked["ModelStreamInfer"] if asked == name]
            replies = [
                reply
                for reply in self.wires["ModelStreamInfer"].replies
                if int(reply.infer_response.id) in places
            ]
            assert [int(reply.infer_response.id) for reply in replies] == places
            for place, reply in zip(places, replies, strict=True):
                gone = reply.error_message
                found[place] = "GONE" if gone else _y(tensor(reply.infer_response).ravel())
        return found


def _flags(flag: str) -> dict[str, bool]:
    return {f"sequence_{flag}": True} if flag else {}


def _reason(status: Any) -> str:
    return _gone(refusal_of(status).reason)


def _gone(reason: str) -> str:
    return "GONE" if reason in GONE else reason


def _y(values: Iterable[float]) -> np.ndarray:
    return np.asarray(list(values), np.float32)


def _told(result: Any) -> object:
    if isinstance(result, asyncio.CancelledError):
        return "GIVEN UP"
    if isinstance(result, StepstateError):
        return _gone(result.reason)
    if isinstance(result, BaseException):
        raise result
    if isinstance(result, pb.StepResponse):
        return _y(result.y)
    if isinstance(result, pb.ForecastResponse):
        return result.forecasts[0].t
    if hasattr(result, "session"):
        return result.session.t
    return _y(tensor(result).ravel())


class OneByOne:
    """What requests come to that are carried out one after the other."""

    def __init__(
        self, rows: np.ndarray, opened: dict[str, list[int]], expired: dict[str, list[int]]
    ) -> None:
        self._x = rows
        self.open = {name: list(places) for name, places in opened.items()}
        self.expired = {name: list(places) for name, places in expired.items()}

    def outcome(self, place: int, kind: str, name: str) -> object:
        """Carries a request out."""
        rows = self.open.get(name)
        if kind == "OpenSession":
            self.open.setdefault(name, [])
            self.expired.pop(name, None)
            return 0 if rows is None else "SESSION_EXISTS"
        if kind == "RestoreSession":
            if rows is None and name in self.expired:
                self.open[name] = self.expired.pop(name)
                return len(self.open[name])
            return "GONE" if rows is None else "SESSION_EXISTS"
        if kind.endswith("start"):
            rows = self.open[name] = []
            self.expired.pop(name, None)
        if rows is None:
            return "GONE"
        if kind.startswith(STEPS):
            rows += (place, -place) if kind == TWO_ROWS else (place,)
            told: object = self._y(name)
        else:
            told = "FORECAST_IMPOSSIBLE" if kind == "Forecast" and not rows else len(rows)
        if kind.endswith("end") or kind == "CloseSession":
            del self.open[name]
        return told

    def _y(self, name: str) -> np.ndarray:
        x = [self._x[place] if place >= 0 else -self._x[-place] for place in self.open[name]]
        return NETWORK.offline(np.stack(x))[-1]


async def carry_out(
    states: Sequence[str],
    durability: Durability,
    delays: Sequence[int],
    arrivals: Sequence[Arrival],
) -> None:
    """Lets requests arrive, and checks what they came to."""
    surprises: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: surprises.append(told))
    rows = np.random.default_rng(len(arrivals)).normal(size=(len(arrivals) + 10, 3))
    rows = rows.astype(np.float32)
    clock = Clock()
    store = Delayed(clock, delays)
    rig = Rig(MODEL, store=store, clock=clock, max_sessions=3)
    opened, expired = await prepare(
        rig, store, states, durability=durability, rows=rows, first=len(arrivals) + 1
    )
    doors = Doors(rig, rows)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    used: set[str] = set()  # streams, in this turn: a second message would come before the others
    for place, one in enumerate(arrivals, 1):
        pause = one.pause + one.gives_up * one.may_give_up
        stream = one.kind.partition(" ")[0]
        if stream in used:
            await _turns(1, used)
        doors.arrive(place, one.kind, one.name)
        used |= {stream} & set(STREAMS)
        await _turns(pause, used)
        if one.may_give_up:
            doors.calls[place].cancel()
    found = await doors.outcomes()
    given_up = [
        place for place, told in found.items() if isinstance(told, str) and told == "GIVEN UP"
    ]
    problems = []
    for applied in product((True, False), repeat=len(given_up)):
        skipped = {place for place, yes in zip(given_up, applied, strict=True) if not yes}
        problem = _problem(arrivals, found, OneByOne(rows, opened, expired), skipped)
        if problem is None:
            break
        problems.append(problem)
    else:
        raise AssertionError(problems)
    async with asyncio.timeout(HANG):  # a load may go on that nobody waits for any more
        await rig.settle(*NAMES)
    assert not rig.left_over()
    assert not surprises


async def _turns(count: int, used: set[str]) -> None:
    for _ in range(count):
        await asyncio.sleep(0)
        used.clear()


def _problem(
    arrivals: Sequence[Arrival], found: dict[int, object], model: OneByOne, skipped: set[int]
) -> str | None:
    """The first outcome that is not that of its turn."""
    for place, one in enumerate(arrivals, 1):
        if place in skipped:
            continue
        expected = model.outcome(place, one.kind, one.name)
        told = found[place]
        if isinstance(told, str) and told == "GIVEN UP":
            continue
        if one.kind == "GetSession" and isinstance(told, int) and isinstance(expected, int):
            same = told <= expected  # it tells where a session stands, without a wait for its steps
        elif isinstance(told, np.ndarray) and isinstance(expected, np.ndarray):
            same = bool(np.abs(told - expected).max() <= CLOSE)
        else:
            same = type(told) is type(expected) and told == expected
        if not same:
            return f"{place}: {one} told {told}, expected {expected}"
    return None


async def prepare(
    rig: Rig,
    store: Delayed,
    states: Sequence[str],
    *,
    durability: Durability,
    rows: np.ndarray,
    first: int,
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Brings each session into its state; returns the rows of those that are open, and expired."""
    opened: dict[str, list[int]] = {}
    expired: dict[str, list[int]] = {}
    other = Rig(MODEL, store=store, clock=rig.clock, owner="other")
    for number, (name, state) in enumerate(zip(NAMES, states, strict=True)):
        if state == "unknown":
            continue
        idle = SHORT_IDLE_SECONDS if state == "expired" else None
        where = other if state in ("spilled", "elsewhere") else rig
        kept = Durability.SYNC if state == "elsewhere" else durability
        session = await where.sessions.open(opening(name, idle=idle, durability=kept))
        for place in range(first + 3 * number, first + 3 * number + number):
            await where.step(session, rows[place])
        if state == "spilled":
            await where.sessions.writer.save([session], release=True)
        told_of = expired if state == "expired" else opened
        told_of[name] = list(range(first + 3 * number, first + 3 * number + number))
    rig.clock.advance(SHORT_IDLE_SECONDS)
    return opened, expired


ARRIVALS = st.builds(
    Arrival,
    st.sampled_from(STEPS) | st.sampled_from(KINDS) | st.just(TWO_ROWS),
    st.sampled_from("aaaabc"),
    st.sampled_from([0, 0, 0, 1, 2, 3, 6]),
    st.sampled_from([0, 0, 0, 0, 1, 3, 6]),
)


@examples(150)
@given(
    states=st.tuples(*[st.sampled_from(STATES)] * len(NAMES)),
    durability=st.sampled_from([Durability.SYNC, Durability.ASYNC]),
    delays=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    arrivals=st.lists(ARRIVALS, min_size=2, max_size=24),
)
def test_every_request_finds_its_session_as_those_before_it_left_it(
    states: tuple[str, ...], durability: Durability, delays: list[int], arrivals: list[Arrival]
) -> None:
    if sum(one.may_give_up for one in arrivals) > 6:
        arrivals = [Arrival(one.kind, one.name, one.pause, 0) for one in arrivals]
    asyncio.run(carry_out(states, durability, delays, arrivals))


PACKED_ARRIVALS = st.builds(
    Arrival,
    st.sampled_from(["StreamPacked", TWO_ROWS, TWO_ROWS, *KINDS]),
    st.just("a"),
    st.sampled_from([0, 0, 1, 2, 9]),
    st.just(0),
)


@examples(200)
@given(
    delays=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    arrivals=st.lists(PACKED_ARRIVALS, min_size=3, max_size=16),
)
def test_packed_rows_that_go_straight_or_wait_for_each_other_are_in_the_line_too(
    delays: list[int], arrivals: list[Arrival]
) -> None:
    states = ("resident", "unknown", "unknown")
    asyncio.run(carry_out(states, Durability.ASYNC, delays, arrivals))


@examples(150)
@given(
    kind=st.sampled_from(list(STREAMS)),
    most=st.integers(1, 4),
    states=st.tuples(*[st.sampled_from(STATES)] * len(NAMES)),
    delays=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    sent=st.lists(
        st.tuples(st.sampled_from("aaaabc"), st.sampled_from([0, 0, 0, 1, 3])),
        min_size=3,
        max_size=24,
    ),
)
def test_a_stream_that_is_full_keeps_its_order(
    kind: str, most: int, states: tuple[str, ...], delays: list[int], sent: list[tuple[str, int]]
) -> None:
    arrivals = [Arrival(kind, name, pause, 0) for name, pause in sent]
    with patch.object(bidi, "MAX_UNANSWERED", most):
        asyncio.run(carry_out(states, Durability.SYNC, delays, arrivals))
