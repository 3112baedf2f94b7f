"""What an error of Redis means: a broken connection, a server that can't serve now, or a mistake.

A server that can't serve now may not be the one that the address leads to any more: a proxy or
Sentinel has made another one the primary, and the connection is of the time before.
"""

from __future__ import annotations

import re

from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    MaxConnectionsError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import TimeoutError as RedisTimeout

_BY_TYPE: tuple[tuple[type[Exception], str], ...] = (
    (ReadOnlyError, "readonly"),
    (MasterDownError, "masterdown"),
    (BusyLoadingError, "loading"),
    (OutOfMemoryError, "oom"),
    (ClusterDownError, "cluster"),
    (RedisClusterException, "cluster"),  # it can't be reached, or a slot has no node
    (AskError, "cluster"),  # MovedError is one
    (TryAgainError, "cluster"),
)
_CODE = re.compile(
    r"(?:^|-)(READONLY|MASTERDOWN|LOADING|NOREPLICAS|OOM|MISCONF|CLUSTERDOWN|MOVED|ASK|TRYAGAIN) "
)
"""At the beginning; before Redis 7 also in the midst of the error of a script that met it."""
_OF_A_CLUSTER = {"CLUSTERDOWN", "MOVED", "ASK", "TRYAGAIN"}

_LASTING = (AuthenticationError, AuthorizationError, MaxConnectionsError)
"""Derived from ConnectionError, and yet answers: another try would get the same."""

_ADVICE = {
    "readonly": "it is a replica: see that the address leads to the primary",
    "masterdown": "it is a replica without its primary: see that the address leads to the primary",
    "loading": "it starts, and takes no commands before it has read its data",
    "noreplicas": "too few of its replicas are connected (min-replicas-to-write)",
    "oom": "raise maxmemory, or let sessions end",
    "misconf": "its log says why it can't save to its disk",
    "cluster": "its slots move, or some have no node: `redis-cli --cluster check` tells",
}


def cause_of(error: BaseException) -> str:
    """One of `errors.STORE_CAUSES`."""
    for kind, cause in _BY_TYPE:
        if isinstance(error, kind):
            return cause
    if (code := _CODE.search(str(error))) and isinstance(error, RedisError):
        return "cluster" if code[1] in _OF_A_CLUSTER else code[1].lower()
    if isinstance(error, TimeoutError | RedisTimeout):
        return "timeout"
    lost = isinstance(error, Disconnected | OSError) and not isinstance(error, _LASTING)
    return "disconnected" if lost else "other"


def advice_on(cause: str) -> str:
    """What it means and what to do; empty: the error says it."""
    return _ADVICE.get(cause, "")


def may_pass(reply: object) -> bool:
    """Whether a new connection may get another reply: this one broke, or the server can't serve."""
    if not isinstance(reply, BaseException):
        return False
    return cause_of(reply) not in ("other", "timeout")
