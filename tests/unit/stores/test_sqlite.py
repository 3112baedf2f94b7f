"""How the store on SQLite works on its file; what it promises is in tests/contract."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from stepstate.errors import StoreOpenError, StoreUnavailable
from stepstate.stores import EndReason, SaveResult, Tombstone
from stepstate.stores.sqlite import file as session_file
from stepstate.stores.sqlite import reads, writer_thread, writes
from stepstate.stores.sqlite import store as sqlite_store
from stepstate.uptime import UptimeClock
from tests.stores import FINGERPRINT, FileHome, acquire, create, listed, record, saving

UPTIME = UptimeClock(time.monotonic)


@pytest.fixture
async def home(tmp_path):
    made = FileHome(tmp_path / "sessions.db")
    yield made
    await made.close()


@pytest.fixture
async def store(home):
    return await home.open()


@pytest.fixture
def groups(store, monkeypatch):
    """How many writes were done together, each time."""
    sizes: list[int] = []

    def write(connection, writing, **clocks):
        sizes.append(len(writing))
        time.sleep(0.02)  # while more come
        return writes.write(connection, writing, **clocks)

    monkeypatch.setattr(writer_thread, "write", write)
    return sizes


async def test_what_comes_while_a_transaction_runs_goes_together_into_the_next(home, store, groups):
    first = asyncio.create_task(create(home, store, "first"))
    await asyncio.sleep(0.005)
    epochs = await asyncio.gather(*(create(home, store, f"s{i}") for i in range(20)))
    assert groups == [1, 20]
    saves = [saving(home, f"s{i}", epoch) for i, epoch in enumerate(epochs)]
    together = (store.save(saves[:7]), store.save(saves[7:]), create(home, store, "one more"))
    await asyncio.gather(*together, first)
    assert sum(groups) == 1 + 20 + 21
    assert len(groups) <= 4


async def test_a_write_waits_for_a_part_of_one_page_however_many_are_asked_for(
    home, store, monkeypatch
):
    """Eight pages of 1,000 sessions delayed every save by 50 ms."""
    monkeypatch.setattr(sqlite_store, "READ_AT_ONCE", 10)
    epochs = {f"s{i:03}": await create(home, store, f"s{i:03}") for i in range(100)}
    done: list[str] = []
    began = asyncio.Event()
    loop, page = asyncio.get_running_loop(), reads.page

    def slow_page(*of: object, **options: object) -> object:
        done.append("part")
        loop.call_soon_threadsafe(began.set)
        time.sleep(0.01)  # while the save comes
        return page(*of, **options)

    monkeypatch.setattr(reads, "page", slow_page)
    pages = [asyncio.create_task(store.page("", 100)) for _ in range(8)]
    await began.wait()
    assert await store.save([saving(home, "s000", epochs["s000"])]) == [SaveResult.DONE]
    done.append("save")
    for found, token in await asyncio.gather(*pages):
        assert ([one.session_id for one in found], token) == (sorted(epochs), "")
    assert done.index("save") <= 3
    assert done.count("part") == 80


async def test_a_value_that_cant_be_written_fails_its_own_call_only(home, store):
    epochs = {name: await create(home, store, name) for name in "abc"}
    bad = {"b": 2**70}
    saves = (store.save([saving(home, n, e, t=bad.get(n, 5))]) for n, e in epochs.items())
    answers = await asyncio.gather(*saves, return_exceptions=True)
    assert answers[0] == answers[2] == [SaveResult.DONE]
    assert isinstance(answers[1], OverflowError)
    assert [(await store.find(name)).t for name in "abc"] == [5, 0, 5]


async def test_snapshots_that_are_read_together_are_told_apart(home, store, monkeypatch):
    """Also when they take several reads."""
    monkeypatch.setattr(writes, "READ_BYTES", 1000)
    made = {f"s{i}": bytes([i]) * (i * 37) for i in range(40)}
    epochs = {name: await create(home, store, name) for name in made}
    await store.save([saving(home, n, epochs[n], snapshot=s) for n, s in made.items()])
    taken = await asyncio.gather(*(acquire(store, name) for name in made))
    assert [snapshot for _, snapshot in taken] == list(made.values())


async def test_more_saves_than_a_statement_takes_are_all_written(home, store):
    names = [f"s{i}" for i in range(2 * writes.ROWS_AT_ONCE + 3)]
    epochs = await asyncio.gather(*(create(home, store, name) for name in names))
    saves = [saving(home, *pair, t=4) for pair in zip(names, epochs, strict=True)]
    assert await store.save(saves) == [SaveResult.DONE] * len(names)
    assert {entry.t for entry in (await store.page("", 1000))[0]} == {4}


class RacedConnection(sqlite3.Connection):
    """Lets another server do something just before one of its statements."""

    before = 0
    other_server = staticmethod(lambda: None)

    def execute(self, *statement):
        if self.before == 0:
            self.other_server()
        self.before -= 1
        return super().execute(*statement)


@pytest.mark.parametrize("kind", ["save", "expire"])
@pytest.mark.parametrize("beside", [[], ["held too"], ["stale"], ["held too", "stale"]])
@pytest.mark.parametrize("before", range(6))
async def test_a_save_is_done_if_and_only_if_it_says_so_whenever_another_server_takes_the_session(
    home, store, kind, beside, before
):
    epochs = {name: await create(home, store, name) for name in ("taken", "held too", "stale")}
    await acquire(store, "stale", owner="B")
    make = {
        "save": lambda save: writes.SaveOne(save.key, save),
        "expire": lambda save: writes.Expire(save.key, save, home.clock()),
    }[kind]
    saves = [make(saving(home, name, epochs[name])) for name in ("taken", *beside)]
    connection = sqlite3.connect(home.path, factory=RacedConnection, isolation_level=None)
    other = sqlite3.connect(home.path, timeout=0, isolation_level=None)
    now = {"now": home.clock(), "unix_time": home.clock()}

    def take() -> None:
        with suppress(sqlite3.OperationalError):  # locked
            writes.write(other, [writes.Acquire("taken", "B", {FINGERPRINT})], **now)

    connection.before, connection.other_server = before, take
    writes.write(connection, saves, **now)
    for one in saves:
        stored = await store.find(one.key)
        assert (stored.t == 1) == (one.result is SaveResult.DONE), (one.key, one.result)
    connection.close()
    other.close()


async def test_the_file_does_not_grow_with_sessions_that_come_and_go(home, store):
    sizes = []
    for _ in range(3):
        names = [f"{time.monotonic_ns()}" for _ in range(200)]
        epochs = await asyncio.gather(*(create(home, store, name) for name in names))
        tombstone = Tombstone(EndReason.CLOSED, 1, 60.0)
        ends = (store.end(*pair, tombstone) for pair in zip(names, epochs, strict=True))
        assert all(await asyncio.gather(*ends))
        await home.pass_time(4000)
        sizes.append(pages(home.path))
    assert sizes[2] <= sizes[1] + 2


async def test_old_tombstones_are_deleted_from_the_file(home, store):
    for name in "abc":
        await store.end(name, await create(home, store, name), Tombstone(EndReason.CLOSED, 1, 60.0))
        await home.pass_time(4000)
    assert ask(home.path, "SELECT count(*) FROM endings") == 1


async def test_the_wal_stays_bounded(connections, home, store):
    connection = connections[-1]
    connection.execute("PRAGMA wal_autocheckpoint = 100")
    epoch = await create(home, store, "a")
    for t in range(1, 60):
        await store.save([saving(home, "a", epoch, t, bytes(50_000))])
    assert size_of(f"{home.path}-wal") < 150 * 4096


async def test_sessions_that_were_used_are_looked_at_again_later_and_not_again_now(home, store):
    epoch = await create(home, store, "a")
    now = home.clock()
    await home.pass_time(50)
    await store.save([saving(home, "a", epoch)])
    assert ask(home.path, "SELECT due FROM sessions") == (now + 60) * 1e6
    assert await store.overdue(now + 61, 10) == []
    assert ask(home.path, "SELECT due FROM sessions") == (now + 110) * 1e6


async def test_many_that_were_used_do_not_hide_one_that_was_not(home, store, monkeypatch):
    monkeypatch.setattr(reads, "DUE_AT_ONCE", 2)
    epochs = {name: await create(home, store, name) for name in "abcdefgh"}
    await home.pass_time(50)
    await store.save([saving(home, name, epochs[name]) for name in "abcdefg"])
    await home.pass_time(11)
    sweeps = [await store.overdue(home.clock(), 2) for _ in range(5)]
    assert "h" in {entry.record.session_id for found in sweeps for entry in found}


async def test_a_disk_that_hangs_is_reported_and_a_write_that_was_given_up_is_not_done(
    connections, home, store, monkeypatch
):
    connection = connections[-1]
    epochs = {name: await create(home, store, name) for name in "ab"}
    with monkeypatch.context() as patched:
        patched.setattr(writer_thread, "ANSWER_SECONDS", 0.05)
        blocking = asyncio.Event()
        loop = asyncio.get_running_loop()

        def hang() -> int:
            connection.set_progress_handler(None, 0)
            loop.call_soon_threadsafe(blocking.set)
            time.sleep(0.3)
            return 0

        connection.set_progress_handler(hang, 1)
        hanging = asyncio.create_task(store.save([saving(home, "b", epochs["b"])]))
        await blocking.wait()
        with pytest.raises(StoreUnavailable, match="hang"):
            await store.save([saving(home, "a", epochs["a"])])
        with pytest.raises(StoreUnavailable):
            await hanging
    assert (await store.find("a")).t == 0


ANY_TIME = 9e9
INDEXES = {
    "a page": (lambda store, _: store.page("", 10), "INDEX sessions_open"),
    "a page with expired ones": (
        lambda store, _: store.page("", 10, expired=True),
        "INDEX sessions_expired",
    ),
    "a page of a tenant": (
        lambda store, _: store.page("", 10, tenant="default"),
        "INDEX sessions_open (tenant=? AND session_id>?)",
    ),
    "a page of a tenant with expired ones": (
        lambda store, _: store.page("", 10, tenant="default", expired=True),
        "INDEX sessions_expired (tenant=? AND session_id>?)",
    ),
    "a page of a model": (
        lambda store, _: store.page("", 10, "lstm", tenant="default"),
        "COVERING INDEX sessions_by_model (tenant=? AND model=? AND expired=? AND session_id>?)",
    ),
    "what is due": (lambda store, _: store.overdue(ANY_TIME, 10), "sessions_by_due"),
    "what is to be deleted": (lambda store, _: store.expired(ANY_TIME, 10), "sessions_by_due"),
    "a count of expired ones": (
        lambda store, _: store.count_expired(),
        "COVERING INDEX sessions_by_due",
    ),
    "one session": (lambda store, _: store.find("a"), "sqlite_autoindex_sessions_1"),
    "a save": (lambda store, save: store.save([save]), "sqlite_autoindex_sessions_1"),
    "an end by time": (
        lambda store, save: store.expire([save], delete_at=ANY_TIME),
        "sqlite_autoindex_sessions_1",
    ),
}


@pytest.mark.parametrize("what", INDEXES)
async def test_the_indexes_are_used(connections, home, store, what):
    """No statement reads the whole table, but to count what an index holds."""
    act, index = INDEXES[what]
    connection, said = connections[-1], []
    save = saving(home, "a", await create(home, store, "a"))
    connection.set_trace_callback(said.append)
    await act(store, save)
    connection.set_trace_callback(None)
    plans = {one: plan(home.path, one) for one in said if "sessions" in one}
    assert plans
    assert any(index in found for found in plans.values()), plans
    assert not [one for one, found in plans.items() if found.endswith("SCAN sessions")]


@pytest.mark.parametrize("attempt", range(10))  # each may see a file that is half made
async def test_servers_that_make_the_file_together_all_open_it(home, attempt):
    stores = await asyncio.gather(*(home.open() for _ in range(4)))
    assert await create(home, stores[0], "a")
    found = await stores[3].acquire("a", owner="B", fingerprints=[FINGERPRINT])
    assert isinstance(found, tuple)


async def test_a_commit_waits_for_the_disk_if_fsync_is_set(tmp_path):
    for fsync, synchronous in ((False, 1), (True, 2)):
        opened = session_file.SessionFile(
            tmp_path / f"{fsync}.db", fsync=fsync, clock=UptimeClock(time.time)
        )
        opened.open()
        with opened.use() as connection:
            assert connection.execute("PRAGMA synchronous").fetchone() == (synchronous,)
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        opened.close()


def ask(path, question):
    connection = sqlite3.connect(path)
    try:
        return connection.execute(question).fetchone()[0]
    finally:
        connection.close()


def size_of(path) -> int:
    return Path(path).stat().st_size


def pages(path) -> int:
    return ask(path, "PRAGMA page_count")


def plan(path, statement) -> str:
    connection = sqlite3.connect(path)
    try:
        rows = connection.execute(f"EXPLAIN QUERY PLAN {statement}").fetchall()
        return " ".join(str(row[3]) for row in rows)
    finally:
        connection.close()


DAMAGED_CLOCKS = ("'soon'", "x'00ff'", "1 << 62", "-5", "1.5")


@pytest.mark.parametrize("damaged", DAMAGED_CLOCKS)
async def test_a_damaged_clock_begins_at_the_last_step(home, store, damaged):
    await create(home, store, "a")
    await home.close()
    write(home.path, f"UPDATE clock SET micros = {damaged}")
    home.clock.now += 86_400
    opened = await home.open()
    assert (await opened.find("a")).expires_at - opened.now() == pytest.approx(60)
    await opened.heartbeat()


@pytest.mark.parametrize("damaged", DAMAGED_CLOCKS)
async def test_a_clock_that_is_damaged_under_a_server_is_the_servers(home, store, damaged):
    await create(home, store, "a")
    write(home.path, f"UPDATE clock SET micros = {damaged}")
    await home.pass_time(20)
    assert (await store.find("a")).expires_at - store.now() == pytest.approx(40)
    assert ask(home.path, "SELECT micros FROM clock") == home.clock() * 1e6


def write(path, statement) -> None:
    connection = sqlite3.connect(path)
    try:
        connection.execute(statement)
        connection.commit()
    finally:
        connection.close()


async def test_temporary_data_stays_in_memory(tmp_path):
    """A read-only container has no folder for it; groups beyond 64 KiB then failed."""
    file = session_file.SessionFile(
        tmp_path / "sessions.db", fsync=False, clock=UptimeClock(time.time)
    )
    file.open()
    with file.use() as connection:
        assert connection.execute("PRAGMA temp_store").fetchone() == (2,)
    file.close()


async def test_a_listing_of_open_sessions_does_not_look_at_expired_ones(connections, home, store):
    """With 150,000 of them one page took 2 s, in which nobody else's step was saved."""
    epochs = {f"s{i:04}": await create(home, store, f"s{i:04}") for i in range(600)}
    gone = [saving(home, name, epochs[name]) for name in epochs if name != "s0599"]
    await store.expire(gone, delete_at=9e9)
    with counted(connections[-1]) as steps:
        entries, token = await store.page("", 100)
    assert [entry.session_id for entry in entries] == ["s0599"]
    assert not token
    assert steps.total() < 10


