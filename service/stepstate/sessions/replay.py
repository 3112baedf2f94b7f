"""The replay window: the replies to the last requests, so that a retry gets the same one.

Replies to single rows are in one ring a slot, as [x | y] rows of an array: a micro-batch is
stored in two writes, and a snapshot is one copy. x itself is kept, not a digest of it, so that
a retry and a mismatch are told apart exactly. Replies to requests with many rows, or with
`inspect`, are kept whole, within a bound in bytes for all sessions.

A tenant may have fewer bytes: beyond its own limit its oldest replies go. Beyond the bound of all,
replies that are not the last of their session go first, the oldest first: what
the others do costs no session its last reply. When only last replies are left, the largest goes,
so that many large ones never push a small one out.

D inputs, O outputs, W rows in a ring, B rows in a micro-batch.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stepstate.budget import MemoryAccount, MemoryUse
from stepstate.engine.work import Floats, Layers, WorkItem
from stepstate.identity import DEFAULT_TENANT
from stepstate.tenants import TenantTable

RING_BYTES = 65_536
"""A ring is larger only for rows of over a thousand columns: 10,000 sessions stay below 655 MB."""
ROWS_IN_FLIGHT = 16
"""What the client's streams have in flight: a retry of any of them must be answered."""
SNAPSHOT_BYTES = 4_000_000
"""A snapshot holds the newest long reply, and older ones within this: the largest reply."""


@dataclass(slots=True, eq=False)
class CachedReply:
    """A reply that was given to the request that began at t."""

    t: int
    rows: int
    y: bytes
    layers: Layers | None = None
    digest: bytes = b""
    slot: int = 0
    tenant: str = DEFAULT_TENANT

    @property
    def nbytes(self) -> int:
        """What it costs to keep."""
        layers = self.layers or []
        return len(self.y) + sum(part.nbytes for layer in layers for part in layer.values())


@dataclass(frozen=True, slots=True)
class ReplayState:
    """The replay window of one slot.

    stamps [K]: t + 1 of each row; ring [K, D + O]: the rows; the long replies, the oldest first.
    """

    stamps: NDArray[np.int64]
    ring: Floats
    replies: tuple[CachedReply, ...]


