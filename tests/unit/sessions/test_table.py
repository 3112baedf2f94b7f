from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import pytest

from stepstate.sessions import ResidentSession, Table
from stepstate.stores import Durability, SessionRecord


def session(
    session_id: str, durability: Durability = Durability.ASYNC, idle: float = 10.0
) -> ResidentSession:
    now = datetime.now(UTC)
    scheduler = SimpleNamespace(number=0, model=None, release=lambda slot: None)
    record = SessionRecord(session_id, "m", "1", "", idle, None, now, durability)
    return ResidentSession(record, scheduler, 0, 0)


@pytest.fixture
def table() -> Table:
    return Table(3)


def add(
    table: Table, *names: str, now: float = 0.0, durability: Durability = Durability.ASYNC
) -> list[ResidentSession]:
    made = [session(name, durability) for name in names]
    for one in made:
        table.add(one, t=0, durable_t=0, now=now, expires_at=now + 10.0)
    return made


def test_a_session_is_found_by_its_id_while_it_is_in(table):
    (a,) = add(table, "a")
    assert table.get("a") is a
    assert table.get("b") is None
    table.remove(a)
    assert table.get("a") is None
    assert len(table) == 0


def test_a_handle_has_another_generation_once_its_session_is_ending_or_gone(table):
    (a,) = add(table, "a")
    seen = [int(table.generation_array[a.handle])]
    for change in (table.begin_end, table.revoke, table.remove):
        change(a)
        seen.append(int(table.generation_array[a.handle]))
    (b,) = add(table, "b")
    assert b.handle == a.handle
    assert len(set(seen)) == 4


def test_sessions_have_different_handles_up_to_the_limit(table):
    assert sorted(one.handle for one in add(table, "a", "b", "c")) == [0, 1, 2]
    assert len(table) == table.limit


def test_a_handle_that_is_used_again_starts_at_t_0_with_its_own_expiry(table):
    (old,) = add(table, "old")
    table.t[old.handle] = 99
    table.remove(old)
    (new,) = add(table, "new", now=50.0)
    assert new.handle == old.handle
    assert table.t[new.handle] == 0
    assert table.expires_at[new.handle] == 60.0


def test_views_and_arrays_are_the_same_numbers(table):
    (a,) = add(table, "a")
    table.t_array[np.array([a.handle])] = 7
    table.expires_at[a.handle] = 3.0
    assert table.t[a.handle] == 7
    assert type(table.t[a.handle]) is int
    assert table.expires_at_array[a.handle] == 3.0


def test_free_is_the_room_that_is_left(table):
    a, _ = add(table, "a", "b")
    assert table.free == 1
    table.remove(a)
    assert table.free == 2


def test_a_handle_that_is_used_again_takes_the_numbers_it_is_given(table):
    (old,) = add(table, "old")
    table.touch_at[old.handle] = 1.0
    table.remove(old)
    new = session("new")
    table.add(new, t=40, durable_t=30, now=0.0, expires_at=7.0)
    assert (table.t[new.handle], table.durable_t[new.handle]) == (40, 30)
    assert table.expires_at[new.handle] == 7.0
    assert table.untouched(100.0) == []


def test_undurable_are_async_sessions_with_rows_that_are_not_saved(table):
    a, b = add(table, "a", "b")
    (none,) = add(table, "none", durability=Durability.NONE)
    for one in (a, none):
        table.t[one.handle] = 5
    assert table.undurable() == [a]
    assert table.undurable_rows() == 5
    table.durable_t[a.handle] = 3
    assert table.undurable_rows() == 2
    table.durable_t[a.handle] = 5
    assert table.undurable() == []
    table.t[b.handle] = 1
    table.remove(b)
    assert table.undurable() == []
    assert table.undurable_rows() == 0


def test_untouched_are_those_whose_time_to_be_touched_has_come(table):
    a, b, _ = add(table, "a", "b", "c")
    table.touch_at[a.handle] = 3.0
    table.touch_at[b.handle] = 4.0
    assert table.untouched(2.9) == []
    assert table.untouched(3.5) == [a]
    table.remove(a)
    assert table.untouched(4.0) == [b]


def test_the_longest_idle_are_those_stepped_and_loaded_the_longest_ago(table):
    a, b, c = add(table, "a", "b", "c")
    for one, stepped_at in ((a, 30.0), (b, 10.0), (c, 20.0)):
        table.expires_at[one.handle] = stepped_at + 10.0
    assert table.longest_idle(2) == [b, c]
    assert table.longest_idle(9) == [b, c, a]
    table.remove(b)
    assert table.longest_idle(1) == [c]


def test_a_session_that_was_just_loaded_is_not_among_the_longest_idle(table):
    (a,) = add(table, "a", now=5.0)
    loaded = session("loaded")
    table.add(loaded, t=9, durable_t=9, now=6.0, expires_at=3.0)
    assert table.longest_idle(1) == [a]


def test_overdue_are_those_whose_time_is_up_and_who_are_still_in(table):
    a, b = add(table, "a", "b", now=0.0)
    (c,) = add(table, "c", now=5.0)
    assert table.overdue(9.9) == []
    assert table.overdue(10.0) == [a, b]
    table.remove(a)
    assert table.overdue(20.0) == [b, c]
