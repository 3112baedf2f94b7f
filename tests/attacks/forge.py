"""Snapshots with a right checksum that no server wrote: see `sessions/snapshots/format.py`."""

from __future__ import annotations

import json
import struct
import zlib

_HEAD = struct.Struct("<8sHH6I2Qd")
_REPLY = struct.Struct("<Q3I16s")
_IDENTITY, _REPLIES = 3, 7
"""Places in the head: bytes of the identity, and replies."""


def with_record(snapshot: bytes, **changed: object) -> bytes:
    """A snapshot whose record has other values."""
    record, owner = json.loads(_identity(snapshot))
    text = json.dumps(json.loads(record) | changed)
    return with_identity(snapshot, json.dumps([text, owner]).encode())


def with_identity(snapshot: bytes, identity: bytes) -> bytes:
    """A snapshot with other bytes where its record is."""
    head = list(_HEAD.unpack_from(snapshot))
    rest = snapshot[_HEAD.size + head[_IDENTITY] : -4]
    head[_IDENTITY] = len(identity)
    return _sealed(_HEAD.pack(*head) + identity + rest)


def with_reply(snapshot: bytes, size: int) -> bytes:
    """A snapshot that remembers one more reply, to a request with many rows, of so many bytes."""
    head = list(_HEAD.unpack_from(snapshot))
    head[_REPLIES] += 1
    reply = _REPLY.pack(0, 2, size, 0, bytes(16)) + bytes(size)
    return _sealed(_HEAD.pack(*head) + snapshot[_HEAD.size : -4] + reply)


def _identity(snapshot: bytes) -> bytes:
    length = _HEAD.unpack_from(snapshot)[_IDENTITY]
    return snapshot[_HEAD.size : _HEAD.size + length]


def _sealed(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))
