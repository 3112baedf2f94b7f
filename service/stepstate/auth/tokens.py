"""Bearer tokens: their text, what a server keeps of them, and how one is looked up.

A token is `PREFIX`, 256 random bits as 43 digits of base 62, and 6 digits of their CRC-32, as
GitHub's tokens are: scanners find one that was published by its form, and tell by the checksum that
it is one (`PATTERN`, `is_token`).

Rule 1: a token is known to its owner only. A server keeps its SHA-256. That is enough for a secret
        of 256 random bits: a slow hash makes guesses of passwords expensive, and nobody guesses
        2^256 of anything; it would only let everybody spend the server's time.
Rule 2: a token is found by its hash. How long that takes depends on the hash, from which nothing
        follows for the token, and the hashes are compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from stepstate.identity import TENANT_GRAMMAR, Identity, Scope, is_tenant

PREFIX = "stepstate_"
PATTERN = re.compile(r"stepstate_[0-9A-Za-z]{49}")
"""The form of a token, for secret scanners."""
ID_LENGTH = 12
"""Hexadecimal digits: the beginning of a token's SHA-256 names it in lists and logs."""

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SECRET_BYTES = 32
_SECRET_DIGITS = 43
_CHECKSUM_DIGITS = 6


def make_token() -> str:
    """A new token."""
    number = int.from_bytes(secrets.token_bytes(_SECRET_BYTES))
    secret = _base62(number, _SECRET_DIGITS)
    return f"{PREFIX}{secret}{_checksum(secret)}"


def is_token(text: str) -> bool:
    """Whether a text has the form of a token, and its checksum is right."""
    if PATTERN.fullmatch(text) is None:
        return False
    secret = text[len(PREFIX) : -_CHECKSUM_DIGITS]
    return text.endswith(_checksum(secret))


def digest_of(text: str) -> str:
    """The SHA-256 of a credential, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def _checksum(secret: str) -> str:
    return _base62(zlib.crc32(secret.encode()), _CHECKSUM_DIGITS)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))


def _tenant(name: str) -> str:
    if not is_tenant(name):
        raise ValueError(f"is no name of a tenant: expected {TENANT_GRAMMAR}")
    return name


class TokenRecord(BaseModel):
    """What is kept of a token."""

    # What was given is not in an error: someone may have pasted a token.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    identity: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
    tenant: Annotated[str, AfterValidator(_tenant)]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]

    @property
    def id(self) -> str:
        """Names the token in lists and logs."""
        return self.sha256[:ID_LENGTH]

    @property
    def ended(self) -> datetime | None:
        """When it ends, or ended; None: never."""
        return min((end for end in (self.expires, self.revoked) if end), default=None)


class TokenList(BaseModel):
    """All that a server knows of tokens: the content of its file."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    version: Literal[1] = 1
    tokens: tuple[TokenRecord, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({token.id for token in self.tokens}) < len(self.tokens):
            raise ValueError("a token is there twice")
        tenants: dict[str, str] = {}
        for token in self.tokens:
            if tenants.setdefault(token.identity, token.tenant) != token.tenant:
                raise ValueError(
                    f"identity {token.identity} has tokens of two tenants, and may have one tenant"
                )
        return self


@dataclass(frozen=True, slots=True)
class KnownToken:
    """A token of a table, whether it can still be used or not."""

    identity: Identity
    sha256: str
    revoked: bool


class TokenTable:
    """Finds tokens by their hash.

    Args:
        records: of the tokens.
    """

    def __init__(self, records: Iterable[TokenRecord]) -> None:
        self._tokens = {record.sha256: _known(record) for record in records}
        self._usable = {token.identity for token in self._tokens.values() if not token.revoked}

    def __len__(self) -> int:
        return len(self._tokens)

    def find(self, sha256: str) -> KnownToken | None:
        """The token with a hash."""
        token = self._tokens.get(sha256)
        if token is None or not hmac.compare_digest(token.sha256, sha256):
            return None
        return token

    def is_usable(self, identity: Identity) -> bool:
        """Whether a token proves this identity, and is not revoked."""
        return identity in self._usable


def _known(record: TokenRecord) -> KnownToken:
    identity = Identity(
        f"{record.identity}#{record.id}",
        record.tenant,
        frozenset(record.scopes),
        expires_at=record.expires.timestamp() if record.expires else None,
        credential=f"token {record.id}",
    )
    return KnownToken(identity, record.sha256, record.revoked is not None)
