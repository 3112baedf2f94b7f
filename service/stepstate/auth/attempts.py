"""How many credentials of one client may prove nothing before further ones are not looked at.

It keeps guesses, and clients that are set up wrong, from taking time that is others'. It guards no
secret: nobody guesses 256 bits.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from stepstate.buckets import TokenBucket
from stepstate.errors import TooManyAuthFailures

BURST = 30
"""Failures of a client at once: it has some calls under way when its token is revoked."""
PER_SECOND = 1.0
"""Failures of a client beyond these. It is not 0, so that others with its address get through."""
MAX_CLIENTS = 10_000
"""Clients that are remembered; a new one pushes out the one whose last failure is oldest."""


class AuthAttempts:
    """Counts the failures of each client: each takes a token of a bucket of its own.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()
        """By client; the one whose last failure is oldest first."""

    def __len__(self) -> int:
        return len(self._buckets)

    def check(self, client: str) -> None:
        """Refuses a client that has failed too often.

        Raises:
            TooManyAuthFailures: it has.
        """
        bucket = self._buckets.get(client)
        if bucket is not None and (wait := bucket.wait_seconds()):
            raise TooManyAuthFailures(round(wait, 3))

    def failed(self, client: str) -> None:
        """A client failed once more."""
        if client not in self._buckets:
            self._buckets[client] = TokenBucket(PER_SECOND, BURST, self._clock)
        self._buckets[client].take(1)
        self._buckets.move_to_end(client)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
