"""The channel of a client: its options, credentials and metadata, and how long calls may take.

No I/O here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from stepstate.client import convert
from stepstate.client._protocol.retry import Backoff
from stepstate.errors import ServerUnreachable, StepstateError

TIMEOUT = 90.0
"""Seconds a call may take with all its retries. A server that is restarted drains for up to 30 s,
and starts in up to 17 s on a busy machine: twice that, so that a client survives it."""
CONNECT_TIMEOUT = 10.0
"""Seconds until a server must have answered for the first time: a wrong address is told soon."""
CHANNEL_OPTIONS = (
    # Find a server that vanished without a word, also while nothing is sent.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The server's own limit for what it takes.
    ("grpc.max_send_message_length", 16 * 2**20),
    # Every reply stays below gRPC's default limit of 4 MiB, but for a server of an earlier version.
    ("grpc.max_receive_message_length", 64 * 2**20),
    # Reconnect as fast as Backoff asks for, not by gRPC's own minute.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

Options = Sequence[tuple[str, Any]]
"""gRPC's channel options: names and values."""
Metadata = Sequence[tuple[str, str | bytes]]
"""Keys, in lower case, and values that go with every call."""


def channel_options(options: Options) -> list[tuple[str, Any]]:
    """The options of a channel: the caller's take the place of ours of the same name."""
    return list((dict(CHANNEL_OPTIONS) | dict(options)).items())


class MetadataChannel:
    """A channel whose calls all carry the same metadata; for a stub.

    Args:
        channel: of gRPC, asynchronous or not.
        metadata: what goes with each call.
    """

    def __init__(self, channel: Any, metadata: Metadata) -> None:
        self._channel = channel
        self._metadata = tuple(metadata)

    def unary_unary(self, *args: Any, **options: Any) -> Callable[..., Any]:
        """As of a channel."""
        return partial(self._channel.unary_unary(*args, **options), metadata=self._metadata)

    def unary_stream(self, *args: Any, **options: Any) -> Callable[..., Any]:
        """As of a channel."""
        return partial(self._channel.unary_stream(*args, **options), metadata=self._metadata)

    def stream_unary(self, *args: Any, **options: Any) -> Callable[..., Any]:
        """As of a channel."""
        return partial(self._channel.stream_unary(*args, **options), metadata=self._metadata)

    def stream_stream(self, *args: Any, **options: Any) -> Callable[..., Any]:
        """As of a channel."""
        return partial(self._channel.stream_stream(*args, **options), metadata=self._metadata)


@dataclass(slots=True)
class ServerReach:
    """Whether a server has ever answered at an address: it must within `connect_timeout` s."""

    connect_timeout: float
    reached: bool = False


class CallAttempts:
    """The tries of one unary call, and what became of each.

    Args:
        reach: of the call's client.
        timeout: seconds for all tries.
    """

    def __init__(self, reach: ServerReach, timeout: float) -> None:
        self._reach = reach
        self._all = Backoff(timeout)
        self._first = Backoff(min(timeout, reach.connect_timeout))

    @property
    def connecting(self) -> float | None:
        """Seconds to wait for a connection before the try; None: do not wait."""
        return None if self._reach.reached else max(self._first.left, 0.001)

    def left(self, *, connected: bool) -> float:
        """Seconds that the try may take; a moment without a connection, to learn what is wrong."""
        return max(self._all.left, 0.001) if connected else 0.05

    def wait(self, error: StepstateError) -> float:
        """Seconds to wait after an error, before the next try.

        Raises:
            StepstateError: there is no next try.
        """
        if not isinstance(error, ServerUnreachable):
            self._reach.reached = True
        if not convert.passing(error):
            raise error
        if self._reach.reached:
            return self._all.wait(error)
        try:
            return self._first.wait(error)
        except ServerUnreachable as last:
            raise _never_reached(last) from None


def _never_reached(error: ServerUnreachable) -> ServerUnreachable:
    hint = "no server has answered there yet: check the host and the port, and whether it needs TLS"
    return replace(error, detail=f"{error.detail} ({hint})")
