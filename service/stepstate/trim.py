"""Gives memory back to the system that clients made the server take, when it is free again.

Two things keep it otherwise. glibc's allocator keeps freed blocks between others that are in use:
after a flood of small replies 300 of 400 MiB. And each RPC of gRPC leaves a reference cycle, which
waits for Python's collector, which is tuned to run rarely.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

TRIM_SECONDS = 2.0
"""Between two looks: after a flood, trimming takes some 30 ms of a thread."""
MAX_GROWTH = 8 * 2**20
"""Bytes that are not worth it."""
PAUSE = 3
"""Looks that are skipped when trimming did not help: then it takes a millisecond or two."""

_STATM = Path("/proc/self/statm")


class Trimmer:
    """Trims while a process takes more than it did, beyond what it holds for clients.

    That may not help: sessions may have taken the memory, or it is still in use. So it is tried
    again and again, but more rarely.

    Args:
        held: bytes that it holds for clients.
        resident: bytes that it takes of the machine.
        trim: gives back what it can.
    """

    def __init__(
        self,
        held: Callable[[], int],
        *,
        resident: Callable[[], int] | None = None,
        trim: Callable[[], object] | None = None,
    ) -> None:
        self._held = held
        self._resident = resident or resident_bytes
        self._trim = trim or _malloc_trim
        self._lowest = self._resident() - held()
        self._skip = 0

    async def look(self) -> None:
        """Trims if that is worth it."""
        resident = self._resident()
        beyond = resident - self._held()
        self._lowest = min(self._lowest, beyond)
        if beyond <= self._lowest + MAX_GROWTH:
            return
        if self._skip:
            self._skip -= 1
            return
        gc.collect(0)  # the youngest objects: more would take too long
        await asyncio.to_thread(self._trim)
        if resident - self._resident() <= MAX_GROWTH:
            self._skip = PAUSE


def resident_bytes() -> int:
    """What this process takes of the machine; 0 where the system does not say."""
    with suppress(OSError):
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _malloc_trim() -> None:
    with suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
