"""Targets: what proves who calls. Bearer tokens, JWTs, JWK sets, certificates, the token file."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import tempfile
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from stepstate.auth import (
    CertificateMapping,
    CertificateRule,
    Credentials,
    JwtSettings,
    KeyFile,
    KeyRing,
    TokenFile,
    WebTokens,
    read_tokens,
)
from stepstate.auth.signing_keys import parse_keys
from stepstate.errors import CredentialsInvalid, StepstateError
from stepstate.identity import Scope
from tests.credentials import AUDIENCE, ISSUER, Provider, token
from tests.fuzz.target import Target

FOLDER = Path(tempfile.mkdtemp(prefix="stepstate-fuzz-"))
LOOP = asyncio.new_event_loop()
CLIENTS = itertools.count()
"""Each attempt is another client's, so that none is refused unseen."""
PROVIDER = Provider()
TOKENS, JWKS, CHANGED = FOLDER / "tokens.json", FOLDER / "jwks.json", FOLDER / "changed.json"
TOKEN = token(TOKENS)
JWKS.write_bytes(PROVIDER.jwks())


def make_web_tokens() -> WebTokens:
    web_tokens = WebTokens(JwtSettings(ISSUER, AUDIENCE), KeyRing(KeyFile(str(JWKS))))
    LOOP.run_until_complete(web_tokens.keys.refresh(force=True))
    return web_tokens


WEB_TOKENS = make_web_tokens()
RULES = [CertificateRule(f"{kind}:*", "acme", frozenset(Scope)) for kind in ("URI", "DNS", "CN")]
CREDENTIALS = Credentials(
    tokens=TokenFile(str(TOKENS)), jwts=WEB_TOKENS, certificates=CertificateMapping(RULES)
)


def run_bearer(data: bytes) -> None:
    """The value of `authorization`, as text and as bytes."""
    for value in (data, data.decode("latin-1")):
        CREDENTIALS.known([value], {})
        with suppress(StepstateError):
            found = CREDENTIALS.verify([value], {}, str(next(CLIENTS)))
            identity = LOOP.run_until_complete(found)
            kind = identity.credential.partition(" ")[0]
            assert {"token": TOKEN, "jwt": SIGNED}[kind].encode() in data


def run_jwt(data: bytes) -> None:
    """A header and claims, in JSON with a zero byte between, under a right signature."""
    header, _, claims = data.partition(b"\0")
    text = signed(header, claims)
    with suppress(StepstateError):
        LOOP.run_until_complete(WEB_TOKENS.verify(text, text))


def signed(header: bytes, claims: bytes) -> str:
    """As RFC 7515, section 5.1 has it, whatever the parts are."""
    parts = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in (header, claims))
    key = PROVIDER.keys["first"]
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    r, s = utils.decode_dss_signature(key.sign(parts, ec.ECDSA(hashes.SHA256())))
    signature = r.to_bytes(32, "big") + s.to_bytes(32, "big")
    return (parts + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


def run_jwks(data: bytes) -> None:
    with suppress(ValueError):
        assert len(parse_keys(data))


def run_token_file(data: bytes) -> None:
    CHANGED.write_bytes(data)
    with suppress(CredentialsInvalid):
        for record in read_tokens(str(CHANGED)):
            assert record.sha256 not in repr(record)


def run_certificate(data: bytes) -> None:
    """A certificate in DER. TLS has checked its signature; anything may be in its names."""
    text = base64.encodebytes(data)
    pem = b"-----BEGIN CERTIFICATE-----\n" + text + b"-----END CERTIFICATE-----\n"
    with suppress(StepstateError):
        found = CREDENTIALS.verify([], {"x509_pem_cert": [pem]}, str(next(CLIENTS)))
        LOOP.run_until_complete(found)


def jwt_parts() -> tuple[bytes, ...]:
    header = {"alg": "ES256", "kid": "first", "typ": "JWT"}
    now = int(datetime.now(UTC).timestamp())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "m", "exp": now + 10**7, "tenant": "acme"}
    others = (
        claims | {"exp": 1e999},
        claims | {"nbf": -(10**400), "iat": 1e308},
        claims | {"aud": [AUDIENCE], "scope": ["step"]},
        claims | {"sub": None, "tenant": {}},
    )
    return tuple(json.dumps(header).encode() + b"\0" + json.dumps(one).encode() for one in others)


def certificate_seed() -> bytes:
    key = PROVIDER.keys["first"]
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "meter-1")])
    names = [x509.DNSName("m.test"), x509.UniformResourceIdentifier("spiffe://test/meter")]
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=100))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    return made.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


JWT = PROVIDER.token()
SIGNED = JWT.rpartition(".")[0]
"""The same signature can be written in several ways (RFC 4648, section 3.5)."""
TARGETS = {
    "bearer": Target(
        run_bearer, (f"Bearer {TOKEN}".encode(), f"Bearer {JWT}".encode(), b"Basic YTpi")
    ),
    "jwt": Target(run_jwt, jwt_parts()),
    "jwks": Target(run_jwks, (PROVIDER.jwks(),)),
    "token-file": Target(run_token_file, (TOKENS.read_bytes(),)),
    "certificate": Target(run_certificate, (certificate_seed(),)),
}
