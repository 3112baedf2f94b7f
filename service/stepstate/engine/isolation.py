"""Running things together, so that a surprise in one of them is nobody else's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def isolated(
    items: Sequence[T],
    run: Callable[[Sequence[T]], R],
    failed: Callable[[T, Exception], object],
) -> list[tuple[Sequence[T], R]]:
    """Runs items together; if that raises, each half of them, down to the single item that raises.

    Args:
        items: at least one.
        run: changes nothing when it raises.
        failed: called with each item that raises when it runs alone, and what it raised.

    Returns:
        The items that ran together, and what `run` returned for them.
    """
    try:
        return [(items, run(items))]
    except Exception as error:  # noqa: BLE001 - it is told to whoever sent the item
        if len(items) == 1:
            failed(items[0], error)
            return []
    middle = len(items) // 2
    return isolated(items[:middle], run, failed) + isolated(items[middle:], run, failed)
