"""Time that passes only while somebody is there: what idle times are measured in.

A wall clock may be set forward or back, and a monotonic clock goes on while its process is
paused. Neither may end a session, so expiry is counted in seconds in which a server was up.
"""

from __future__ import annotations

from collections.abc import Callable

BEAT_SECONDS = 5.0
"""How often a store's clock is moved on: what a killed server loses of it at the most."""
MAX_BEAT_SECONDS = 10.0
"""What counts between two beats at the most: they may be late on a busy machine; whatever is
longer was a pause of the process, or a store that was away."""


class UptimeClock:
    """Seconds in which its process ran: a pause between two beats counts as little of it.

    It may be read and set from any thread.

    Args:
        monotonic: monotonic seconds.
        start: what it shows at first.
    """

    def __init__(self, monotonic: Callable[[], float], *, start: float = 0.0) -> None:
        self._monotonic = monotonic
        self._mark = start, monotonic()

    def __call__(self) -> float:
        """What it shows."""
        seconds, at = self._mark
        return seconds + min(self._monotonic() - at, MAX_BEAT_SECONDS)

    def read(self) -> tuple[float, float, float]:
        """What it shows, how much of it came since the last beat, and the monotonic seconds."""
        seconds, at = self._mark
        now = self._monotonic()
        since = min(now - at, MAX_BEAT_SECONDS)
        return seconds + since, since, now

    def beat(self) -> None:
        """Goes on from here. To be called at least every `BEAT_SECONDS`."""
        seconds, _, at = self.read()
        self.set(seconds, at)

    def set(self, seconds: float, at: float | None = None) -> None:
        """Makes it show `seconds`, or to have shown them at a monotonic time `at`."""
        self._mark = seconds, self._monotonic() if at is None else at
