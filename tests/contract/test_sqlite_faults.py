"""What happens to a file of sessions: kill -9, a full disk, a deleted file, another's lock."""

from __future__ import annotations

import asyncio
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

from stepstate.errors import StoreOpenError, StoreUnavailable
from stepstate.stores import SaveResult
from stepstate.stores.sqlite import file as session_file
from stepstate.stores.sqlite import reserve, watch, writer_thread, writes
from tests.contract import store_writer
from tests.stores import CLOSED, FileHome, acquire, create, saving


@pytest.fixture
async def home(tmp_path):
    made = FileHome(tmp_path / "folder" / "sessions.db")
    made.path.parent.mkdir()
    yield made
    await made.close()


async def test_every_acknowledged_save_survives_kill_9(home):
    """Three times on the same file, while the writer saves as fast as it can."""
    for acknowledged in (1, 60, 200):
        last = writes_until_killed(home.url, acknowledged)
        store = await home.open()
        for name in store_writer.SESSIONS:
            entry, snapshot = await acquire(store, name)
            assert entry.t >= last
            assert snapshot == store_writer.snapshot(entry.t)
        await store.close()


def writes_until_killed(url: str, acknowledged: int) -> int:
    """Kills a writer after so many acknowledgements; returns the last t of them."""
    command = [sys.executable, "-m", store_writer.__name__, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        for _ in range(acknowledged):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        lines = [
            line for line in writer.stdout.read().splitlines(keepends=True) if line[-1] == "\n"
        ]
        return int(lines[-1]) if lines else acknowledged


@contextmanager
def full_disk(largest: Path) -> Iterator[None]:
    """No file may grow beyond this one: a write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest.stat().st_size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_store_that_cant_grow_says_so_and_goes_on_when_it_can(home):
    store = await home.open()
    epoch = await create(home, store, "a")
    with full_disk(Path(f"{home.path}-wal")):
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match=str(home.path)):
                await store.save([saving(home, "a", epoch, snapshot=bytes(10**6))])
    assert await store.save([saving(home, "a", epoch, t=3)]) == [SaveResult.DONE]
    assert (await acquire(store, "a"))[1] == b"later"


async def test_on_a_full_disk_what_is_there_is_read_and_it_goes_on_when_there_is_room(small_disk):
    home = FileHome(small_disk / "sessions.db")
    store = await home.open()
    epoch = await create(home, store, "a")
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"):
        ballast.write_bytes(bytes(4 * 2**20))
    with pytest.raises(StoreUnavailable, match="full"):
        await store.save([saving(home, "a", epoch)])
    assert (await store.find("a")).t == 0
    with pytest.raises(StoreUnavailable, match="full"):
        await create(home, store, "b")
    ballast.unlink()
    assert await store.save([saving(home, "a", epoch, t=3)]) == [SaveResult.DONE]
    assert (await acquire(store, "a"))[1] == b"later"
    await home.close()


async def test_a_wal_that_filled_the_disk_is_written_back_when_its_reader_is_gone(small_disk):
    """All its pages are new: the database has to grow, and not a byte is free for that."""
    home = FileHome(small_disk / "sessions.db")
    store = await home.open()
    epoch = await create(home, store, "a")
    other = sqlite3.connect(home.path, isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT count(*) FROM sessions").fetchone()
    kept: dict[str, int] = {}
    with pytest.raises(StoreUnavailable) as refused:
        while True:
            name = f"s{len(kept)}"
            kept[name] = await create(home, store, name)
            await store.save([saving(home, name, kept[name], snapshot=bytes(50_000))])
    assert refused.value.cause == "wal"
    with suppress(OSError):
        (small_disk / "ballast").write_bytes(bytes(4 * 2**20))
    assert shutil.disk_usage(small_disk).free == 0
    for call in (store.save([saving(home, "a", epoch)]), store.probe()):
        with pytest.raises(StoreUnavailable):
            await call
    other.close()
    before = home.path.stat().st_size
    with suppress(StoreUnavailable):  # room for the WAL is made; there may be too little for more
        await store.probe()
    assert home.path.stat().st_size > before + 500_000
    (small_disk / "ballast").unlink()
    assert await store.save([saving(home, "a", epoch, t=3)]) == [SaveResult.DONE]
    assert (await store.count())["default", "lstm/1"] in (len(kept) + 1, len(kept) + 2)
    await home.close()
    assert [one.name for one in small_disk.iterdir()] == ["sessions.db"]


async def test_a_store_that_is_opened_on_a_full_disk_is_read_and_written_when_there_is_room(
    small_disk,
):
    """A server that was killed there comes back; one that was not there before says what to do."""
    home = FileHome(small_disk / "sessions.db")
    first = await home.open()
    epoch = await create(home, first, "a")
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"):
        ballast.write_bytes(bytes(4 * 2**20))
    second = await home.open()
    assert (await second.find("a")).t == 0
    with pytest.raises(StoreUnavailable, match="full"):
        for t in range(1000):
            await second.save([saving(home, "a", epoch, t)])
    with pytest.raises(StoreOpenError, match="make room on the disk"):
        await FileHome(small_disk / "other.db").open()
    ballast.unlink()
    await second.probe()
    assert await second.save([saving(home, "a", epoch, t=9)]) == [SaveResult.DONE]
    await home.close()


async def test_a_wal_is_bounded_however_long_a_reader_reads(home, monkeypatch):
    monkeypatch.setattr(reserve, "MAX_WAL_BYTES", 2**20)
    store = await home.open()
    epoch = await create(home, store, "a")
    other = sqlite3.connect(home.path, isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT count(*) FROM sessions").fetchone()
    with pytest.raises(StoreUnavailable, match="end that process") as refused:
        for t in range(10_000):
            await store.save([saving(home, "a", epoch, t, snapshot=bytes(50_000))])
    assert refused.value.cause == "wal"
    assert store.disk_usage().wal < 17 * 2**20  # as large as the reserve may be at once
    other.close()
    assert await store.save([saving(home, "a", epoch, t=3)]) == [SaveResult.DONE]


@pytest.fixture
def kept_from_writing(home, monkeypatch):
    """Fills the WAL of a store up to its bound, and keeps it from being written back."""
    monkeypatch.setattr(reserve, "MAX_WAL_BYTES", 2**20)
    other = sqlite3.connect(home.path, isolation_level=None)

    async def fill(store, epoch):
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM sessions").fetchone()
        with pytest.raises(StoreUnavailable, match="end that process"):
            for t in range(10_000):
                await store.save([saving(home, "filler", epoch, t, snapshot=bytes(500_000))])

    yield fill
    other.close()


async def test_nothing_is_written_past_the_bound_of_the_wal(home, kept_from_writing):
    """Whatever writes is refused there, also what is called for the sake of reading."""
    store = await home.open()
    epochs = {name: await create(home, store, name) for name in ("a", "used", "bad", "filler")}
    epochs["gone"] = await create(home, store, "gone")
    await store.expire([saving(home, "gone", epochs["gone"])], delete_at=home.clock() + 1)
    gone = await store.find("gone")
    await home.pass_time(55)
    await store.save([saving(home, "used", epochs["used"])])
    with closing(sqlite3.connect(home.path)) as other, other:
        other.execute("UPDATE sessions SET record = '{' WHERE session_id = 'bad'")
    await kept_from_writing(store, epochs["filler"])
    full = store.disk_usage().wal
    home.clock.advance(5)
    save = saving(home, "a", epochs["a"])
    writes = {
        "create": lambda: create(home, store, "b"),
        "acquire": lambda: acquire(store, "a"),
        "save": lambda: store.save([save]),
        "expire": lambda: store.expire([save], delete_at=9e9),
        "restore": lambda: store.restore("gone", gone.epoch, expires_at=9e9),
        "end": lambda: store.end("a", epochs["a"], CLOSED),
        "discard": lambda: store.discard("bad", CLOSED),
        "overdue": lambda: store.overdue(home.clock() + 10, 10),
        "expired": lambda: store.expired(home.clock() + 1e6, 10),
        "heartbeat": store.heartbeat,
        "probe": store.probe,
    }
    done = []
    for name, write in writes.items():
        with suppress(StoreUnavailable):
            await write()
            done.append(name)
        assert store.disk_usage().wal == full, name
    assert done == ["expired"]  # it had nothing to write
    assert (await store.find("a")).epoch == epochs["a"]


async def test_the_reserve_is_as_large_as_the_wal_whatever_is_written(home):
    store = await home.open()
    names = [f"s{i}" for i in range(8)]
    epochs = {name: await create(home, store, name) for name in names}
    other = sqlite3.connect(home.path, isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT count(*) FROM sessions").fetchone()
    large = bytes(5 * 2**20)
    for name in names:
        save = saving(home, name, epochs[name], snapshot=large)
        assert await store.expire([save], delete_at=9e9) == [SaveResult.DONE]
        usage = store.disk_usage()
        assert usage.wal <= usage.reserve
    other.close()


async def test_a_file_that_was_made_read_only_says_so_and_goes_on_when_it_is_not(home, connections):
    store = await home.open()
    connection = connections[-1]
    epoch = await create(home, store, "a")
    connection.execute("PRAGMA query_only = ON")
    with pytest.raises(StoreUnavailable, match="readonly"):
        await store.save([saving(home, "a", epoch)])
    assert await store.save([saving(home, "a", epoch)]) == [SaveResult.DONE]


async def test_a_deleted_file_is_made_anew_and_its_sessions_are_missing(home, monkeypatch):
    monkeypatch.setattr(session_file, "FRESH_SECONDS", 0.0)
    store = await home.open()
    epoch = await create(home, store, "a")
    for part in home.path.parent.iterdir():
        part.unlink()
    assert await store.save([saving(home, "a", epoch)]) == [SaveResult.MISSING]
    assert await create(home, store, "a") > 0
    shutil.rmtree(home.path.parent)
    with pytest.raises(StoreUnavailable, match="unable to open"):
        await store.find("a")
    home.path.parent.mkdir()
    assert await store.find("a") is None


PARTS = [("-wal",), ("-shm",), ("-wal", "-shm")]


WRITERS = [("s",), pytest.param(("s", "other"), marks=pytest.mark.long)]


@pytest.mark.parametrize("parts", PARTS, ids="".join)
@pytest.mark.parametrize("names", WRITERS, ids="+".join)
async def test_what_was_acknowledged_into_a_wal_that_was_deleted_survives_kill_9(
    home, names, parts
):
    """What was committed before a server noticed, too: it has the deleted file open."""
    last = writes_while_deleted(home, names, parts)
    store = await home.open()
    for writer in names:
        for name in store_writer.sessions(writer):
            entry, snapshot = await acquire(store, name)
            assert entry.t >= last[writer]
            assert snapshot == store_writer.snapshot(entry.t)
    with closing(sqlite3.connect(home.path)) as reader:
        assert reader.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def writes_while_deleted(home: FileHome, names: tuple[str, ...], parts: tuple[str, ...]) -> dict:
    """Deletes files beside the database of writers, then kills them; returns their last t."""
    command = [sys.executable, "-m", store_writer.__name__, home.url]
    told = {name: home.path.with_name(f"{name}.out") for name in names}
    with ExitStack() as stack:
        for name, file in told.items():
            out = stack.enter_context(file.open("w"))
            writer = stack.enter_context(subprocess.Popen([*command, name], stdout=out))
            stack.callback(writer.kill)
        for _ in range(4):
            wait_for_more(told)
            delete(home.path, *parts)
        wait_for_more(told)
    return {name: last_line(file.read_text()) for name, file in told.items()}


def wait_for_more(told: dict[str, Path]) -> None:
    """Waits until every writer has saved 20 times more."""
    goals = {file: last_line(file.read_text()) + 20 for file in told.values()}
    while any(last_line(file.read_text()) < goal for file, goal in goals.items()):
        time.sleep(0.01)


def last_line(text: str) -> int:
    """The number on the last whole line; 0: there is none."""
    return int(text.rpartition("\n")[0].rpartition("\n")[2] or 0)


def delete(path: Path, *parts: str) -> None:
    """Deletes files beside a database."""
    for part in parts:
        path.with_name(path.name + part).unlink(missing_ok=True)  # it may just be opened anew


@pytest.fixture
def as_it_commits(monkeypatch):
    """Something that happens once, when the next group of writes is committed and not confirmed."""
    todo = []

    def write(*args, **kwargs):
        writes.write(*args, **kwargs)
        while todo:
            todo.pop()()

    monkeypatch.setattr(writer_thread, "write", write)
    return todo


@pytest.mark.parametrize("parts", PARTS, ids="".join)
async def test_a_commit_is_acknowledged_when_it_is_where_a_restart_finds_it(
    home, parts, as_it_commits, tmp_path
):
    store = await home.open()
    epoch = await create(home, store, "a")
    as_it_commits.append(lambda: delete(home.path, *parts))
    assert await store.save([saving(home, "a", epoch, t=7)]) == [SaveResult.DONE]
    as_killed = FileHome(shutil.copytree(home.path.parent, tmp_path / "copy") / home.path.name)
    assert (await (await as_killed.open()).find("a")).t == 7
    await as_killed.close()
    assert await store.save([saving(home, "a", epoch, t=8)]) == [SaveResult.DONE]


async def test_a_commit_to_a_file_that_is_deleted_meanwhile_is_not_acknowledged(
    home, as_it_commits
):
    store = await home.open()
    epoch = await create(home, store, "a")
    as_it_commits.append(home.path.unlink)
    with pytest.raises(StoreUnavailable, match="deleted or replaced") as refused:
        await store.save([saving(home, "a", epoch, t=7)])
    assert refused.value.cause == "io"
    assert await store.save([saving(home, "a", epoch, t=7)]) == [SaveResult.MISSING]


async def test_a_commit_beside_the_new_files_of_another_process_is_not_acknowledged(
    home, as_it_commits
):
    """The other one goes on, and the database is whole."""
    store = await home.open()
    epoch = await create(home, store, "a")
    command = [sys.executable, "-m", store_writer.__name__, home.url]

    def replace() -> None:
        delete(home.path, "-wal", "-shm")
        others.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        others[0].stdout.readline()

    others: list[subprocess.Popen] = []
    as_it_commits.append(replace)
    with pytest.raises(StoreUnavailable, match="deleted or replaced"):
        await store.save([saving(home, "a", epoch, t=7)])
    await create(home, store, "b")
    others[0].kill()
    others[0].communicate()
    for name in store_writer.SESSIONS:
        entry, snapshot = await acquire(store, name)
        assert snapshot == store_writer.snapshot(entry.t)
    with closing(sqlite3.connect(home.path)) as reader:
        assert reader.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_a_deleted_wal_that_another_process_still_reads_is_kept_until_it_ends(home):
    store = await home.open()
    epoch = await create(home, store, "a")
    other = sqlite3.connect(home.path, isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT count(*) FROM sessions").fetchone()
    delete(home.path, "-wal")
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match="end that process") as refused:
            await store.save([saving(home, "a", epoch, t=7)])
        assert refused.value.cause == "wal"
    other.close()
    assert await store.save([saving(home, "a", epoch, t=8)]) == [SaveResult.DONE]


async def test_a_deleted_wal_is_not_acknowledged_into_while_another_server_does_not_notice(
    home, monkeypatch
):
    monkeypatch.setattr(watch, "LOCK_SECONDS", 0.2)
    store, other = await home.open(), await home.open()
    epoch = await create(home, store, "a")
    delete(home.path, "-wal")
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="another server still uses it") as refused:
            await store.save([saving(home, "a", epoch, t=7)])
        assert refused.value.cause == "busy"
    await other.close()
    assert await store.save([saving(home, "a", epoch, t=8)]) == [SaveResult.DONE]


@pytest.mark.parametrize("parts", [(), ("-wal",), ("-wal", "-shm"), ("-wal", "-shm", "-reserve")])
@pytest.mark.parametrize("what", ["folder", "file"])
async def test_what_may_only_be_read_is_refused_at_the_start_whatever_is_beside_it(
    home, read_only, what, parts, tmp_path
):
    store = await home.open()
    await create(home, store, "a")
    copy = tmp_path / "copy" / home.path.name
    copy.parent.mkdir()
    for part in ("", *parts):
        shutil.copy(f"{home.path}{part}", f"{copy}{part}")
    read_only(copy.parent if what == "folder" else copy)
    with pytest.raises(StoreOpenError, match="see that the server may write there"):
        await FileHome(copy).open()


async def test_a_lock_of_another_process_is_waited_for_and_then_told(home, monkeypatch):
    monkeypatch.setattr(session_file, "BUSY_SECONDS", 0.3)
    store = await home.open()
    epoch = await create(home, store, "a")
    other = sqlite3.connect(home.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for call in (store.save([saving(home, "a", epoch)]), store.probe()):
        with pytest.raises(StoreUnavailable, match="locked") as refused:
            await call
        assert refused.value.cause == "busy"
    assert (await store.find("a")).t == 0
    waiting = asyncio.create_task(store.save([saving(home, "a", epoch)]))
    await asyncio.sleep(0.1)
    other.execute("ROLLBACK")
    assert await waiting == [SaveResult.DONE]
    other.close()


async def test_a_session_whose_pages_are_damaged_fails_alone(home):
    """The pages of a snapshot are a chain: cut, SQLite calls the file malformed when it is read."""
    store = await home.open()
    for name in "abc":
        epoch = await create(home, store, name)
        await store.save([saving(home, name, epoch, snapshot=name.encode() * 20_000)])
    await store.close()
    data = bytearray(home.path.read_bytes())
    page = data.index(b"b" * 4_000) // 4_096 * 4_096
    while data[page + 8 : page + 4_096] != b"b" * 4_088:
        page += 4_096
    data[page : page + 4] = b"\xff\xff\xff\xff"  # the number of the next page
    home.path.write_bytes(data)

    store = await home.open()
    found = await asyncio.gather(*(acquire(store, name) for name in "abc"), return_exceptions=True)
    assert [found[0][1], found[2][1]] == [b"a" * 20_000, b"c" * 20_000]
    assert isinstance(found[1], StoreUnavailable)
    assert found[1].cause == "corrupt"
