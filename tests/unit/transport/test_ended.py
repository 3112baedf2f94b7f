from __future__ import annotations

import pytest

from stepstate.budget import MemoryAccount, MemoryBudget, MemoryUse
from stepstate.transport.triton import ended
from stepstate.transport.triton.ended import (
    MAX_ENDED,
    MAX_ENDED_BYTES,
    MAX_REPLY_BYTES,
    EndedSequence,
    EndedSequences,
)


@pytest.fixture
def budget() -> MemoryBudget:
    return MemoryBudget(2**30)


@pytest.fixture
def kept(budget: MemoryBudget) -> EndedSequences:
    return EndedSequences(MemoryAccount(budget))


def one(peer: str = "a", size: int = 100) -> EndedSequence:
    return EndedSequence(peer, 7, b"digest", bytes(size))


def test_what_is_kept_is_counted(kept, budget):
    for session_id in ("1", "2", "1"):
        kept.add(session_id, one())
    assert len(kept) == 2
    assert budget.by_use[MemoryUse.ENDED] == budget.used == 2 * one().size
    kept.discard("1")
    kept.discard("1")
    kept.discard("2")
    assert (len(kept), budget.used) == (0, 0)


def test_a_long_reply_is_not_kept_and_forgets_the_one_before(kept, budget):
    kept.add("1", one())
    kept.add("1", one(size=MAX_REPLY_BYTES + 1))
    assert kept.get("1") is None
    assert not budget.used


def test_they_are_bounded_in_number(kept):
    for place in range(3 * MAX_ENDED):
        kept.add(str(place), one())
    assert len(kept) == MAX_ENDED
    assert kept.get(str(2 * MAX_ENDED)) is not None
    assert kept.get(str(2 * MAX_ENDED - 1)) is None


def test_they_are_bounded_in_bytes(kept, budget):
    for place in range(2 * MAX_ENDED_BYTES // MAX_REPLY_BYTES):
        kept.add(str(place), one(size=MAX_REPLY_BYTES))
    assert MAX_ENDED_BYTES - 2 * MAX_REPLY_BYTES < budget.used <= MAX_ENDED_BYTES


@pytest.mark.parametrize("flooding", [1, 3, 40])
def test_floods_of_endings_leave_the_last_ones_of_others(kept, flooding):
    for place in range(20):
        kept.add(f"mine-{place}", one("honest"))
    for place in range(5 * MAX_ENDED):
        kept.add(str(place), one(f"flood-{place % flooding}"))
    assert all(kept.get(f"mine-{place}") for place in range(20))


def test_without_free_memory_the_oldest_make_room(monkeypatch):
    monkeypatch.setattr(ended, "MAX_ENDED_BYTES", 2**40)
    size = one().size
    budget = MemoryBudget(14 * size)  # of which a quarter is for those who hold little
    other, kept = MemoryAccount(budget), EndedSequences(MemoryAccount(budget))
    for place in range(9):
        kept.add(str(place), one())
    assert [place for place in range(9) if kept.get(str(place))] == [4, 5, 6, 7, 8]
    other.reserve(MemoryUse.REPLIES, 5 * size)
    kept.add("9", one())  # what others hold is not theirs to take
    assert 0 < len(kept) < 5
    assert budget.used <= budget.limit
