"""Opening and closing many sessions: unary calls, many on their way at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import grpc

from stepstate.bench.model import NAME
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub

AT_ONCE = 64
"""Calls on their way."""
LEFT_BEHIND = timedelta(hours=1)
"""When sessions expire that a broken off benchmark left in somebody's Redis."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wish:
    """What sessions are opened with."""

    durability: str = "unspecified"
    """By the contract's name in small letters."""
    expires_at: float | None = None
    """When they are all to expire, by `time.monotonic`; None: when nobody is left to mind."""

    def idle_timeout(self) -> timedelta:
        """For a session that is opened now."""
        if self.expires_at is None:
            return LEFT_BEHIND
        return timedelta(seconds=max(0.001, self.expires_at - time.monotonic()))


def opening(session_id: str, wish: Wish) -> pb.OpenSessionRequest:
    """A request for a session of the benchmark's model, to be sent now."""
    request = pb.OpenSessionRequest(
        session_id=session_id, model=NAME, durability=f"DURABILITY_{wish.durability.upper()}"
    )
    request.idle_timeout.FromTimedelta(wish.idle_timeout())
    return request


async def open_sessions(target: str, names: Sequence[str], wish: Wish) -> None:
    """Opens sessions."""

    async def call(stub: StepstateServiceStub, name: str) -> None:
        await stub.OpenSession(opening(name, wish))

    await _all(target, names, call)


async def close_sessions(target: str, names: Sequence[str]) -> None:
    """Closes sessions."""

    async def call(stub: StepstateServiceStub, name: str) -> None:
        await stub.CloseSession(pb.CloseSessionRequest(session_id=name))

    await _all(target, names, call)


async def _all(
    target: str, items: Iterable[T], call: Callable[[StepstateServiceStub, T], Awaitable[None]]
) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        stub, left = StepstateServiceStub(channel), iter(items)

        async def caller() -> None:
            for item in left:
                await call(stub, item)

        await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
