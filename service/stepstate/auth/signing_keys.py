"""The public keys that JWTs are signed with: a JWK set (RFC 7517) from a file or an https URL.

Rule 1: a key that is known is found at once. Nothing waits for the provider of the keys but tokens
        whose key is not known, and of these at most `MAX_WAITING`.
Rule 2: anybody can make up the name of a key. So unknown names are not kept, all that come while
        the keys are read wait for that one reading, and two readings are at least as far apart as
        the source says: 30 s for a URL.
Rule 3: what can't be read changes nothing: the keys that are known stay.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Protocol

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from stepstate.auth.watched_file import WatchedFile
from stepstate.errors import CredentialsInvalid, KeysUnavailable

log = logging.getLogger(__name__)

OPTION = "jwt-jwks"
REFRESH_SECONDS = 300.0
"""Between two readings of a URL while all keys are known, so that a withdrawn key ends."""
URL_INTERVAL_SECONDS = 30.0
"""At least so much is between two readings of a URL."""
FETCH_SECONDS = 5.0
"""For an answer of the provider."""
MAX_BYTES = 2**20
"""Of a JWK set; those of large providers take 10 KiB."""
RETRY_SECONDS = 1.0
"""For clients that are told to try again, where nothing else says when."""
MAX_WAITING = 256
"""Calls that wait for a reading."""
MIN_RSA_BITS = 2048

_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_CURVES = {
    "P-256": ("ES256",),
    "P-384": ("ES384",),
    "P-521": ("ES512",),
    "Ed25519": ("EdDSA",),
}
# What a public key consists of: nothing else of an entry is looked at.
_MEMBERS = {"RSA": ("n", "e"), "EC": ("crv", "x", "y"), "OKP": ("crv", "x")}


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A public key, and the algorithms that its signatures may have: never one with a secret."""

    id: str | None
    fingerprint: str
    key: Any
    algorithms: tuple[str, ...]


class KeySet:
    """The keys of a JWK set.

    Args:
        keys: that signatures are checked with.
    """

    def __init__(self, keys: tuple[SigningKey, ...] = ()) -> None:
        self._keys = {key.id: key for key in reversed(keys)}  # of two with one name, the first
        self._only = keys[0] if len(keys) == 1 else None
        self._fingerprints = frozenset(key.fingerprint for key in keys)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, key_id: str | None) -> SigningKey | None:
        """The key with this name; None is a name only where there is a single key."""
        return self._only if key_id is None else self._keys.get(key_id)

    def has(self, fingerprint: str) -> bool:
        """Whether a key is one of these."""
        return fingerprint in self._fingerprints


