"""An honest client in a process of its own: a few sessions that step at a steady rate.

It retries nothing: whatever a server refuses counts as an error. A step's latency is counted from
when it was due, so a server that stops for ten seconds shows in every step of these seconds.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import grpc
import numpy as np

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.attacks.processes import in_child
from tests.networks import Network

SESSIONS = 4
PERIOD_SECONDS = 0.04
ANSWER_SECONDS = 40.0
"""A step without an answer after this is an error."""
MODEL, INPUTS = "lstm", 3

Metadata = tuple[tuple[str, str], ...]
"""Of calls."""


@dataclass(slots=True)
class Record:
    """What the client was given; times are those of `time.monotonic`, which processes share."""

    steps: list[tuple[float, float]] = field(default_factory=list)
    """When each answered step was due, and when it was answered."""
    errors: list[str] = field(default_factory=list)
    y: dict[str, list[list[float]]] = field(default_factory=dict)
    """The outputs of each session."""

    def p99(self, start: float, end: float) -> float:
        """Seconds, of the steps that were due in this time; infinite if there were none."""
        late = [answered - due for due, answered in self.steps if start <= due < end]
        return float(np.percentile(late, 99)) if late else float("inf")

    def served_again(self, moment: float) -> float:
        """Seconds from a moment to the first answer after it."""
        return min((done for _, done in self.steps if done >= moment), default=np.inf) - moment

    def wrong(self, network: Network) -> list[str]:
        """What is wrong with the outputs, compared with the whole sequence in PyTorch."""
        wrong = []
        for name, got in self.y.items():
            want = network.offline(rows(name, len(got)))
            if not np.allclose(np.array(got), want, rtol=0, atol=1e-5):
                wrong.append(f"{name} has other outputs than torch.nn.LSTM")
        return wrong


def rows(name: str, count: int) -> np.ndarray:
    """The first rows [T, D] that a session sends."""
    random = np.random.default_rng(int(name.rpartition("-")[2]))
    return random.standard_normal((count, INPUTS)).astype(np.float32)


class _Session:
    """One session, stepped by unary calls or on a stream."""

    def __init__(
        self,
        stub: StepstateServiceStub,
        name: str,
        record: Record,
        *,
        streams: bool,
        metadata: Metadata = (),
    ) -> None:
        self._stub = stub
        self._metadata = metadata
        self._name = name
        self._record = record
        self._streams = streams
        self._stream: grpc.aio.StreamStreamCall | None = None
        self._y: list[list[float]] = []
        record.y[name] = self._y

    async def run(self, stopping: asyncio.Event) -> None:
        opening = pb.OpenSessionRequest(session_id=self._name, model=MODEL)
        await self._stub.OpenSession(opening, metadata=self._metadata)
        x = rows(self._name, 10_000)
        due = time.monotonic()
        while not stopping.is_set():
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            t = len(self._y)
            request = pb.StepRequest(session_id=self._name, t=t, x=x[t])
            try:
                reply = await asyncio.wait_for(self._ask(request), ANSWER_SECONDS)
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                self._fail(t, error)
            else:
                self._note(reply, t, due)
            due += PERIOD_SECONDS

    async def _ask(self, request: pb.StepRequest) -> pb.StepResponse:
        if not self._streams:
            return await self._stub.Step(request, metadata=self._metadata)
        if self._stream is None:
            self._stream = self._stub.StreamSteps(metadata=self._metadata)
        await self._stream.write(request)
        reply = await self._stream.read()
        if reply is grpc.aio.EOF:
            await self._stream.code()
            raise TimeoutError("the stream ended")
        return reply

    def _fail(self, t: int, error: Exception) -> None:
        self._stream = None
        code = error.code() if isinstance(error, grpc.aio.AioRpcError) else ""
        text = error.details() if isinstance(error, grpc.aio.AioRpcError) else repr(error)
        self._record.errors.append(f"{self._name} t={t}: {code} {str(text)[:200]}")

    def _note(self, reply: pb.StepResponse, t: int, due: float) -> None:
        if reply.HasField("error"):
            self._record.errors.append(f"{self._name} t={t}: {reply.error.message[:200]}")
        elif reply.t != t + 1:
            self._record.errors.append(f"{self._name}: t={reply.t} after the step of t={t}")
        else:
            self._y.append(list(reply.y))
            self._record.steps.append((due, time.monotonic()))


async def _step_until_told(address: str, metadata: Metadata, parent: Connection) -> Record:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_reader(parent.fileno(), stopping.set)
    record = Record()
    async with grpc.aio.insecure_channel(address) as channel, asyncio.TaskGroup() as group:
        stub = StepstateServiceStub(channel)
        for place in range(SESSIONS):
            streams = place % 2 == 1
            one = _Session(
                stub,
                f"honest-{time.monotonic_ns()}-{place}",
                record,
                streams=streams,
                metadata=metadata,
            )
            group.create_task(one.run(stopping))
    return record


def _main(address: str, metadata: Metadata, parent: Connection) -> None:
    parent.send(asyncio.run(_step_until_told(address, metadata, parent)))


class Honest:
    """The client, seen from the test."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def stop(self) -> Record:
        """Ends it."""
        self._connection.send("stop")
        if not await asyncio.to_thread(self._connection.poll, 2 * ANSWER_SECONDS):
            raise TimeoutError("the honest client does not end")
        record: Record = self._connection.recv()
        return record


@contextmanager
def honest_client(address: str, metadata: Metadata = ()) -> Iterator[Honest]:
    """The client steps inside the block; `metadata`: of its calls."""
    mine, its = multiprocessing.Pipe()
    with in_child(_main, address, metadata, its):
        its.close()
        yield Honest(mine)
