"""Waiting for a moment, accurate to some microseconds.

uvloop's own timers count whole milliseconds, as long as a step takes. Linux's timerfd
wakes the loop at the moment itself.
"""

from __future__ import annotations

import asyncio
import ctypes
import heapq
import os
import time
from itertools import count
from types import TracebackType
from typing import Self

_NONBLOCK = os.O_NONBLOCK | os.O_CLOEXEC
_ABSOLUTE = 1  # TFD_TIMER_ABSTIME
_NANO = 1_000_000_000


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Timer:
    """Wakes coroutines of the running loop at moments of `time.monotonic`."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = count()
        self._fd: int = self._libc.timerfd_create(time.CLOCK_MONOTONIC, _NONBLOCK)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")

    def __enter__(self) -> Self:
        self._loop.add_reader(self._fd, self._fire)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    async def until(self, moment: float) -> None:
        """Returns at the moment, or at once if it has passed."""
        if moment <= time.monotonic():
            return
        waiter = self._loop.create_future()
        heapq.heappush(self._waiting, (moment, next(self._order), waiter))
        if self._waiting[0][2] is waiter:
            self._arm()
        await waiter

    def _arm(self) -> None:
        moment = int(self._waiting[0][0] * _NANO)
        spec = _Itimerspec(_Timespec(0, 0), _Timespec(*divmod(moment, _NANO)))
        if self._libc.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(spec), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def _fire(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # it was set anew meanwhile
            return
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            waiter = heapq.heappop(self._waiting)[2]
            if not waiter.done():
                waiter.set_result(None)
        if self._waiting:
            self._arm()
