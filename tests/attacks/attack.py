"""What an attack is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Target:
    """What an attacker knows of the server."""

    address: str
    metrics_address: str
    store: Path
    """Its SQLite file."""


Script = Callable[[Target, int], Awaitable[None]]
"""What an attacker does. Its docstring says what that does to a server, and what broke before; the
number is how often it does it."""


@dataclass(frozen=True, slots=True)
class Attack:
    """An attack and its size.

    Args:
        script: it.
        count: its size in the table of SECURITY.md.
        short: its size for every change: as small as can be while the server before the limits
            still fails. None: there is no such size, so it runs only with the long tests.
        options: of `stepstate serve`.
        keeps: bytes that stay after it on either transport.
        grpcio_keeps: bytes that stay after it once with grpcio's transport, and hardly grow when
            it comes again: see docs/decisions.md.
        log_is_read: else its stderr is a pipe that nobody reads for a while.
    """

    script: Script
    count: int
    short: int | None = None
    options: tuple[str, ...] = ()
    keeps: int = 0
    grpcio_keeps: int = 0
    log_is_read: bool = True

    @property
    def name(self) -> str:
        """For a table."""
        return self.script.__name__
