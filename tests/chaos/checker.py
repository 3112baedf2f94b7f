"""Tells from the outputs alone what a session's state has gone through."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tests.chaos.ledger import Ledger, Tally
from tests.integration.wire import TOLERANCE
from tests.networks import Network

LOOKED_BACK = 64
"""How many rows before the first wrong output may be the ones applied twice, or left out."""


def check(ledger: Ledger, network: Network, server_t: int) -> Tally:
    """Counts what is missing and what is there twice: by t, and by nn.LSTM over the inputs."""
    tally = ledger.tally
    tally.sessions, tally.rows = 1, ledger.t
    tally.lost += max(0, ledger.t - server_t)
    tally.twice += max(0, server_t - ledger.t)
    if not ledger.t:
        return tally
    got = np.array([np.frombuffer(y, "<f4") for y in ledger.given])
    x = ledger.rows(0, ledger.t)
    off = _wrong(got, network.offline(x))
    if off.size:
        tally.wrong += 1
        twice, lost = explain(got, x, network, int(off[0]))
        tally.twice += twice
        tally.lost += lost
    return tally


def explain(got: np.ndarray, x: np.ndarray, network: Network, first: int) -> tuple[int, int]:
    """Rows applied twice, and rows left out, that make the outputs from `first` on what they are.

    Looks for one row, or a run of them up to that point, that explains the first wrong output;
    (0, 0) if there is none.
    """
    for size in (1, 2, 3, 4, 8, 16):
        for begin in range(max(0, first - LOOKED_BACK), first - size + 1):
            run, after = slice(begin, begin + size), begin + size
            doubled = np.concatenate((x[:after], x[run], x[after : first + 1]))
            if not _wrong(got[first], network.offline(doubled)[-1]).size:
                return size, 0
            without = np.concatenate((x[:begin], x[after : first + 1]))
            if not _wrong(got[first], network.offline(without)[-1]).size:
                return 0, size
    return 0, 0


def total(tallies: Iterable[Tally]) -> Tally:
    """All of them together."""
    whole = Tally()
    for tally in tallies:
        whole.add(tally)
    return whole


def _wrong(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Rows that are off."""
    return np.flatnonzero(~(np.abs(np.atleast_2d(got - want)).max(axis=1) <= TOLERANCE))
