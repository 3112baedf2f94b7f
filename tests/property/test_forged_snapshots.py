"""Whatever a snapshot says under a right checksum, it stays a matter of its session.

Snapshots with arbitrary records, numbers, states and replies are imported, and put where a store
has a session's snapshot. Either they are refused in words, or they are sessions like any other.
The others are then listed, stepped, saved, drained, counted and shown in the metrics.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from stepstate import errors
from stepstate.sessions.replay import CachedReply, ReplayState
from stepstate.sessions.snapshots.format import decode, encode
from stepstate.stores import Durability
from stepstate.v1 import stepstate_pb2 as pb
from tests.offline import forecasting_network
from tests.property.homes import ODD, Door, FileHome, MemoryHome, RedisHome
from tests.property.test_damaged_records import FIELDS, TYPED, values
from tests.redis_process import RedisProcess, redis_process
from tests.unit.rig import Clock, model_of, timed_network

TIMED, PROFILES = timed_network()
MODELS = (model_of(forecasting_network()), model_of(TIMED, PROFILES))
X = np.random.default_rng(3).normal(size=(12, 2)).astype(np.float32)
START = datetime(2026, 1, 1, tzinfo=UTC)
REFUSALS = (errors.SnapshotCorrupt, errors.SnapshotModelMismatch, errors.InvalidRequest)
STEPPED = 9
"""Rows of the session that is forged: a row of them, a request of many, single rows."""

specials = st.sampled_from([0.0, -1.0, 0.5, 2.0**24, 1e30, 3.4e38, np.nan, np.inf, -np.inf])
floats = st.one_of(specials, st.floats(width=32))
counts = st.one_of(
    st.integers(0, 20), st.sampled_from([2**31, 2**32 - 1, 2**52, 2**53 - 100, 2**63, 2**64 - 1])
)


@st.composite
def replies(draw) -> CachedReply:
    shape = draw(st.sampled_from([(1, 6), (3, 6), (1, 16), (3, 16), (0, 0)]))
    names = st.sampled_from(["i", "f", "g", "o", "c", "m", "h", "h_prime", ""])
    layer = st.dictionaries(names, st.just(np.full(shape, draw(floats), np.float32)), max_size=7)
    return CachedReply(
        draw(counts),
        draw(counts.map(lambda count: count % 2**32)),
        draw(st.binary(max_size=40) | st.integers(0, 80).map(lambda n: bytes(4 * n))),
        draw(st.none() | st.lists(layer, max_size=2)),
        bytes(16),
    )


edits = st.fixed_dictionaries(
    {},
    optional={
        "record": st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=2),
        "identity": st.binary(max_size=30) | st.sampled_from([b"[" * 60_000, b"[]" * 40_000]),
        "t": counts,
        "epoch": counts,
        "stepped_at": st.floats(),
        "state": st.dictionaries(st.integers(0, 2**16), floats, max_size=4),
        "width": st.integers(0, 200),
        "stamps": st.dictionaries(st.integers(0, 30), st.integers(-3, 2**62), max_size=3),
        "ring": st.dictionaries(st.integers(0, 200), floats, max_size=3),
        "replies": st.lists(replies(), max_size=3),
    },
)


def forged(data: bytes, edit: Mapping[str, object]) -> bytes:
    """A snapshot with some of its values changed, under a checksum that fits them."""
    source = decode(data)
    record = json.loads(source.record.to_json()) | edit.get("record", {})
    identity = edit.get("identity", json.dumps([json.dumps(record), "x"]).encode())
    window = source.window
    state, stamps, ring = source.state.copy(), window.stamps.copy(), window.ring.copy()
    for target, places in ((state, "state"), (stamps, "stamps"), (ring.reshape(-1), "ring")):
        for place, value in edit.get(places, {}).items():
            target[place % len(target)] = value
    changed = replace(
        source,
        state=state[: edit.get("width", len(state))],
        window=ReplayState(stamps, ring, tuple(edit.get("replies", window.replies))),
        **{name: edit[name] for name in ("t", "epoch", "stepped_at") if name in edit},
    )
    return encode(changed, identity)


async def opened(door: Door, model: str, session_id: str) -> None:
    """A session of one row, a request of many, and single rows."""
    session = await door.rig.open(
        session_id, model=model, start=START, missing="hold", durability=Durability.ASYNC
    )
    await door.rig.step(session, X[0], 0)
    await door.rig.step(session, X[1:5], 1)
    await door.rig.step(session, X[5], 5, inspect=True)
    for t in range(6, STEPPED):
        await door.rig.step(session, X[t], t)


async def used(door: Door) -> None:
    """Uses the forged session for everything that a session can be used for."""
    try:
        session = await door.rig.sessions.get(ODD)
    except TYPED:
        return
    t = door.rig.sessions.t(session)
    for first in (t - 3, t - 1, t, t + 1):
        with suppress(errors.NonFiniteResult, *TYPED, errors.StepTooOld):
            await door.rig.step(session, X[first % 12], max(first, 0))
    exported = await door.native.ExportSession(pb.ExportSessionRequest(session_id=ODD), None)
    assert decode(exported.snapshot).record.session_id == ODD
    await door.native.Forecast(pb.ForecastRequest(session_id=["a", ODD], horizon=2), None)


async def works(door: Door, t: int) -> None:
    """What each server must do whatever the odd session is."""
    await door.rig.sessions.survey.look()
    listed = await door.listed()
    assert listed.pop(ODD, pb.SESSION_STATUS_OPEN) in {
        pb.SESSION_STATUS_OPEN,
        pb.SESSION_STATUS_UNREADABLE,
        pb.SESSION_STATUS_MODEL_MISSING,
    }
    assert listed == dict.fromkeys("ab", pb.SESSION_STATUS_OPEN)
    for name in "ab":
        assert np.isfinite(await door.step(name, X[t], t)).all()
    await door.rig.sessions.sweep()
    await door.rig.sessions.writer.save_round()
    assert b"stepstate_slots_leaked 0.0" in generate_latest(door.rig.registry)


async def survive(home: FileHome | RedisHome | MemoryHome, which: int, edit: dict) -> None:
    """Forges one session between two servers, by an import and in the store."""
    clock = Clock()
    clock.now = float(int(time.time()))
    store = await home.open(clock)
    first = Door(*MODELS, store=store, clock=clock, owner="first")
    await first.rig.sessions.start()
    model = MODELS[which].manifest.name
    for name in "ab":
        await opened(first, model, name)
    data = forged((await first.rig.sessions.export("a"))[0], edit)
    with suppress(*REFUSALS):
        await first.native.ImportSession(
            pb.ImportSessionRequest(session_id=ODD, snapshot=data), None
        )
    await used(first)
    await works(first, STEPPED)
    with suppress(errors.NotFound):
        await first.close(ODD)

    await opened(first, model, ODD)
    own = forged((await first.rig.sessions.export(ODD))[0], edit)
    await first.rig.sessions.drain()
    assert not first.rig.left_over()
    home.put(own)
    second = Door(*MODELS, store=store, clock=clock, owner="second")
    await second.rig.sessions.start()
    await used(second)
    await works(second, STEPPED + 1)
    assert (await store.count())["default", MODELS[which].key] == 3
    await second.close(ODD)
    assert set(await second.listed()) == {"a", "b"}
    assert second.rig.sessions.unreadable_sessions == 0
    await second.rig.sessions.drain()
    assert not second.rig.left_over()
    await store.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    with redis_process(tmp_path_factory.mktemp("redis")) as running:
        yield running


@given(which=st.sampled_from([0, 1]), edit=edits)
@example(which=0, edit={"record": {"version": 1}})
@example(which=0, edit={"identity": b"[" * 60_000})
@example(which=1, edit={"record": {"start_time": "0001-01-01T00:00:00+14:00"}})
@example(which=1, edit={"record": {"start_time": None}})
@example(which=0, edit={"t": 2**52 - 1})
def test_a_forged_snapshot_in_memory_is_a_matter_of_its_session(which, edit):
    asyncio.run(survive(MemoryHome(), which, edit))


@given(which=st.sampled_from([0, 1]), edit=edits)
def test_a_forged_snapshot_in_sqlite_is_a_matter_of_its_session(which, edit):
    with TemporaryDirectory() as folder:
        asyncio.run(survive(FileHome(Path(folder)), which, edit))


@given(which=st.sampled_from([0, 1]), edit=edits)
def test_a_forged_snapshot_in_redis_is_a_matter_of_its_session(server, which, edit):
    asyncio.run(survive(RedisHome(server), which, edit))
