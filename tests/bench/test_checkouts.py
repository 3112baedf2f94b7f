"""Another commit's package is copied whole; a folder is taken as it is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import checkouts
from benchmarks.checkouts import NoSuchCommit, checkout
from benchmarks.transports import GRPCIO_ONLY


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=any", "-c", "user.email=any@example.com")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of two commits."""
    module = tmp_path / "service" / "module.py"
    module.parent.mkdir()
    git(tmp_path, "init", "--quiet")
    for text in ("first", "second"):
        module.write_text(text)
        git(tmp_path, "add", "service")
        git(tmp_path, "commit", "--quiet", "--message", text)
    monkeypatch.setattr(checkouts, "_ROOT", tmp_path)
    monkeypatch.setattr(checkouts, "_COPIES", tmp_path / "build" / "commits")
    return tmp_path


def test_the_package_of_a_commit_is_copied_once(repository: Path):
    copy = checkout("HEAD^")
    assert (copy / "service" / "module.py").read_text() == "first"
    assert (repository / "service" / "module.py").read_text() == "second"
    assert checkout("HEAD^") == copy
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_a_folder_is_taken_as_it_is(tmp_path: Path):
    assert checkout(str(tmp_path)) == tmp_path


@pytest.mark.usefixtures("repository")
def test_a_commit_that_is_not_here_is_told():
    with pytest.raises(NoSuchCommit, match=f"{GRPCIO_ONLY} is no folder, and no commit"):
        checkout(GRPCIO_ONLY)