async def test_what_a_tenant_asks_for_takes_no_longer_when_others_have_many_sessions(
    connections, home, store
):
    keys = [f"{tenant}s{i:03}" for tenant in ("", "acme/", "other/") for i in range(300)]
    epochs = {key: await create(home, store, key) for key in keys}
    await store.expire([saving(home, key, epochs[key]) for key in keys[::2]], delete_at=9e9)
    for key in ("a", "mid/a", "z/a"):
        await create(home, store, key)
    with counted(connections[-1]) as steps:
        for which in ({}, {"model": "lstm"}, {"expired": True}):
            for tenant in ("mid", "z"):
                entries, token = await store.page("", 100, tenant=tenant, **which)
                assert ([entry.key for entry in entries], token) == ([f"{tenant}/a"], "")
        assert (await store.page("", 1, tenant="default"))[0][0].key == "a"
        await store.count()
        until = {"expires_at": 9e9, "max_open_sessions": 1}
        await store.create(record("z/b"), owner="A", t=0, snapshot=b"", **until)
    assert steps.total() < 60


async def test_a_row_under_the_name_of_another_tenant_is_shown_to_neither(home, store):
    """Its tenant is in its key; a damaged column must not give it away."""
    for key in ("acme/a", "acme/b", "other/a"):
        await create(home, store, key)
    write(home.path, "UPDATE sessions SET tenant = 'acme' WHERE session_id = 'other/a'")
    assert await listed(store, 1, tenant="acme") == ["acme/a", "acme/b"]
    assert await listed(store, tenant="other") == []
    assert await listed(store, 1) == ["acme/a", "acme/b", "other/a"]


