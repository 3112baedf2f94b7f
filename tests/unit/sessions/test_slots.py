"""Whatever goes wrong between a slot's claim and its use, the slot comes back."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime

import pytest

from stepstate.errors import Internal, SessionUnknown
from stepstate.models.timeline import Timeline
from stepstate.sessions import CopyOptions, Table, loader
from stepstate.sessions.replay import ReplayWindow
from stepstate.sessions.scheduler import StepScheduler
from stepstate.stores import Durability, MemoryStore
from tests.unit.rig import Lasting, Rig, model_of, opening, timed_network

START = datetime(2026, 1, 1, tzinfo=UTC)
SLOTS = 3
NETWORK, PROFILES = timed_network()
FAILING = [
    (StepScheduler, "claimed"),
    (ReplayWindow, "write"),
    (Timeline, "phase"),
    (loader, "identity_of"),
    (Table, "add"),
    (MemoryStore, "create"),
    (MemoryStore, "acquire"),
]


@pytest.fixture
def rig(make_rig, clock) -> Rig:
    return make_rig(model_of(NETWORK, PROFILES), store=Lasting(clock), max_sessions=SLOTS)


def breaking(*_: object, **__: object) -> None:
    raise ArithmeticError


def leaked(rig: Rig) -> float | None:
    return rig.registry.get_sample_value("stepstate_slots_leaked")


@pytest.mark.parametrize(
    ("owner", "name"), FAILING, ids=lambda value: getattr(value, "__name__", value)
)
async def test_a_slot_comes_back_whatever_raises_while_a_session_is_placed(
    rig, monkeypatch, owner, name
):
    """More often than there are slots: by opens, forks, imports and loads."""
    sessions = rig.sessions
    await rig.open("source", start=START)
    snapshot = (await sessions.export("source"))[0]
    await rig.open("stored", start=START, durability=Durability.SYNC)
    await sessions.writer.save([sessions.find("stored")], release=True)
    rig.table.remove(rig.table.get("stored"))
    with monkeypatch.context() as broken:
        broken.setattr(owner, name, breaking)
        for place in range(2 * SLOTS):
            for ask in (
                sessions.open(opening(f"a{place}", start=START)),
                sessions.fork("source", CopyOptions(f"b{place}", None, None)),
                sessions.restore(snapshot, CopyOptions(f"c{place}", None, None)),
                sessions.get("stored"),
            ):
                with suppress(ArithmeticError, TypeError, Internal):
                    await ask
            await rig.settle("stored", f"a{place}", f"b{place}", f"c{place}")
    await sessions.sweep()
    assert leaked(rig) == 0
    assert not rig.left_over()
    await sessions.get("stored")
    with pytest.raises(SessionUnknown):
        await sessions.get("never")
    for place in range(2 * SLOTS):
        await rig.open(f"after{place}", start=START)
    assert not rig.left_over()


async def test_a_slot_that_is_lost_shows_in_the_metrics(rig):
    rig.scheduler.engine.claim()
    await rig.sessions.sweep()
    assert leaked(rig) == 1
