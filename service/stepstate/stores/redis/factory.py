"""Opens the store of a URL, and warns of a Redis that may lose sessions."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, ResponseError

from stepstate.errors import StoreOpenError
from stepstate.stores.redis.connection import (
    AWAY,
    ClusterConnection,
    RedisConnection,
    SentinelConnection,
    SingleConnection,
)
from stepstate.stores.redis.pipeline import TIMEOUT_SECONDS
from stepstate.stores.redis.store import RedisStore

log = logging.getLogger(__name__)

PORT = 6379
SENTINEL_PORT = 26379
TLS = "rediss"
"""What URLs of a Redis with TLS begin with."""
SENTINEL_SECONDS = 0.5
"""For one Sentinel: short enough to ask the next one within the timeout of a pipeline."""

_OPTIONS: Mapping[str, Any] = {
    "socket_timeout": None,  # `pipeline` has one for whole pipelines
    "socket_connect_timeout": TIMEOUT_SECONDS,
    "protocol": 2,  # enough for scripts, and every Redis has it
}


def _options(url: str, password: str, ca_file: str) -> dict[str, Any]:
    """The options of a client, which does not retry by itself."""
    given = {"password": password} if password else {}  # else that of the URL
    if ca_file and url.startswith(TLS):
        given["ssl_ca_certs"] = ca_file
    return {**_OPTIONS, **given, "retry": Retry(NoBackoff(), 0)}


async def open_redis(
    url: str,
    *,
    clock: Callable[[], float],
    unix_time: Callable[[], float] = time.time,
    password: str = "",
    ca_file: str = "",
) -> RedisStore:
    """Opens a store on the Redis, or the cluster, that a URL names.

    If Redis is away this succeeds; the store's methods raise `StoreUnavailable` until it is back.

    Args:
        url: `redis://[USER:PASSWORD@]HOST:PORT/DB`; for a cluster
            `redis+cluster://[USER:PASSWORD@]HOST:PORT[,HOST:PORT...]`;
            for a primary that Sentinels name
            `redis+sentinel://[USER:PASSWORD@]HOST:PORT[,HOST:PORT...]/SERVICE[/DB]`: user and
            password are those of Redis; those of the Sentinels are `?sentinel_password=` and
            `&sentinel_username=`. With TLS, also to Sentinels, it begins with `rediss`.
        clock: monotonic seconds.
        unix_time: seconds since 1970.
        password: of Redis, if it is not in the URL; empty: there is none.
        ca_file: PEM file with the authorities of Redis's certificate; empty: the system's.

    Raises:
        StoreOpenError: the URL can't be read, or Redis refuses what it says.
    """
    check_authorities(ca_file)
    connection = _connection(url, _options(url, password, ca_file))
    name = f"{url.partition(':')[0]}://{connection.place}"
    try:
        problem = _check(name, await _info(connection), is_cluster=connection.is_cluster)
    except AWAY as error:
        problem = _refusal(error)
        if not problem:
            log.warning("redis is away", extra={"store": name, "problem": str(error)})
    except TypeError:  # from a constructor of redis-py
        problem = "an option after the ? of its URL is not one of redis-py's"
    except BaseException:
        await connection.close()
        raise
    if problem:
        await connection.close()
        raise StoreOpenError(name, problem)
    return RedisStore(connection, clock=clock, unix_time=unix_time)


def check_authorities(ca_file: str) -> None:
    """Whether a file with the authorities of Redis can be used: redis-py would find out much later.

    Raises:
        StoreOpenError: it can't.
    """
    try:
        ssl.create_default_context(cafile=ca_file or None)
    except OSError as error:  # ssl.SSLError is one
        problem = error.strerror or "it has no certificates in PEM"
        raise StoreOpenError(f"--store-ca-file {ca_file}", f"{problem}: give a PEM file") from error


def _connection(url: str, options: Mapping[str, Any]) -> RedisConnection:
    scheme, _, rest = url.partition("://")
    try:
        urls = _urls(scheme, rest)
        if scheme.endswith("+sentinel"):
            return _sentinel_connection(urls, options)
        place = ",".join(f"{host}:{port}" for host, port in map(_address, urls))
        if scheme.endswith("+cluster"):
            return ClusterConnection(_cluster(urls, options), place)
        return SingleConnection(Redis.from_url(urls[0], **options), place)
    except (ValueError, TypeError, *AWAY):
        # Without its text, which may contain a part of the password.
        sentinels = "[,HOST:PORT...]/SERVICE[/DB]" if scheme.endswith("+sentinel") else ""
        raise StoreOpenError(
            f"{scheme}://...",
            f"can't be read, expected {scheme}://[USER:PASSWORD@]HOST:PORT{sentinels}; "
            "special characters of a password are written as %XX",
        ) from None


def _cluster(urls: Sequence[str], options: Mapping[str, Any]) -> RedisCluster:
    nodes = [ClusterNode(*_address(url), **_OPTIONS) for url in urls[1:]]
    return RedisCluster.from_url(
        urls[0], startup_nodes=nodes, require_full_coverage=False, **options
    )


def _sentinel_connection(urls: Sequence[str], common: Mapping[str, Any]) -> RedisConnection:
    """A connection to the primary of a service; the hosts of its URLs are Sentinels."""
    sentinels = [_address(url, SENTINEL_PORT) for url in urls]
    service, _, db = urlsplit(urls[0]).path.strip("/").partition("/")
    if not service:
        raise ValueError(urls[0])
    options: dict[str, Any] = {**parse_url(urls[0]), **common, "db": int(db or 0)}
    del options["host"]  # of a Sentinel, as the port
    options.pop("port", None)
    tls = {"ssl": options.pop("connection_class", None) is SSLConnection}
    options |= tls
    ask = {name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    seconds = {"socket_timeout": SENTINEL_SECONDS, "socket_connect_timeout": SENTINEL_SECONDS}
    ask |= {"protocol": 2, "retry": options["retry"], **seconds, **tls}
    ask |= {name: value for name, value in options.items() if name.startswith("ssl_")}
    sentinel = Sentinel(sentinels, sentinel_kwargs=ask, **options)  # type: ignore[no-untyped-call]
    return SentinelConnection(
        sentinel, service, ",".join(f"{host}:{port}" for host, port in sentinels)
    )


def _urls(scheme: str, rest: str) -> list[str]:
    """A URL that redis-py can read for each host, with the same credentials and options."""
    hosts, slash, tail = rest.partition("/")
    credentials, at, hosts = hosts.rpartition("@")
    plain, _, cluster = scheme.partition("+")
    if "," in hosts and not cluster:
        raise ValueError(hosts)
    return [f"{plain}://{credentials}{at}{host}{slash}{tail}" for host in hosts.split(",")]


def _address(url: str, port: int = PORT) -> tuple[str, int]:
    parts = urlsplit(url)
    if not parts.hostname or parts.fragment:
        raise ValueError(parts.netloc)
    return parts.hostname, parts.port or port


async def _info(connection: RedisConnection) -> Mapping[str, Any]:
    """The reply to INFO; of a cluster, that of one of its nodes."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        if isinstance(connection, ClusterConnection):
            await connection.client.initialize()
            return dict(
                await connection.client.info(target_nodes=connection.client.get_random_node())
            )
        assert isinstance(connection, SingleConnection)
        return dict(await connection.client.info())


