"""How many credentials of one client may prove nothing before further ones are not looked at.

It keeps guesses, and clients that are set up wrong, from taking time that is others'. It guards no
secret: nobody guesses 256 bits.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from stepstate.errors import TooManyAuthFailures

BURST = 30
"""Failures of a client at once: it has some calls under way when its token is revoked."""
PER_SECOND = 1.0
"""Failures of a client beyond these. It is not 0, so that others with its address get through."""
MAX_CLIENTS = 10_000
"""Clients that are remembered; a new one pushes out the one whose last failure is oldest."""


class AuthAttempts:
    """Counts the failures of each client, in a bucket that empties by `PER_SECOND`.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """By client: how full its bucket was, and when."""

    def __len__(self) -> int:
        return len(self._failures)

    def check(self, client: str) -> None:
        """Refuses a client that has failed too often.

        Raises:
            TooManyAuthFailures: it has.
        """
        level = self._level(client)
        if level > BURST - 1:
            raise TooManyAuthFailures(round((level - BURST + 1) / PER_SECOND, 3))

    def failed(self, client: str) -> None:
        """A client failed once more."""
        level = self._level(client)
        self._failures[client] = level + 1, self._clock()
        self._failures.move_to_end(client)
        if len(self._failures) > MAX_CLIENTS:
            self._failures.popitem(last=False)

    def _level(self, client: str) -> float:
        level, since = self._failures.get(client, (0.0, 0.0))
        return max(0.0, level - (self._clock() - since) * PER_SECOND)
