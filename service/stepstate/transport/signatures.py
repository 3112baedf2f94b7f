"""Signatures of exported snapshots: which server made one, for the servers that import it.

A signed snapshot is `MAGIC`, the HMAC-SHA256 [32] of the snapshot, and the snapshot. One without a
signature begins as `sessions.snapshots.format` says, so the two can't be taken for each other.

Keys are for what clients carry from server to server. What a store has is not signed: only servers
write there, and whoever can write to a store can do more than change snapshots.
"""

from __future__ import annotations

import hmac
from pathlib import Path

from stepstate.errors import SnapshotKeyInvalid, SnapshotUntrusted
from stepstate.watched_files import warn_if_readable

MAGIC = b"STEPSIGN"
MIN_KEY_LENGTH = 32
"""Characters: 128 bits, if they are random hexadecimal digits."""
_DIGEST = "sha256"
_DIGEST_BYTES = 32
_BEFORE = len(MAGIC) + _DIGEST_BYTES
_MAX_FILE_BYTES = 65_536


class SnapshotKeys:
    """Signs snapshots with the first of some keys, and accepts those signed with any of them.

    Args:
        keys: none: nothing is signed, and signatures are not looked at.
    """

    def __init__(self, *keys: bytes) -> None:
        self._keys = keys

    def signed(self, snapshot: bytes) -> bytes:
        """A snapshot with its signature, if there are keys."""
        if not self._keys:
            return snapshot
        return b"".join((MAGIC, hmac.digest(self._keys[0], snapshot, _DIGEST), snapshot))

    def verified(self, data: bytes) -> bytes:
        """The snapshot in what `signed` returned, here or on another server.

        Raises:
            SnapshotUntrusted: there are keys, and it is signed with none of them.
        """
        signed = data.startswith(MAGIC) and len(data) >= _BEFORE
        if not self._keys:
            return data[_BEFORE:] if signed else data
        if not signed:
            raise SnapshotUntrusted("it has no signature")
        digest, snapshot = data[len(MAGIC) : _BEFORE], data[_BEFORE:]
        made = (hmac.digest(key, snapshot, _DIGEST) for key in self._keys)
        if not any(hmac.compare_digest(digest, one) for one in made):
            raise SnapshotUntrusted("its signature is of none of this server's keys")
        return snapshot


def read_keys(file: str) -> SnapshotKeys:
    """The keys in a file, one a line; empty lines and those that begin with # are skipped.

    Args:
        file: its name; empty: there are no keys.

    Raises:
        SnapshotKeyInvalid: it can't be read, or has no key, or one that is too short.
    """
    if not file:
        return SnapshotKeys()
    try:
        with Path(file).open("rb") as opened:
            mode, text = Path(file).stat().st_mode, opened.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SnapshotKeyInvalid(file, f"can't be read: {error.strerror}") from error
    if len(text) > _MAX_FILE_BYTES:
        raise SnapshotKeyInvalid(file, f"has more than {_MAX_FILE_BYTES} bytes")
    keys = [line.strip() for line in text.splitlines()]
    keys = [key for key in keys if key and not key.startswith(b"#")]
    if not keys:
        raise SnapshotKeyInvalid(file, "has no key")
    if any(len(key) < MIN_KEY_LENGTH for key in keys):
        raise SnapshotKeyInvalid(file, f"has a key of fewer than {MIN_KEY_LENGTH} characters")
    warn_if_readable(file, mode)
    return SnapshotKeys(*keys)
