"""Tokens and their file: what is in it, who may write, and what a server makes of a broken one."""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import re
import stat
import threading
import zlib
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from stepstate.auth import (
    Credentials,
    TokenFile,
    TokenRecord,
    change_tokens,
    digest_of,
    is_token,
    make_token,
    read_tokens,
)
from stepstate.auth import token_file as module
from stepstate.auth.tokens import PATTERN
from stepstate.auth.watched_file import WatchedFile
from stepstate.errors import CredentialsInvalid, Unauthenticated
from stepstate.identity import Scope
from tests.credentials import revoke, token


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def records(file: Path) -> dict[str, TokenRecord]:
    return {one.identity: one for one in read_tokens(str(file))}


def test_a_token_is_known_by_its_form_and_by_its_checksum():
    texts = {make_token() for _ in range(100)}
    assert len(texts) == 100
    for text in texts:
        assert PATTERN.fullmatch(text)
        assert is_token(text)
    text = texts.pop()
    for place in range(len("stepstate_"), len(text)):
        other = "a" if text[place] != "a" else "b"
        assert not is_token(text[:place] + other + text[place + 1 :])


def test_the_checksum_is_that_of_githubs_tokens():
    text = make_token()
    secret, checksum = text[len("stepstate_") : -6], text[-6:]
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    value = 0
    for digit in checksum:
        value = 62 * value + digits.index(digit)
    assert value == zlib.crc32(secret.encode())


def test_the_file_has_no_secret_and_is_its_owners(file: Path):
    os.umask(0)
    text = token(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    content = file.read_text()
    assert text not in content
    assert text[-20:] not in content
    assert digest_of(text) in content
    assert digest_of(text) not in repr(read_tokens(str(file)))


def test_a_link_stays_a_link(file: Path, tmp_path: Path):
    token(file)
    link = tmp_path / "link.json"
    link.symlink_to(file)
    token(link, "second")
    assert link.is_symlink()
    assert set(records(file)) == {"tester", "second"}


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_who_could_read_the_file_can_read_it_after_a_change(file: Path, mode: int):
    """A server of another user would go on with the tokens before, the revoked ones too."""
    text = token(file)
    file.chmod(mode)
    if os.geteuid() == 0:  # nobody else may give files away
        os.chown(file, 1234, 5678)
    with suppress(OSError):  # not every file system has them
        os.setxattr(file, "user.label", b"kept")  # access lists are attributes, too
    before, attributes = file.stat(), os.listxattr(file)
    revoke(file, text)
    after = file.stat()
    assert after.st_ino != before.st_ino
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )
    assert os.listxattr(file) == attributes


