"""The life of a resident session: which transition each state allows, and what each state means."""

from __future__ import annotations

import itertools

import pytest

from stepstate.errors import StaleOwner
from stepstate.sessions import SessionState, Table
from stepstate.sessions.types import TRANSITIONS
from tests.unit.sessions.test_table import session

OPEN, ENDING, SPILLING, LOST, GONE = SessionState
LOSS = StaleOwner("a", 9)
OPERATIONS = {
    "begin_end": Table.begin_end,
    "begin_spill": Table.begin_spill,
    "reopen": Table.reopen,
    "lose": lambda table, one: table.lose(one, LOSS),
    "remove": Table.remove,
}
# What follows in each state on each operation: the same state where it changes nothing; None where
# it must not be called.
FOLLOWING = {
    OPEN: {"begin_end": ENDING, "begin_spill": SPILLING, "reopen": OPEN},
    ENDING: {"begin_end": ENDING, "begin_spill": None, "reopen": OPEN},
    SPILLING: {"begin_end": SPILLING, "begin_spill": None, "reopen": OPEN},
    LOST: {"begin_end": LOST, "begin_spill": None, "reopen": LOST},
    GONE: {"begin_end": GONE, "begin_spill": None, "reopen": GONE},
}


def following(state: SessionState, operation: str, *, busy: bool) -> SessionState | None:
    if operation == "remove":
        return GONE
    if operation == "lose":  # a session that has steps answers them first
        return LOST if state is not GONE and (busy or state is LOST) else GONE
    return FOLLOWING[state][operation]


@pytest.mark.parametrize(
    ("before", "after"), [*itertools.product(SessionState, SessionState)], ids=lambda s: s.value
)
async def test_a_session_moves_only_along_the_transitions(before, after):
    table = Table(1)
    one = session("a")
    table.add(one, t=0, durable_t=0, now=0.0, expires_at=10.0)
    one.state = before
    if after in TRANSITIONS[before]:
        table._change(one, after)  # noqa: SLF001 - no method makes all of these moves
        assert one.state is after
    else:
        with pytest.raises(RuntimeError, match=before.value):
            table._change(one, after)  # noqa: SLF001 - as above
        assert one.state is before


@pytest.mark.parametrize("busy", [False, True])
async def test_whatever_happens_to_a_session_its_state_says_what_it_allows(busy):
    for operations in itertools.product(OPERATIONS, repeat=4):
        walk(operations, busy=busy)


def walk(operations: tuple[str, ...], *, busy: bool) -> None:
    """Applies operations to a session, and compares each state with what it is to mean."""
    table = Table(1)
    one = session("a")
    table.add(one, t=0, durable_t=0, now=0.0, expires_at=10.0)
    table.busy[one.handle] = busy
    for operation in operations:
        before, generation = one.state, int(table.generation_array[one.handle])
        left = one.left
        expected = following(before, operation, busy=busy)
        if expected is None:
            with pytest.raises(RuntimeError):
                OPERATIONS[operation](table, one)
            expected = before
        else:
            OPERATIONS[operation](table, one)
        assert one.state is expected
        assert (table.usable("a", 0.0) is one) == (table.ref_of(one) is not None) == one.open
        assert (table.get("a") is one) == (one.state is not GONE)
        assert len(table) + table.free == 1
        changed = int(table.generation_array[one.handle]) != generation
        assert changed == (expected is not before)
        if one.state is LOST:
            assert one.lost is LOSS
            assert not one.left.done()
        elif one.state is SPILLING:
            assert not one.left.done()
        elif left is not None:  # whoever waited for it goes on
            assert left.done()
