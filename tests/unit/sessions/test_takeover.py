"""Of several servers on one store, one owns a session: the loser notices."""

from __future__ import annotations

import numpy as np
import pytest

from stepstate.errors import (
    SessionExists,
    StaleOwner,
    StepAhead,
    StoreUnavailable,
)
from stepstate.identity import DEFAULT_TENANT
from stepstate.stores import Durability
from tests.unit.rig import (
    rounds,
    rows_of,
)
from tests.unit.sessions.servers import CLOSE, count, play


@pytest.fixture
def x(network):
    return rows_of(network, 40)


@pytest.fixture
def rig(start):
    return start()


async def test_the_loser_of_a_sync_session_answers_aborted_and_forgets_its_copy(start, x, network):
    one, two = start(), start()
    session = await one.open("a", durability=Durability.SYNC)
    await play(one, "a", x[:3], 0)
    await play(two, "a", x[3:5], 3)
    callers = [one.send(session, x[5], None), one.send(session, x[6], None)]
    for caller in callers:
        error = await caller.error()
        assert isinstance(error, StaleOwner)
    assert (await callers[0].error()).expected_t == 5
    await rounds(3)
    assert len(one.sessions) == 0
    y = await play(one, "a", x[5:8], 5)  # and takes it back
    assert np.abs(y - network.offline(x[:8])[5:]).max() <= CLOSE
    assert count(one, "stepstate_session_takeovers_total") == 1


async def test_the_loser_of_an_async_session_notices_with_its_next_snapshot(start, x):
    one, two = start(), start()
    await one.open("a")
    await play(one, "a", x[:3], 0)
    await one.sessions.writer.save_round()
    await play(one, "a", x[3:5], 3)
    await play(two, "a", x[3:4], 3)
    await one.sessions.writer.save_round()
    await rounds(2)
    assert len(one.sessions) == 0
    fenced = {"reason": "fenced"}
    assert one.registry.get_sample_value("stepstate_snapshot_failures_total", fenced) == 1
    await two.sessions.writer.save_round()
    assert two.sessions.undurable_rows == 0


async def test_a_client_that_is_ahead_of_a_stale_copy_is_told_of_the_takeover(start, x):
    one, two = start(), start()
    session = await one.open("a", durability=Durability.SYNC)
    await play(one, "a", x[:2], 0)
    await play(two, "a", x[2:5], 2)
    callers = [one.send(session, x[t], t) for t in (5, 6)]
    for caller in callers:
        error = await caller.error()
        assert isinstance(error, StaleOwner)
        assert error.expected_t == 5
    await rounds(3)
    await play(one, "a", x[5:7], 5)


async def test_a_client_that_is_ahead_of_its_session_is_told_so(rig, x):
    session = await rig.open("a")
    callers = [rig.send(session, x[0], t) for t in (3, 4, 0)]
    for caller in callers[:2]:
        assert isinstance(await caller.error(), StepAhead)
    assert (await callers[2].outcome()).t_after == 1


async def test_no_rows_are_asked_for_again_while_the_store_can_not_tell_who_has_them(
    start, store, x
):
    one, two = start(), start()
    session = await one.open("a", durability=Durability.SYNC)
    await play(one, "a", x[:3], 0)
    await play(two, "a", x[3:5], 3)
    store.away = True
    with pytest.raises(StoreUnavailable):
        await one.step(session, x[5], 5)
    store.away = False
    with pytest.raises(StaleOwner):
        await one.step(session, x[5], 5)


async def test_closing_a_session_that_another_server_took_is_refused(start, x):
    one, two = start(), start()
    await one.open("a")
    await play(two, "a", x[:2], 0)
    with pytest.raises(StaleOwner):
        await one.sessions.close("a")
    assert await one.sessions.close("a") == 0  # taken back first, as two had not saved it


async def test_of_two_servers_that_open_one_id_only_one_succeeds(start):
    one, two = start(), start()
    await one.open("a")
    with pytest.raises(SessionExists):
        await two.open("a")


async def test_looking_takes_nothing_over(start, x):
    one, two = start(), start()
    session = await one.open("a", durability=Durability.SYNC)
    await play(one, "a", x[:3], 0)
    standing = await two.sessions.look("a")
    assert (standing.t, standing.durable_t, standing.resident) == (3, 3, False)
    assert standing.owner == "server-0"
    (listed,), following = await two.sessions.page("", 10, "", tenant=DEFAULT_TENANT)
    assert (listed.record.session_id, listed.t, following) == ("a", 3, "")
    await one.step(session, x[3], 3)
