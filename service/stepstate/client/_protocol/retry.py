"""Waiting before asking again."""

from __future__ import annotations

import random
import time

from stepstate.errors import StepstateError


class Backoff:
    """How long to wait before the next try, and when to give up.

    Args:
        timeout: seconds after which `wait` raises instead.
    """

    def __init__(self, timeout: float) -> None:
        self._deadline = time.monotonic() + timeout
        self._delay = 0.02

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self._deadline - time.monotonic()

    def wait(self, error: StepstateError) -> float:
        """Seconds to wait after this error: doubling up to 1 s, with jitter, or as it asks.

        Raises:
            StepstateError: the error, if the deadline would pass meanwhile.
        """
        delay = max(
            self._delay * random.uniform(0.5, 1.0),  # noqa: S311 - jitter
            getattr(error, "retry_after_seconds", 0.0),
        )
        self._delay = min(2 * self._delay, 1.0)
        if delay >= self.left:
            raise error
        return float(delay)
