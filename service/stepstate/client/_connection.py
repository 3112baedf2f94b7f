"""What both clients' connections share: the channel's options and metadata, and the client's state.

No I/O here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any, ClassVar

import grpc

from stepstate.client import convert
from stepstate.client._api import ConnectionAPI
from stepstate.client._protocol.replay import RESUME_ROWS
from stepstate.client._protocol.retry import CONNECT_TIMEOUT, TIMEOUT, CallAttempts, ServerReach
from stepstate.client.diagnosis import why_unreachable
from stepstate.client.security import Endpoint, Tls, Token, endpoint_of
from stepstate.client.types import ModelInfo
from stepstate.errors import Cancelled, ServerUnreachable, StepstateError, Unauthenticated
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub

CHANNEL_OPTIONS = (
    # Find a server that vanished without a word, also while nothing is sent.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The server's own limit for a message.
    ("grpc.max_send_message_length", 16 * 2**20),
    # Every reply stays below gRPC's default limit of 4 MiB, except from a server of an earlier
    # version.
    ("grpc.max_receive_message_length", 64 * 2**20),
    # Reconnect as fast as Backoff asks for, not by gRPC's own minute.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

Options = Sequence[tuple[str, Any]]
"""gRPC's channel options: names and values."""
Metadata = Sequence[tuple[str, str | bytes]]
"""Keys, in lower case, and values that are sent with every call."""


def channel_options(options: Options) -> list[tuple[str, Any]]:
    """The options of a channel: the caller's replace ours of the same name."""
    return list((dict(CHANNEL_OPTIONS) | dict(options)).items())


class MetadataChannel:
    """A channel for a stub whose calls all carry the client's metadata, and its token.

    Args:
        channel: of gRPC, asynchronous or not.
        metadata: what is sent with each call.
        token: gives the token of a call; None: there is none.
    """

    def __init__(self, channel: Any, metadata: Metadata, token: Callable[[], str] | None) -> None:
        self._channel = channel
        self._metadata = tuple(metadata)
        self._token = token

    def __getattr__(self, kind: str) -> Callable[..., Callable[..., Any]]:
        """`unary_unary`, `unary_stream`, `stream_unary` and `stream_stream` of a channel."""
        make = getattr(self._channel, kind)
        if self._token is None:
            return lambda *args, **options: partial(make(*args, **options), metadata=self._metadata)
        return lambda *args, **options: partial(self._call, make(*args, **options))

    def _call(self, rpc: Callable[..., Any], *args: Any, **options: Any) -> Any:
        assert self._token is not None, "there is one"
        metadata = (*self._metadata, ("authorization", f"Bearer {self._token()}"))
        return rpc(*args, metadata=metadata, **options)


class CallErrors:
    """What the failures of a client's calls mean.

    Args:
        endpoint: of the client.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def begin(self) -> Callable[[Any], StepstateError]:
        """Is called before a call; what it returns makes the error of its failure."""
        return partial(self._error_of, time.monotonic())

    def _error_of(self, began: float, failure: Any) -> StepstateError:
        target, token = self._endpoint.target, self._endpoint.token
        error = convert.from_rpc(failure, target)
        if isinstance(error, Unauthenticated) and token and token.renewed_since(began):
            return ServerUnreachable(target, f"{error}, and there is a new token")
        return error


class BaseConnection(ConnectionAPI):
    """The state of a connection to a server."""

    _grpc: ClassVar[ModuleType]
    """What makes the channels: `grpc` or `grpc.aio`."""

    def __init__(
        self,
        target: str | None = None,
        *,
        tls: bool | Tls | None = None,
        token: Token | None = None,
        tenant: str = "",
        timeout: float = TIMEOUT,
        connect_timeout: float = CONNECT_TIMEOUT,
        resume_rows: int = RESUME_ROWS,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Metadata = (),
        options: Options = (),
    ) -> None:
        """Makes a client; it connects with its first call.

        Args:
            target: host:port, or another name that gRPC resolves. `grpcs://host:port` means TLS,
                `grpc://host:port` plain text. Without one, the environment says where and how:
                STEPSTATE_TARGET (default: 127.0.0.1:50051), STEPSTATE_CA_FILE,
                STEPSTATE_CERT_FILE, STEPSTATE_KEY_FILE and STEPSTATE_TOKEN_FILE.
            tls: True: TLS, with the authorities that gRPC brings; `Tls(...)`: with files of your
                own. False: plain text, on purpose. Default: as the target says, else plain text.
            token: of the client's identity, as text; a `Path` of the file that has it, which is
                read again when it changes; or a function that returns it, called for each call.
                It is not sent in plain text, unless to loopback or where the target or `tls` asks
                for that.
            tenant: for administrators: on whose sessions to act. Default: the identity's own.
            timeout: seconds that a call may take with all its retries, and that a stream may be
                without an answer. The default survives the restart of a server. `step`, `prime`,
                `forecast` and others take one of their own.
            connect_timeout: seconds within which the server must answer for the first time; with a
                wrong address calls fail after them.
            resume_rows: most rows that each session keeps, to send them again to a server that was
                rolled back. What a server has saved is not kept.
            credentials: gRPC's own, instead of `tls`: `grpc.ssl_channel_credentials(...)`, also
                composed with call credentials.
            metadata: keys and values that are sent with every call. Over plain text anyone on the
                way can read them.
            options: gRPC's channel options, such as ("grpc.keepalive_time_ms", 60_000); they
                replace the client's own of the same name.

        Raises:
            InvalidField: the arguments contradict each other, or a file can't be read.
        """
        self._endpoint = endpoint_of(target, tls=tls, token=token, credentials=credentials)
        self.call_errors = CallErrors(self._endpoint)
        self.target = self._endpoint.target
        self.timeout = timeout
        self.resume_rows = resume_rows
        self._channel = self._endpoint.channel(self._grpc, channel_options(options))
        if tenant:
            metadata = [*metadata, ("x-stepstate-tenant", tenant)]
        self._stub = StepstateServiceStub(
            MetadataChannel(self._channel, metadata, self._endpoint.token)
        )
        self._reach = ServerReach(connect_timeout)
        self._disconnected = False
        self._models: dict[tuple[str, str], ModelInfo] = {}

    def __repr__(self) -> str:
        state = ", disconnected" if self._disconnected else ""
        return f"{type(self).__name__}({self.target!r}{state})"

    @property
    def stub(self) -> StepstateServiceStub:
        if self._disconnected:
            raise Cancelled(convert.DISCONNECTED)
        return self._stub

    def _explained(self, error: StepstateError) -> StepstateError:
        """The error, with the reason if no server has ever answered. It may connect to find it."""
        if self._reach.reached or not isinstance(error, ServerUnreachable):
            return error
        why = why_unreachable(self._endpoint, error.detail)
        return replace(error, detail=f"{error.detail} (no server has answered there yet: {why})")

    def _attempts(self, timeout: float | None) -> CallAttempts:
        return CallAttempts(self._reach, self.timeout if timeout is None else timeout)
