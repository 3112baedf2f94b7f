"""The stores that are compared, each fresh: a file, a Redis of its own, or one that is there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stepstate.bench.servers import REDIS_OPTIONS, running_redis

DURABLE = ("sqlite", "redis")
STORES = ("memory", *DURABLE)
DURABILITIES = ("none", "async", "sync")


@dataclass(frozen=True, slots=True)
class Store:
    """A store that servers can be given."""

    kind: str
    url: str
    told: str
    """What it is, for the description of the workload."""
    pid: int | None = None
    """Its process, if it has one of its own that was started here."""
    folder: Path | None = None
    """Where its files are, if they are here."""

    def file_bytes(self) -> int:
        """Bytes of its files, that of the log of writes too."""
        files = self.folder.rglob("*") if self.folder is not None else ()
        return sum(path.stat().st_size for path in files if path.is_file())


@contextmanager
def fresh_store(kind: str, folder: Path) -> Iterator[Store]:
    """A store without sessions, in a folder of its own inside another."""
    own = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=folder))
    if kind == "redis":
        with running_redis(own) as redis:
            told = f"redis-server of its own with {' '.join(REDIS_OPTIONS[:4])}"
            told += f", its file on {_file_system(own)}"
            yield Store(kind, f"redis://{redis.address}/0", told, redis.pid, own)
    elif kind == "sqlite":
        told = f"sqlite without fsync, its file on {_file_system(own)}"
        yield Store(kind, f"sqlite:{own}/sessions.db", told, folder=own)
    else:
        yield Store(kind, "memory:", "memory")


def _file_system(path: Path) -> str:
    """The kind of file system that a path is on, by proc(5)'s mounts."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    _, kind = max((len(point), kind) for point, kind in mounts if path.is_relative_to(point))
    return kind
