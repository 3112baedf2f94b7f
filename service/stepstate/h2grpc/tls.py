"""TLS: what HTTP/2 asks of it, how it begins, and what it tells of a client.

What is told has the names that gRPC's C core gives it.

Sources: RFC 9113, sections 3.2 and 9.2; gRPC's `grpc_security_constants.h`, and its function
`grpc_ssl_peer_to_auth_context`.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

ALPN = "h2"
"""What HTTP/2 is called in the handshake."""
INSECURE: Mapping[str, Iterable[bytes]] = {
    "transport_security_type": [b"insecure"],
    "security_level": [b"TSI_SECURITY_NONE"],
}
"""The authentication context of a connection without TLS."""
MAX_HANDSHAKES = 1000
"""Under way at once; one more ends the oldest. Each takes 51 KiB, also of a client that says
nothing, and no other limit counts that."""
MIN_HANDSHAKE_SECONDS = 1.0
"""None is ended earlier for others: in a burst, new connections wait rather than end each other."""
ACCEPT_PAUSE_SECONDS = 0.1
"""Between two tries to accept a connection, when the process has no more files."""
COMMON_NAME = "x509_common_name"
ALTERNATIVE_NAMES = "x509_subject_alternative_name"
_KINDS = {"DNS": "peer_dns", "URI": "peer_uri", "IP Address": "peer_ip", "email": "peer_email"}


def set_up_http2(context: ssl.SSLContext) -> None:
    """Lets the server of this context negotiate HTTP/2, as HTTP/2 has to have it."""
    context.set_alpn_protocols([ALPN])
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION


class TlsListener:
    """Accepts connections with TLS. Unlike an `asyncio.Server`, it can end their handshakes.

    Args:
        listener: a socket that listens.
        context: gives that of the server, anew for each connection, so that it may change.
        handshake_seconds: how long a handshake may take.
        protocol: makes the protocol of a connection, which begins after the handshake.
    """

    def __init__(
        self,
        listener: socket.socket,
        context: Callable[[], ssl.SSLContext],
        handshake_seconds: float,
        protocol: Callable[[], asyncio.Protocol],
    ) -> None:
        self._context = context
        self._handshake_seconds = handshake_seconds
        self._protocol = protocol
        self._handshakes: dict[asyncio.Task[None], tuple[socket.socket, float]] = {}
        listener.setblocking(False)  # noqa: FBT003 - its only argument
        self._listener = listener
        self._accepting = asyncio.create_task(self._accept())

    async def close(self) -> None:
        """Accepts no more connections; handshakes go on."""
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        self._listener.close()

    async def handshakes_done(self) -> None:
        """Waits until no handshake is under way."""
        if self._handshakes:
            await asyncio.wait(self._handshakes)

    async def end_handshakes(self) -> None:
        """Ends the handshakes that are under way, and their connections."""
        for connection, _ in self._handshakes.values():
            _end(connection)
        await self.handshakes_done()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except ConnectionAbortedError:  # its client has ended it
                continue
            except OSError:
                await asyncio.sleep(ACCEPT_PAUSE_SECONDS)
                continue
            handshake = loop.create_task(self._shake_hands(connection))
            self._handshakes[handshake] = connection, loop.time()
            handshake.add_done_callback(self._handshakes.pop)
            if len(self._handshakes) > MAX_HANDSHAKES:
                await self._end_oldest()
            await asyncio.sleep(0)  # handshakes go on between two connections

    async def _end_oldest(self) -> None:
        handshake, (connection, began) = next(iter(self._handshakes.items()))
        left = began + MIN_HANDSHAKE_SECONDS - asyncio.get_running_loop().time()
        await asyncio.wait([handshake], timeout=max(0.0, left))
        if not handshake.done():
            _end(connection)
            await asyncio.wait([handshake])

    async def _shake_hands(self, connection: socket.socket) -> None:
        context = self._context()
        set_up_http2(context)
        protocol = self._protocol()
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol,
                connection,
                ssl=context,
                ssl_handshake_timeout=self._handshake_seconds,
            )
        except OSError as error:  # a client that speaks no TLS, is too slow, or is gone
            error.__traceback__ = None  # its frames hold the error: they must be no reference cycle
            protocol.connection_lost(error)  # asyncio tells it only if the handshake was done


def _end(connection: socket.socket) -> None:
    with suppress(OSError):  # its client has ended it
        connection.shutdown(socket.SHUT_RDWR)


def auth_context_of(connection: ssl.SSLObject) -> Mapping[str, Iterable[bytes]]:
    """The authentication context of a connection with TLS, and of its client's certificate.

    The certificate is there if the server's `ssl.SSLContext` asks for one.
    """
    found: dict[str, list[bytes]] = {
        "transport_security_type": [b"ssl"],
        "security_level": [b"TSI_PRIVACY_AND_INTEGRITY"],
        "ssl_session_reused": [b"true" if connection.session_reused else b"false"],
    }
    encoded = connection.getpeercert(binary_form=True)
    if encoded is not None:
        found["x509_pem_cert"] = [ssl.DER_cert_to_PEM_cert(encoded).encode()]
        _add_names(found, connection.getpeercert() or {})
    return found


def _add_names(found: dict[str, list[bytes]], certificate: Mapping[str, Any]) -> None:
    for part in certificate.get("subject", ()):
        found.update((COMMON_NAME, [name.encode()]) for key, name in part if key == "commonName")
    for kind, name in certificate.get("subjectAltName", ()):
        if kind in _KINDS:
            text = str(ip_address(name.strip())) if kind == "IP Address" else name
            for key in (ALTERNATIVE_NAMES, _KINDS[kind]):
                found.setdefault(key, []).append(text.encode())


def identity_key(auth_context: Mapping[str, Iterable[bytes]]) -> str | None:
    """Which property of a client's certificate says who it is; None: there is none."""
    return next((key for key in (ALTERNATIVE_NAMES, COMMON_NAME) if key in auth_context), None)
