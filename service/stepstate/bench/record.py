"""What one client process saw within its window."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from stepstate.bench.load import Sample, Window


class Record:
    """Messages that count, and how long each took.

    Args:
        window: when they count.
        paced: by when a message was due, not by when its reply came.
    """

    def __init__(self, window: Window, *, paced: bool) -> None:
        self._start, self._finish = window.start, window.finish
        self._paced = paced
        self._at: list[float] = []
        self._latencies: list[float] = []
        self._replies = 0

    def answered(self, since: float, now: float) -> None:
        """A message that was sent, or due, at `since` was answered."""
        within = self._start <= now < self._finish
        self._replies += within
        if self._start <= since < self._finish if self._paced else within:
            self._at.append(now)
            self._latencies.append(now - since)

    def unanswered(self, since: Iterable[float], now: float) -> None:
        """Nobody waits any longer for the replies to messages that were due at `since`."""
        for moment in since:
            if self._start <= moment < self._finish:
                self._at.append(math.inf)
                self._latencies.append(now - moment)

    def sample(self) -> Sample:
        """All of it."""
        return Sample(np.array(self._at), np.array(self._latencies), self._replies)
