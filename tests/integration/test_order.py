"""Calls sent one after the other without waiting are applied in that order, on real servers.

ORDER_SEQUENCES=10000 makes these tests as long as the figures in docs/decisions.md were taken with.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient import grpc as triton_client

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.triton import inputs
from tests.networks import Network
from tests.processes import ServerProcess
from tests.redis_process import redis_process

SEQUENCES = int(os.environ.get("ORDER_SEQUENCES", "100"))
STEPS = 4
IN_FLIGHT = 300
"""Sequences; all calls of each are sent at once."""
SLOTS = 32
HANG = 60.0
CLOSE = 1e-4

Start = Callable[..., AbstractContextManager[ServerProcess]]
Outputs = list[np.ndarray | None]


@pytest.fixture
def network(networks: dict[str, Network]) -> Network:
    """What is served as "lstm"."""
    return networks["lstm"]


@pytest.fixture(params=["sqlite", "redis"])
def store_options(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sequence[str]]:
    """Options of a server that keeps its sessions where a look takes a while."""
    if request.param == "sqlite":
        yield ()
        return
    with redis_process(tmp_path) as redis:
        yield ("--store", redis.url)


async def test_triton_sequences_sent_without_waiting_keep_their_order(
    start_process: Start, store_options: Sequence[str], network: Network
) -> None:
    """Start, two requests and the end of each sequence, by `async_infer` of Triton's client."""
    with start_process(*store_options) as server:
        await asyncio.to_thread(_triton, server.address, network)


@pytest.mark.parametrize("t", [False, True])
async def test_steps_of_spilled_sessions_sent_without_waiting_keep_their_order(
    start_process: Start, store_options: Sequence[str], network: Network, *, t: bool
) -> None:
    """By futures of `Step`, with and without `t`; a `t` out of order would be STEP_AHEAD."""
    with start_process(*store_options, "--slots", str(SLOTS)) as server:
        await asyncio.to_thread(_steps, server.address, network, t=t, opened=True)


async def test_an_open_and_what_is_sent_after_it_without_waiting_keep_their_order(
    start_process: Start, store_options: Sequence[str], network: Network
) -> None:
    with start_process(*store_options) as server:
        await asyncio.to_thread(_steps, server.address, network, t=False, opened=False)


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

    def check(self, network: Network, x: np.ndarray) -> None:
        """Compares with the network's outputs over the rows in order."""
        wrong = sum(
            any(
                y is None or np.abs(y.ravel() - expected).max() > CLOSE
                for y, expected in zip(outputs, network.offline(rows), strict=True)
            )
            for outputs, rows in zip(self.outputs, x, strict=True)
        )
        assert (wrong, self.problems) == (0, []), f"{wrong} of {SEQUENCES} were out of order"


def _triton(address: str, network: Network) -> None:
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
            )

    with triton_client.InferenceServerClient(address) as client:
        assert client.is_server_live()  # calls sent before the connection is there have no order
        sequences.send(send)
    sequences.check(network, x)


def _infer_answered(
    sequences: Sequences, number: int, place: int, result: Any, error: object
) -> None:
    sequences.answered(number, place, None if result is None else result.as_numpy("y"), error)


@contextmanager
def _stub(address: str) -> Iterator[StepstateServiceStub]:
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(timeout=HANG)
        yield StepstateServiceStub(channel)


def _steps(address: str, network: Network, *, t: bool, opened: bool) -> None:
    x, sequences, openings = _rows(), Sequences(), []

    def send(number: int) -> None:
        if not opened:
            openings.append(stub.OpenSession.future(_opening(number)))
        for place in range(STEPS):
            request = pb.StepRequest(
                session_id=f"s-{number}", x=x[number, place], t=place if t else None
            )
            stub.Step.future(request).add_done_callback(
                partial(_step_answered, sequences, number, place)
            )

    with _stub(address) as stub:
        if opened:
            for number in range(SEQUENCES):
                stub.OpenSession(_opening(number))
        sequences.send(send)
        assert not any(opening.exception() for opening in openings)
    sequences.check(network, x)


def _opening(number: int) -> pb.OpenSessionRequest:
    return pb.OpenSessionRequest(session_id=f"s-{number}", model="lstm")


def _step_answered(sequences: Sequences, number: int, place: int, call: Any) -> None:
    error = call.exception()
    sequences.answered(number, place, None if error else np.array(call.result().y), error)
