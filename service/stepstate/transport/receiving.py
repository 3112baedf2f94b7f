"""How many requests are received at once.

The lean transport knows how long a message is when it begins, and reserves so much for it
(`ReceivingMemory`; see `h2grpc.memory`).

grpcio says how long a message is when it has all of it. Until a call is read, its client can send
no more than 64 KiB; then, all of the message. So each read counts as one of the longest message,
and when too many are under way, calls wait before they are read (`Receiver`). Streams of steps
can't be counted like that: they always read, and most are idle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Any

from stepstate.budget import MemoryAccount, MemoryBudget, MemoryUse
from stepstate.errors import MemoryLimit

MAX_MESSAGE_BYTES = 16 * 2**20
"""The longest request, 100,000 rows of 40 inputs."""
SHARE = 4
"""The part of the memory limit that messages being received may take is one of so many."""
WINDOWS_SHARE, MIN_WINDOWS_BYTES = 8, 16 * 2**20
"""The part of the memory limit for what comes within the windows of the lean transport, and waits:
one of so many, but at least so much."""
STALLED_SECONDS = 2.0
"""A read that took so long already is ended if others wait: its client may send nothing at all."""


class Receiver:
    """Receives the requests of calls that have one, or a few long ones, from grpcio.

    Args:
        memory_limit: bytes that clients may make the server hold.
    """

    def __init__(self, memory_limit: int) -> None:
        self.budget = MemoryBudget(max(memory_limit // SHARE, 2 * MAX_MESSAGE_BYTES))
        """For messages that are being received."""
        self.windows = MemoryBudget(max(memory_limit // WINDOWS_SHARE, MIN_WINDOWS_BYTES))
        """For what comes within windows, and what is written and not read."""
        self._since: dict[asyncio.Timeout, float] = {}  # of the reads, the oldest first
        self._look: asyncio.TimerHandle | None = None

    async def read(self, account: MemoryAccount, receive: Callable[[], Awaitable[Any]]) -> Any:
        """What `receive` returns, once the peer with this account may receive.

        Raises:
            MemoryLimit: it took long, and others wait.
        """
        if not account.fits(MAX_MESSAGE_BYTES):
            self._look_soon()
            await account.wait_for(MAX_MESSAGE_BYTES)
        account.reserve(MemoryUse.REQUESTS, MAX_MESSAGE_BYTES)
        limit = asyncio.timeout(None)
        self._since[limit] = asyncio.get_running_loop().time()
        try:
            async with limit:
                return await receive()
        except TimeoutError:
            held, budget = account.held, self.budget
            free = budget.limit - budget.used
            raise MemoryLimit(MAX_MESSAGE_BYTES, held, free, budget.limit) from None
        finally:
            del self._since[limit]
            account.release(MemoryUse.REQUESTS, MAX_MESSAGE_BYTES)

    def _look_soon(self) -> None:
        if self._look is None:
            loop = asyncio.get_running_loop()
            self._look = loop.call_later(STALLED_SECONDS, self._end_stalled)

    def _end_stalled(self) -> None:
        """Ends the oldest reads, one for each peer that waits."""
        self._look = None
        now, waiting = asyncio.get_running_loop().time(), len(self.budget.waiting)
        for limit, since in islice(self._since.items(), waiting):
            if since <= now - STALLED_SECONDS:
                limit.reschedule(now)
        if waiting:
            self._look_soon()


class ReceivingMemory:
    """What one connection of the lean transport may keep: a `ConnectionMemory`.

    Args:
        receiver: has the budgets.
    """

    __slots__ = ("_rests", "_rests_budget", "_waiting", "_windows", "_windows_budget")

    def __init__(self, receiver: Receiver) -> None:
        self._windows_budget, self._rests_budget = receiver.windows, receiver.budget
        self._windows = MemoryAccount(receiver.windows)
        self._rests = MemoryAccount(receiver.budget)
        self._waiting: asyncio.Task[None] | None = None

    @property
    def contended(self) -> bool:
        """See `ConnectionMemory`."""
        return bool(self._rests_budget.waiting)

    def reserve(self, size: int) -> bool:
        """See `ConnectionMemory`."""
        return _reserve(self._windows, size)

    def reserve_rest(self, size: int) -> bool:
        """See `ConnectionMemory`."""
        return _reserve(self._rests, size)

    def release(self, size: int, rest: int = 0) -> None:
        """See `ConnectionMemory`."""
        self._windows.release(MemoryUse.REQUESTS, size)
        if rest:
            self._rests.release(MemoryUse.REQUESTS, rest)

    def wait_for(self, size: int, then: Callable[[], None]) -> None:
        """See `ConnectionMemory`."""
        self._waiting = asyncio.get_running_loop().create_task(self._wait_for(size, then))

    async def _wait_for(self, size: int, then: Callable[[], None]) -> None:
        await self._rests.wait_for(size)
        then()

    def refusal(self, size: int) -> MemoryLimit:
        """See `ConnectionMemory`."""
        budget = self._windows_budget
        free = max(0, budget.shared - budget.used)
        return MemoryLimit(size, self._windows.held, free, budget.limit)

    def close(self) -> None:
        """See `ConnectionMemory`."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.cancel()
            self._rests_budget.schedule_wake()  # which forgets who does not wait any more


def _reserve(account: MemoryAccount, size: int) -> bool:
    if not account.fits(size):
        return False
    account.reserve(MemoryUse.REQUESTS, size)
    return True