def parse_keys(data: bytes) -> KeySet:
    """The keys of a JWK set that signatures can be checked with.

    Raises:
        ValueError: it is no JWK set, or has none.
    """
    try:
        entries = json.loads(data)["keys"]
        keys = tuple(key for entry in entries if (key := _key_of(entry)) is not None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("is no JWK set: JSON with a list `keys` (RFC 7517)") from error
    if not keys:
        raise ValueError(
            f"has no public key for signatures: RSA of {MIN_RSA_BITS} bits or more, EC or Ed25519"
        )
    return KeySet(keys)


def _key_of(entry: dict[str, Any]) -> SigningKey | None:
    """The key of an entry; None: it is of another kind, or for something else."""
    kind, key_id = entry.get("kty"), entry.get("kid")
    if entry.get("use", "sig") != "sig" or "verify" not in entry.get("key_ops", ["verify"]):
        return None
    possible = _RSA if kind == "RSA" else _CURVES.get(str(entry.get("crv")), ())
    algorithms = tuple(one for one in possible if entry.get("alg", one) == one)
    if kind not in _MEMBERS or not algorithms or not isinstance(key_id, str | None):
        return None
    public = {"kty": kind} | {name: entry.get(name) for name in _MEMBERS[kind]}
    try:
        key = jwt.PyJWK(public, algorithms[0]).key
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
    if isinstance(key, RSAPublicKey) and key.key_size < MIN_RSA_BITS:
        return None
    text = json.dumps(public, sort_keys=True)
    return SigningKey(key_id, hashlib.sha256(text.encode()).hexdigest(), key, algorithms)


class KeySource(Protocol):
    """Where a JWK set is."""

    interval_seconds: float
    """At least so much is between two readings."""

    def due(self, age_seconds: float, *, for_unknown: bool) -> bool:
        """Whether to read it again after so long; `for_unknown`: a key was not found."""
        ...

    def read(self) -> bytes:
        """Reads it; it may take seconds.

        Raises:
            CredentialsInvalid: it can't be read.
        """
        ...

    def invalid(self, problem: str) -> CredentialsInvalid:
        """The error about it."""
        ...


class KeyFile:
    """A JWK set in a file, which is read again when it changes.

    Args:
        file: its name.
    """

    interval_seconds = 0.0

    def __init__(self, file: str) -> None:
        self._file = WatchedFile(OPTION, file)
        self.read = self._file.read
        self.invalid = self._file.invalid

    def due(self, age_seconds: float, *, for_unknown: bool) -> bool:  # noqa: ARG002 - if changed
        """See `KeySource`."""
        return self._file.changed()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follows none: only the URL that was configured is trusted."""


class KeyUrl:
    """A JWK set at an https URL. Python's CAs are trusted, or those of SSL_CERT_FILE.

    Args:
        url: of the set; a redirect is not followed.
    """

    interval_seconds = URL_INTERVAL_SECONDS

    def __init__(self, url: str) -> None:
        self._url = url

    def due(self, age_seconds: float, *, for_unknown: bool) -> bool:
        """See `KeySource`."""
        return for_unknown or age_seconds >= REFRESH_SECONDS

    def read(self) -> bytes:
        """See `KeySource`."""
        opener = urllib.request.build_opener(_NoRedirect)
        deadline, data = time.monotonic() + FETCH_SECONDS, b""
        try:
            with opener.open(self._url, timeout=FETCH_SECONDS) as response:
                while part := response.read1():
                    data += part
                    if len(data) > MAX_BYTES:
                        raise self.invalid(f"answers with more than {MAX_BYTES} bytes")
                    if time.monotonic() > deadline:
                        raise self.invalid(f"has not answered within {FETCH_SECONDS:g} s")
        except (OSError, HTTPException, ValueError) as error:
            raise self.invalid(f"can't be read: {error}") from error
        return data

    def invalid(self, problem: str) -> CredentialsInvalid:
        """See `KeySource`."""
        return CredentialsInvalid(OPTION, self._url, problem)


class KeyRing:
    """The keys that are known, and their source.

    Args:
        source: of the keys.
        clock: seconds that only grow.
    """

    name = "jwks"
    """In metrics."""

    def __init__(self, source: KeySource, clock: Callable[[], float] = time.monotonic) -> None:
        self.stale = False
        """Whether the last reading failed."""
        self._source = source
        self._clock = clock
        self._keys = KeySet()
        self._read_at = -math.inf
        self._reading: asyncio.Task[None] | None = None
        self._waiting = 0

    def find(self, key_id: str | None) -> SigningKey | None:
        """The key with this name, if it is known."""
        return self._keys.find(key_id)

    def has(self, fingerprint: str) -> bool:
        """Whether a key is still one of those of the source."""
        return self._keys.has(fingerprint)

    async def fetch_for_unknown(self) -> None:
        """Reads the keys again, for a token whose key is not known, if that may help.

        Raises:
            KeysUnavailable: it can't be now.
        """
        if self._reading is None:
            if not self._source.due(self._age(), for_unknown=True):
                return
            wait = self._next_reading()
            if wait > 0:
                raise KeysUnavailable("the issuer's keys were read a moment ago", round(wait, 3))
            self._reading = asyncio.create_task(self._read())
        if self._waiting >= MAX_WAITING:
            raise KeysUnavailable("many calls wait for the issuer's keys", RETRY_SECONDS)
        self._waiting += 1
        try:
            async with asyncio.timeout(2 * FETCH_SECONDS):
                await asyncio.shield(self._reading)
        except TimeoutError:
            raise KeysUnavailable(
                "the provider of the issuer's keys does not answer", RETRY_SECONDS
            ) from None
        finally:
            self._waiting -= 1
        if self.stale:
            wait = max(self._next_reading(), RETRY_SECONDS)
            raise KeysUnavailable("the issuer's keys can't be read", round(wait, 3))

    async def refresh(self, *, force: bool = False) -> None:
        """Begins to read the keys again if that is due; if `force`, in any case, and waits."""
        if self._reading is None and (force or await self._is_due()):
            self._reading = self._reading or asyncio.create_task(self._read())
        if force and self._reading is not None:
            await asyncio.shield(self._reading)

    async def _is_due(self) -> bool:
        if self._next_reading() > 0:
            return False
        return self.stale or await asyncio.to_thread(
            self._source.due, self._age(), for_unknown=False
        )

    async def read_now(self) -> None:
        """Reads the keys, at the start.

        Raises:
            CredentialsInvalid: they can't be read.
        """
        self._read_at = self._clock()
        self._keys = self._parse(await asyncio.to_thread(self._source.read))

    def _next_reading(self) -> float:
        """Seconds until the keys may be read again."""
        return self._source.interval_seconds - self._age()

    def _age(self) -> float:
        """Seconds since the keys were read, or tried to be."""
        return self._clock() - self._read_at

    async def _read(self) -> None:
        stale, self._read_at = self.stale, self._clock()
        try:
            self._keys = self._parse(await asyncio.to_thread(self._source.read))
            self.stale = False
            log.info("keys of JWTs were read", extra={"keys": len(self._keys)})
        except CredentialsInvalid as error:
            self.stale = True
            if not stale:
                log.error("the keys of JWTs that are known stay in use: %s", error)  # noqa: TRY400
        finally:
            self._reading = None

    def _parse(self, data: bytes) -> KeySet:
        try:
            return parse_keys(data)
        except ValueError as error:
            raise self._source.invalid(str(error)) from error
