"""Opens the store that a URL names."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from stepstate.errors import StoreOpenError
from stepstate.stores.base import SessionStore
from stepstate.stores.memory import MemoryStore
from stepstate.stores.sqlite import SqliteStore

REDIS = tuple(
    f"{plain}{kind}" for plain in ("redis", "rediss") for kind in ("", "+cluster", "+sentinel")
)
KINDS = (
    "sqlite:PATH, redis://HOST:PORT/DB, redis+cluster://HOST:PORT, "
    "redis+sentinel://HOST:PORT/SERVICE, rediss, rediss+cluster and rediss+sentinel with TLS, or "
    "memory:"
)


async def open_store(
    url: str,
    *,
    clock: Callable[[], float],
    unix_time: Callable[[], float] = time.time,
    fsync: bool = False,
    password: str = "",
    ca_file: str = "",
) -> SessionStore:
    """Opens the store that a URL names.

    Args:
        url: `sqlite:PATH`, `redis://[USER:PASSWORD@]HOST:PORT/DB`, `redis+cluster://HOST:PORT`,
            `redis+sentinel://HOST:PORT/SERVICE/DB` or `memory:`. With TLS it begins with `rediss`.
        clock: monotonic seconds; may be called from a thread.
        unix_time: seconds since 1970, for epochs and for the start of a new store's clock; may
            be called from a thread.
        fsync: whether a commit of sqlite waits for the disk. Redis has its own configuration.
        password: of Redis, if it is not in the URL; empty: there is none.
        ca_file: PEM file with the authorities of Redis's certificate; empty: the system's.

    Raises:
        StoreOpenError: there is no such store.
    """
    scheme, colon, rest = url.partition(":")
    if colon and scheme == "memory" and not rest:
        return MemoryStore(clock)
    if colon and scheme == "sqlite":
        return await SqliteStore.open(
            _path(url, rest), clock=clock, unix_time=unix_time, fsync=fsync
        )
    if scheme in REDIS and rest.startswith("//"):
        from stepstate.stores.redis import open_redis  # noqa: PLC0415 - 0.1 s of CPU, only here

        return await open_redis(
            url, clock=clock, unix_time=unix_time, password=password, ca_file=ca_file
        )
    raise StoreOpenError(repr(scheme), f"no such kind of store, expected {KINDS}")


def read_password(path: str) -> str:
    """The password in a file, without the line break at its end.

    Raises:
        StoreOpenError: there is none.
    """
    try:
        password = Path(path).read_text().rstrip("\r\n")
    except OSError as error:
        problem = str(error.strerror)
    except UnicodeDecodeError:
        problem = "it is not UTF-8"
    else:
        if password:
            return password
        problem = "it is empty"
    raise StoreOpenError(f"password in {path}", f"{problem}: write the password of Redis there")


def _path(url: str, rest: str) -> Path:
    """The path of `sqlite:PATH`; the usual form `sqlite:///PATH` is an absolute one."""
    if rest in {"", ":memory:"}:
        raise StoreOpenError(repr(url), "no file is named: write sqlite:PATH, or memory:")
    if rest.startswith("//") and not rest.startswith("///"):
        path = rest.lstrip("/")
        raise StoreOpenError(
            repr(url), f"write sqlite:{path} or, if it is absolute, sqlite:/{path}"
        )
    return Path(rest)
