"""When a request is sent again: which errors allow it, how long to wait, when to give up. No I/O.

The constants of all retries are here.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from stepstate.errors import (
    ServerUnreachable,
    StaleOwner,
    StepstateError,
    TenantLimitReached,
    Unavailable,
)

TIMEOUT = 90.0
"""Seconds a call may take with all its retries. A server that is restarted drains for up to 30 s,
and starts in up to 17 s on a busy machine: twice that, so that a client survives it."""
CONNECT_TIMEOUT = 10.0
"""Seconds within which a server must answer for the first time: a wrong address is found soon."""
FIRST_DELAY = 0.02
"""Seconds before the second try; doubled for each further one."""
MAX_DELAY = 1.0
MIN_TIMEOUT = 0.001
"""Seconds that gRPC is given for a call when no time is left: it takes no less than this."""
PROBE_TIMEOUT = 0.05
"""Seconds for a call without a connection, whose error says why there is none."""


def is_retryable(error: StepstateError) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, TenantLimitReached) and error.limit == "open_sessions":
        return False  # no session ends by itself within a timeout
    return isinstance(error, Unavailable | StaleOwner)


class Backoff:
    """How long to wait before the next try, and when to give up.

    Args:
        timeout: seconds after which `wait` raises instead.
    """

    def __init__(self, timeout: float) -> None:
        self._deadline = time.monotonic() + timeout
        self._delay = FIRST_DELAY

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self._deadline - time.monotonic()

    def wait(self, error: StepstateError) -> float:
        """Seconds to wait after this error: doubled up to 1 s, with jitter, or as the error asks.

        Raises:
            StepstateError: the error, if the deadline would pass meanwhile.
        """
        delay = max(
            self._delay * random.uniform(0.5, 1.0),  # noqa: S311 - jitter
            getattr(error, "retry_after_seconds", 0.0),
        )
        self._delay = min(2 * self._delay, MAX_DELAY)
        if delay >= self.left:
            raise error
        return float(delay)


class ProgressTimeout:
    """A `Backoff` that starts anew with every answer that makes progress.

    Args:
        timeout: seconds without progress after which `wait` raises.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._backoff: Backoff | None = None

    @property
    def left(self) -> float:
        """Seconds that a request may take; they count from the first request on."""
        if self._backoff is None:
            self._backoff = Backoff(self._timeout)
        return max(self._backoff.left, MIN_TIMEOUT)

    def progress(self) -> None:
        """There was progress: the time starts anew with the next request."""
        self._backoff = None

    def wait(self, error: StepstateError) -> float:
        """Seconds to wait after this error.

        Raises:
            StepstateError: the error, if there was no progress for too long.
        """
        if self._backoff is None:
            self._backoff = Backoff(self._timeout)
        return self._backoff.wait(error)


@dataclass(slots=True)
class ServerReach:
    """Whether a server has ever answered a client: it must within `connect_timeout` seconds."""

    connect_timeout: float
    reached: bool = False


class CallAttempts:
    """The tries of one unary call, and when to give up.

    Args:
        reach: of the call's client.
        timeout: seconds for all tries.
    """

    def __init__(self, reach: ServerReach, timeout: float) -> None:
        self._reach = reach
        self._all = Backoff(timeout)
        self._first = Backoff(min(timeout, reach.connect_timeout))

    @property
    def connect_seconds(self) -> float | None:
        """Seconds to wait for a connection before the try; None: do not wait."""
        return None if self._reach.reached else max(self._first.left, MIN_TIMEOUT)

    def left(self, *, connected: bool) -> float:
        """Seconds that the try may take."""
        return max(self._all.left, MIN_TIMEOUT) if connected else PROBE_TIMEOUT

    def answered(self) -> None:
        """The server answered."""
        self._reach.reached = True

    def wait(self, error: StepstateError) -> float:
        """Seconds to wait after an error, before the next try.

        Raises:
            StepstateError: there is no next try.
        """
        if not isinstance(error, ServerUnreachable):
            self._reach.reached = True
        if not is_retryable(error):
            raise error
        return (self._all if self._reach.reached else self._first).wait(error)
