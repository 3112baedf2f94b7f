"""Which store a URL names, and what is said of one that names none."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from stepstate.errors import StoreOpenError
from stepstate.stores import MemoryStore, SqliteStore, open_store
from stepstate.stores.sqlite import schema


async def refused(url: str) -> str:
    with pytest.raises(StoreOpenError) as error:
        await open_store(url, clock=time.time)
    return str(error.value)


async def test_memory_names_the_store_that_forgets():
    store = await open_store("memory:", clock=time.time)
    assert isinstance(store, MemoryStore)
    assert not store.durable


@pytest.mark.parametrize("slashes", ["", "//"])
async def test_sqlite_names_a_file_which_is_made(tmp_path, slashes):
    path = tmp_path / "sessions.db"
    store = await open_store(f"sqlite:{slashes}{path}", clock=time.time)
    assert isinstance(store, SqliteStore)
    assert store.durable
    await store.close()
    assert path.exists()


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("stepstate.db", "no such kind of store"),
        ("memory:x", "no such kind of store"),
        ("postgres://u:secret@h/db", "expected sqlite:PATH"),
        ("redis:secret@h", "no such kind of store"),
        ("sqlite:", "no file is named"),
        ("sqlite::memory:", "memory:"),
        ("sqlite://sessions.db", "write sqlite:sessions.db"),
        ("redis://u:secret@h:port/0", "can't be read"),
        ("redis://u:sec#ret@h:6379/0", "can't be read"),
        ("redis://u:secret@a:1,b:2/0", "can't be read"),
        ("redis://", "can't be read"),
        ("redis+cluster://u:secret@a:1,b:two", "can't be read"),
        ("redis://u:secret@localhost:1/0?colour=secret", "an option after the ?"),
        ("redis+cluster://u:secret@localhost:1/?colour=secret", "can't be read"),
        ("redis+sentinel://u:secret@localhost:1", "HOST:PORT[,HOST:PORT...]/SERVICE"),
        ("redis+sentinel://u:secret@localhost:1/", "HOST:PORT[,HOST:PORT...]/SERVICE"),
        ("redis+sentinel://u:secret@localhost:1/sessions/one", "/SERVICE[/DB]"),
        ("redis+sentinel://u:secret@localhost:1/sessions?colour=secret", "an option after the ?"),
    ],
)
async def test_a_url_that_names_no_store_is_refused_without_its_password(url, problem):
    message = await refused(url)
    assert problem in message
    assert "secret" not in message
    assert "ret@" not in message


async def test_a_folder_that_is_missing_is_named(tmp_path):
    message = await refused(f"sqlite:{tmp_path}/none/sessions.db")
    assert f"the folder {tmp_path}/none does not exist" in message


async def test_a_folder_is_not_taken_for_a_file(tmp_path):
    assert "it is a folder" in await refused(f"sqlite:{tmp_path}")


async def test_a_file_that_is_no_database_is_left_as_it_is(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(b"what somebody wrote\n" * 100)
    assert "something else" in await refused(f"sqlite:{path}")
    assert path.read_bytes() == b"what somebody wrote\n" * 100


async def test_the_database_of_another_program_is_left_as_it_is(tmp_path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE theirs (x)")
    other.close()
    before = path.read_bytes()
    assert "another program" in await refused(f"sqlite:{path}")
    assert path.read_bytes() == before


async def test_a_file_of_a_later_version_is_left_as_it_is(tmp_path):
    path = tmp_path / "sessions.db"
    await (await open_store(f"sqlite:{path}", clock=time.time)).close()
    change(path, f"PRAGMA user_version = {schema.VERSION + 1}")
    message = await refused(f"sqlite:{path}")
    assert f"has version {schema.VERSION + 1}" in message
    assert f"knows up to {schema.VERSION}" in message


@pytest.mark.parametrize("mode", [0o755, 0o700], ids=["readable", "unreadable"])
async def test_a_file_that_may_not_be_written_is_refused(mode):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "sessions.db"
        await (await open_store(f"sqlite:{path}", clock=time.time)).close()
        path.parent.chmod(mode)
        path.chmod(0o444)
        with nobody():
            assert "see that the server may write there" in await refused(f"sqlite:{path}")


@contextmanager
def nobody():
    """Root may write everywhere; so it is somebody else for a moment."""
    if os.geteuid():
        yield
        return
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(0)


def change(path, statement):
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.commit()
    connection.close()
