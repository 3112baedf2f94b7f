"""The client processes, as their parent sees them."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from benchmarks import BenchError
from benchmarks.load import (
    Answer,
    CloseSessions,
    Failed,
    Load,
    OpenSessions,
    Question,
    Sample,
    Window,
)
from benchmarks.sender import run_client

ANSWER_SECONDS = 120.0
"""A client without an answer for this long waits for a server that hangs."""


@dataclass(frozen=True, slots=True)
class _Client:
    process: SpawnProcess
    pipe: Connection[Question, Answer]

    def receive(self) -> Answer:
        """The next answer of the process; raises if it failed, died, or is silent."""
        if not self.pipe.poll(ANSWER_SECONDS):
            raise BenchError(f"a client got no reply for {ANSWER_SECONDS:g} s: the server hangs")
        try:
            answer = self.pipe.recv()
        except EOFError as error:
            raise BenchError("a client process died") from error
        if isinstance(answer, Failed):
            raise BenchError(f"a client failed: {answer.detail}")
        return answer


class Clients:
    """Processes that work at the same time: `prepare`, then for loads `send` and `collect`."""

    def __init__(self, clients: Sequence[_Client]) -> None:
        self._clients = clients
        self._busy: Sequence[_Client] = ()

    def __len__(self) -> int:
        return len(self._clients)

    def prepare(self, questions: Sequence[Load | OpenSessions | CloseSessions]) -> None:
        """Gives each question to a process, and returns when all is done.

        A `Load` is when each of its sessions was answered once.

        Raises:
            BenchError: a server refused a step, or broke off.
        """
        self._busy = self._clients[: len(questions)]
        for client, question in zip(self._busy, questions, strict=True):
            client.pipe.send(question)
        for client in self._busy:
            client.receive()

    def send(self, window: Window) -> None:
        """Starts sending, until the end of the window."""
        for client in self._busy:
            client.pipe.send(window)

    def collect(self) -> list[Sample]:
        """What each process saw in the window.

        Raises:
            BenchError: a server refused a step, or broke off.
        """
        answers = [client.receive() for client in self._busy]
        return [answer for answer in answers if isinstance(answer, Sample)]


@contextmanager
def running_clients(count: int) -> Iterator[Clients]:
    """Client processes that end with the block."""
    with ExitStack() as stack:
        yield Clients([stack.enter_context(_running_client()) for _ in range(count)])


@contextmanager
def _running_client() -> Iterator[_Client]:
    # Spawned, not forked: gRPC's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_client, args=(theirs,), daemon=True)
    with _ignored(signal.SIGINT):
        process.start()
    theirs.close()
    try:
        yield _Client(process, ours)
    finally:
        process.terminate()
        process.join()
        ours.close()


@contextmanager
def _ignored(number: signal.Signals) -> Iterator[None]:
    """Ignores a signal inside the block; a process started there ignores it for good.

    Ctrl-C reaches every process of a terminal: the parent alone acts on it.
    """
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)