def _check(name: str, info: Mapping[str, Any], *, is_cluster: bool) -> str:
    """Warns of settings that may lose sessions; returns why Redis can't be used, or nothing."""
    where = {"store": name}
    if not info.get("aof_enabled"):
        log.warning(
            "this Redis forgets what its last dump has not: set appendonly yes", extra=where
        )
    if info.get("maxmemory_policy", "noeviction") != "noeviction":
        log.warning("this Redis may evict sessions: set maxmemory-policy noeviction", extra=where)
    if info.get("role") == "slave" and not is_cluster:
        log.warning("this Redis is a replica, which takes no writes", extra=where)
    if info.get("cluster_enabled") and not is_cluster:
        return "it is a node of a cluster: write redis+cluster://"
    return ""


def _refusal(error: BaseException) -> str:
    """What to say about an error that stays until a person acts; empty: it may pass."""
    cause = error.__cause__ or error
    if isinstance(cause, AuthenticationError | AuthorizationError):
        return (
            f"{cause}: see the user in its URL, and the password in the file of "
            "--store-password-file or in STEPSTATE_STORE_PASSWORD"
        )
    if problem := _tls_problem(error):
        return problem
    if "Cluster mode is not enabled" in str(error):
        return "it is no cluster: write redis://"
    return str(error) if type(error) is ResponseError else ""


def _tls_problem(error: BaseException | None) -> str:
    """Why its certificate is not trusted, if that is why an error came: redis-py's has no cause."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return (
        ""
        if error is None
        else (
            f"its certificate can't be verified: {error.verify_message}; give the authority that "
            "signed it in --store-ca-file, and connect by a name that is in it"
        )
    )
