"""Long replies are kept per session first: what others do costs none its last one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stepstate.budget import MemoryAccount, MemoryBudget, MemoryUse
from stepstate.engine import WorkItem
from stepstate.sessions.replay import ReplayWindow
from tests.hypothesis_profiles import examples

SLOTS = 4
BOUND = 100
rounds = st.tuples(st.integers(0, SLOTS - 1), st.none() | st.integers(1, BOUND + 10))
"""A slot, and the bytes of its next reply; None: its session ends."""


class Caller:
    cancelled = False


class Sessions:
    """A window, and what each of its sessions was told last."""

    def __init__(self, memory: int, other: int) -> None:
        self.budget = MemoryBudget(memory)
        MemoryAccount(self.budget).reserve(MemoryUse.REQUESTS, min(other, self.budget.shared))
        self.window = ReplayWindow(
            SLOTS,
            input_width=1,
            output_width=1,
            rows=3,
            long_bytes=BOUND,
            memory=MemoryAccount(self.budget),
        )
        self.t = [0] * SLOTS

    def apply(self, slot: int, size: int | None) -> None:
        if size is None:
            self.window.clear(slot)
            return
        work = WorkItem(np.zeros(2, np.float32), 2, False, False, Caller())  # noqa: FBT003
        work.slot = slot
        self.window.add_long(work, self.t[slot], bytes(size), None)
        self.t[slot] += 2

    def kept(self) -> dict[tuple[int, int], int]:
        """The bytes of each reply that is kept, by slot and t."""
        states = ((slot, self.window.read(slot)) for slot in range(SLOTS))
        return {(slot, one.t): one.nbytes for slot, state in states for one in state.replies}


@examples(100)
@given(st.lists(rounds, max_size=40), st.integers(0, 400), st.integers(0, 400))
def test_a_session_keeps_its_last_reply_unless_it_holds_most(rounds, memory, other):
    sessions = Sessions(memory, other)
    before: dict[tuple[int, int], int] = {}
    for slot, size in rounds:
        sessions.apply(slot, size)
        kept = sessions.kept()
        held = sum(kept.values())
        assert held == sessions.window.long_bytes <= BOUND
        assert held == sessions.budget.by_use[MemoryUse.REPLAY]
        last = {one: max(t for its, t in before if its == one) for one, _ in before}
        lost = [one for one in last.items() if one not in kept and one[0] != slot]
        if lost:  # then nothing is left that is not a last reply, nor is a larger one
            assert len(kept) == len({one for one, _ in kept})
            assert max(kept.values(), default=0) <= min(before[one] for one in lost)
        before = kept
