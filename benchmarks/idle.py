"""Very many sessions of a server: opened, stepped once and closed by several processes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

import numpy as np

from benchmarks.clients import Clients
from benchmarks.load import CallPath, CloseSessions, Kind, Load, OpenSessions, Window
from benchmarks.models import INPUTS
from benchmarks.sessions import SessionOptions

CHUNK = 10_000
"""Sessions in one request to a client process, which answers within seconds."""
PACKED_ROWS = 256


class IdleSessions:
    """Sessions of one server.

    Args:
        count: how many.
        address: of the server.
        clients: the processes that open, step and close them.
    """

    def __init__(self, count: int, address: str, clients: Clients) -> None:
        run_id = uuid.uuid4().hex[:12]
        self.names: Sequence[str] = [f"idle-{run_id}-{number}" for number in range(count)]
        self._address = address
        self._clients = clients

    def first(self, count: int) -> IdleSessions:
        """The first of them."""
        some = IdleSessions(0, self._address, self._clients)
        some.names = self.names[:count]
        return some

    def open(self, options: SessionOptions) -> float:
        """Opens them all; returns the seconds it took."""
        return self._timed(lambda names: OpenSessions(self._address, names, options))

    def close(self) -> float:
        """Closes them all; returns the seconds it took."""
        return self._timed(lambda names: CloseSessions(self._address, names))

    def step(self) -> float:
        """Sends each its first row, in packed messages; returns the seconds it took."""
        began = time.monotonic()
        for share in self._shares():
            for loads in zip_longest(*map(self._loads, share)):
                self._clients.prepare([load for load in loads if load is not None])
                now = time.monotonic()
                self._clients.send(Window(now, now, now))
                self._clients.collect()
        return time.monotonic() - began

    def _loads(self, names: Sequence[str]) -> list[Load]:
        """Full messages, then one with the rest."""
        full = len(names) - len(names) % PACKED_ROWS
        parts = [part for part in (names[:full], names[full:]) if part]
        return [self._load(part) for part in parts]

    def _load(self, names: Sequence[str]) -> Load:
        x = np.full((len(names), INPUTS), 0.5, np.float32)
        rows = min(PACKED_ROWS, len(names))
        return Load(Kind.STEP, CallPath.PACKED, self._address, names, x, rows=rows)

    def _timed(self, question: Callable[[Sequence[str]], OpenSessions | CloseSessions]) -> float:
        began = time.monotonic()
        for share in self._shares():
            self._clients.prepare([question(names) for names in share])
        return time.monotonic() - began

    def _shares(self) -> Iterator[list[Sequence[str]]]:
        """The names for each process, in chunks."""
        count = len(self._clients)
        for first in range(0, len(self.names), CHUNK * count):
            some = self.names[first : first + CHUNK * count]
            yield [some[place::count] for place in range(count) if some[place::count]]
