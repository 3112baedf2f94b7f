"""Files that earlier versions made: what becomes of their sessions, and who may go on with them."""

from __future__ import annotations

import asyncio
import filecmp
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stepstate.errors import StoreOpenError
from stepstate.stores import SaveResult, StoredSession
from stepstate.stores.sqlite import schema
from tests.contract import old_files
from tests.stores import CLOSED, FileHome, acquire, create, listed, record, saving

VERSIONS = pytest.mark.parametrize("version", old_files.SCHEMAS)
NAMES = [f"s{i:03}" for i in range(100)]


@pytest.fixture
async def home(tmp_path):
    made = FileHome(tmp_path / "sessions.db")
    yield made
    await made.close()


def make(home: FileHome, version: int, sessions=NAMES, snapshot: bytes = b"old") -> None:
    old_files.make(home.path, version, sessions, now=home.clock(), snapshot=snapshot)


def ask(path: Path, question: str):
    with old_files.opened(path) as file:
        return file.execute(question).fetchall()


def size_of(path) -> int:
    return Path(path).stat().st_size


@VERSIONS
async def test_existing_sessions_are_those_of_the_default_tenant(home, version):
    make(home, version)
    store = await home.open()
    assert await store.count() == {("default", "lstm/1"): 100}
    assert await listed(store, 7, tenant="default") == NAMES == await listed(store, 7)
    entry, snapshot = await acquire(store, "s007")
    assert (entry.record, entry.t, snapshot) == (record("s007"), 7, b"old")
    assert await store.save([saving(home, "s007", entry.epoch)]) == [SaveResult.DONE]
    await create(home, store, "acme/s007")
    assert await store.end("s007", entry.epoch, CLOSED)
    assert await listed(store, tenant="acme") == ["acme/s007"]
    assert await store.count() == {("default", "lstm/1"): 99, ("acme", "lstm/1"): 1}
    assert ask(home.path, "PRAGMA user_version") == [(schema.VERSION,)]
    assert ask(home.path, "PRAGMA integrity_check") == [("ok",)]


async def test_expired_sessions_are_kept_and_tombstones_too(home):
    make(home, 2)
    with old_files.opened(home.path) as file:
        later = round((home.clock() + 60) * 1e6)
        file.execute(old_files.EXPIRE, ("s001", 1, "", 9, later, None))
        file.execute("INSERT INTO endings VALUES ('gone', 1, 'closed', 12, '60.0', ?)", (later,))
    store = await home.open()
    assert await store.find("gone") == CLOSED
    found = await store.find("s001")
    assert (found.t, found.delete_at) == (9, home.clock() + 60)
    assert await store.count() == {("default", "lstm/1"): 99}
    assert await store.count_expired() == 1
    assert await store.restore("s001", found.epoch, expires_at=home.clock() + 60)
    assert await store.count() == {("default", "lstm/1"): 100}


@VERSIONS
async def test_an_updated_file_is_as_a_new_one(home, version, tmp_path):
    """But for the place of columns that were added."""
    make(home, version, [])
    await home.open()
    await FileHome(tmp_path / "new.db").open()
    tables = [
        sorted(
            (kind, name, sql if kind != "table" or name != "sessions" else "")
            for kind, name, sql in ask(path, "SELECT type, name, sql FROM sqlite_master")
        )
        for path in (home.path, tmp_path / "new.db")
    ]
    assert tables[0] == tables[1]
    columns = [
        sorted(ask(path, "SELECT name, type, \"notnull\" FROM pragma_table_info('sessions')"))
        for path in (home.path, tmp_path / "new.db")
    ]
    assert columns[0] == columns[1]


async def test_servers_that_start_together_update_a_file_once(home):
    make(home, 2)
    stores = await asyncio.gather(*(home.open() for _ in range(4)))
    for store in stores:
        assert await store.count() == {("default", "lstm/1"): 100}
    assert await create(home, stores[0], "acme/a")
    assert isinstance(await stores[3].find("acme/a"), StoredSession)


async def test_the_snapshots_are_not_copied(home):
    """So the time, the memory and the room that it takes depend on the number of sessions only."""
    make(home, 2, [f"s{i}" for i in range(5_000)], snapshot=bytes(8_000))
    before = size_of(home.path)
    await home.open()
    assert size_of(f"{home.path}-wal") < before / 10


KILLED = """
import os, signal, sqlite3, sys
from pathlib import Path
from stepstate.stores.sqlite import schema

class Killed(sqlite3.Connection):
    def execute(self, *statement):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(*statement)

left = [int(sys.argv[2])]
connection = sqlite3.connect(sys.argv[1], factory=Killed, isolation_level=None)
schema.prepare(connection, 0.0)
left[0] = 1
connection.execute("PRAGMA user_version")
"""


@pytest.mark.parametrize("before", [8, 11, 13, 16, 18])
async def test_what_is_killed_while_it_updates_a_file_has_changed_nothing(home, tmp_path, before):
    """Before one of its statements; the next server does it all."""
    make(home, 2)
    killed = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, home.path, str(before)
    )
    assert await killed.wait() == -signal.SIGKILL
    assert ask(home.path, "PRAGMA user_version") == [(2,)]
    assert ask(home.path, "SELECT count(*) FROM sqlite_master WHERE name = 'counts'") == [(0,)]
    store = await home.open()
    assert await listed(store, tenant="default") == NAMES
    assert await store.count() == {("default", "lstm/1"): 100}


