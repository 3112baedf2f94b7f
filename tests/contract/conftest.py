"""Fixtures: each kind of store, empty."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from stepstate.stores import SessionStore
from stepstate.stores.redis import pipeline
from tests.redis_process import RedisProcess, redis_cluster, redis_process
from tests.stores import FileHome, Home, RedisHome

KINDS = (
    "memory",
    "sqlite",
    "redis",
    pytest.param("cluster", marks=pytest.mark.long),  # as Redis, at six times the time
)


@pytest.fixture(scope="session")
def one_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """A Redis for all tests of this process that do it no harm."""
    with redis_process(tmp_path_factory.mktemp("redis"), "--appendonly", "yes") as server:
        yield server


@pytest.fixture(scope="session")
def one_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisProcess]]:
    """The same of three nodes."""
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as servers:
        yield servers


@pytest.fixture(params=KINDS)
async def home(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Home]:
    """An empty place of each kind.

    Redis may take its time, as a busy machine may stand still for seconds. What a server does when
    Redis does not answer is in `test_redis_faults`.
    """
    monkeypatch.setattr(pipeline, "TIMEOUT_SECONDS", 20.0)
    made = _HOMES[request.param](request, tmp_path)
    yield made
    await made.close()


@pytest.fixture
async def store(home: Home) -> SessionStore:
    """A store in it."""
    return await home.open()


_HOMES: dict[str, Callable[[pytest.FixtureRequest, Path], Home]] = {
    "memory": lambda _request, _path: Home("memory:"),
    "sqlite": lambda _request, path: FileHome(path / "sessions.db"),
    "redis": lambda request, _path: RedisHome(request.getfixturevalue("one_redis")),
    "cluster": lambda request, _path: RedisHome(*request.getfixturevalue("one_cluster")),
}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB, where mounting is permitted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def read_only():
    """Makes a folder, or a file, read-only by a mount, where mounting is permitted."""
    mounted = []

    def mount(place: Path) -> None:
        for options in (("--bind", place, place), ("-o", "remount,bind,ro", place)):
            if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
                pytest.skip("mounting is not permitted here")
            mounted.append(place)

    yield mount
    for place in set(mounted):
        subprocess.run(["umount", "-l", place], check=True)
