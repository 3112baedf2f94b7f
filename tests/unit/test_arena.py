from __future__ import annotations

import pytest
import torch

from stepstate.engine.arena import Arena


@pytest.fixture
def arena() -> Arena:
    return Arena(4, 3)


def slots(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


def test_a_claimed_slot_is_zero_whatever_it_held_before(arena):
    slot = arena.claim()
    arena.scatter(slots(slot), torch.full((1, 3), torch.nan))
    arena.release(slot)
    assert arena.claim() == slot
    assert (arena.gather(slots(slot)) == 0).all()


def test_all_slots_can_be_claimed_and_are_different(arena):
    assert sorted(arena.claim() for _ in range(4)) == [0, 1, 2, 3]
    assert (arena.used, arena.used_bytes) == (4, 48)
    arena.release(2)
    assert (arena.used, arena.used_bytes) == (3, 36)


def test_what_is_scattered_is_gathered_and_other_slots_keep_theirs(arena):
    for _ in range(4):
        arena.claim()
    states = torch.arange(6.0).reshape(2, 3)
    arena.scatter(slots(3, 1), states)
    assert torch.equal(arena.gather(slots(1, 3)), states[[1, 0]])
    assert (arena.gather(slots(0, 2)) == 0).all()


def test_gathered_states_are_a_copy(arena):
    slot = arena.claim()
    arena.gather(slots(slot)).fill_(7)
    assert (arena.gather(slots(slot)) == 0).all()
