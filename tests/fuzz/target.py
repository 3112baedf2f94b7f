"""What a fuzz target is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """A decoder of bytes from outside.

    It raises what it may raise for any bytes, and that is caught in `run`; what `run` raises is a
    fault.
    """

    run: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    """From which a fuzzer begins: what is right."""
