"""The server's certificate and key, and the authority of its clients: read, checked, read again.

A certificate lasts for weeks and a server for longer, so the files are looked at every second and
read when they have changed. New connections get the new certificate; those that are open go on.
Files that can't be used change nothing but the log and a metric: the ones before stay in use.

The ciphers are those of TLS 1.2 that RFC 9113, section 9.2.2, leaves, and all of TLS 1.3.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from threading import Lock
from weakref import WeakKeyDictionary

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from stepstate.errors import TlsInvalid
from stepstate.watched_files import WatchedFiles, warn_if_readable

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Between two polls of the files: far more often than a certificate is renewed."""
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


class ClientAuth(StrEnum):
    """Whether clients show a certificate."""

    NONE = "none"
    OPTIONAL = "optional"
    """They may; one that is not of the authority is refused."""
    REQUIRED = "required"


_VERIFY = {
    ClientAuth.NONE: ssl.CERT_NONE,
    ClientAuth.OPTIONAL: ssl.CERT_OPTIONAL,
    ClientAuth.REQUIRED: ssl.CERT_REQUIRED,
}


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where the PEM files are, and what is asked of clients."""

    certificate: Path
    """The server's own, and then those between it and its authority."""
    key: Path
    client_ca: Path | None = None
    """The authorities of clients' certificates."""
    client_auth: ClientAuth = ClientAuth.NONE


@dataclass(frozen=True, slots=True)
class LoadedTls:
    """Files that were read, and fit together."""

    files: TlsFiles
    expires_at: float
    """When the first of the server's certificates does, in Unix seconds."""
    http2: ssl.SSLContext
    """For connections of gRPC."""
    http: ssl.SSLContext
    """For those of the metrics port: clients that need a certificate may still have none."""
    certificate_pem: bytes
    key_pem: bytes = field(repr=False)
    client_ca_pem: bytes | None
    authorities: frozenset[bytes]
    """Of clients' certificates, in DER."""


def load_tls(files: TlsFiles) -> LoadedTls:
    """Reads the files, and checks that they can be used.

    Raises:
        TlsInvalid: one can't be read or is something else, is not of the others, or has expired.
    """
    certificates, certificate_pem = _certificates("--tls-cert", files.certificate)
    key_pem = _key(files, certificates[0])
    expires_at = _check_times(files.certificate, certificates)
    client_ca_pem, authorities = None, list[x509.Certificate]()
    if files.client_ca is not None:
        authorities, client_ca_pem = _certificates("--tls-client-ca", files.client_ca)
        if max(map(_expiry, authorities)) <= time.time():
            problem = "all of its certificates have expired: no client could connect"
            raise TlsInvalid("--tls-client-ca", str(files.client_ca), problem)
    try:
        http2, http = _context(files, files.client_auth), _context(files, _at_most_optional(files))
    except OSError as error:  # ssl.SSLError is one
        raise TlsInvalid("--tls-cert", str(files.certificate), f"OpenSSL: {error}") from error
    return LoadedTls(
        files,
        expires_at,
        http2,
        http,
        certificate_pem,
        key_pem,
        client_ca_pem,
        frozenset(one.public_bytes(Encoding.DER) for one in authorities),
    )


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsInvalid(option, str(path), str(error.strerror)) from error


def _certificates(option: str, path: Path) -> tuple[list[x509.Certificate], bytes]:
    pem = _read(option, path)
    try:
        return x509.load_pem_x509_certificates(pem), pem
    except ValueError as error:
        problem = "it has no certificates in PEM (-----BEGIN CERTIFICATE-----)"
        raise TlsInvalid(option, str(path), problem) from error


def _key(files: TlsFiles, certificate: x509.Certificate) -> bytes:
    """The key in PEM; it is that of the certificate."""
    pem = _read("--tls-key", files.key)
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        problem = "it is encrypted: write it without a password (`openssl pkey -in FILE`)"
    except (ValueError, UnsupportedAlgorithm):
        problem = "it has no private key in PEM (-----BEGIN PRIVATE KEY-----) of a kind for TLS"
    else:
        form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        if key.public_key().public_bytes(*form) == certificate.public_key().public_bytes(*form):
            return pem
        problem = f"it is not the key of the certificate in {files.certificate}"
    raise TlsInvalid("--tls-key", str(files.key), problem) from None  # no part of the key is told


