"""Snapshots: the same session comes back, bit for bit, and nothing else is taken for one."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from stepstate.engine.tracking.scores import SCORES
from stepstate.errors import SnapshotCorrupt
from stepstate.sessions.replay import CachedReply, ReplayState
from stepstate.sessions.snapshots.checks import adapt
from stepstate.sessions.snapshots.format import Snapshot, decode, encode
from stepstate.stores import Durability, SessionRecord
from tests.offline import forecasting_network
from tests.unit.rig import model_of

SAVED = Path(__file__).parents[1] / "data" / "snapshot-v1.bin"
RECORD = SessionRecord(
    session_id="meter-7",
    model="electricity",
    version="1",
    fingerprint="sha256:" + "ab" * 32,
    idle_timeout_seconds=86_400.5,
    start_time=datetime(2013, 6, 2, 0, 30, tzinfo=UTC),
    open_time=datetime(2026, 11, 23, 21, 0, 0, 123_456, tzinfo=UTC),
    durability=Durability.SYNC,
)


def make() -> Snapshot:
    """A session of everything: state, rows, replies with and without layers."""
    rng = np.random.default_rng(3)

    def floats(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    layers = [{"i": floats(2, 5), "h": floats(2, 5)}, {"i": floats(2, 5), "h": floats(2, 3)}]
    replies = (
        CachedReply(0, 90, floats(90, 2).tobytes(), None, b"d" * 16),
        CachedReply(90, 2, floats(2, 2).tobytes(), layers, b"e" * 16),
    )
    stamps = np.array([97, 94, 95, 96], np.int64)
    window = ReplayState(stamps, floats(4, 5), replies)
    return Snapshot(RECORD, 97, 1_763_900_000.25, floats(20), window, "host:50051#00", 7)


def resealed(data: bytes) -> bytes:
    """Changed bytes under a checksum that fits them."""
    return data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))


def same(one: Snapshot, other: Snapshot) -> bool:
    """Bit for bit."""
    return encode(one) == encode(other)


def test_a_snapshot_comes_back_bit_for_bit():
    snapshot = make()
    back = decode(encode(snapshot))
    assert back.record == snapshot.record
    assert (back.t, back.stepped_at) == (snapshot.t, snapshot.stepped_at)
    assert (back.owner, back.epoch) == (snapshot.owner, snapshot.epoch)
    assert back.state.tobytes() == snapshot.state.tobytes()
    assert back.window.stamps.tolist() == snapshot.window.stamps.tolist()
    assert back.window.ring.tobytes() == snapshot.window.ring.tobytes()
    for got, want in zip(back.window.replies, snapshot.window.replies, strict=True):
        assert (got.t, got.rows, got.y, got.digest) == (want.t, want.rows, want.y, want.digest)
        assert repr(got.layers) == repr(want.layers)
    assert same(back, snapshot)


def test_a_session_without_rows_and_start_time_comes_back():
    window = ReplayState(np.zeros(0, np.int64), np.zeros((0, 5), np.float32), ())
    blank = replace(make(), window=window, t=0, record=replace(RECORD, start_time=None))
    assert same(decode(encode(blank)), blank)


@pytest.mark.parametrize("place", ["magic", "identity", "state", "ring", "reply", "checksum"])
def test_any_changed_bit_is_noticed(place):
    data = bytearray(encode(make()))
    places = {"magic": 3, "identity": 100, "state": 600, "ring": 700, "reply": -300, "checksum": -1}
    data[places[place]] ^= 1
    with pytest.raises(SnapshotCorrupt):
        decode(bytes(data))


def test_any_cut_is_noticed():
    data = encode(make())
    for length in range(0, len(data), 7):
        with pytest.raises(SnapshotCorrupt):
            decode(data[:length])


def test_bytes_of_something_else_are_told_apart():
    with pytest.raises(SnapshotCorrupt, match="do not begin"):
        decode(b"PK\x03\x04" + b"\0" * 1000)


def test_a_later_version_is_refused_by_its_number():
    data = bytearray(encode(make()))
    data[8:10] = struct.pack("<H", 4)
    with pytest.raises(SnapshotCorrupt, match=r"version 4 .* reads up to 3"):
        decode(resealed(bytes(data)))


@pytest.mark.parametrize("field", range(5))
def test_counts_that_do_not_fit_the_bytes_are_refused(field):
    """Whoever can make a checksum still can't make the server allocate what is not there."""
    for count in (0, 2**31, 2**32 - 1):
        data = bytearray(encode(make()))
        data[12 + 4 * field : 16 + 4 * field] = struct.pack("<I", count)
        with pytest.raises(SnapshotCorrupt):
            decode(resealed(bytes(data)))


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_a_state_that_is_infinite_is_refused(value):
    snapshot = make()
    state = snapshot.state.copy()
    state[3] = value
    with pytest.raises(SnapshotCorrupt, match="not finite"):
        decode(encode(replace(snapshot, state=state)))


