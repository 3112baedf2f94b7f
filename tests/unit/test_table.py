from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest

from stepstate.sessions import Session, Table
from stepstate.stores import SessionRecord


def session(session_id: str, idle: float = 10.0) -> Session:
    now = datetime.now(UTC)
    return Session(SessionRecord(session_id, "m", "1", "", idle, None, now), None, 0, 0)


@pytest.fixture
def table() -> Table:
    return Table(3)


def add(table: Table, *names: str, now: float = 0.0) -> list[Session]:
    made = [session(name) for name in names]
    for one in made:
        table.add(one, now)
    return made


def test_a_session_is_found_by_its_id_while_it_is_in(table):
    (a,) = add(table, "a")
    assert table.get("a") is a
    assert table.get("b") is None
    table.remove(a)
    assert table.get("a") is None
    assert len(table) == 0


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


def test_a_page_goes_on_from_a_handle_in_their_order(table):
    a, b, c = add(table, "a", "b", "c")
    assert list(table.page(0)) == [a, b, c]
    assert list(table.page(b.handle)) == [b, c]
    table.remove(b)
    assert list(table.page(0)) == [a, c]
    assert list(table.page(1000)) == []


def test_overdue_are_those_whose_time_is_up_and_who_are_still_in(table):
    a, b = add(table, "a", "b", now=0.0)
    (c,) = add(table, "c", now=5.0)
    assert table.overdue(9.9) == []
    assert table.overdue(10.0) == [a, b]
    table.remove(a)
    assert table.overdue(20.0) == [b, c]
