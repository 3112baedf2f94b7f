"""What stops a server before it starts: its store can't be opened as it was told to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(eq=False)
class StoreOpenError(Exception):
    """A store's URL is wrong, or what it names is not a store. Never on the wire.

    Args:
        store: the URL, without its password.
        problem: what is wrong, and what to do next.
    """

    store: str
    problem: str

    def __str__(self) -> str:
        return f"store {self.store}: {self.problem}"
