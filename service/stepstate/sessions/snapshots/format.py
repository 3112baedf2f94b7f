"""A session's snapshot as bytes, with a version and a checksum.

Version 3, all numbers little-endian:

    8 s   magic "STEPSNAP"          u16   version             u16   0
    u32   length of the identity    u32   R   state values    u32   K   ring rows
    u32   D + O   ring columns      u32   N   long replies    u32   0
    u64   t                         u64   epoch               f64   Unix seconds of the last step
    ...   identity: JSON of the `SessionRecord`, and the owner who wrote it
    f32   state [R], the arena's row: see `engine.layout`
    i64   stamps [K]: t + 1 of each row of the replay window
    f32   ring [K, D + O]: x and y of each
    N times:  u64 t, u32 rows, u32 bytes of y, u32 length of the names, digest [16],
              names: JSON [[[name, T, H] ...] of each layer], y, then the layers' f32 [T, H]
    u32   CRC-32 of everything before it

Version 2 is the same, but its state tracks less: `Engine.upgraded` converts it. Version 1 is the
same, but its state is only the cell's: `extended` converts it. All versions stay readable: see
`_READERS`.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from stepstate.engine import Floats, Layers, Layout
from stepstate.errors import SnapshotCorrupt
from stepstate.sessions.replay import SNAPSHOT_BYTES, CachedReply, ReplayState
from stepstate.stores import MAX_T, SessionRecord

MAGIC = b"STEPSNAP"
VERSION = 3

MAX_JSON_BYTES = 65_536
"""Of the identity, or of the names in a reply: a server writes half of that at most."""
MAX_REPLIES = 10_000
"""More than a replay window holds."""

_Size = Annotated[int, Field(ge=0, strict=True)]
_IDENTITY = TypeAdapter(tuple[str, str])
_SHAPES = TypeAdapter(list[list[tuple[str, _Size, _Size]]])
_START = struct.Struct("<8sHH")
_HEAD = struct.Struct("<8sHH6I2Qd")
_REPLY = struct.Struct("<Q3I16s")
_CRC = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All of one session: `state` [R] in float32, `window` its replay window."""

    record: SessionRecord
    t: int
    stepped_at: float
    """Unix seconds of its last step, or of its opening."""
    state: Floats
    window: ReplayState
    owner: str = ""
    """The server that wrote it."""
    epoch: int = 0


def identity_of(record: SessionRecord, owner: str) -> bytes:
    """The part of a snapshot that does not change while the session is resident."""
    return json.dumps([record.to_json(), owner], separators=(",", ":")).encode()


def encode(snapshot: Snapshot, identity: bytes | None = None) -> bytes:
    """A snapshot as bytes.

    Args:
        snapshot: the session.
        identity: what `identity_of` returns for it, if the caller has it.
    """
    if identity is None:
        identity = identity_of(snapshot.record, snapshot.owner)
    window = snapshot.window
    rows, width = window.ring.shape
    head = _HEAD.pack(
        *(MAGIC, VERSION, 0),
        *(len(identity), len(snapshot.state), rows, width, len(window.replies), 0),
        *(snapshot.t, snapshot.epoch, snapshot.stepped_at),
    )
    parts = [
        head,
        identity,
        _f32(snapshot.state),
        window.stamps.astype("<i8", copy=False).tobytes(),
    ]
    parts.append(_f32(window.ring))
    for reply in window.replies:
        parts.extend(_encode_reply(reply))
    body = b"".join(parts)
    return body + _CRC.pack(zlib.crc32(body))


def decode(data: bytes) -> Snapshot:
    """Decodes a snapshot. Its arrays are read-only views of the bytes.

    Raises:
        SnapshotCorrupt: the bytes are cut, changed, not a snapshot, or of a later version.
    """
    if len(data) < _START.size + _CRC.size or not data.startswith(MAGIC):
        raise SnapshotCorrupt(f"these {len(data)} bytes do not begin as a snapshot does")
    if zlib.crc32(memoryview(data)[: -_CRC.size]) != _CRC.unpack(data[-_CRC.size :])[0]:
        raise SnapshotCorrupt("its checksum is not that of its bytes: it was cut or changed")
    version: int = _START.unpack_from(data)[1]
    reader = _READERS.get(version)
    if reader is None:
        raise SnapshotCorrupt(
            f"it has version {version} of the format, this server reads up to {VERSION}"
        )
    try:
        snapshot = reader(data)
    except ValidationError as error:  # its text has the values, which may be anything
        raise SnapshotCorrupt("its parts do not fit together") from error
    except (ValueError, struct.error) as error:
        raise SnapshotCorrupt(f"its parts do not fit together ({error})") from error
    _check(snapshot)
    return snapshot


