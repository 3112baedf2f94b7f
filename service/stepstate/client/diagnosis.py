"""Why a server can't be reached: in words, where gRPC says "unavailable".

gRPC tells what went wrong in a handshake only of its own checks. That a server expects TLS, or a
certificate of the client, it does not tell: one connection of our own finds that out.
"""

from __future__ import annotations

import re
import socket
import ssl

from stepstate.client.security import Endpoint, Tls

PROBE_SECONDS = 2.0
"""For the connection, and for each answer."""
NO_TLS = "the server speaks no TLS there: use grpc://, or leave tls out; or is it another port?"
NEEDS_TLS = (
    "the server speaks TLS there: use grpcs://, and give the file of its authority if that is no "
    "public one (tls=Tls(ca_file=...), --ca-file, STEPSTATE_CA_FILE)"
)
NEEDS_CERTIFICATE = (
    "the server wants a certificate of the client: give its files (tls=Tls(cert_file=..., "
    "key_file=...), --cert-file and --key-file, STEPSTATE_CERT_FILE and STEPSTATE_KEY_FILE)"
)
UNKNOWN = "check the host and the port, and whether it needs TLS"
_EXPIRED = "the certificate of the server has expired: its operator has to renew it"
_EARLY = "the certificate of the server is not valid yet: is this machine's clock right?"
_NAME = (
    "the certificate of the server is for another name: use one of its names in the target, or "
    "give it as server_name in tls=Tls(...)"
)
_AUTHORITY = (
    "the certificate of the server is of an authority that this client does not trust: give the "
    "file of that authority (tls=Tls(ca_file=...), --ca-file, STEPSTATE_CA_FILE)"
)
OWN_REFUSED = (
    "the server refuses the certificate of this client: it has expired, or is not of an authority "
    "that the server trusts (its --tls-client-ca)"
)
_EXPLANATIONS = tuple(
    (re.compile(pattern), explanation)
    for pattern, explanation in (
        ("WRONG_VERSION_NUMBER", NO_TLS),
        ("Hostname Verification|Hostname mismatch|IP address mismatch", _NAME),
        ("certificate has expired", _EXPIRED),
        ("certificate is not yet valid", _EARLY),
        ("CERTIFICATE_VERIFY_FAILED", _AUTHORITY),
        ("KEY_(VALUES|TYPE)_MISMATCH", "the key of this client is not that of its certificate"),
        ("ALERT_CERTIFICATE_REQUIRED", NEEDS_CERTIFICATE),
        ("ALERT_CERTIFICATE_EXPIRED|ALERT_UNKNOWN_CA|ALERT_BAD_CERTIFICATE", OWN_REFUSED),
    )
)


def explain(detail: str) -> str:
    """What the text of gRPC or of OpenSSL about a failure means, and what to do; or nothing."""
    return next((text for pattern, text in _EXPLANATIONS if pattern.search(detail)), "")


def why_unreachable(endpoint: Endpoint, detail: str) -> str:
    """Why a server has never answered, after gRPC said `detail`. It may connect, once.

    Returns:
        The reason, and what to do.
    """
    return explain(detail) or _probe(endpoint) or UNKNOWN


def _probe(endpoint: Endpoint) -> str:
    """What one connection with TLS tells, or nothing."""
    address, tls = endpoint.address, endpoint.tls or Tls()
    if address is None or (endpoint.credentials is not None and endpoint.tls is None):
        return ""
    try:
        ends = _ends_after_handshake(tls, address)
    except OSError as error:  # ssl.SSLError is one
        problem = str(error)
        if endpoint.tls is None:
            return NEEDS_TLS if "ALERT" in problem else ""
        return explain(problem)
    if endpoint.tls is None:
        return NEEDS_TLS
    if not ends:
        return ""
    return NEEDS_CERTIFICATE if tls.cert_file is None else OWN_REFUSED


def _ends_after_handshake(tls: Tls, address: tuple[str, int]) -> bool:
    """Shakes hands, and waits for the first byte. Returns whether the server ends it instead.

    With TLS 1.3 a server looks at the certificate of its client when the client is done.

    Raises:
        ssl.SSLError: there is no handshake, or an alert came after it.
        OSError: there is no connection.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent
    if tls.cert_file is not None:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    with (
        socket.create_connection(address, PROBE_SECONDS) as plain,
        context.wrap_socket(plain, server_hostname=address[0]) as connected,
    ):
        try:
            return not connected.recv(1)
        except TimeoutError:
            return False
        except ConnectionResetError:
            return True
