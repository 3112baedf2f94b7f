"""Who calls, from what a call presents: a bearer token, a JWT, or a client's certificate.

Rule 1: a token comes before a certificate, and one that proves nothing is refused: the certificate
        does not stand in for it.
Rule 2: what was accepted lately is accepted before anything else is looked at: by one SHA-256, of
        at most `MAX_CREDENTIAL_BYTES`. So nobody who shares an address with others that fail is
        locked out (see `attempts`).
Rule 3: nothing here keeps, logs or answers a credential. Only whoever has the secret is told that
        it has expired or is revoked; to everyone else a credential is unknown.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Protocol

from stepstate.auth.attempts import AuthAttempts
from stepstate.auth.certificates import CertificateMapping
from stepstate.auth.token_file import TokenFile
from stepstate.auth.tokens import PREFIX, digest_of, is_token
from stepstate.auth.web_tokens import WebTokens
from stepstate.errors import KeysUnavailable, StepstateError, Unauthenticated
from stepstate.identity import Identity

MAX_CREDENTIAL_BYTES = 8192
"""Of `authorization`. JWTs with many claims take 2 KiB; gRPC's own limit for all metadata is
8 KiB."""
_BEARER = re.compile(r"bearer +([\x21-\x7e]+) *", re.IGNORECASE)
"""RFC 6750, section 2.1, with the form of any credential."""

_CERTIFICATE = "x509_pem_cert"
"""gRPC's name for the certificate of a client, in PEM."""

AuthContext = Mapping[str, Iterable[bytes]]
"""What TLS tells of a client, with the names of gRPC."""


class _Source(Protocol):
    """What credentials are checked with, read from somewhere."""

    name: str
    stale: bool

    async def refresh(self, *, force: bool = False) -> None:
        """Reads it again if it has changed, or if `force`; logs and notes what fails."""
        ...


class Credentials:
    """Knows which credentials prove what.

    Args:
        tokens: bearer tokens, if there are any.
        jwts: JWTs of an identity provider, if there is one.
        certificates: client certificates, if they are identities.
        unix_time: the time, by which credentials expire.
    """

    def __init__(
        self,
        *,
        tokens: TokenFile | None = None,
        jwts: WebTokens | None = None,
        certificates: CertificateMapping | None = None,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self._tokens = tokens
        self._jwts = jwts
        self._certificates = certificates
        self._unix_time = unix_time
        self._attempts = AuthAttempts()
        self._sources: tuple[_Source, ...] = tuple(
            source for source in (tokens, jwts.keys if jwts else None) if source
        )

    def stale(self) -> dict[str, bool]:
        """By source: whether it could not be read again, so that what it was before still holds."""
        return {source.name: source.stale for source in self._sources}

    def known(
        self, authorization: Sequence[str | bytes], auth_context: AuthContext
    ) -> Identity | None:
        """The identity that a call's credentials prove, if that takes no more than a look.

        Args:
            authorization: the values of this name in its metadata.
            auth_context: what TLS tells; not looked at if there is a value.
        """
        if authorization:
            text = _bearer(authorization)
            identity = None if text is None else self._known_bearer(text)
        else:
            pem = _certificate(auth_context)
            identity = self._certificates.find(pem) if self._certificates and pem else None
        return None if identity is None or self._expired(identity) else identity

    def _known_bearer(self, text: str) -> Identity | None:
        sha256 = digest_of(text)
        if self._tokens and text.startswith(PREFIX):
            token = self._tokens.find(sha256)
            return None if token is None or token.revoked else token.identity
        return self._jwts.find(sha256) if self._jwts else None

    async def verify(
        self, authorization: Sequence[str | bytes], auth_context: AuthContext, client: str
    ) -> Identity:
        """The identity that a call's credentials prove.

        Args:
            authorization: the values of this name in its metadata.
            auth_context: what TLS tells.
            client: whose failures are counted.

        Raises:
            Unauthenticated: there are none, or they prove nothing.
            KeysUnavailable: it can't be told yet.
            TooManyAuthFailures: the client has failed too often; nothing was looked at.
        """
        self._attempts.check(client)
        try:
            if not authorization:
                return self._of_certificate(auth_context)
            return await self._of_bearer(authorization)
        except (Unauthenticated, KeysUnavailable):
            self._attempts.failed(client)
            raise

    def problem_of(self, identity: Identity) -> StepstateError | None:
        """Why an identity that was proved before is not any more; None: it still is."""
        if self._expired(identity):
            return _expired(identity)
        kind = identity.credential.partition(" ")[0]
        source = {
            "token": self._tokens,
            "jwt": self._jwts,
            "certificate": self._certificates,
        }[kind]
        usable = source is not None and source.is_usable(identity)
        return None if usable else _revoked(identity)

    def map_certificates(self, certificates: CertificateMapping | None) -> None:
        """Changes what client certificates prove, from the next call on."""
        self._certificates = certificates

    async def refresh(self, *, force: bool = False) -> None:
        """Reads again what has changed. What can't be read stays as it was, and is logged.

        Args:
            force: also what has not changed.
        """
        for source in self._sources:
            await source.refresh(force=force)

    async def _of_bearer(self, authorization: Sequence[str | bytes]) -> Identity:
        text = _bearer(authorization)
        if text is None:
            raise Unauthenticated(
                "authorization has to be one value, Bearer and a token of at most "
                f"{MAX_CREDENTIAL_BYTES} bytes",
                "malformed",
            )
        if text.startswith(PREFIX):
            return self._of_token(text)
        if self._jwts is None:
            raise Unauthenticated("authorization holds no token of this server", "malformed")
        return await self._jwts.verify(text, digest_of(text))

    def _of_token(self, text: str) -> Identity:
        if not is_token(text):
            raise Unauthenticated("the token is not whole: its checksum is wrong", "malformed")
        token = self._tokens.find(digest_of(text)) if self._tokens else None
        if token is None:
            raise Unauthenticated(
                "no such token is known here: is it one of this server's?", "unknown_token"
            )
        if token.revoked:
            raise _revoked(token.identity)
        if self._expired(token.identity):
            raise _expired(token.identity)
        return token.identity

    def _of_certificate(self, auth_context: AuthContext) -> Identity:
        pem = _certificate(auth_context)
        if self._certificates is None or pem is None:
            raise Unauthenticated(
                "this server asks for a credential: send authorization: Bearer TOKEN"
                + (", or a certificate" if self._certificates else ""),
                "missing",
            )
        identity = self._certificates.verify(pem)
        if self._expired(identity):
            raise _expired(identity)
        return identity

    def _expired(self, identity: Identity) -> bool:
        return identity.expires_at is not None and identity.expires_at <= self._unix_time()


def _bearer(authorization: Sequence[str | bytes]) -> str | None:
    """The credential, if there is one and it has the form of one."""
    if len(authorization) != 1 or len(authorization[0]) > MAX_CREDENTIAL_BYTES:
        return None
    value = authorization[0]
    match = _BEARER.fullmatch(value if isinstance(value, str) else value.decode("latin-1"))
    return match[1] if match else None


def _certificate(auth_context: AuthContext) -> bytes | None:
    return next(iter(auth_context.get(_CERTIFICATE, ())), None)


def _revoked(identity: Identity) -> Unauthenticated:
    return Unauthenticated(
        f"the credential of {identity.name} is revoked: use another one", "revoked"
    )


def _expired(identity: Identity) -> Unauthenticated:
    at = datetime.fromtimestamp(identity.expires_at or 0.0, UTC)
    return Unauthenticated(
        f"the credential of {identity.name} expired at {at:%F %T}Z: get a new one", "expired"
    )
