from __future__ import annotations

import numpy as np
import pytest

from stepstate.engine.arena import Arena, Layout

LAYOUT = Layout(cell=3, history=4, inputs=2, tracked=2)


@pytest.fixture
def arena() -> Arena:
    return Arena(4, LAYOUT, LAYOUT.blank(np.array([0.1, 7.0], np.float32)))


def slots(*numbers: int) -> np.ndarray:
    return np.array(numbers)


def test_a_claimed_slot_is_blank_whatever_it_held_before(arena):
    slot = arena.claim()
    blank = arena.read(slots(slot))
    arena.write(slot, np.full(LAYOUT.width, 5.0, np.float32))
    arena.release(slot)
    assert arena.claim() == slot
    assert (arena.gather(slots(slot)) == 0).all()
    assert arena.read(slots(slot)).tobytes() == blank.tobytes()


def test_all_slots_can_be_claimed_and_are_different(arena):
    assert sorted(arena.claim() for _ in range(4)) == [0, 1, 2, 3]
    assert (arena.used, arena.used_bytes) == (4, 4 * 4 * 13)
    arena.release(2)
    assert (arena.used, arena.used_bytes) == (3, 3 * 4 * 13)


def test_what_is_scattered_is_gathered_and_other_slots_keep_theirs(arena):
    for _ in range(4):
        arena.claim()
    states = np.arange(6.0).reshape(2, 3)
    arena.scatter(slots(3, 1), states)
    assert np.array_equal(arena.gather(slots(1, 3)), states[[1, 0]])
    assert (arena.gather(slots(0, 2)) == 0).all()


def test_gathered_states_are_a_copy(arena):
    slot = arena.claim()
    arena.gather(slots(slot)).fill(7)
    assert (arena.gather(slots(slot)) == 0).all()


def test_past_rows_come_oldest_first_and_are_unknown_before_the_first(arena):
    """They lie in the session's own row, between the cell's state and what is tracked."""
    slot, other = arena.claim(), arena.claim()
    for t in range(6):
        before = arena.past(slots(slot), np.array([t]))[0, :, 0]
        known = [10.0 * past for past in range(max(0, t - 4), t)]
        assert before[4 - len(known) :].tolist() == known
        assert np.isnan(before[: 4 - len(known)]).all()
        arena.append(slots(slot), np.array([t]), np.array([[10.0 * t, t]], np.float32))
    assert arena.past_row(slots(slot), np.array([3])).tolist() == [[30.0, 3.0]]
    whole = arena.read(np.array([slot, other]))
    assert sorted(whole[0, 3:11:2].tolist()) == [20.0, 30.0, 40.0, 50.0]
    assert np.isnan(whole[1, 3:11]).all()
    assert whole[:, 11:].tolist() == [[pytest.approx(0.1), 7.0]] * 2


def test_what_is_tracked_is_a_copy_until_it_is_written(arena):
    slot = arena.claim()
    part = arena.tracked(slots(slot))
    part[0, 0] = 0.5
    assert arena.read(slots(slot))[0, 11] != 0.5
    arena.write_tracked(slots(slot), part)
    assert arena.read(slots(slot))[0, 11] == 0.5
