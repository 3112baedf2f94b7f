"""Restore after snapshot is the identity, bit for bit, whatever the session has been through."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stepstate.errors import SnapshotCorrupt
from stepstate.sessions.options import CopyOptions
from stepstate.sessions.replay import CachedReply, ReplayState
from stepstate.sessions.snapshots.format import Snapshot, decode, encode
from stepstate.stores import Durability, MissingPolicy, SessionRecord
from tests.hypothesis_profiles import examples
from tests.networks import make_network
from tests.offline import forecasting_network
from tests.unit.rig import Rig, model_of, outputs

MODELS = [
    model_of(make_network("lstm", hidden=7, projection=3, seed=5)),
    model_of(make_network("gru", "gru", hidden=5, seed=6)),
    model_of(forecasting_network()),
]
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
anything = st.floats(width=32)
moments = st.datetimes(timezones=st.just(UTC))


def floats(*shape: int, elements: st.SearchStrategy = anything) -> st.SearchStrategy:
    return hnp.arrays(np.float32, shape, elements=elements)


@st.composite
def records(draw) -> SessionRecord:
    return SessionRecord(
        session_id=draw(st.text("abcXYZ019._:-", min_size=1, max_size=128)),
        model=draw(st.text(max_size=20)),
        version=draw(st.text(max_size=5)),
        fingerprint=draw(st.text(max_size=71)),
        idle_timeout_seconds=draw(st.floats(1e-6, 1e9)),
        start_time=draw(st.none() | moments),
        open_time=draw(moments),
        durability=draw(st.sampled_from(Durability)),
        missing=draw(st.sampled_from(MissingPolicy)),
        interval_level=draw(st.none() | st.floats(0.01, 0.99)),
    )


@st.composite
def replies(draw, t: int) -> CachedReply:
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    layer = st.dictionaries(st.sampled_from("ifgoch"), floats(rows, width), min_size=1, max_size=3)
    layers = draw(st.none() | st.lists(layer, min_size=1, max_size=2))
    digest = draw(st.binary(min_size=16, max_size=16))
    return CachedReply(t, rows, draw(st.binary(max_size=40)), layers, digest)


@st.composite
def snapshots(draw) -> Snapshot:
    t = draw(st.integers(0, 2**53 - 1))
    rows, width = draw(st.integers(0, min(t, 5))), draw(st.integers(1, 6))
    stamps = draw(hnp.arrays(np.int64, rows, elements=st.integers(1, max(1, t)), unique=True))
    window = ReplayState(
        stamps, draw(floats(rows, width)), tuple(draw(st.lists(replies(t), max_size=3)))
    )
    return Snapshot(
        draw(records()),
        t,
        draw(st.floats(0, 1e11)),
        draw(floats(draw(st.integers(1, 9)), elements=finite)),
        window,
        draw(st.text(max_size=20)),
        draw(st.integers(0, 2**63)),
    )


@given(snapshots())
def test_decode_undoes_encode_bit_for_bit(snapshot):
    data = encode(snapshot)
    back = decode(data)
    assert encode(back) == data
    assert back.record == snapshot.record
    assert back.state.tobytes() == snapshot.state.tobytes()
    assert (back.t, back.stepped_at, back.owner, back.epoch) == (
        snapshot.t,
        snapshot.stepped_at,
        snapshot.owner,
        snapshot.epoch,
    )


@given(snapshots(), st.data())
def test_no_changed_byte_goes_unnoticed(snapshot, data):
    whole = bytearray(encode(snapshot))
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SnapshotCorrupt):
        decode(bytes(whole))


@given(st.binary(max_size=300))
def test_no_other_bytes_are_taken_for_a_snapshot(data):
    for bytes_ in (data, b"STEPSNAP\x01\x00\x00\x00" + data):
        with pytest.raises(SnapshotCorrupt):
            decode(bytes_)


@examples(30)
@given(
    which=st.integers(0, len(MODELS) - 1),
    sizes=st.lists(st.sampled_from([1, 1, 1, 2, 7]), max_size=8),
    inspect=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_restored_session_computes_the_same_bits(which, sizes, inspect, seed):
    """State, replies and what comes next: all as if nothing had happened."""
    asyncio.run(_go_on_elsewhere(which, sizes, inspect=inspect, seed=seed))


async def _go_on_elsewhere(which: int, sizes: list[int], *, inspect: bool, seed: int) -> None:
    model = MODELS[which]
    rng = np.random.default_rng(seed)
    here, there = Rig(model, replay_rows=64), Rig(model, replay_rows=64)
    session = await here.open("a", start=datetime(2026, 1, 1, tzinfo=UTC))
    sent = []
    for size in sizes:
        x = rng.normal(size=(size, model.manifest.input_width)).astype(np.float32)
        t = here.sessions.t(session)
        sent.append((x, t, await here.step(session, x, t, inspect=inspect)))
    snapshot, _ = await here.sessions.export("a")
    copy = await there.sessions.restore(snapshot, CopyOptions("", None, None))
    assert there.sessions.t(copy) == here.sessions.t(session)
    for x, t, _ in sent:
        first = await here.step(session, x, t, inspect=inspect)
        again = await there.step(copy, x, t, inspect=inspect)
        assert first.replayed
        assert again.replayed
        assert again.y == first.y
        assert repr(again.layers) == repr(first.layers)
    x = rng.normal(size=(1, model.manifest.input_width)).astype(np.float32)
    y = outputs(await here.step(session, x)).tobytes()
    assert outputs(await there.step(copy, x)).tobytes() == y