@contextmanager
def counted(connection):
    """How many hundred instructions SQLite's machine took."""
    steps = Counter()
    connection.set_progress_handler(lambda: steps.update(hundred=1), 100)
    yield steps
    connection.set_progress_handler(None, 0)


@pytest.fixture
def link(tmp_path):
    """A link to a file that is not there yet, with another name and in another folder."""
    folder = tmp_path / "volume"
    folder.mkdir()
    made = tmp_path / "sessions.db"
    made.symlink_to(folder / "real.db")
    return made


async def test_the_wal_of_a_file_behind_a_link_is_seen_and_bounded(link):
    """SQLite keeps it beside the file itself; beside the link there is none."""
    home = FileHome(link)
    store = await home.open()
    await create(home, store, "a")
    usage = store.disk_usage()
    assert usage.wal == size_of(f"{link.resolve()}-wal") > 0
    assert usage.reserve == size_of(f"{link.resolve()}-reserve") > usage.wal
    await home.close()


@pytest.fixture
def foreign_reserve(tmp_path):
    """Something that can't be written is where the reserve should be."""
    made = tmp_path / "sessions.db-reserve"
    made.mkdir()
    return made


async def test_a_reserve_that_cant_be_made_is_named_in_the_error(home, foreign_reserve):
    """Before, it was reported as a full disk, and only at the first write."""
    with pytest.raises(StoreOpenError, match=rf"directory.*{foreign_reserve.name}"):
        await home.open()


