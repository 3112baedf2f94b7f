"""Clients that fight for one session, each through a server of its own, with rows of its own."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from stepstate.v1 import stepstate_pb2 as pb
from tests.chaos.clients import LATER, PAUSE_SECONDS, Ask, Broken, Refused
from tests.chaos.ledger import INPUTS, Complaint, Tally
from tests.integration.wire import TOLERANCE
from tests.networks import Network

BEATEN = ("STEP_MISMATCH", "STEP_TOO_OLD", "STALE_OWNER")
"""The other one was faster; the refusal has the session's t."""


@dataclass(slots=True, eq=False)
class History:
    """One session, as all its clients together know it."""

    session_id: str
    durability: str = field(init=False, default="sync")
    rows: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """The input and output of each acknowledged row."""
    beaten: Counter[str] = field(default_factory=Counter)

    def claim(self, t: int, x: np.ndarray, reply: pb.StepResponse) -> None:
        """A client was answered that row t is its own."""
        if t in self.rows:
            raise Complaint(f"session {self.session_id}: row {t} was given to two clients")
        if (reply.t, reply.durable_t) != (t + 1, t + 1):
            raise Complaint(f"session {self.session_id}: row {t} was answered with {reply}")
        self.rows[t] = x, np.asarray(reply.y, np.float32)

    def check(self, network: Network, server_t: int) -> Tally:
        """The acknowledged rows are one sequence without a hole, and nothing else was applied."""
        ts = sorted(self.rows)
        holes = len(set(range(server_t)) - set(ts))
        tally = Tally(sessions=1, rows=len(ts), twice=holes, lost=sum(t >= server_t for t in ts))
        x = np.array([self.rows[t][0] for t in ts])
        y = np.array([self.rows[t][1] for t in ts])
        tally.wrong = int(np.abs(network.offline(x) - y).max() > TOLERANCE)
        return tally


class Competitor:
    """Appends rows of its own to a session, at whatever t it is by then."""

    def __init__(self, history: History, ask: Ask, seed: int) -> None:
        self.stopping = False
        self._history = history
        self._ask = ask
        self._random = np.random.default_rng(seed)
        self._t = 0

    async def run(self) -> None:
        """Steps until `stopping`."""
        while not self.stopping:
            await self._append(self._random.standard_normal(INPUTS).astype(np.float32))
            await asyncio.sleep(random.uniform(0, 4 * PAUSE_SECONDS))

    async def _append(self, x: np.ndarray) -> None:
        """Sends a row until it is known whether it was applied."""
        t, unsure = self._t, False
        while True:
            try:
                reply = await self._ask(
                    pb.StepRequest(session_id=self._history.session_id, t=t, x=x)
                )
            except Broken:
                unsure = True
            except Refused as refused:
                reason = refused.refusal.reason
                self._history.beaten[reason] += reason in BEATEN
                if reason in BEATEN and not (unsure and reason == "STALE_OWNER"):
                    self._t = int(refused.refusal.metadata["expected_t"])
                    return
                if reason not in LATER:
                    raise Complaint(f"refused at t={t}: {refused.refusal}") from refused
                unsure = True
            else:
                self._history.claim(t, x, reply)
                self._t = t + 1
                return
            await asyncio.sleep(PAUSE_SECONDS)
