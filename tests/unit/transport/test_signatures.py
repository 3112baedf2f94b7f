"""Signed snapshots are taken by servers with one of the keys, and no others are."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepstate.errors import SnapshotKeyInvalid, SnapshotUntrusted
from stepstate.sessions.snapshots import format as snapshot_format
from stepstate.transport.signatures import MAGIC, SnapshotKeys, read_keys

OLD, NEW, OTHER = (name * 32 for name in (b"a", b"b", b"c"))
SNAPSHOT = snapshot_format.MAGIC + b"\x03\x00 and so on"


def test_without_keys_nothing_is_signed_and_signatures_are_not_looked_at():
    none = SnapshotKeys()
    assert none.signed(SNAPSHOT) is SNAPSHOT
    assert none.verified(SNAPSHOT) is SNAPSHOT
    assert none.verified(SnapshotKeys(OTHER).signed(SNAPSHOT)) == SNAPSHOT


def test_keys_are_rotated_without_a_moment_at_which_a_snapshot_is_refused():
    """The new key is added behind the old one, then put first; then the old one goes."""
    before, during, after = SnapshotKeys(OLD), SnapshotKeys(OLD, NEW), SnapshotKeys(NEW, OLD)
    for one in (before, during, after):
        for other in (during, after):
            assert other.verified(one.signed(SNAPSHOT)) == SNAPSHOT
    assert SnapshotKeys(NEW).verified(after.signed(SNAPSHOT)) == SNAPSHOT
    with pytest.raises(SnapshotUntrusted, match="none of this server's keys"):
        SnapshotKeys(NEW).verified(before.signed(SNAPSHOT))


def test_a_snapshot_without_a_signature_is_refused_once_there_is_a_key():
    with pytest.raises(SnapshotUntrusted, match="no signature"):
        SnapshotKeys(NEW).verified(SNAPSHOT)


@given(st.data())
def test_no_changed_or_missing_byte_goes_unnoticed(data):
    keys = SnapshotKeys(NEW, OLD)
    signed = bytearray(keys.signed(SNAPSHOT))
    if data.draw(st.booleans()):
        del signed[data.draw(st.integers(0, len(signed) - 1)) :]
    else:
        signed[data.draw(st.integers(0, len(signed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SnapshotUntrusted):
        keys.verified(bytes(signed))


def test_the_file_has_one_key_a_line(tmp_path, caplog):
    file = tmp_path / "keys"
    file.write_bytes(b"# the new one\r\n  " + NEW + b"  \n\n" + OLD)
    file.chmod(0o600)
    keys = read_keys(str(file))
    assert keys.signed(SNAPSHOT) == SnapshotKeys(NEW).signed(SNAPSHOT)
    assert keys.verified(SnapshotKeys(OLD).signed(SNAPSHOT)) == SNAPSHOT
    assert not caplog.records
    file.chmod(0o644)
    read_keys(str(file))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert read_keys("").signed(SNAPSHOT) is SNAPSHOT


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "can't be read: No such file"),
        (b"", "has no key"),
        (b"# only this\n", "has no key"),
        (NEW + b"\nshort\n", "fewer than 32"),
        (NEW * 10_000, "more than 65536 bytes"),
    ],
)
def test_a_file_that_is_no_file_of_keys_is_refused_in_words_without_a_key(tmp_path, text, problem):
    file = tmp_path / "keys"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(SnapshotKeyInvalid, match=problem) as refused:
        read_keys(str(file))
    assert NEW.decode() not in str(refused.value)
    assert str(file) in str(refused.value)


def test_both_kinds_of_snapshots_begin_differently():
    assert len({MAGIC, snapshot_format.MAGIC}) == 2
    assert len(MAGIC) == len(snapshot_format.MAGIC)
