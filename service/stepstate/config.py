"""What a server is told: values, checked. It opens nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

LARGEST = 2**40
"""No setting means anything beyond this."""
LONGEST_IDLE_SECONDS = 100 * 366 * 86_400.0
"""A century: beyond it the time of expiry could not be told."""
DURABILITIES = ("none", "async", "sync")
WEIGHTS = ("float32", "bfloat16", "int8")
MAX_SLOTS = 10_000_000
"""The arrays of the session table are made at start, some 100 bytes a session."""

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[^:\s/\[\]]+):(\d{1,5})")


_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")


class ConfigError(ValueError):
    """A value can't be used; the message names it."""


def _setting(default: T, text: str) -> T:
    """A field with the text that `stepstate serve --help` shows for it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The settings of one server; each is an option of `stepstate serve` and a variable.

    Every default has its reason beside it.
    """

    models: Path = _setting(Path("models"), "The folder that holds <name>/<version>/.")
    # A model that is missing is noticed at once, not when its first session is opened.
    skip_invalid_models: bool = _setting(
        default=False,
        text="Start with the good models beside bad ones; the log and "
        'stepstate_models{state="skipped"} tell of those.',
    )
    # Loopback: without credentials nobody else should reach it.
    listen: str = _setting("127.0.0.1:50051", "host:port for gRPC; port 0 takes a free one.")
    # The port that OpenTelemetry's exporter made usual.
    metrics_listen: str = _setting("127.0.0.1:9464", "host:port for Prometheus.")
    # A file beside where it runs: sessions survive a restart without any set-up.
    store: str = _setting(
        "sqlite:stepstate.db",
        "Where sessions are kept: sqlite:PATH, redis://HOST:PORT/DB, redis+cluster://HOST:PORT, "
        "redis+sentinel://HOST:PORT/SERVICE, or memory: (lost with the process).",
    )
    # kill -9 loses nothing without it; it costs a disk write for each group of steps.
    store_fsync: bool = _setting(
        default=False,
        text="Make sqlite wait for the disk, so that sync steps survive a loss of power too.",
    )
    # Where a host runs one server, the host's name says which it is.
    server_name: str = _setting("", "Holds leases under this name; empty: host and port.")
    # Replies at once; clients of the library lose nothing.
    durability: str = _setting(
        "async", "For sessions that ask for none in particular: none, async or sync."
    )
    # What a client has to send again after a crash is about this much.
    snapshot_interval: float = _setting(1.0, "Seconds between two rounds of snapshots (async).")
    # The longest request: a client of the library keeps twice as many rows.
    backlog_rows: int = _setting(
        100_000, "Rows of an async session that may wait for their snapshot."
    )
    # With states of 2 KiB and replay windows of at most 64 KiB they stay below 1 GB.
    slots: int = _setting(10_000, "Sessions in memory at the most; others wait in the store.")
    # Some 4 GB on disk.
    max_sessions: int = _setting(
        1_000_000, "Open and expired sessions at the most, in memory or not."
    )
    # A day: a meter that reports hourly survives a night's outage.
    idle_timeout: float = _setting(
        86_400.0,
        "Seconds without a step, while a server is up, after which a session expires; "
        "5 step intervals of the model if they are longer.",
    )
    # A month: what was forgotten for longer is not coming back.
    max_idle_timeout: float = _setting(
        31 * 86_400.0,
        "The longest that a client may ask for; 5 step intervals of the model if they are longer.",
    )
    # A week: somebody who was on holiday, or a feed that was down, can still be helped.
    expired_grace: float = _setting(
        7 * 86_400.0, "Seconds for which an expired session is kept and can be restored."
    )
    # A GPU pays where thousands of sessions step at once.
    device: str = _setting("cpu", "Where states are and steps run: cpu, cuda or cuda:N.")
    # Exact; the others are coarser, and faster on some processors only.
    weights: str = _setting(
        "float32",
        "What models' weights are kept as in steps: float32, bfloat16 or int8. "
        "The log says at start how far that moves each model's outputs.",
    )
    # A larger forward takes over a millisecond and gains little.
    batch_rows: int = _setting(256, "Most single rows in one forward.")
    # About a millisecond: what a long request may delay the steps of others.
    chunk_rows: int = _setting(96, "Most rows of long requests between two forwards.")
    # More than a client has in flight for one session.
    replay_rows: int = _setting(32, "Single rows whose replies a session remembers.")
    # Some hundred of the longest replies.
    replay_bytes: int = _setting(256 * 2**20, "Bound for remembered replies with many rows.")
    # Several seconds of work for one core.
    queue_requests: int = _setting(65_536, "Accepted and unanswered requests at the most.")
    # Ten of the longest requests.
    queue_rows: int = _setting(1_000_000, "Accepted and unanswered rows at the most.")
    # What an orchestrator usually grants between SIGTERM and SIGKILL.
    drain_seconds: float = _setting(30.0, "For finishing accepted steps after SIGTERM.")

    def __post_init__(self) -> None:
        _check_address("listen", self.listen)
        _check_address("metrics_listen", self.metrics_listen)
        _check_one_of("durability", self.durability, DURABILITIES)
        _check_one_of("weights", self.weights, WEIGHTS)
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device is {self.device!r}, expected cpu, cuda or cuda:N")
        if self.device != "cpu" and self.weights != "float32":
            raise ConfigError(
                f"weights is {self.weights!r}, which is for the CPU: with device {self.device} "
                "leave it out"
            )
        for setting in fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, bool):
                continue
            if isinstance(value, int | float) and not 0 < value <= LARGEST:
                raise ConfigError(
                    f"{setting.name} is {value}, expected more than 0 and at most {LARGEST}"
                )
        for name in ("max_idle_timeout", "expired_grace"):
            if getattr(self, name) > LONGEST_IDLE_SECONDS:
                raise ConfigError(
                    f"{name} is {getattr(self, name):g} s, at most {LONGEST_IDLE_SECONDS:g}"
                )
        if self.slots > MAX_SLOTS:
            raise ConfigError(f"slots is {self.slots}, at most {MAX_SLOTS}")
        if self.idle_timeout > self.max_idle_timeout:
            raise ConfigError(
                f"idle_timeout is {self.idle_timeout:g} s, more than max_idle_timeout, "
                f"{self.max_idle_timeout:g} s"
            )


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