def modes(folder: Path) -> dict[str, int]:
    return {one.name: one.stat().st_mode & 0o777 for one in folder.iterdir()}


FILES = ["sessions.db", "sessions.db-wal", "sessions.db-shm", "sessions.db-reserve"]


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.parametrize("umask", [0, 0o022, 0o777], indirect=True, ids=oct)
async def test_new_files_are_for_the_user_of_the_server_only(home, umask, caplog):
    await home.open()
    assert modes(home.path.parent) == dict.fromkeys(FILES, 0o600)
    assert caplog.messages == []


async def test_a_file_that_is_made_anew_is_private_too(home, store):
    for part in FILES:
        home.path.with_name(part).unlink()
    assert await store.find("a") is None
    assert modes(home.path.parent) == dict.fromkeys(FILES, 0o600)


@pytest.mark.parametrize("umask", [0o022], indirect=True, ids=oct)
@pytest.mark.parametrize(("mode", "warnings"), [(0o644, 1), (0o660, 0)])
async def test_a_file_that_is_there_keeps_its_mode_and_those_beside_it_get_it(
    home, umask, mode, warnings, caplog
):
    home.path.touch()
    home.path.chmod(mode)
    home.path.parent.chmod(0o755)
    await home.open()
    assert modes(home.path.parent) == dict.fromkeys(FILES, mode)
    assert len([one for one in caplog.messages if "other users" in one]) == warnings


async def test_a_file_that_others_may_read_in_a_folder_they_may_not_enter_is_no_warning(
    home, caplog
):
    home.path.touch()
    home.path.chmod(0o644)
    home.path.parent.chmod(0o700)
    await home.open()
    assert caplog.messages == []
