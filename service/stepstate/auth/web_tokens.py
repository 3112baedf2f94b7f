"""JSON Web Tokens of an identity provider (RFC 7519, with the advice of RFC 8725).

Rule 1: what a token says of itself chooses nothing but the name of a key that is known here. The
        algorithms are the key's, and all are asymmetric: `alg: none` and a public key as the secret
        of an HMAC fit none. `jku`, `x5u`, `jwk` and `x5c` are not looked at.
Rule 2: a token that was accepted is known by its SHA-256 until it expires, or its key is withdrawn:
        its next calls cost no signature.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jwt

from stepstate.auth.signing_keys import KeyRing, SigningKey
from stepstate.errors import Unauthenticated
from stepstate.identity import TENANT_GRAMMAR, Identity, Scope, is_tenant

MAX_KNOWN = 10_000
"""Tokens that are known by their hash, of 1 KiB each; the one that was used least lately goes."""
MAX_NAME_LENGTH = 128
MAX_EXPIRY = 253_402_300_799
"""Unix seconds at the end of the year 9999: a float, and a date, has no room for any number."""
_SCOPES = {scope.value: scope for scope in Scope}


@dataclass(frozen=True, slots=True)
class JwtSettings:
    """What a token has to say."""

    issuer: str
    audience: str
    tenant_claim: str = "tenant"
    scopes_claim: str = "scope"
    leeway_seconds: float = 30.0
    """That clocks may differ."""


class WebTokens:
    """Knows which JWTs prove what.

    Args:
        settings: what they have to say.
        keys: they are signed with.
        unix_time: the time, by which they expire.
    """

    def __init__(
        self, settings: JwtSettings, keys: KeyRing, *, unix_time: Callable[[], float] = time.time
    ) -> None:
        self.keys = keys
        self._settings = settings
        self._unix_time = unix_time
        self._known: OrderedDict[str, Identity] = OrderedDict()

    def find(self, sha256: str) -> Identity | None:
        """The identity of a token that was accepted and still holds, by the token's hash."""
        identity = self._known.get(sha256)
        if identity is None:
            return None
        expired = identity.expires_at is None or identity.expires_at <= self._unix_time()
        if expired or not self.is_usable(identity):
            del self._known[sha256]
            return None
        self._known.move_to_end(sha256)
        return identity

    def is_usable(self, identity: Identity) -> bool:
        """Whether the key of the token that proved an identity is still one of the provider's."""
        return self.keys.has(identity.credential.partition(" ")[2])

    async def verify(self, text: str, sha256: str) -> Identity:
        """The identity that a token proves.

        Raises:
            Unauthenticated: it proves nothing.
            KeysUnavailable: its key is not known, and can't be asked for now.
        """
        key_id = _key_id(text)
        key = self.keys.find(key_id)
        if key is None:
            await self.keys.fetch_for_unknown()
            key = self.keys.find(key_id)
        if key is None:
            raise Unauthenticated("no key of the issuer has this JWT's `kid`", "unknown_key")
        identity = self._identity_of(self._claims(text, key), key)
        self._known[sha256] = identity
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return identity

    def _claims(self, text: str, key: SigningKey) -> dict[str, Any]:
        settings = self._settings
        try:
            claims: dict[str, Any] = jwt.decode(
                text,
                key.key,
                algorithms=key.algorithms,
                issuer=settings.issuer,
                audience=settings.audience,
                leeway=settings.leeway_seconds,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("the JWT has expired: get a new one", "expired") from None
        except jwt.ImmatureSignatureError:
            raise Unauthenticated(
                "the JWT is not valid yet: compare the clocks", "bad_claims"
            ) from None
        except jwt.InvalidIssuerError:
            raise Unauthenticated("the JWT is of another issuer (`iss`)", "bad_claims") from None
        except jwt.InvalidAudienceError:
            raise Unauthenticated("the JWT is for another audience (`aud`)", "bad_claims") from None
        except jwt.MissingRequiredClaimError as error:
            raise Unauthenticated(f"the JWT has no `{error.claim}`", "bad_claims") from None
        except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError, jwt.InvalidKeyError):
            raise Unauthenticated("the JWT is not signed by its key", "bad_signature") from None
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise Unauthenticated("the JWT can't be read", "malformed") from None
        return claims

    def _identity_of(self, claims: dict[str, Any], key: SigningKey) -> Identity:
        """Who a token is of, by its claims; they are the issuer's word."""
        settings = self._settings
        subject, tenant = claims["sub"], claims.get(settings.tenant_claim)
        if not 0 < len(subject) <= MAX_NAME_LENGTH or not subject.isprintable():
            raise Unauthenticated(
                f"`sub` has to be printable, of at most {MAX_NAME_LENGTH} characters", "bad_claims"
            )
        if not isinstance(tenant, str) or not is_tenant(tenant):
            raise Unauthenticated(
                f"`{settings.tenant_claim}` has to be the name of a tenant: {TENANT_GRAMMAR}",
                "bad_claims",
            )
        return Identity(
            f"jwt:{subject}",
            tenant,
            _scopes_of(claims.get(settings.scopes_claim)),
            expires_at=min(int(claims["exp"]), MAX_EXPIRY) + settings.leeway_seconds,
            credential=f"jwt {key.fingerprint}",
        )


def _key_id(text: str) -> str | None:
    try:
        key_id: str | None = jwt.get_unverified_header(text).get("kid")
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise Unauthenticated("the JWT can't be read", "malformed") from None
    return key_id


def _scopes_of(claim: object) -> frozenset[Scope]:
    """The scopes in a claim: a text with spaces (RFC 8693, section 4.2) or a list; not others'."""
    given = claim.split() if isinstance(claim, str) else claim
    if not isinstance(given, list):
        return frozenset()
    return frozenset(_SCOPES[one] for one in given if isinstance(one, str) and one in _SCOPES)