def _check(snapshot: Snapshot) -> None:
    """Refuses values that no session can have, whoever wrote them."""
    # What may be NaN in a state depends on the model: see `loader.adapt`.
    if np.isinf(snapshot.state).any() or not math.isfinite(snapshot.stepped_at):
        raise SnapshotCorrupt("its state or its time is not finite")
    stamps = snapshot.window.stamps
    if snapshot.t >= MAX_T or (stamps < 1).any() or (stamps > snapshot.t).any():
        raise SnapshotCorrupt("it remembers rows that it can't have applied")


def extended(snapshot: Snapshot, layout: Layout, blank: Floats) -> Snapshot:
    """A snapshot of version 1 in the current layout, with the past rows in its replay window.

    Args:
        snapshot: it has only the cell's state.
        layout: the current parts of a state.
        blank: the state [R] of a session without rows.
    """
    state = blank.copy()
    state[: layout.cell] = snapshot.state
    ring = layout.rings(state[None])[0]
    rows = snapshot.window.stamps - 1
    known = rows >= snapshot.t - layout.history
    ring[rows[known] % layout.history] = snapshot.window.ring[known, : layout.inputs]
    return replace(snapshot, state=state)


def _read(data: bytes) -> Snapshot:
    parts = _HEAD.unpack_from(data)
    identity_length, state_width, rows, width, replies, _, t, epoch, stepped_at = parts[3:]
    cursor = _Cursor(data, _HEAD.size, len(data) - _CRC.size)
    identity = cursor.take(_bounded("identity", identity_length, MAX_JSON_BYTES))
    record, owner = _IDENTITY.validate_json(identity)
    _bounded("replies", replies, MAX_REPLIES)
    state = cursor.floats(state_width)
    stamps = np.frombuffer(cursor.take(8 * rows), "<i8")
    ring = cursor.floats(rows * width).reshape(rows, width)
    window = ReplayState(stamps, ring, tuple(_read_reply(cursor) for _ in range(replies)))
    cursor.end()
    return Snapshot(SessionRecord.from_json(record), t, stepped_at, state, window, owner, epoch)


_READERS: dict[int, Callable[[bytes], Snapshot]] = {1: _read, 2: _read, 3: _read}


class _Cursor:
    """Reads bytes from a position on, never past the end."""

    def __init__(self, data: bytes, position: int, end: int) -> None:
        self._data = data
        self._position = position
        self._end = end

    def take(self, count: int) -> bytes:
        first, self._position = self._position, self._position + count
        if count < 0 or self._position > self._end:
            raise ValueError("it ends too early")
        return self._data[first : self._position]

    def floats(self, count: int) -> Floats:
        return np.frombuffer(self.take(4 * count), "<f4")

    def end(self) -> None:
        if self._position != self._end:
            raise ValueError("there is more than it tells of")


def _encode_reply(reply: CachedReply) -> list[bytes]:
    layers = reply.layers or []
    shapes = [[[name, *part.shape] for name, part in layer.items()] for layer in layers]
    names = json.dumps(shapes, separators=(",", ":")).encode() if layers else b""
    head = _REPLY.pack(reply.t, reply.rows, len(reply.y), len(names), reply.digest)
    return [head, names, reply.y, *(_f32(part) for layer in layers for part in layer.values())]


def _read_reply(cursor: _Cursor) -> CachedReply:
    t, rows, y_length, names_length, digest = _REPLY.unpack(cursor.take(_REPLY.size))
    names = cursor.take(_bounded("names in a reply", names_length, MAX_JSON_BYTES))
    y = cursor.take(_bounded("reply", y_length, SNAPSHOT_BYTES))
    layers: Layers | None = None
    if names:
        layers = [
            {
                name: cursor.floats(length * width).reshape(length, width)
                for name, length, width in layer
            }
            for layer in _SHAPES.validate_json(names)
        ]
    return CachedReply(t, rows, y, layers, digest)


def _bounded(what: str, size: int, most: int) -> int:
    if size > most:
        raise ValueError(f"{what}: {size}, at most {most}")
    return size


def _f32(values: Floats) -> bytes:
    return values.astype("<f4", copy=False).tobytes()
