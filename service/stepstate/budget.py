"""Memory that clients make the server hold, counted before it is used.

`MemoryBudget` is the limit of the whole server, and a `MemoryAccount` is what one peer holds of it.
Whoever is about to keep something for a peer (a request, a reply, a binding) reserves its bytes
first, and releases them when it is really gone.

A peer may hold as much as would still be free (the dynamic threshold of A. K. Choudhury and
E. L. Hahne, "Dynamic queue length thresholds for shared-memory packet switches", 1998): alone it
gets half, two greedy peers get a third each. So no share has to be set aside for peers that are not
there. Where it is known who calls, all peers of a tenant have one account together, with a limit
of its own, `memory_bytes`, if that is configured. But what one after the other takes and never
gives back leaves half as much each time: so a quarter of the limit is kept for those that hold
little.

`CallMemory` is what one RPC holds of its peer's account: what is left of it when the RPC is done is
released then, whatever has happened to it.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections import defaultdict, deque
from contextvars import ContextVar
from enum import StrEnum
from pathlib import Path

from pydantic import ByteSize, TypeAdapter

from stepstate.errors import MemoryLimit
from stepstate.tenants import Tenant

MIN_LIMIT = 128 * 2**20
"""Bytes: room for the longest message while it is received and served, beside short ones."""

WAKE_SECONDS = 0.01
"""Those who wait for room are looked at together, at most so often: a release stays cheap."""

_CGROUPS = Path("/sys/fs/cgroup")
_LIMIT_FILES = ("memory.max", "memory/memory.limit_in_bytes")  # of cgroups v2, and v1


class MemoryUse(StrEnum):
    """What memory is held for."""

    __hash__ = str.__hash__  # that of `Enum` is in Python, and these are keys on the hot path

    CALLS = "calls"
    """What is kept of each open call, beside its messages."""
    REQUESTS = "requests"
    """Messages that were received and not yet answered: parsed, or waiting."""
    REPLIES = "replies"
    """Replies that were promised or made, and have not left."""
    BINDINGS = "bindings"
    """Handles of packed streams."""
    SNAPSHOTS = "snapshots"
    """Snapshots that are being sent or received."""
    ENDED = "ended_sequences"
    """Last replies of sequences, for retries."""
    REPLAY = "replay"
    """Replies with many rows, for retries."""


class MemoryBudget:
    """The bytes that all peers together may make a server hold.

    Args:
        limit: most bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.shared = limit - limit // 4
        """Of the limit, for peers that hold more than little."""
        self.little = limit // 512
        """So much a peer may hold as long as anything is free."""
        self.used = 0
        """Bytes reserved now."""
        self.by_use: dict[str, int] = dict.fromkeys(MemoryUse, 0)
        """Bytes reserved now, by what they are for."""
        self.waiting: dict[MemoryAccount, deque[tuple[int, asyncio.Future[None]]]] = {}
        """The accounts that somebody waits for, with who, and for how many bytes."""
        self._wake_scheduled = False

    def schedule_wake(self) -> None:
        """Looks soon whether those who wait can go on, now that something was released."""
        if not self._wake_scheduled:
            self._wake_scheduled = True
            asyncio.get_running_loop().call_later(WAKE_SECONDS, self._wake)

    def _wake(self) -> None:
        self._wake_scheduled = False
        for account in list(self.waiting):
            if account.wake():
                del self.waiting[account]


