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
        budget: for messages that are being received.
    """

    __slots__ = ("_account", "_budget", "_waiting")

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._account = MemoryAccount(budget)
        self._waiting: asyncio.Task[None] | None = None

    @property
    def contended(self) -> bool:
        """See `ConnectionMemory`."""
        return bool(self._budget.waiting)

    def reserve(self, size: int) -> bool:
        """See `ConnectionMemory`."""
        if not self._account.fits(size):
            return False
        self._account.reserve(MemoryUse.REQUESTS, size)
        return True

    def release(self, size: int) -> None:
        """See `ConnectionMemory`."""
        self._account.release(MemoryUse.REQUESTS, size)

    def wait_for(self, size: int, then: Callable[[], None]) -> None:
        """See `ConnectionMemory`."""
        self._waiting = asyncio.get_running_loop().create_task(self._wait_for(size, then))

    async def _wait_for(self, size: int, then: Callable[[], None]) -> None:
        await self._account.wait_for(size)
        then()

    def refusal(self, size: int) -> MemoryLimit:
        """See `ConnectionMemory`."""
        budget = self._budget
        free = max(0, budget.shared - budget.used)
        return MemoryLimit(size, self._account.held, free, budget.limit)

    def close(self) -> None:
        """See `ConnectionMemory`."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.cancel()
            self._budget.schedule_wake()  # which forgets who does not wait any more
