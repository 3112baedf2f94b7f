"""Token buckets: how many a second, and how many at once after a pause."""

from __future__ import annotations

from collections.abc import Callable

_ROUNDING = 1e-3
"""Tokens. One that lacks so little is there: whoever waited exactly as long as it was told gets it,
however many a second there are, and however long the clock has run."""


class TokenBucket:
    """Fills with `rate` tokens a second, up to `burst`; it begins full.

    What is taken is taken as long as one token is there, however much it is: what it lacks is a
    debt, which is filled up first. So a large request waits no longer for its turn than a small
    one, and has those after it wait instead. In any interval of s seconds at most
    rate * s + burst tokens are taken, and beyond that only the rest of the last request.

    Args:
        rate: tokens a second.
        burst: most tokens that it holds; None: those of one second, and at least one.
        clock: monotonic seconds.
    """

    __slots__ = ("_at", "_clock", "_level", "burst", "rate")

    def __init__(self, rate: float, burst: float | None, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at = clock()
        self.rate = rate
        self.burst = _burst(rate, burst)
        self._level = self.burst

    def change(self, rate: float, burst: float | None) -> None:
        """Changes rate and burst; what is in it stays, as far as there is room."""
        self._fill()
        self.rate, self.burst = rate, _burst(rate, burst)
        self._level = min(self._level, self.burst)

    @property
    def full(self) -> bool:
        """Whether it is as a new one."""
        self._fill()
        return self._level >= self.burst

    def wait_seconds(self) -> float:
        """Seconds until something can be taken; 0: now."""
        self._fill()
        lacking = min(1.0, self.burst) - self._level
        return 0.0 if lacking <= _ROUNDING else lacking / self.rate

    def whole(self) -> int:
        """How many single tokens can be taken one by one."""
        self._fill()
        return max(0, int(self._level + _ROUNDING))

    def take(self, amount: float) -> None:
        """Takes tokens, whether they are there or not; see `wait_seconds`."""
        self._fill()
        self._level -= amount

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self.burst, self._level + self.rate * (now - self._at))
        self._at = now


def _burst(rate: float, burst: float | None) -> float:
    return max(1.0, rate if burst is None else burst)
