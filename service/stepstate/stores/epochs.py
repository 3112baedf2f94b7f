"""The number that proves a lease."""

from __future__ import annotations


def next_epoch(previous: int, now: float) -> int:
    """A higher epoch than the previous one, and than any before it that the store has forgotten.

    Microseconds since 1970, or one more than the previous epoch, whichever is more. So a
    server that outlives its store's data can't hold an epoch that is given out again.

    Args:
        previous: of the session, or of the one that ended under its id; 0: none is known.
        now: Unix seconds.
    """
    return max(previous + 1, int(now * 1e6))
