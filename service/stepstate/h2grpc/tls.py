"""TLS: what HTTP/2 asks of it, and what it tells of a client, as gRPC's C core names it.

Sources: RFC 9113, sections 3.2 and 9.2; gRPC's `grpc_security_constants.h`, and its function
`grpc_ssl_peer_to_auth_context`.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from typing import Any

ALPN = "h2"
"""What HTTP/2 is called in the handshake."""
INSECURE: Mapping[str, Iterable[bytes]] = {
    "transport_security_type": [b"insecure"],
    "security_level": [b"TSI_SECURITY_NONE"],
}
"""The authentication context of a connection without TLS."""
COMMON_NAME = "x509_common_name"
ALTERNATIVE_NAMES = "x509_subject_alternative_name"
_KINDS = {"DNS": "peer_dns", "URI": "peer_uri", "IP Address": "peer_ip", "email": "peer_email"}


def set_up_http2(context: ssl.SSLContext) -> None:
    """Lets the server of this context negotiate HTTP/2, as HTTP/2 has to have it."""
    context.set_alpn_protocols([ALPN])
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION


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
