"""Forks, exports and imports of sessions."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from stepstate.errors import (
    InvalidField,
    SessionExists,
    SessionUnknown,
    SnapshotCorrupt,
    SnapshotModelMismatch,
    StepTooOld,
)
from stepstate.sessions.options import CopyOptions
from stepstate.sessions.snapshots.format import decode, encode
from stepstate.stores import Durability
from tests.networks import make_network
from tests.unit.rig import (
    IDLE_SECONDS,
    rows_of,
)
from tests.unit.sessions.servers import CLOSE, play, printed

AS_IT_IS = CopyOptions("", None, None)


@pytest.fixture
def x(network):
    return rows_of(network, 40)


@pytest.fixture
def rig(start):
    return start()


async def test_a_fork_goes_on_from_the_state_of_its_source_and_apart_from_it(rig, x, network):
    await rig.open("a")
    await play(rig, "a", x[:6], 0)
    fork = await rig.sessions.fork("a", CopyOptions("b", None, None))
    assert rig.sessions.t(fork) == 6
    await play(rig, "a", x[10:13], 6)
    y = await play(rig, "b", x[6:9], 6)
    assert np.abs(y - network.offline(x[:9])[6:]).max() <= CLOSE
    assert fork.record.idle_timeout_seconds == IDLE_SECONDS


async def test_a_fork_has_the_steps_accepted_before_it_and_none_after(start, x, network):
    rig = start(chunk_rows=1)
    session = await rig.open("a")
    before = rig.send(session, x[:4], 0)
    forking = asyncio.create_task(rig.sessions.fork("a", CopyOptions("b", None, None)))
    await asyncio.sleep(0)
    after = rig.send(session, x[4:6], 4)
    fork = await forking
    await before.outcome()
    await after.outcome()
    assert rig.sessions.t(fork) == 4
    y = await play(rig, "b", x[4:6], 4)
    assert np.abs(y - network.offline(x[:6])[4:]).max() <= CLOSE


async def test_a_fork_can_have_another_timeout_and_durability(rig):
    await rig.open("a")
    fork = await rig.sessions.fork("a", CopyOptions("b", 7.0, Durability.SYNC))
    assert fork.record.idle_timeout_seconds == 7.0
    assert fork.record.durability is Durability.SYNC
    with pytest.raises(SessionExists):
        await rig.sessions.fork("a", CopyOptions("b", None, None))
    with pytest.raises(InvalidField, match="session_id"):
        await rig.sessions.fork("a", CopyOptions("b b", None, None))
    with pytest.raises(SessionUnknown):
        await rig.sessions.fork("never", CopyOptions("c", None, None))


async def test_an_exported_session_goes_on_elsewhere_with_the_same_bytes(rig, make_rig, x, network):
    await rig.open("a")
    await play(rig, "a", x[:6], 0)
    snapshot, standing = await rig.sessions.export("a")
    assert standing.t == 6
    other = make_rig(replay_rows=8)  # another server, with a memory of its own
    session = await other.sessions.restore(snapshot, AS_IT_IS)
    assert (session.session_id, other.sessions.t(session)) == ("a", 6)
    assert session.record.durability is Durability.NONE
    assert (await other.sessions.export("a"))[0] != b""
    again = await other.step(session, x[5], 5)
    assert again.replayed
    assert (await other.y(session, x[6])).tobytes() == (await play(rig, "a", x[6:7], 6)).tobytes()


async def test_a_snapshot_can_be_imported_under_another_id(rig, x):
    await rig.open("a")
    await play(rig, "a", x[:3], 0)
    snapshot, _ = await rig.sessions.export("a")
    with pytest.raises(SessionExists):
        await rig.sessions.restore(snapshot, AS_IT_IS)
    session = await rig.sessions.restore(snapshot, CopyOptions("b", None, None))
    assert rig.sessions.t(session) == 3


async def test_an_import_of_other_weights_is_refused(rig, make_rig, x):
    await rig.open("a")
    snapshot, _ = await rig.sessions.export("a")
    other = make_rig(printed(make_network("lstm", seed=77), "22"))
    with pytest.raises(SnapshotModelMismatch) as refused:
        await other.sessions.restore(snapshot, AS_IT_IS)
    assert refused.value.loaded == other.scheduler.model.manifest.fingerprint
    assert len(other.sessions) == 0


async def test_an_import_whose_state_does_not_fit_its_model_is_refused(rig):
    await rig.open("a")
    snapshot = decode((await rig.sessions.export("a"))[0])
    cut = encode(replace(snapshot, state=snapshot.state[:-1]))
    with pytest.raises(SnapshotModelMismatch):
        await rig.sessions.restore(cut, CopyOptions("b", None, None))


async def test_an_import_that_is_no_snapshot_is_refused(rig):
    with pytest.raises(SnapshotCorrupt):
        await rig.sessions.restore(b"", AS_IT_IS)


async def test_a_shorter_replay_window_keeps_the_newest_rows(rig, make_rig, x):
    await rig.open("a")
    await play(rig, "a", x[:8], 0)
    snapshot, _ = await rig.sessions.export("a")
    small = make_rig(replay_rows=3)
    session = await small.sessions.restore(snapshot, AS_IT_IS)
    for t in (5, 6, 7):
        assert (await small.step(session, x[t], t)).replayed
    with pytest.raises(StepTooOld):
        await small.step(session, x[4], 4)