@pytest.mark.parametrize("what", ["folder", "file"])
async def test_a_file_that_may_only_be_read_says_so_and_is_as_it_was(
    home, read_only, tmp_path, what
):
    make(home, 2)
    folder = tmp_path / "folder"
    folder.mkdir()
    copy = Path(shutil.copy(home.path, folder))
    read_only(folder if what == "folder" else copy)
    with pytest.raises(StoreOpenError, match="see that the server may write there"):
        await FileHome(copy).open()
    assert filecmp.cmp(copy, home.path, shallow=False)


@pytest.mark.parametrize("room", [0, 100_000])
async def test_without_room_nothing_is_lost_and_it_says_what_to_do(small_disk, room):
    home = FileHome(small_disk / "sessions.db")
    names = [f"a-rather-long-name-of-a-session-{i:05}" for i in range(2_500)]
    make(home, 2, names)
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"):
        ballast.write_bytes(bytes(4 * 2**20))
    os.truncate(ballast, ballast.stat().st_size - room)
    with pytest.raises(StoreOpenError, match="make room on the disk"):
        await home.open()
    ballast.unlink()
    assert ask(home.path, "PRAGMA user_version") == [(2,)]
    store = await home.open()
    assert await listed(store, 1000) == names
    assert await store.count() == {("default", "lstm/1"): 2_500}
    await home.close()


async def test_an_earlier_server_does_not_start_on_a_file_of_this_version(home, monkeypatch):
    await home.open()
    monkeypatch.setattr(schema, "VERSION", 2)
    with pytest.raises(StoreOpenError, match="start the Stepstate that wrote it"):
        await home.open()


async def test_an_earlier_server_that_has_the_file_open_goes_on_with_its_sessions(home):
    """Its statements work as before, and what it does is counted. It knows no other tenants."""
    make(home, 2)
    at = round((home.clock() + 60) * 1e6)
    with old_files.opened(home.path) as earlier:
        earlier.execute("SELECT count(*) FROM sessions").fetchone()
        store = await home.open()
        await create(home, store, "acme/s001")

        def new(name: str, epoch: int) -> None:
            text = record(name).to_json()
            earlier.execute(old_files.CREATE, (name, "lstm/1", text, epoch, "", 0, at, b"new"))

        async def counted(sessions: int) -> None:
            wanted = {("default", "lstm/1"): sessions, ("acme", "lstm/1"): 1}
            assert await store.count() == wanted
            assert len(await listed(store, tenant="default")) == sessions

        saved = earlier.execute(old_files.SAVE, ("s000", 1, "", 8, at + 1, b"saved"))
        assert saved.rowcount == 1
        assert (await acquire(store, "s000"))[1] == b"saved"
        new("another", 5)
        await counted(101)
        new("s001", 6)  # instead of an overdue one
        await counted(101)
        earlier.execute(old_files.EXPIRE, ("s001", 6, "", 0, at, None))
        await counted(100)
        new("s001", 8)  # instead of an expired one
        await counted(101)
        earlier.execute(old_files.EXPIRE, ("s001", 8, "", 0, at, None))
        earlier.execute(old_files.RESTORE, ("s001", at))
        await counted(101)
        earlier.execute(old_files.END, ('["s001", "s002"]',))
        await counted(99)
        assert earlier.execute(old_files.PAGE, ("", 10)).fetchone()


PEAK = r"""
import pathlib, re, sqlite3, sys
from stepstate.stores.sqlite import schema

def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])

before = peak()
schema.prepare(sqlite3.connect(sys.argv[1], isolation_level=None), 0.0)
print(peak() - before)
"""


@pytest.mark.long
def test_many_sessions_are_updated_in_bounded_memory(tmp_path):
    """Figures: see docs/operations.md."""
    home = FileHome(tmp_path / "sessions.db")
    make(home, 2, (f"meter-{i}" for i in range(100_000)), snapshot=bytes(2_000))
    started = time.monotonic()
    command = [sys.executable, "-c", PEAK, home.path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(f"{time.monotonic() - started:.2f} s with the start of Python, {done.stdout} KiB")
    assert int(done.stdout) < 50_000
    assert ask(home.path, "SELECT * FROM counts") == [("default", "lstm/1", 100_000)]


async def test_sessions_of_version_1_keep_the_time_they_had_left(home):
    """Its times were Unix times; it had no clock and no expired sessions."""
    make(home, 1, ["a", "b"])
    for jump in (-21 * 86_400, 400 * 86_400):  # a wrong clock, or years in a cupboard
        copy = FileHome(Path(shutil.copy(home.path, f"{home.path}{jump}")))
        copy.clock.now = home.clock.now + jump
        store = await copy.open()
        left = (await store.find("b")).expires_at - store.now()
        assert left >= 60 if jump < 0 else left == pytest.approx(60)
        epoch = (await acquire(store, "b"))[0].epoch
        await store.expire([saving(copy, "b", epoch)], delete_at=9e9)
        assert await store.count_expired() == 1
        marked = await store.find("b")
        assert await store.restore("b", marked.epoch, expires_at=store.now() + 60)
        await copy.close()


@pytest.mark.parametrize(
    "damage", ["record = '{no json'", "expires = 1 << 62", "expires = 'soon'", "expires = 5"]
)
async def test_a_damaged_row_of_version_1_does_not_matter_to_the_others(home, damage):
    make(home, 1, ["a", "b"])
    with old_files.opened(home.path) as file:
        file.execute(f"UPDATE sessions SET {damage} WHERE session_id = 'a'")
    home.clock.now += 86_400
    store = await home.open()
    assert (await store.find("b")).expires_at - store.now() == pytest.approx(60)
    assert await acquire(store, "b")
