"""Faults of stores, as context managers: while the block runs, nothing can be written."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path

from tests.chaos.restartable import RestartableRedis, RestartableServer

ROOM = "256m"
_LITTLE = 65_536
"""The log of a server is smaller than that, its database is not."""

Fault = Callable[[RestartableServer], AbstractAsyncContextManager[None]]


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own, in memory."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def may_mount() -> bool:
    """Whether this process may mount a file system."""
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff"))
    return bool(int(effective, 16) >> 21 & 1)  # CAP_SYS_ADMIN


def full_disk(disk: Path) -> Fault:
    """The disk is as large as what is on it; afterwards somebody makes it larger."""

    @asynccontextmanager
    async def fault(_: RestartableServer) -> AsyncIterator[None]:
        while not _resize(disk, str(shutil.disk_usage(disk).used)):
            pass  # it has grown meanwhile
        try:
            yield
        finally:
            assert _resize(disk, ROOM)

    return fault


def _resize(disk: Path, size: str) -> bool:
    command = ["mount", "-o", f"remount,size={size}", str(disk)]
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0


@asynccontextmanager
async def limited_files(server: RestartableServer) -> AsyncIterator[None]:
    """The server's files may not grow beyond a limit (RLIMIT_FSIZE) that they have long passed."""
    pid = server.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (_LITTLE, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def locked_database(path: Path) -> Fault:
    """Another process has begun to write to the database, and does not end."""

    @asynccontextmanager
    async def fault(_: RestartableServer) -> AsyncIterator[None]:
        other = sqlite3.connect(path, isolation_level=None, timeout=10, check_same_thread=False)
        try:
            await asyncio.to_thread(other.execute, "BEGIN IMMEDIATE")
            yield
            other.execute("ROLLBACK")
        finally:
            other.close()

    return fault


def subject_to_permissions() -> Sequence[str]:
    """What starts a program so that root, too, may write only what its permissions allow."""
    if os.geteuid():
        return ()
    return ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--")


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody may write to the files of a folder, nor make new ones."""
    everything = [folder, *folder.iterdir()]
    modes = [one.stat().st_mode for one in everything]
    for one, mode in zip(everything, modes, strict=True):
        one.chmod(mode & ~0o222)
    try:
        yield
    finally:
        for one, mode in zip(everything, modes, strict=True):
            if one.exists():
                one.chmod(mode)


def read_only_database(folder: Path) -> Fault:
    """The database is read-only from when the server opens it again, after a failed write, on."""

    @asynccontextmanager
    async def fault(server: RestartableServer) -> AsyncIterator[None]:
        with read_only(folder):
            async with limited_files(server):
                await asyncio.sleep(0.5)
            yield

    return fault


def stopped_redis(redis: RestartableRedis) -> Fault:
    """Redis takes requests and answers none; afterwards it does what it was asked, late."""

    @asynccontextmanager
    async def fault(_: RestartableServer) -> AsyncIterator[None]:
        redis.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            redis.process.send_signal(signal.SIGCONT)

    return fault
