"""The settings of a server: values, checked. It opens nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

MAX_NUMBER = 2**40
"""No setting is useful beyond this."""
LONGEST_IDLE_SECONDS = 100 * 366 * 86_400.0
"""A century: beyond it the time of expiry overflows."""
DURABILITIES = ("none", "async", "sync")
MAY_BE_ZERO = ("max_connection_age", "jwt_leeway")
TRANSPORTS = ("lean", "grpcio")
CLIENT_AUTHS = ("none", "optional", "required")
WEIGHTS = ("float32", "bfloat16", "int8")
ENGINES = ("onnxruntime", "torch")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
LOG_FORMATS = ("auto", "json", "text")
MAX_SLOTS = 10_000_000
"""The arrays of the session table are allocated at start, about 100 bytes a session."""
VARIABLES_ONLY = ("store_password",)
"""Settings that are no options: every user of the machine can read the options of a process."""
MAX_STREAMS = 2**31 - 1
"""HTTP/2 has no more."""

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[^:\s/\[\]]+):(\d{1,5})")
_SIZE = re.compile(r"\d{1,9}(\.\d{1,9})?(%|[KMGT]i?B)|\d{1,15}")
_PASSWORD = re.compile(r"://[^@/]*:[^@/]+@|[?&]password=")
_SECRET = re.compile(rf"{_PASSWORD.pattern}|[?&]\w*password=")
_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")


class ConfigError(ValueError):
    """A setting has a value that can't be used."""


