"""What one client process saw within its window."""

from __future__ import annotations

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
        self._since: list[float] = []
        self._latencies: list[float] = []
        self._replies = 0
        self._unanswered = 0

    def answered(self, since: float, now: float) -> None:
        """A message that was sent, or due, at `since` was answered."""
        within = self._start <= now < self._finish
        self._replies += within
        if self._start <= since < self._finish if self._paced else within:
            self._since.append(since)
            self._latencies.append(now - since)

    def unanswered(self, since: Iterable[float], now: float) -> None:
        """Nobody waits any longer for the replies to messages that were due at `since`."""
        for moment in since:
            if self._start <= moment < self._finish:
                self._unanswered += 1
                self._since.append(moment)
                self._latencies.append(now - moment)

    def sample(self) -> Sample:
        """All of it."""
        since, latencies = np.array(self._since), np.array(self._latencies)
        return Sample(since, latencies, self._replies, self._unanswered)