class MemoryAccount:
    """What one peer, or all peers of a tenant, make a server hold.

    Args:
        budget: of the server.
        tenant: whose limit it keeps; None: nobody's.
    """

    __slots__ = ("_budget", "_most", "_tenant", "held")

    def __init__(self, budget: MemoryBudget, tenant: Tenant | None = None) -> None:
        self._budget = budget
        self._tenant = tenant
        self.held = 0
        """Bytes reserved now."""
        self.read_limit()

    def fits(self, size: int) -> bool:
        """Whether so many bytes more could be reserved now."""
        budget, total = self._budget, self.held + size
        return total <= self._most and (
            total <= budget.shared - budget.used
            or (total <= budget.little and size <= budget.limit - budget.used)
        )

    def read_limit(self) -> None:
        """Keeps the limit that its tenant has now."""
        most = None if self._tenant is None else self._tenant.limits.memory_bytes
        self._most = math.inf if most is None else most

    def reserve(self, use: MemoryUse, size: int) -> None:
        """Reserves bytes.

        Raises:
            MemoryLimit: the peer would hold more than would be free; nothing was reserved.
            TenantLimitReached: it would be more than its tenant may have; nothing was reserved.
        """
        budget = self._budget
        if self._tenant is not None and self.held + size > self._most:
            self._tenant.refuse("memory_bytes")
        if self.held + size > budget.shared - budget.used and not self.fits(size):
            free = max(0, budget.shared - budget.used)
            raise MemoryLimit(size, self.held, free, budget.limit)
        if use is MemoryUse.SNAPSHOTS and self._tenant is not None:
            self._tenant.hold("snapshot_bytes", size)
        self.held += size
        budget.used += size
        budget.by_use[use] += size

    def charge(self, use: MemoryUse, size: int) -> None:
        """Counts bytes that are here already, whether they fit or not."""
        budget = self._budget
        self.held += size
        budget.used += size
        budget.by_use[use] += size

    def release(self, use: MemoryUse, size: int) -> None:
        """Releases bytes that were reserved."""
        budget = self._budget
        if use is MemoryUse.SNAPSHOTS and self._tenant is not None:
            self._tenant.release("snapshot_bytes", size)
        self.held -= size
        budget.used -= size
        budget.by_use[use] -= size
        if budget.waiting:
            budget.schedule_wake()

    async def wait_for(self, size: int) -> None:
        """Waits until so many bytes could be reserved; it reserves nothing.

        Those who wait for the same account go on in the order in which they came.
        """
        while not self.fits(size):
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._budget.waiting.setdefault(self, deque()).append((size, future))
            await future

    def wake(self) -> bool:
        """Lets those go on whose bytes fit now; returns whether nobody waits any more."""
        promised, waiting = 0, self._budget.waiting[self]
        while waiting:
            size, future = waiting[0]
            if not future.done():
                if not self.fits(2 * promised + size):
                    return False
                promised += size
                future.set_result(None)
            waiting.popleft()
        return True


class CallMemory:
    """What one RPC makes a server hold.

    Args:
        account: of its peer.
    """

    __slots__ = ("_account", "_by_use", "_closed", "fits")

    def __init__(self, account: MemoryAccount) -> None:
        self._account = account
        self._by_use: defaultdict[MemoryUse, int] = defaultdict(int)
        self._closed = False
        self.fits = account.fits
        """See `MemoryAccount.fits`."""

    def reserve(self, use: MemoryUse, size: int) -> None:
        """See `MemoryAccount.reserve`; once the RPC is done, nothing is counted."""
        if not self._closed:
            self._account.reserve(use, size)
            self._by_use[use] += size

    def charge(self, use: MemoryUse, size: int) -> None:
        """See `MemoryAccount.charge`."""
        if not self._closed:
            self._account.charge(use, size)
            self._by_use[use] += size

    def release(self, use: MemoryUse, size: int) -> None:
        """Releases bytes before the RPC is done."""
        if not self._closed:
            self._account.release(use, size)
            self._by_use[use] -= size

    def resize(self, use: MemoryUse, size: int) -> None:
        """Counts as many bytes as there turned out to be."""
        self.charge(use, size - self._by_use[use])

    async def wait_for(self, size: int) -> None:
        """See `MemoryAccount.wait_for`."""
        await self._account.wait_for(size)

    def close(self) -> None:
        """Releases what is left: the RPC is done."""
        for use, size in self._by_use.items():
            self._account.release(use, size)
        self._by_use.clear()
        self._closed = True


call_memory: ContextVar[CallMemory] = ContextVar("call_memory")
"""What the RPC holds that this task serves."""


def limit_bytes(setting: str) -> int:
    """The bytes of a limit such as "2GiB", or "25%" of the memory that this process may use.

    They are at least `MIN_LIMIT`.
    """
    if setting.endswith("%"):
        share = float(setting[:-1]) / 100
        size = int(share * min(_machine_bytes(), _container_bytes()))
    else:
        size = int(TypeAdapter(ByteSize).validate_python(setting))
    return max(MIN_LIMIT, size)


def _machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container_bytes() -> float:
    """The limit of the cgroup that this process sees as the root one; infinite if it has none."""
    for name in _LIMIT_FILES:
        try:
            return int((_CGROUPS / name).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return float("inf")
