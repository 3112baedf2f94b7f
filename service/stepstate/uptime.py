"""A clock that runs only while a server does: idle times are measured in it.

The system's clock may be set forward or back, and a monotonic clock goes on while its process is
paused. Neither may end a session, so expiry is counted in seconds in which a server was up.
"""

from __future__ import annotations

from collections.abc import Callable

HEARTBEAT_SECONDS = 5.0
"""How often a store's clock is advanced: at most this is lost when a server is killed."""
MAX_HEARTBEAT_SECONDS = 10.0
"""At most this counts between two heartbeats, which may be late on a busy machine. If it was
longer, the process was paused or the store was away."""


class UptimeClock:
    """Seconds in which its process ran; of a pause at most `MAX_HEARTBEAT_SECONDS` count.

    It may be read and set from any thread.

    Args:
        monotonic: monotonic seconds.
        start: its first value.
    """

    def __init__(self, monotonic: Callable[[], float], *, start: float = 0.0) -> None:
        self._monotonic = monotonic
        self._mark = start, monotonic()

    def __call__(self) -> float:
        """Its value, in seconds."""
        seconds, at = self._mark
        return seconds + min(self._monotonic() - at, MAX_HEARTBEAT_SECONDS)

    def read(self) -> tuple[float, float, float]:
        """Its value, how much of it is since the last heartbeat, and the monotonic seconds."""
        seconds, at = self._mark
        now = self._monotonic()
        since = min(now - at, MAX_HEARTBEAT_SECONDS)
        return seconds + since, since, now

    def heartbeat(self) -> None:
        """Counts the time since the last one; to be called at least every `HEARTBEAT_SECONDS`."""
        seconds, _, at = self.read()
        self.set(seconds, at)

    def set(self, seconds: float, at: float | None = None) -> None:
        """Sets its value, as of now or of a monotonic time `at`."""
        self._mark = seconds, self._monotonic() if at is None else at
