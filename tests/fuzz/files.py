"""Targets: what is read from files, stores and other servers."""

from __future__ import annotations

import tempfile
import zlib
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from stepstate.config import ConfigError
from stepstate.configuration.file import parse
from stepstate.errors import ModelInvalid, SnapshotCorrupt, SnapshotKeyInvalid, SnapshotUntrusted
from stepstate.identity import SessionKey
from stepstate.models import load_model
from stepstate.sessions.replay import CachedReply, ReplayState
from stepstate.sessions.snapshots.checks import check_import
from stepstate.sessions.snapshots.format import Snapshot, decode, encode
from stepstate.stores import Durability, SessionRecord, StoredSession, UnreadableSession
from stepstate.stores.types import decode_session, decode_tombstone
from stepstate.transport.signatures import SnapshotKeys, read_keys
from tests.fuzz.target import Target
from tests.networks import make_network

FOLDER = Path(tempfile.mkdtemp(prefix="stepstate-fuzz-"))
MODEL = make_network("m", hidden=2, layers=1).write(FOLDER / "models")
MANIFEST, WEIGHTS = MODEL / "manifest.json", MODEL / "model.safetensors"
KEYS = SnapshotKeys(bytes(32))
RECORD = SessionRecord(
    "a", "m", "1", "f", 60.0, None, datetime(2026, 1, 1, tzinfo=UTC), Durability.ASYNC
)


def run_snapshot(data: bytes) -> None:
    """A snapshot, with the checksum that its bytes have; what can be read can be written."""
    sent = data + zlib.crc32(data).to_bytes(4, "little")
    for each in (data, sent):
        with suppress(SnapshotCorrupt):
            snapshot = decode(each)
            check_import(snapshot)
            again = decode(encode(snapshot))
            assert (again.record, again.t) == (snapshot.record, snapshot.t)


def run_signature(data: bytes) -> None:
    with suppress(SnapshotUntrusted):
        assert data.endswith(KEYS.verified(data))


def run_record(data: bytes) -> None:
    """What a store has of a session: a record, the other columns behind a zero byte."""
    record, _, rest = data.partition(b"\0")
    columns = [*rest.split(b"\0"), b"1", b"1", b"1", b"1", b"1"]
    found = decode_session(
        SessionKey("a"),
        "m/1",
        record=record,
        t=columns[0],
        expires=columns[1],
        epoch=columns[2],
        owner=columns[3],
        delete=columns[4],
    )
    assert isinstance(found, StoredSession | UnreadableSession)
    decode_tombstone(*columns[:3])
    with suppress(ValueError):
        read = SessionRecord.from_json(record)
        assert SessionRecord.from_json(read.to_json()) == read


def run_manifest(data: bytes) -> None:
    before = MANIFEST.read_bytes()
    MANIFEST.write_bytes(data)
    with suppress(ModelInvalid):
        load_model(MODEL)
    MANIFEST.write_bytes(before)


def run_weights(data: bytes) -> None:
    before = WEIGHTS.read_bytes()
    WEIGHTS.write_bytes(data)
    with suppress(ModelInvalid):
        load_model(MODEL)
    WEIGHTS.write_bytes(before)


def run_configuration(data: bytes) -> None:
    with suppress(ConfigError):
        parse("stepstate.toml", data)


def run_snapshot_keys(data: bytes) -> None:
    file = FOLDER / "keys"
    file.write_bytes(data)
    with suppress(SnapshotKeyInvalid):
        read_keys(str(file))


def snapshot_seed() -> bytes:
    window = ReplayState(
        np.zeros(2, np.int64), np.zeros((2, 5), np.float32), (CachedReply(0, 1, bytes(8)),)
    )
    return encode(Snapshot(RECORD, 3, 1.8e9, np.zeros(8, np.float32), window))[:-4]


CONFIGURATION = b"""[server]
listen = "127.0.0.1:0"
log_level = "INFO"
[limits]
sessions = 5
[tenants.acme]
weight = 2
"""
TARGETS = {
    "snapshot": Target(run_snapshot, (snapshot_seed(),)),
    "signature": Target(run_signature, (KEYS.signed(b"snapshot"),)),
    "record": Target(run_record, (RECORD.to_json().encode() + b"\x001\x002\x003\x00owner\x004",)),
    "manifest": Target(run_manifest, (MANIFEST.read_bytes(),)),
    "weights": Target(run_weights, (WEIGHTS.read_bytes(),)),
    "configuration": Target(run_configuration, (CONFIGURATION,)),
    "snapshot-keys": Target(run_snapshot_keys, (b"# keys\n" + bytes(range(40, 80)),)),
}
