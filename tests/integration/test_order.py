"""Calls sent one after the other without waiting are applied as they arrive, on real servers.

gRPC itself hands a few of 10,000 unary calls to its server's handlers in another order than they
were sent in, also of a server that does nothing. So the order in which they arrive is noted where
they enter, and sequences that gRPC mixed up are counted, and not compared.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient import grpc as triton_client

from stepstate.config import ServerConfig
from stepstate.server import running_server
from stepstate.transport import RpcInterceptor
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.triton import inputs
from tests.networks import Network
from tests.redis_process import redis_process

pytestmark = pytest.mark.transports

SEQUENCES = int(os.environ.get("ORDER_SEQUENCES", "100"))
STEPS = 4
IN_FLIGHT = 300
"""Sequences; all calls of each are sent at once."""
SLOTS = 32
HANG = 60.0
CLOSE = 1e-4

Outputs = list[np.ndarray | None]


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.long)])
def stored(
    request: pytest.FixtureRequest, config: ServerConfig, tmp_path: Path
) -> Iterator[ServerConfig]:
    """A server that keeps its sessions where a look takes a while."""
    if request.param == "sqlite":
        yield config
        return
    with redis_process(tmp_path / "redis") as redis:
        yield replace(config, store=redis.url)


@pytest.fixture
def arrived(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """The calls of each sequence in the order in which gRPC hands them over."""
    places: dict[int, list[int]] = defaultdict(list)
    enter = RpcInterceptor.intercept_service

    async def noted(self: RpcInterceptor, continuation: Any, details: Any) -> Any:
        sent = dict(details.invocation_metadata)
        if "sequence" in sent:
            places[int(sent["sequence"])].append(int(sent["place"]))
        return await enter(self, continuation, details)

    monkeypatch.setattr(RpcInterceptor, "intercept_service", noted)
    return places


async def test_triton_sequences_sent_without_waiting_keep_their_order(
    stored: ServerConfig, arrived: dict[int, list[int]], network: Network
) -> None:
    """Start, two requests and the end of each sequence, by `async_infer` of Triton's client."""
    async with running_server(stored) as server:
        x, sequences = await asyncio.to_thread(_triton, server.address)
    sequences.check(network, x, arrived)


@pytest.mark.parametrize("t", [False, True])
async def test_steps_of_spilled_sessions_sent_without_waiting_keep_their_order(
    stored: ServerConfig, arrived: dict[int, list[int]], network: Network, *, t: bool
) -> None:
    """By futures of `Step`, with and without `t`; a `t` out of order would be STEP_AHEAD."""
    async with running_server(replace(stored, slots=SLOTS)) as server:
        x, sequences = await asyncio.to_thread(_steps, server.address, t=t, opened=True)
    sequences.check(network, x, arrived)


async def test_an_open_and_what_is_sent_after_it_without_waiting_keep_their_order(
    stored: ServerConfig, arrived: dict[int, list[int]], network: Network
) -> None:
    async with running_server(stored) as server:
        x, sequences = await asyncio.to_thread(_steps, server.address, t=False, opened=False)
    sequences.check(network, x, arrived)


def _rows() -> np.ndarray:
    """x [sequences, T, D]."""
    values = np.random.default_rng(13).normal(size=(SEQUENCES, STEPS, 3))
    return values.astype(np.float32)


class Sequences:
    """Sends so many sequences at a time, and collects their outputs [sequences, T]."""

    def __init__(self) -> None:
        self.outputs: list[Outputs] = [[None] * STEPS for _ in range(SEQUENCES)]
        self.problems: list[str] = []
        self._free = threading.Semaphore(IN_FLIGHT)
        self._left = [STEPS] * SEQUENCES
        self._ended: queue.Queue[int] = queue.Queue()

    def send(self, send: Callable[[int], None]) -> None:
        """Sends all sequences and waits for their ends."""
        for number in range(SEQUENCES):
            assert self._free.acquire(timeout=HANG)
            send(number)
        for _ in range(SEQUENCES):
            self._ended.get(timeout=HANG)

    def answered(self, number: int, place: int, y: np.ndarray | None, error: object) -> None:
        """Takes a reply, in any thread."""
        self.outputs[number][place] = y
        if error is not None:
            self.problems.append(str(error))
        self._left[number] -= 1
        if not self._left[number]:
            self._free.release()
            self._ended.put(number)

    def check(self, network: Network, x: np.ndarray, arrived: dict[int, list[int]]) -> None:
        """Compares with the network's outputs over the rows in order."""
        whole = [number for number, places in arrived.items() if places == sorted(places)]
        print(f"{len(whole)} of {SEQUENCES} sequences arrived in order")
        wrong = [
            number
            for number in whole
            if any(
                y is None or np.abs(y.ravel() - expected).max() > CLOSE
                for y, expected in zip(
                    self.outputs[number], network.offline(x[number]), strict=True
                )
            )
        ]
        assert not wrong, f"{len(wrong)} of {len(whole)} were out of order: {self.problems[:3]}"
        assert len(whole) > 0.9 * SEQUENCES


def _triton(address: str) -> tuple[np.ndarray, Sequences]:
    x, sequences = _rows(), Sequences()

    def send(number: int) -> None:
        for place in range(STEPS):
            client.async_infer(
                "lstm",
                inputs(x[number, place]),
                callback=partial(_infer_answered, sequences, number, place),
                sequence_id=number + 1,
                sequence_start=place == 0,
                sequence_end=place == STEPS - 1,
                headers={"sequence": str(number), "place": str(place)},
            )

    with triton_client.InferenceServerClient(address) as client:
        assert client.is_server_live()  # calls sent before the connection is there have no order
        sequences.send(send)
    return x, sequences


def _infer_answered(
    sequences: Sequences, number: int, place: int, result: Any, error: object
) -> None:
    sequences.answered(number, place, None if result is None else result.as_numpy("y"), error)


@contextmanager
def _stub(address: str) -> Iterator[StepstateServiceStub]:
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(timeout=HANG)
        yield StepstateServiceStub(channel)


def _steps(address: str, *, t: bool, opened: bool) -> tuple[np.ndarray, Sequences]:
    x, sequences, openings = _rows(), Sequences(), []

    def send(number: int) -> None:
        if not opened:
            sent = stub.OpenSession.future(_opening(number), metadata=_noted(number, -1))
            openings.append(sent)
        for place in range(STEPS):
            request = pb.StepRequest(
                session_id=f"s-{number}", x=x[number, place], t=place if t else None
            )
            stub.Step.future(request, metadata=_noted(number, place)).add_done_callback(
                partial(_step_answered, sequences, number, place)
            )

    with _stub(address) as stub:
        if opened:
            for number in range(SEQUENCES):
                stub.OpenSession(_opening(number))
        sequences.send(send)
        for opening in openings:
            opening.result(timeout=HANG)
    return x, sequences


def _noted(number: int, place: int) -> tuple[tuple[str, str], ...]:
    return ("sequence", str(number)), ("place", str(place))


def _opening(number: int) -> pb.OpenSessionRequest:
    return pb.OpenSessionRequest(session_id=f"s-{number}", model="lstm")


def _step_answered(sequences: Sequences, number: int, place: int, call: Any) -> None:
    error = call.exception()
    sequences.answered(number, place, None if error else np.array(call.result().y), error)
