"""Which packed rows go straight to the engine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from stepstate.sessions import RowBatch, Table
from stepstate.stores import Durability
from tests.unit.sessions.test_table import add

NOW, BACKLOG_ROWS, T = 5.0, 4, 3


@pytest.fixture
def table() -> Table:
    table = Table(3)
    for one in add(table, "a", "b", "c"):
        table.t[one.handle] = T
        table.durable_t[one.handle] = T
    return table


def handles_of(table: Table, *names: str) -> np.ndarray:
    return np.array([table.get(name).handle for name in names])


def go_straight(table: Table, **changed: object) -> list[bool]:
    """Of one row for each of the three sessions, all as they should be but for `changed`."""
    handles = handles_of(table, "a", "b", "c")
    fields = {
        "handles": handles,
        "generations": table.generation_array[handles],
        "t": np.full(3, T),
        "x": np.zeros((3, 2), np.float32),
    }
    columns = RowBatch(**fields | changed)
    return table.fast_path_mask(columns, scheduler=0, now=NOW, backlog_rows=BACKLOG_ROWS).tolist()


def test_rows_of_idle_seated_sessions_go_straight_with_their_t_or_without(table):
    assert go_straight(table) == [True, True, True]
    assert go_straight(table, t=None) == [True, True, True]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda table, handle: table.revoke(table.at(handle)), id="another generation"),
        pytest.param(
            lambda table, handle: table.scheduler_array.put(handle, 1), id="another model"
        ),
        pytest.param(lambda table, handle: table.busy_array.put(handle, 1), id="busy"),
        pytest.param(lambda table, handle: table.expires_at_array.put(handle, NOW), id="expired"),
        pytest.param(
            lambda table, handle: table.durable_t_array.put(handle, T - BACKLOG_ROWS),
            id="too much waits to be saved",
        ),
        pytest.param(lambda table, handle: table.t_array.put(handle, T + 1), id="another t"),
    ],
)
def test_a_session_that_is_not_ready_keeps_its_row_back_and_no_other(
    table: Table, change: Callable[[Table, int], None]
):
    generations = table.generation_array[handles_of(table, "a", "b", "c")]
    change(table, table.get("b").handle)
    assert go_straight(table, generations=generations) == [True, False, True]


def test_one_row_less_than_the_backlog_may_wait_to_be_saved(table):
    table.durable_t[table.get("b").handle] = T - BACKLOG_ROWS + 1
    assert go_straight(table) == [True, True, True]


def test_a_session_that_is_never_saved_has_no_backlog(table):
    table.remove(table.get("b"))
    (b,) = add(table, "b", durability=Durability.NONE)
    table.t[b.handle] = T + BACKLOG_ROWS
    assert go_straight(table, t=np.array([T, T + BACKLOG_ROWS, T])) == [True, True, True]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_kept_back(table, value):
    x = np.zeros((3, 2), np.float32)
    x[1, 1] = value
    assert go_straight(table, x=x) == [True, False, True]


def test_of_the_rows_of_one_session_only_the_first_goes(table):
    handles = handles_of(table, "b", "c", "b")
    assert go_straight(table, handles=handles, generations=np.ones(3, np.int64)) == [
        True,
        True,
        False,
    ]