def test_a_file_whose_readers_can_not_be_kept_is_not_changed(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    text = token(file)
    before = file.read_bytes()

    def denied(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(module.os, "chown", denied)
    with pytest.raises(CredentialsInvalid, match="run this as that user or as root"):
        revoke(file, text)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir() if path.suffix != ".lock"] == [file.name]


def _add(file: str, name: str, count: int) -> None:
    for one in range(count):
        token(Path(file), f"{name}-{one}")


def test_writers_take_turns(file: Path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_add, args=(str(file), name, 20)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(records(file)) == 60


def test_a_write_that_fails_leaves_the_file_as_it_was(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    token(file)
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        token(file, "second")
    assert file.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"tokens.json", ".tokens.json.lock"}


def test_one_identity_has_one_tenant(file: Path):
    token(file, "meters", tenant="acme")
    token(file, "meters", tenant="acme")  # several tokens
    with pytest.raises(CredentialsInvalid, match="identity meters has tokens of two tenants"):
        token(file, "meters", tenant="other")


def test_tokens_that_ended_long_ago_are_forgotten(file: Path):
    day = timedelta(days=1)
    now = datetime.now(UTC)
    token(file, "long-ago", expires=now - 91 * day)
    token(file, "lately", expires=now - 89 * day)
    token(file, "now")
    assert set(records(file)) == {"lately", "now"}


BROKEN = {
    "nothing": b"",
    "no JSON": b"stepstate_",
    "a list": b"[]",
    "another version": b'{"version": 2, "tokens": []}',
    "another field": b'{"version": 1, "tokens": [], "x": 1}',
    "no text": b"\xff\xfe",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("what", BROKEN)
async def test_a_broken_file_keeps_the_tokens_that_were_there(
    file: Path, what: str, caplog: pytest.LogCaptureFixture
):
    text = token(file)
    source = TokenFile(str(file))
    credentials = Credentials(tokens=source)
    file.write_bytes(BROKEN[what])  # noqa: ASYNC240 - a small file
    for _ in range(3):
        await credentials.refresh()
        assert credentials.stale() == {"tokens": True}
        assert credentials.known([f"Bearer {text}"], {}) is not None
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "--tokens-file" in caplog.text
    with pytest.raises(CredentialsInvalid):
        TokenFile(str(file))  # at the start there are none to keep


async def test_of_two_readings_at_once_the_newer_one_counts(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whichever takes longer: what is revoked does not come back."""
    text = token(file)
    credentials = Credentials(tokens=TokenFile(str(file)))
    read, slow, started = WatchedFile.read, threading.Event(), threading.Event()

    def read_slowly(self: WatchedFile) -> bytes:
        found = read(self)
        started.set()
        slow.wait(20)
        return found

    monkeypatch.setattr(WatchedFile, "read", read_slowly)
    older = asyncio.create_task(credentials.refresh(force=True))
    await asyncio.to_thread(started.wait, 20)
    monkeypatch.undo()
    revoke(file, text)
    newer = asyncio.create_task(credentials.refresh(force=True))
    await asyncio.wait([newer], timeout=0.2)
    slow.set()
    await asyncio.gather(older, newer)
    assert credentials.known([f"Bearer {text}"], {}) is None


async def test_a_file_that_has_gone_keeps_them_too_until_it_is_back(file: Path):
    text = token(file)
    credentials = Credentials(tokens=TokenFile(str(file)))
    moved = file.rename(file.with_suffix(".old"))  # noqa: ASYNC240 - at once
    await credentials.refresh()
    assert credentials.stale() == {"tokens": True}
    revoke(moved, text)
    moved.rename(file)
    await credentials.refresh()
    assert credentials.stale() == {"tokens": False}
    assert credentials.known([f"Bearer {text}"], {}) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tenant", "Acme"),
        ("tenant", "a/b"),
        ("identity", "a b"),
        ("identity", ""),
        ("scopes", []),
        ("scopes", ["root"]),
        ("created", "2026-01-01T00:00:00"),
        ("sha256", "AB"),
        ("secret", "stepstate_x"),
    ],
)
def test_a_record_with_what_is_not_understood_is_refused(file: Path, field: str, value: object):
    token(file)
    content = json.loads(file.read_text())
    content["tokens"][0][field] = value
    file.write_text(json.dumps(content))
    with pytest.raises(CredentialsInvalid, match=re.escape(f"tokens.0.{field}")) as refused:
        read_tokens(str(file))
    if value and field == "secret":
        assert str(value) not in str(refused.value)


def test_the_same_token_twice_is_refused(file: Path):
    token(file)
    with pytest.raises(CredentialsInvalid, match="twice"):
        change_tokens(str(file), lambda tokens: (*tokens, *tokens))


def test_a_file_that_others_can_read_is_warned_of(file: Path, caplog: pytest.LogCaptureFixture):
    token(file)
    file.chmod(0o640)  # for a server of its group
    read_tokens(str(file))
    assert not caplog.records
    for mode in (0o644, 0o660):
        caplog.clear()
        file.chmod(mode)
        read_tokens(str(file))
        assert "chmod g-w,o-rwx" in caplog.text


@pytest.mark.parametrize("way", ["revoked", "expired"])
async def test_only_who_has_the_secret_is_told_how_it_ended(file: Path, way: str):
    past = datetime.now(UTC) - timedelta(minutes=1)
    text = token(file, "gone", expires=past if way == "expired" else None)
    if way == "revoked":
        revoke(file, text)
    credentials = Credentials(tokens=TokenFile(str(file)))
    told = {}
    for given in (text, make_token()):
        with pytest.raises(Unauthenticated) as refused:
            await credentials.verify([f"Bearer {given}"], {}, "client")
        told[given] = refused.value
        assert given not in f"{refused.value}{refused.value!r}"
    assert told[text].cause == way
    assert "gone#" in told[text].problem
    unknown = told.popitem()[1]
    assert unknown.cause == "unknown_token"
    assert "gone" not in unknown.problem


@pytest.mark.parametrize("field", ["tenant", "scopes", "expires", "gone"])
async def test_a_token_that_was_changed_in_its_file_ends_what_it_began(file: Path, field: str):
    text = token(file)
    token(file, "other")
    credentials = Credentials(tokens=TokenFile(str(file)))
    identity = credentials.known([f"Bearer {text}"], {})
    assert identity is not None
    assert credentials.problem_of(identity) is None
    content = json.loads(file.read_text())  # noqa: ASYNC240 - a small file
    if field == "gone":
        del content["tokens"][0]
    else:
        new = {"tenant": "acme", "scopes": ["read"], "expires": "2099-01-01T00:00:00Z"}
        content["tokens"][0][field] = new[field]
    file.write_text(json.dumps(content))  # noqa: ASYNC240 - a small file
    await credentials.refresh()
    assert isinstance(credentials.problem_of(identity), Unauthenticated)


async def test_a_token_says_who_whose_and_what(file: Path):
    text = token(file, "meters", tenant="acme", scopes="read admin")
    identity = Credentials(tokens=TokenFile(str(file))).known([f"bearer  {text} "], {})
    assert identity is not None
    assert re.fullmatch(r"meters#[0-9a-f]{12}", identity.name)
    assert digest_of(text).startswith(identity.name.partition("#")[2])
    assert (identity.tenant, identity.scopes) == ("acme", {Scope.READ, Scope.ADMIN})
