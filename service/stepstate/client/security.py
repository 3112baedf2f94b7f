"""How a client reaches a server safely: TLS, its token, and what the environment says of both.

Nothing here connects.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc

from stepstate.errors import InvalidField

TARGET = "127.0.0.1:50051"
"""Of a client that is given none, and has none in its environment."""
_SCHEMES = {"grpc://": False, "grpcs://": True}
"""What a target may begin with, and whether that means TLS."""
_HOST = re.compile(r"(?:(?:dns:(?:///)?)|ipv4:|ipv6:)?(\[[^\]]*\]|[^:/,\[\]]+)(?::(\d+))?")
_HTTPS_PORT = 443
"""Which gRPC takes if a target has none."""

Token = str | Path | Callable[[], str]
"""A token; the file that has it, which is read again when it changes; or what gives it for each
call, and so may renew it."""


@dataclass(frozen=True, slots=True)
class Tls:
    """How a client checks a server's certificate, and which it has itself. Files are in PEM."""

    ca_file: str | Path | None = None
    """The authorities that the server's certificate may be of; None: those that gRPC brings."""
    cert_file: str | Path | None = None
    """The client's own certificate, for a server that asks for one."""
    key_file: str | Path | None = None
    """The key of it."""
    server_name: str | None = None
    """The name that the server's certificate must have; None: that of the target."""

    def credentials(self) -> grpc.ChannelCredentials:
        """The same for gRPC. The files are read now, once.

        Raises:
            InvalidField: one can't be read, or a certificate or key is alone.
        """
        if (self.cert_file is None) != (self.key_file is None):
            raise InvalidField("tls", "has a certificate or a key alone: give both, or neither")
        parts = (
            ("ca_file", self.ca_file),
            ("key_file", self.key_file),
            ("cert_file", self.cert_file),
        )
        return grpc.ssl_channel_credentials(*(_content(name, path) for name, path in parts))


def _content(name: str, path: str | Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InvalidField(f"tls.{name}", f"can't be read: {path}: {error.strerror}") from error
    if b"-----BEGIN " not in content:
        raise InvalidField(f"tls.{name}", f"is not PEM: {path}")
    return content


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a client connects, and how."""

    target: str
    """As gRPC takes it."""
    credentials: grpc.ChannelCredentials | None
    """None: plain text."""
    tls: Tls | None
    """What they were made of, if it is known."""
    token: TokenSource | None

    def channel(self, library: ModuleType, options: Sequence[tuple[str, Any]] = ()) -> Any:
        """A channel of `grpc` or `grpc.aio`, with gRPC's options."""
        if self.credentials is None:
            return library.insecure_channel(self.target, options=options)
        if self.tls is not None and self.tls.server_name is not None:
            options = [("grpc.ssl_target_name_override", self.tls.server_name), *options]
        return library.secure_channel(self.target, self.credentials, options=options)

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port, if the target is of that form."""
        match = _HOST.fullmatch(self.target)
        return match and (match[1].strip("[]"), int(match[2] or _HTTPS_PORT))


def endpoint_of(
    target: str | None,
    *,
    tls: bool | Tls | None = None,
    token: Token | None = None,
    credentials: grpc.ChannelCredentials | None = None,
) -> Endpoint:
    """What the arguments of a client mean; without a target, with those of the environment.

    Raises:
        InvalidField: they contradict each other, a file can't be read, or a token would travel
            unprotected.
    """
    if target is None:
        target = os.environ.get("STEPSTATE_TARGET") or TARGET
        tls = _tls_of(os.environ) if tls is None and credentials is None else tls
        file = os.environ.get("STEPSTATE_TOKEN_FILE")
        token = Path(file) if token is None and file else token
    if credentials is not None and tls is not None:
        raise InvalidField("tls", "is given, and credentials, too: give one of them")
    plain, is_tls = _split(target)
    if tls is not None:
        if is_tls is not None and is_tls != bool(tls):
            raise InvalidField("tls", f"contradicts the target, {target}")
        is_tls = bool(tls)
    chosen = None
    if is_tls and credentials is None:
        chosen = tls if isinstance(tls, Tls) else Tls()
        credentials = chosen.credentials()
    if token is not None and credentials is None and is_tls is None:
        _check_loopback(plain)
    return Endpoint(plain, credentials, chosen, None if token is None else _source(token))


def _tls_of(environment: Mapping[str, str]) -> Tls | None:
    names = ("ca_file", "cert_file", "key_file")
    given = [environment.get(f"STEPSTATE_{name.upper()}") or None for name in names]
    return Tls(*given) if any(given) else None


def _split(target: str) -> tuple[str, bool | None]:
    """The target without its scheme, and whether that means TLS; None: it has none."""
    for scheme, is_tls in _SCHEMES.items():
        if target.startswith(scheme):
            return target.removeprefix(scheme).rstrip("/"), is_tls
    return target, None


def _check_loopback(target: str) -> None:
    """Raises InvalidField if others may read what is sent there in plain text."""
    match = _HOST.fullmatch(target)
    host = match[1].strip("[]") if match else ""
    if target.startswith("unix:") or host == "localhost" or _is_loopback(host):
        return
    raise InvalidField(
        "token",
        f"would go to {target} in plain text, where others may read it: use TLS, "
        f"grpcs://{target}, or write grpc://{target} to send it all the same",
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class TokenSource:
    """A client's token, which may be renewed while calls with the one before are open.

    Args:
        read: gives the token that is to be used now; white space around it is not part of it.
    """

    def __init__(self, read: Callable[[], str]) -> None:
        self._read = read
        self._token = ""
        self._renewed_at = 0.0

    def __call__(self) -> str:
        """The token of a new call.

        Raises:
            InvalidField: what was given is none.
        """
        token = self._read().strip()
        _check(token, "is")
        if token != self._token:
            if self._token:  # the first one renews nothing
                self._renewed_at = time.monotonic()
            self._token = token
        return token

    def renewed_since(self, moment: float) -> bool:
        """Whether a call that was begun then, by `time.monotonic`, had another token than now."""
        self()
        return self._renewed_at > moment


def _source(token: Token) -> TokenSource:
    if isinstance(token, Path):
        return TokenSource(TokenFileReader(token))
    if isinstance(token, str):
        _check(token, "is")  # now, and not at the first call
        return TokenSource(lambda: token)
    return TokenSource(token)


def _check(token: str, what: str) -> None:
    """Raises InvalidField if that is no token that metadata can carry. It is not shown."""
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidField("token", f"{what} empty, or has characters that no token has")


class TokenFileReader:
    """The token in a file, which may be replaced at any time.

    Args:
        path: the file, such as a mounted secret; white space around the token is not part of it.

    Raises:
        InvalidField: there is no token in it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version: tuple[int, int, int] | None = None
        self._token = ""
        self._read()

    def __call__(self) -> str:
        """The token that is in the file now, or was in it last."""
        try:
            self._read()
        except InvalidField:
            if not self._token:
                raise
        return self._token

    def _read(self) -> None:
        try:
            status = self._path.stat()
            version = status.st_ino, status.st_size, status.st_mtime_ns
            if version == self._version:
                return
            token = self._path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            problem = getattr(error, "strerror", None) or "it is not text"
            raise InvalidField("token", f"can't be read from {self._path}: {problem}") from None
        _check(token, f"in {self._path} is")
        self._token, self._version = token, version
