"""Other commits of this repository, whose servers are measured beside this one's."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import BenchError

_ROOT = Path(__file__).parents[1]
_COPIES = _ROOT / "build" / "benchmarks" / "commits"


class NoSuchCommit(BenchError):
    """It is neither a folder, nor a commit that this repository has."""


def checkout(where: str) -> Path:
    """The folder of another version of this repository.

    Args:
        where: a folder, which is returned as it is; or a commit, whose package is copied to build/.

    Raises:
        NoSuchCommit.
    """
    if Path(where).is_dir():
        return Path(where)
    try:
        commit = _git("rev-parse", "--verify", f"{where}^{{commit}}").decode().strip()
        return _copy_of(commit)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoSuchCommit(f"{where} is no folder, and no commit that git finds here") from error


def _copy_of(commit: str) -> Path:
    copy = _COPIES / commit
    if not copy.exists():
        _COPIES.mkdir(parents=True, exist_ok=True)
        packed = io.BytesIO(_git("archive", f"--prefix={commit}/", commit, "service"))
        with TemporaryDirectory(dir=_COPIES) as scratch, tarfile.open(fileobj=packed) as archive:
            archive.extractall(scratch, filter="data")
            (Path(scratch) / commit).rename(copy)  # whole, or not at all
    return copy


def _git(*arguments: str) -> bytes:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True).stdout
