"""Files that are polled: a change is seen once, when it is over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stepstate.watched_files import WatchedFiles, warn_if_readable


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    """The second one is not there."""
    (tmp_path / "one").write_text("1")
    return tmp_path / "one", tmp_path / "two"


def replace(path: Path) -> None:
    new = path.with_suffix(".new")
    new.write_text("2")
    new.rename(path)


CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "longer": lambda one, _: one.write_text("12"),
    "replaced": lambda one, _: replace(one),
    "gone": lambda one, _: one.unlink(),
    "another": lambda _, two: two.write_text(""),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen_until_it_is_read(paths: tuple[Path, Path], change):
    watched = WatchedFiles(*paths)
    assert [watched.settled(), watched.settled()] == [False, False]
    change(*paths)
    assert [watched.settled(), watched.settled(), watched.settled()] == [False, True, True]
    watched.mark_read()
    assert [watched.settled(), watched.settled()] == [False, False]


def test_nothing_is_read_while_the_files_still_change(paths: tuple[Path, Path]):
    watched, seen = WatchedFiles(*paths), []
    for length in range(2, 6):
        paths[length % 2].write_text("x" * length)
        seen.append(watched.settled())
    assert [*seen, watched.settled()] == [False] * 4 + [True]


def test_a_change_while_the_files_are_read_is_not_missed(paths: tuple[Path, Path]):
    watched = WatchedFiles(*paths)
    paths[0].write_text("12")
    assert [watched.settled(), watched.settled()] == [False, True]
    watched.mark_read()
    paths[0].write_text("123")
    assert [watched.settled(), watched.settled()] == [False, True]


def test_files_that_are_back_as_they_were_are_not_read(paths: tuple[Path, Path]):
    watched, kept = WatchedFiles(*paths), paths[0].with_name("kept")
    paths[0].rename(kept)
    assert not watched.settled()
    kept.rename(paths[0])
    assert [watched.settled(), watched.settled()] == [False, False]


@pytest.mark.parametrize(
    ("mode", "options", "advice"),
    [
        (0o600, {}, None),
        (0o640, {}, "go-rwx"),
        (0o604, {}, "go-rwx"),
        (0o640, {"group_may": True}, None),
        (0o644, {"group_may": True}, "g-w,o-rwx"),
        (0o660, {"group_may": True}, "g-w,o-rwx"),
    ],
)
def test_a_file_that_others_can_read_is_warned_of(
    caplog: pytest.LogCaptureFixture, mode: int, options: dict[str, bool], advice: str | None
):
    warn_if_readable("keys", mode, **options)
    found = [(record.file, record.message.rpartition(" ")[2]) for record in caplog.records]
    assert found == ([("keys", advice)] if advice else [])