def _setting(default: T, text: str, reason: str, *, shown: bool = True, reloads: bool = False) -> T:
    """A field with its text in `stepstate serve --help`, and the reason for its default.

    Args:
        default: its default.
        text: what it is.
        reason: why that is the default.
        shown: whether `repr` shows its value; not what may be secret.
        reloads: whether a running server can change it.
    """
    metadata = {"help": text, "reason": reason, "reloads": reloads}
    return field(default=default, repr=shown, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The settings of a server, each with its help text and the reason for its default.

    Each is also an environment variable STEPSTATE_..., and an option of `stepstate serve` and a key
    of its configuration file unless it is one of `VARIABLES_ONLY`.
    """

    models: Path = _setting(
        Path("models"),
        "The folder that holds <name>/<version>/.",
        "Where a checkout has the shipped models.",
    )
    skip_invalid_models: bool = _setting(
        False,  # noqa: FBT003 - a default
        "Start even if some models are invalid. They are skipped, logged, and counted in "
        'stepstate_models{state="skipped"}.',
        "A missing model is noticed at the start, not when its first session is opened.",
    )
    listen: str = _setting(
        "127.0.0.1:50051",
        "host:port for gRPC. Port 0 means any free port.",
        "Loopback: without TLS and identities, no other machine should reach the server.",
    )
    insecure: bool = _setting(
        False,  # noqa: FBT003 - a default
        "Listen at an address that other machines reach, even without TLS or identities: whoever "
        "reaches it, or reads the network, can read, step and close the sessions.",
        "A server that other machines reach protects its sessions, or does not start.",
    )
    transport: str = _setting(
        "lean",
        "The gRPC server: lean, Stepstate's own, or grpcio.",
        "It costs a fraction of the CPU, and bounds what each connection can hold.",
    )
    tls_cert: str = _setting(
        "",
        "PEM file with the server's certificate, followed by intermediate certificates. gRPC and "
        "the metrics port speak TLS then. It is read again when it changes.",
        "Loopback needs no TLS.",
    )
    tls_key: str = _setting(
        "",
        "PEM file with the key of tls_cert, without a password. Only the server's user should be "
        "able to read it.",
        "Loopback needs no TLS.",
    )
    tls_client_ca: str = _setting(
        "",
        "PEM file with the CA certificates that sign the certificates of clients.",
        "Clients may prove who they are in other ways.",
    )
    tls_client_auth: str = _setting(
        "",
        "Whether clients must show a certificate of tls_client_ca: none, optional or required. "
        "Empty: required if tls_client_ca is given. /healthz needs none.",
        "Who names an authority for clients wants them to be checked.",
    )
    max_concurrent_streams: int = _setting(
        1024,
        "Most calls of one connection at a time; further ones wait in the client. A StreamSteps "
        "call is one for as long as it is open.",
        "Resetting as many calls as fast as possible delays others by less than a second; with "
        "65,536 it was half a minute.",
    )
    max_connection_age: float = _setting(
        0.0,
        "Seconds after which a connection ends, give or take a tenth: its client begins no more "
        "calls on it and connects again, and calls that are not done a minute later are cut. 0: "
        "never.",
        "Only where a load balancer spreads connections over servers do they gain from a new one.",
    )
    allow_compressed_requests: bool = _setting(
        False,  # noqa: FBT003 - a default
        "Accept requests that are compressed with gzip or deflate.",
        "grpcio inflates a message before it checks its size: 4 MB become 4 GB. The lean transport "
        "stops at the longest message, but a short request may still cost as much as a long one.",
    )
    metrics_listen: str = _setting(
        "127.0.0.1:9464",
        "host:port for Prometheus and /healthz.",
        "The usual port of OpenTelemetry's Prometheus exporter.",
    )
    store: str = _setting(
        "sqlite:stepstate.db",
        "Where sessions are kept: sqlite:PATH, redis://HOST:PORT/DB, "
        "redis+cluster://HOST:PORT, redis+sentinel://HOST:PORT/SERVICE, or memory: (they end "
        "with the process).",
        "A file in the working directory: sessions survive a restart without any setup.",
        shown=False,
    )
    store_password: str = _setting(
        "",
        "Password of Redis. The user, if there is one, is in the URL: redis://USER@HOST:PORT/DB.",
        "A Redis that only this server can reach needs none.",
        shown=False,
    )
    store_password_file: str = _setting(
        "",
        "File with the password of Redis, such as a mounted secret; a line break at its end is not "
        "part of it. Or set STEPSTATE_STORE_PASSWORD to the password itself.",
        "A Redis that only this server can reach needs none.",
    )
    store_ca_file: str = _setting(
        "",
        "PEM file with the CA certificates for Redis, for rediss://. Empty: those of the system.",
        "A Redis of a cloud provider often has a certificate of a public authority.",
    )
    store_fsync: bool = _setting(
        False,  # noqa: FBT003 - a default
        "Make sqlite wait for the disk, so that sync steps also survive a loss of power.",
        "Without it, kill -9 loses nothing. It costs a disk write for each group of steps.",
    )
    server_name: str = _setting(
        "",
        "Name under which the server holds leases. Empty: host and port.",
        "On a host with one server, host and port identify it.",
    )
    durability: str = _setting(
        "async",
        "Default durability of sessions: none, async or sync.",
        "Replies without delay; the client library loses nothing.",
    )
    snapshot_interval: float = _setting(
        1.0,
        "Seconds between two snapshots of an async session.",
        "A client has to send about this much again after a crash.",
    )
    backlog_rows: int = _setting(
        100_000,
        "Most rows of an async session that may wait for their snapshot.",
        "The longest request; the client library keeps twice as many rows.",
    )
    slots: int = _setting(
        10_000,
        "Most sessions in memory; others wait in the store.",
        "With states of 2 KiB and replay windows of up to 64 KiB, less than 1 GB.",
    )
    max_sessions: int = _setting(
        1_000_000,
        "Most open and expired sessions, in memory or not.",
        "About 4 GB on disk.",
    )
    idle_timeout: float = _setting(
        86_400.0,
        "Seconds without a step after which a session expires; only time in which a server is "
        "up counts. At least 5 step intervals of the model.",
        "One day: the session of an hourly meter survives if readings stop for a night.",
    )
    max_idle_timeout: float = _setting(
        31 * 86_400.0,
        "Longest idle timeout that a client may ask for. At least 5 step intervals of the model.",
        "One month: a session that was idle for longer is not expected to continue.",
    )
    expired_grace: float = _setting(
        7 * 86_400.0,
        "Seconds for which an expired session is kept and can be restored.",
        "One week: long enough to notice after a holiday, or after an outage of a data feed.",
    )
    device: str = _setting(
        "cpu",
        "Device that holds states and runs steps: cpu, cuda or cuda:N.",
        "A GPU pays where thousands of sessions step at once.",
    )
    weights: str = _setting(
        "float32",
        "Type of the models' weights in steps: float32, bfloat16 or int8. At start, the log "
        "says how much that changes the outputs of each model.",
        "Exact. The others are less precise, and faster only on some processors.",
    )
    engine: str = _setting(
        "onnxruntime",
        "Library that computes single rows on the CPU: onnxruntime or torch. Missing values, long "
        "requests, forecasts, and weights that are not float32 are computed by torch.",
        "Takes half of torch's time for the same results, to rounding.",
    )
    batch_rows: int = _setting(
        256,
        "Most single rows in one forward pass.",
        "A larger forward pass takes more than a millisecond and gains little.",
    )
    chunk_rows: int = _setting(
        96,
        "Most rows of long requests between two forward passes.",
        "About a millisecond: the delay that a long request may cause for the steps of others.",
    )
    replay_rows: int = _setting(
        32,
        "Single rows of a session whose replies are remembered.",
        "More than a client has in flight for one session.",
    )
    replay_bytes: int = _setting(
        256 * 2**20,
        "Most bytes of remembered replies with many rows.",
        "About a hundred of the longest replies.",
    )
    snapshot_key: str = _setting(
        "",
        "File with secret keys, one a line. Exported snapshots are signed with the first, and "
        "imports are refused that are signed with none of them. Empty: nothing is signed or "
        "refused.",
        "Whoever may import can open sessions, too; a key matters where snapshots pass through "
        "other hands.",
    )
    tokens_file: str = _setting(
        "",
        "File of bearer tokens, as `stepstate tokens` writes it. It is read again when it changes. "
        "Empty: there are no tokens.",
        "On loopback everyone is the user of the machine.",
    )
    jwt_issuer: str = _setting(
        "",
        "Issuer of JWTs, as their `iss` has it. With jwt_audience and jwt_jwks, callers may be "
        "known by JWTs.",
        "There is no identity provider.",
    )
    jwt_audience: str = _setting(
        "",
        "What the `aud` of JWTs has to have: the name of this service at the identity provider.",
        "There is no identity provider.",
    )
    jwt_jwks: str = _setting(
        "",
        "JWK set with the keys of the issuer: a file, or an https URL. It is read again when it "
        "changes, and a URL for tokens with an unknown key, at most every 30 s.",
        "There is no identity provider.",
    )
    jwt_tenant_claim: str = _setting(
        "tenant",
        "Claim of a JWT that has the name of its tenant.",
        "A plain name; providers let you choose.",
    )
    jwt_scopes_claim: str = _setting(
        "scope",
        "Claim of a JWT that has its scopes, step, read or admin: a text with spaces, or a list.",
        "As RFC 8693 has it.",
    )
    jwt_leeway: float = _setting(
        30.0,
        "Seconds by which the clock of the issuer may be different.",
        "More than clocks differ that are set by NTP, and little beside the life of a token.",
    )
    reflection: bool = _setting(
        True,  # noqa: FBT003 - a default
        "Serve gRPC reflection, also to clients without a credential.",
        "grpcurl and its like need no proto file, and the contract is public.",
    )
    queue_requests: int = _setting(
        65_536,
        "Most accepted and unanswered requests.",
        "Several seconds of work for one core.",
    )
    queue_rows: int = _setting(
        1_000_000,
        "Most accepted and unanswered rows.",
        "Ten of the longest requests.",
    )
    memory_limit: str = _setting(
        "25%",
        "Most bytes that clients may make the server hold in requests, replies, bindings and "
        "snapshots: such as 2GiB, or a share of the memory of the machine or container; at least "
        "128 MiB. It comes on top of the models and the slots.",
        "The rest is for states, models, the store's cache and the other programs.",
    )
    trusted_proxies: str = _setting(
        "",
        "Addresses and networks of proxies, separated by commas, such as 10.0.0.7,fd00::/8. Calls "
        "through them are those of the address that they name in x-forwarded-for.",
        "None: anyone can send that header, and each connection is a client of its own.",
    )
    audit_log: str = _setting(
        "",
        "File for the audit log: a JSON line for each session opened, closed, exported or "
        "imported, each act of an admin and each refused credential. It may be rotated. "
        "-: standard output.",
        "Empty, no lines: a server on loopback has nobody to call to account.",
    )
    drain_seconds: float = _setting(
        30.0,
        "Seconds to finish accepted steps after SIGTERM.",
        "The usual time that an orchestrator allows between SIGTERM and SIGKILL.",
    )
    log_level: str = _setting(
        "INFO",
        "Lowest level that is logged: DEBUG, INFO, WARNING or ERROR.",
        "What an operator wants to know, and nothing for each request.",
        reloads=True,
    )
    log_format: str = _setting(
        "auto",
        "json, text, or auto: text on a terminal, otherwise JSON.",
        "People read terminals, programs the rest.",
    )

    def __post_init__(self) -> None:
        _check_address("listen", self.listen)
        _check_address("metrics_listen", self.metrics_listen)
        _check_one_of("durability", self.durability, DURABILITIES)
        _check_one_of("transport", self.transport, TRANSPORTS)
        _check_one_of("weights", self.weights, WEIGHTS)
        _check_one_of("engine", self.engine, ENGINES)
        self._check_tls()
        _check_one_of("log_level", self.log_level, LOG_LEVELS)
        _check_one_of("log_format", self.log_format, LOG_FORMATS)
        self._check_password()
        self._check_device()
        self._check_memory_limit()
        self._check_trusted_proxies()
        self._check_jwt()
        self._check_numbers()
        self._check_idle_timeouts()

    def _check_tls(self) -> None:
        for name, needed in (
            ("tls_cert", "tls_key"),
            ("tls_key", "tls_cert"),
            ("tls_client_ca", "tls_cert"),
        ):
            if getattr(self, name) and not getattr(self, needed):
                raise ConfigError(f"{name} is given without {needed}: give both, or neither")
        if self.tls_client_auth:
            _check_one_of("tls_client_auth", self.tls_client_auth, CLIENT_AUTHS)
        if self.client_auth != "none" and not self.tls_client_ca:
            raise ConfigError(
                f"tls_client_auth is {self.tls_client_auth} without tls_client_ca, which signs the "
                "certificates of clients: give it, too"
            )
        if self.client_auth == "optional" and self.transport == "grpcio":
            raise ConfigError(
                "tls_client_auth is optional, which the transport grpcio can't do: choose required "
                "or none, or the transport lean"
            )

    @property
    def client_auth(self) -> str:
        """Of `CLIENT_AUTHS`: `tls_client_auth`, or what it is if it is empty."""
        return self.tls_client_auth or ("required" if self.tls_client_ca else "none")

    def _check_password(self) -> None:
        given = [n for n in ("store_password", "store_password_file") if getattr(self, n)]
        if _PASSWORD.search(self.store):
            given.insert(0, "the URL in store")
        if len(given) > 1:
            raise ConfigError(f"the store's password is in {' and '.join(given)}: give it once")
        if given and not self.store.startswith("redis"):
            raise ConfigError(f"{given[0]} is for Redis, and store is another one: leave it out")
        if self.store_ca_file and not self.store.startswith("rediss"):
            raise ConfigError("store_ca_file is for a store with rediss://: leave it out")

    def _check_device(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device is {self.device!r}, expected cpu, cuda or cuda:N")
        if self.device != "cpu" and self.weights != "float32":
            raise ConfigError(
                f"weights is {self.weights!r}, which is for the CPU: with device {self.device} "
                "leave it out"
            )

    def _check_memory_limit(self) -> None:
        text = self.memory_limit
        if not _SIZE.fullmatch(text):
            raise ConfigError(f"memory_limit is {text!r}, expected such as 2GiB, 500MB or 25%")
        if text.endswith("%") and not 0 < float(text[:-1]) <= 100:
            raise ConfigError(f"memory_limit is {text}, expected more than 0% and at most 100%")

    def _check_jwt(self) -> None:
        settings = ("jwt_issuer", "jwt_audience", "jwt_jwks")
        missing = [name for name in settings if not getattr(self, name)]
        if 0 < len(missing) < len(settings):
            raise ConfigError(
                f"without {' and '.join(missing)}: JWTs need jwt_issuer, jwt_audience and jwt_jwks"
            )
        scheme, separator, rest = self.jwt_jwks.partition("://")
        if separator and (scheme != "https" or "@" in rest.partition("/")[0]):
            raise ConfigError("jwt_jwks has to be a file, or an https URL without a password")

    def _check_trusted_proxies(self) -> None:
        try:
            _ = self.trusted_networks
        except ValueError as error:
            raise ConfigError(
                f"trusted_proxies: {error}; expected addresses and networks, separated by commas, "
                "such as 10.0.0.7,fd00::/8"
            ) from error

    @property
    def trusted_networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """The networks of `trusted_proxies`; an address is one of its own."""
        return tuple(ip_network(part.strip()) for part in self.trusted_proxies.split(",") if part)

    def _check_numbers(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, bool) or (setting.name in MAY_BE_ZERO and value == 0):
                continue
            if isinstance(value, int | float) and not 0 < value <= MAX_NUMBER:
                raise ConfigError(
                    f"{setting.name} is {value}, expected more than 0 and at most {MAX_NUMBER}"
                )
        for name, most in (("slots", MAX_SLOTS), ("max_concurrent_streams", MAX_STREAMS)):
            if getattr(self, name) > most:
                raise ConfigError(f"{name} is {getattr(self, name)}, at most {most}")

    def _check_idle_timeouts(self) -> None:
        for name in ("max_idle_timeout", "expired_grace"):
            if getattr(self, name) > LONGEST_IDLE_SECONDS:
                raise ConfigError(
                    f"{name} is {getattr(self, name):g} s, at most {LONGEST_IDLE_SECONDS:g}"
                )
        if self.idle_timeout > self.max_idle_timeout:
            raise ConfigError(
                f"idle_timeout is {self.idle_timeout:g} s, more than max_idle_timeout, "
                f"{self.max_idle_timeout:g} s"
            )


def has_secret(url: str) -> bool:
    """Whether the URL of a store contains a password: of Redis, of its Sentinels or of a key."""
    return _SECRET.search(url) is not None


def split_address(address: str) -> tuple[str, int]:
    """Host (without brackets) and port of "host:port"."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name} is {value!r}, expected {' or '.join(known)}")


def _check_address(name: str, address: str) -> None:
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match[2]) > 65_535:
        raise ConfigError(
            f"{name} is {address!r}, expected host:port such as 127.0.0.1:50051 (port 0: any free)"
        )