class ReplayWindow:
    """Cached replies of the sessions in a model's slots.

    Args:
        capacity: slots.
        input_width: D.
        output_width: O.
        rows: W, if `RING_BYTES` holds so many; else what it holds, but at least
            `ROWS_IN_FLIGHT` of them.
        long_bytes: bound for the replies with many rows, all slots together.
        memory: these replies are reserved there, too.
        tenants: how many bytes each may have, in all windows.
    """

    def __init__(
        self,
        capacity: int,
        *,
        input_width: int,
        output_width: int,
        rows: int,
        long_bytes: int,
        memory: MemoryAccount,
        tenants: TenantTable | None = None,
    ) -> None:
        self._tenants = tenants or TenantTable()
        self._of_tenant: dict[str, dict[CachedReply, None]] = {}  # the oldest first
        width = input_width + output_width
        self.rows = min(rows, max(ROWS_IN_FLIGHT, RING_BYTES // (4 * width)))
        self._input_width = input_width
        self._ring: Floats = np.zeros((capacity * self.rows, width), np.float32)
        # t + 1 of the row in each place of the ring; 0: none.
        self._stamps: NDArray[np.int64] = np.zeros(capacity * self.rows, np.int64)
        self._long: dict[int, deque[CachedReply]] = {}
        self._superseded: dict[CachedReply, None] = {}  # the first to be so first
        # Of each slot's last reply: bytes (0: none), and its number among all.
        self._last_bytes: NDArray[np.int64] = np.zeros(capacity, np.int64)
        self._last_number: NDArray[np.int64] = np.zeros(capacity, np.int64)
        self._kept = 0
        self._long_limit = long_bytes
        self._memory = memory
        self._reserved = 0
        self.long_bytes = 0

    def clear(self, slot: int) -> None:
        """Empties the window of a slot."""
        self._stamps[slot * self.rows : (slot + 1) * self.rows] = 0
        for reply in tuple(self._long.get(slot, ())):
            self._evict(reply)
        self._reserve()

    def add_rows(
        self, slots: NDArray[np.int64], t: NDArray[np.int64], x: Floats, y: Floats
    ) -> None:
        """Adds single rows, each applied to its slot [B] at its t [B]."""
        places = slots * self.rows + t % self.rows
        self._stamps[places] = t + 1
        self._ring[places] = np.concatenate((x, y), axis=1)

    def add_row(self, slot: int, t: int, x: Floats, y: Floats) -> None:
        """Adds one row [D] and its outputs [O], applied to a slot at t."""
        place = slot * self.rows + t % self.rows
        self._stamps[place] = t + 1
        row = self._ring[place]
        row[: self._input_width] = x
        row[self._input_width :] = y

    def add_long(
        self,
        work: WorkItem,
        t: int,
        y: bytes,
        layers: Layers | None,
        *,
        tenant: str = DEFAULT_TENANT,
    ) -> None:
        """Adds the reply to a request of a tenant with many rows, or with `inspect`."""
        self._keep(work.slot, CachedReply(t, work.rows, y, layers, _digest(work)), tenant)

    def _keep(self, slot: int, reply: CachedReply, tenant: str) -> None:
        owner = self._tenants.get(tenant)
        most = owner.limits.replay_bytes
        if reply.nbytes > self._long_limit or (most is not None and reply.nbytes > most):
            return
        reply.slot, reply.tenant = slot, tenant
        owner.held["replay_bytes"] += reply.nbytes
        self._of_tenant.setdefault(tenant, {})[reply] = None
        replies = self._long.setdefault(slot, deque())
        if replies:
            self._superseded[replies[-1]] = None
        replies.append(reply)
        self._kept += 1
        self._last_bytes[slot], self._last_number[slot] = reply.nbytes, self._kept
        self.long_bytes += reply.nbytes
        if len(replies) > self.rows:
            self._evict(replies[0])
        while most is not None and owner.held["replay_bytes"] > most:
            its = self._of_tenant.get(tenant)
            if its is None:
                break  # the others are of other models
            self._evict(next(iter(its)))
        while self._is_full():
            self._evict(next(iter(self._superseded), None) or self._largest_last())
        self._reserve()

    def find(self, work: WorkItem, t: int) -> CachedReply | None:
        """The reply to this same request, if it is cached."""
        if work.single:
            return self._find_row(work.slot, t, work.x)
        digest = _digest(work)
        for reply in self._long.get(work.slot, ()):
            if reply.t == t and reply.digest == digest:
                return reply
        return None

    def read(self, slot: int) -> ReplayState:
        """The window of a slot, for a snapshot; views that are valid until the next step."""
        first, last = slot * self.rows, (slot + 1) * self.rows
        stamps, ring = self._stamps[first:last], self._ring[first:last]
        if not stamps.all():
            held = stamps > 0
            stamps, ring = stamps[held], ring[held]
        return ReplayState(stamps, ring, self._newest(slot))

    def write(self, slot: int, state: ReplayState, *, tenant: str = DEFAULT_TENANT) -> None:
        """Fills an empty slot from a tenant's snapshot; a shorter ring keeps the newest rows."""
        order = np.argsort(state.stamps)[-self.rows :]
        stamps = state.stamps[order]
        places = slot * self.rows + (stamps - 1) % self.rows
        self._stamps[places] = stamps
        self._ring[places] = state.ring[order]
        for reply in state.replies:
            self._keep(slot, reply, tenant)

    def _newest(self, slot: int) -> tuple[CachedReply, ...]:
        newest: list[CachedReply] = []
        size = 0
        for reply in reversed(self._long.get(slot, ())):
            size += reply.nbytes
            if newest and size > SNAPSHOT_BYTES:
                break
            newest.append(reply)
        return tuple(reversed(newest))

    def covers(self, slot: int, t: int) -> bool:
        """Whether the window still reaches back to row t, by whatever request it was applied."""
        place = slot * self.rows + t % self.rows
        if self._stamps[place] == t + 1:
            return True
        return any(reply.t <= t < reply.t + reply.rows for reply in self._long.get(slot, ()))

    def _find_row(self, slot: int, t: int, x: Sequence[float] | Floats) -> CachedReply | None:
        place = slot * self.rows + t % self.rows
        row = self._ring[place]
        sent = np.asarray(x, np.float32)
        if self._stamps[place] != t + 1 or row[: self._input_width].tobytes() != sent.tobytes():
            return None
        return CachedReply(t, 1, row[self._input_width :].tobytes())

    def _is_full(self) -> bool:
        more = self.long_bytes - self._reserved
        over = self.long_bytes > self._long_limit
        return over or (more > 0 and not self._memory.fits(more))

    def _largest_last(self) -> CachedReply:
        """The largest reply that is the last of its slot; the oldest of several."""
        slots = np.flatnonzero(self._last_bytes == self._last_bytes.max())
        return self._long[int(slots[self._last_number[slots].argmin()])][-1]

    def _evict(self, reply: CachedReply) -> None:
        """Drops a reply: a superseded one, or the only one of its slot."""
        self._tenants.get(reply.tenant).release("replay_bytes", reply.nbytes)
        its = self._of_tenant[reply.tenant]
        del its[reply]
        if not its:
            del self._of_tenant[reply.tenant]
        replies = self._long[reply.slot]
        replies.remove(reply)
        self._superseded.pop(reply, None)
        if not replies:
            del self._long[reply.slot]
            self._last_bytes[reply.slot] = 0
        self.long_bytes -= reply.nbytes

    def _reserve(self) -> None:
        """Reserves what is kept by now."""
        more, self._reserved = self.long_bytes - self._reserved, self.long_bytes
        if more > 0:
            self._memory.reserve(MemoryUse.REPLAY, more)
        elif more < 0:
            self._memory.release(MemoryUse.REPLAY, -more)


def _digest(work: WorkItem) -> bytes:
    """A digest of everything that makes two requests at one t the same."""
    sent = np.asarray(work.x, np.float32).tobytes()
    options = bytes((work.inspect, work.last_only))
    return hashlib.blake2b(options + sent, digest_size=16).digest()