def _check_times(path: Path, certificates: list[x509.Certificate]) -> float:
    """When the first certificate expires; all are valid now."""
    now = time.time()
    for one in certificates:
        name = one.subject.rfc4514_string() or "a certificate"
        if _expiry(one) <= now:
            problem = f"{name} expired at {one.not_valid_after_utc:%F %T}Z: renew it"
            raise TlsInvalid("--tls-cert", str(path), problem)
        if one.not_valid_before_utc.timestamp() > now:
            problem = f"{name} is valid from {one.not_valid_before_utc:%F %T}Z on: see the clock"
            raise TlsInvalid("--tls-cert", str(path), problem)
    return min(map(_expiry, certificates))


def _expiry(certificate: x509.Certificate) -> float:
    return certificate.not_valid_after_utc.timestamp()


def _at_most_optional(files: TlsFiles) -> ClientAuth:
    required = files.client_auth is ClientAuth.REQUIRED
    return ClientAuth.OPTIONAL if required else files.client_auth


def _context(files: TlsFiles, client_auth: ClientAuth) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.load_cert_chain(files.certificate, files.key, password="")  # it never asks for one
    context.verify_mode = _VERIFY[client_auth]
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # an authority need not be a root
    if files.client_ca is not None:
        context.load_verify_locations(files.client_ca)
    return context


class ServerTls:
    """TLS of a server, whose files may be replaced at any time.

    Args:
        files: where they are.

    Raises:
        TlsInvalid: they can't be used.
    """

    def __init__(self, files: TlsFiles) -> None:
        named = (files.certificate, files.key, files.client_ca)
        self._watched = WatchedFiles(*(path for path in named if path is not None))
        self.current = load_tls(files)
        """What new connections get."""
        self.reload_failed = False
        """Whether the files that are there now can't be used."""
        self._authorities = WeakKeyDictionary({self.current.http2: self.current.authorities})
        self._reading = Lock()
        _warn_if_readable(files.key)

    async def watch(self) -> None:
        """Reads the files again whenever they have changed, until it is cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await asyncio.to_thread(self.poll)
            except Exception:
                log.exception("the TLS files were not read; the next poll tries again")

    def poll(self) -> None:
        """Reads files that have changed, but not since the last poll: all of them are written."""
        if self._watched.settled():
            self.reload()

    def is_outdated(self, context: ssl.SSLContext) -> bool:
        """Whether a context for gRPC trusted an authority of clients that is not trusted any more.

        Then its connections must not go on: which authority a client's certificate was of is not
        known once the handshake is over.
        """
        return not self._authorities[context] <= self.current.authorities

    def reload(self) -> bool:
        """Reads the files again, whether they have changed or not. Returns whether they are used.

        It reads from the disk: call it in a thread.
        """
        with self._reading:  # of two at once, the one that read first must not be the last to write
            return self._reload()

    def _reload(self) -> bool:
        files = self.current.files
        self._watched.mark_read()
        try:
            loaded = load_tls(files)
        except TlsInvalid as error:
            self.reload_failed = True
            log.error(  # noqa: TRY400 - the operator's mistake, not ours
                "the new TLS files can't be used: those before stay in use",
                extra={"problem": str(error), "expires": _date(self.current.expires_at)},
            )
            return False
        self._authorities[loaded.http2] = loaded.authorities
        self.current, self.reload_failed = loaded, False
        _warn_if_readable(files.key)
        log.info("new TLS files are in use", extra={"expires": _date(self.current.expires_at)})
        return True


def _date(unix_time: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(unix_time))


def _warn_if_readable(key: Path) -> None:
    warn_if_readable(key, key.stat().st_mode, group_may=True)