def test_rows_that_were_never_applied_are_refused():
    with pytest.raises(SnapshotCorrupt, match="can't have applied"):
        decode(encode(replace(make(), t=96)))


@pytest.mark.parametrize("record", ["[]", "{}", '{"session_id":1}', "not json"])
def test_an_identity_that_is_none_is_refused(record):
    identity = b'["' + record.replace('"', '\\"').encode() + b'",""]'
    with pytest.raises(SnapshotCorrupt, match="do not fit"):
        decode(encode(make(), identity))


def test_a_snapshot_of_version_1_stays_readable():
    """The file was written once, by the first server that had snapshots; it must never change."""
    assert same(decode(SAVED.read_bytes()), make())


async def test_a_session_of_version_2_goes_on_with_what_it_tracked(make_rig):
    """A file that a server wrote when snapshots had version 2: 60 rows, three of them missing."""
    rig = make_rig(model_of(forecasting_network(quantiles=())))
    data = (SAVED.parent / "snapshot-v2.bin").read_bytes()
    old = decode(data)
    adapted = adapt(old, rig.scheduler)
    engine = rig.scheduler.engine
    assert len(adapted.state) == engine.layout.width > len(old.state)
    rows = engine.layout.tracked_from
    assert adapted.state[:rows].tobytes() == old.state[:rows].tobytes()
    session = await rig.open()
    engine.write_state(session.slot, adapted.state)
    quality = engine.quality(session.slot, 60)
    assert (quality.level, quality.drift.alarms, quality.drift.last_t) == (0.9, 1, 40)
    told = [
        (one.horizon, one.lifetime.scored, one.lifetime.mean_absolute_error, one.offset)
        for one in quality.accuracy
    ]
    assert told == [
        (1, 56, pytest.approx(2.41987, rel=1e-4), pytest.approx(0.584943, rel=1e-4)),
        (3, 54, pytest.approx(2.58028, rel=1e-4), pytest.approx(1.61208, rel=1e-4)),
    ]
    one = quality.accuracy[0]
    assert one.lifetime.mean_absolute_scaled_error == pytest.approx(1.138014, rel=1e-4)
    assert one.lifetime.coverage == pytest.approx(0.872727, rel=1e-4)
    assert one.recent.scored == 0
    spots = rig.tracker.targets[0].horizons
    before = old.state[-sum(3 * spot.horizon + 8 for spot in spots) :]
    place = 0
    for spot in spots:  # what is pending is as it was issued
        pending = before[place + 8 : place + 8 + 3 * spot.horizon]
        now = adapted.state[rows + spot.place + SCORES :][: 3 * spot.horizon]
        assert np.array_equal(now, pending)
        place += 8 + 3 * spot.horizon


@pytest.mark.parametrize("value", [-1.0, 0.5, np.nan, np.inf])
@pytest.mark.parametrize("place", range(1, 13))
def test_a_forged_session_of_version_2_is_corrupt_or_sound(make_rig, place, value):
    """Of the level, the widths, the test and the first counts and means."""
    rig = make_rig(model_of(forecasting_network(quantiles=())))
    old = decode((SAVED.parent / "snapshot-v2.bin").read_bytes())
    state = old.state.copy()
    state[rig.scheduler.engine.layout.tracked_from + place - 1] = value
    try:
        adapted = adapt(replace(old, state=state), rig.scheduler)
    except SnapshotCorrupt:
        return
    assert rig.scheduler.engine.is_valid(adapted.state, adapted.t)
    assert not np.isinf(adapted.state).any()
