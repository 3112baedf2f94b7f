"""JWTs: which are accepted, and why all others are not."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import RSAAlgorithm

from stepstate.auth import Credentials, JwtSettings, KeyFile, KeyRing, WebTokens, digest_of
from stepstate.auth import web_tokens as module
from stepstate.auth.signing_keys import parse_keys
from stepstate.errors import Unauthenticated
from stepstate.identity import Identity, Scope
from tests.credentials import AUDIENCE, ISSUER, Provider

SETTINGS = JwtSettings(ISSUER, AUDIENCE, leeway_seconds=5.0)


class Clock:
    """Unix time that a test moves on."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@pytest.fixture(scope="module")
def provider() -> Provider:
    made = Provider("first", "second")
    made.add("rsa", "RSA")
    return made


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(provider: Provider, tmp_path: Path) -> Path:
    path = tmp_path / "jwks.json"
    path.write_bytes(provider.jwks())
    return path


@pytest.fixture
async def tokens(file: Path, clock: Clock) -> WebTokens:
    keys = KeyRing(KeyFile(str(file)))
    await keys.read_now()
    return WebTokens(SETTINGS, keys, unix_time=clock)


async def verify(tokens: WebTokens, text: str) -> Identity:
    return await Credentials(jwts=tokens).verify([f"Bearer {text}"], {}, "client")


async def cause(tokens: WebTokens, text: str) -> str:
    with pytest.raises(Unauthenticated) as refused:
        await verify(tokens, text)
    shown = f"{refused.value} {refused.value!r} {refused.value.__cause__}"
    assert not text or text not in shown
    return refused.value.cause


def part(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@pytest.mark.parametrize("key", ["first", "second", "rsa"])
async def test_a_jwt_says_who_whose_and_what(tokens: WebTokens, provider: Provider, key: str):
    identity = await verify(tokens, provider.token(key, sub="meter 7", scope=["read", "x", 7]))
    assert (identity.name, identity.tenant) == ("jwt:meter 7", "acme")
    assert identity.scopes == {Scope.READ}
    assert (await verify(tokens, provider.token(key))).scopes == {Scope.STEP, Scope.READ}
    assert (await verify(tokens, provider.token(key, scope=None))).scopes == frozenset()
    assert (await verify(tokens, provider.token(key, scope={"admin": 1}))).scopes == frozenset()


async def test_a_known_jwt_costs_no_signature(
    tokens: WebTokens, provider: Provider, monkeypatch: pytest.MonkeyPatch
):
    text = provider.token()
    credentials = Credentials(jwts=tokens)
    assert credentials.known([f"Bearer {text}"], {}) is None
    identity = await verify(tokens, text)
    monkeypatch.setattr(jwt, "decode", None)
    assert credentials.known([f"Bearer {text}"], {}) is identity


async def test_a_known_jwt_is_forgotten_when_it_expires(
    tokens: WebTokens, provider: Provider, clock: Clock
):
    text = provider.token(exp=int(time.time()) + 100)
    identity = await verify(tokens, text)
    clock.ahead = 104.0
    assert tokens.find(digest_of(text)) is identity
    clock.ahead = 105.5
    assert tokens.find(digest_of(text)) is None


async def test_a_known_jwt_ends_with_its_key(tokens: WebTokens, provider: Provider, file: Path):
    credentials = Credentials(jwts=tokens)
    text, other = provider.token(), provider.token("second")
    identity = await credentials.verify([f"Bearer {text}"], {}, "a")
    staying = await credentials.verify([f"Bearer {other}"], {}, "a")
    replaced = Provider("first")  # the same name, another key
    replaced.keys["second"] = provider.keys["second"]
    file.write_bytes(replaced.jwks())  # noqa: ASYNC240 - a small file
    await credentials.refresh(force=True)
    assert credentials.known([f"Bearer {text}"], {}) is None
    assert credentials.problem_of(identity).cause == "revoked"
    assert await cause(tokens, text) == "bad_signature"
    assert credentials.known([f"Bearer {other}"], {}) is staying
    assert credentials.problem_of(staying) is None


async def test_few_are_known(
    tokens: WebTokens, provider: Provider, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "MAX_KNOWN", 2)
    first, second, third = (provider.token(sub=name) for name in "abc")
    await verify(tokens, first)
    await verify(tokens, second)
    assert tokens.find(digest_of(first))  # now the second is the one used least lately
    await verify(tokens, third)
    assert tokens.find(digest_of(second)) is None
    assert tokens.find(digest_of(first))


def rsa_pem(provider: Provider) -> bytes:
    return (
        provider.keys["rsa"]
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )


def hs_with(provider: Provider, secret: bytes, **headers: Any) -> str:
    """What an attacker makes of a public key: a secret of an HMAC."""
    head = part({"alg": "HS256", "typ": "JWT", "kid": "rsa"} | headers)
    body = provider.token().split(".")[1]
    signature = hmac.digest(secret, f"{head}.{body}".encode(), hashlib.sha256)
    return f"{head}.{body}.{part(signature)}"


def with_own_key(provider: Provider, **headers: Any) -> str:
    """A token signed by an attacker's key, whose header says where that key is."""
    attacker = Provider("first")
    key = attacker.keys["first"]
    jwk = json.loads(attacker.jwks())["keys"][0]
    places = {"jku": "https://evil.test/jwks", "x5u": "https://evil.test/cert", "jwk": jwk}
    assert key is not provider.keys["first"]
    return attacker.token("first", headers=places | headers)


def tampered(text: str) -> str:
    head, body, signature = text.split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=="))
    return f"{head}.{part(claims | {'tenant': 'other'})}.{signature}"


FORGED: dict[str, tuple[str, Callable[[Provider], str]]] = {
    "no algorithm": ("bad_signature", lambda p: jwt.encode({}, "", "none", {"kid": "first"})),
    "none, spelt otherwise": (
        "bad_signature",
        lambda p: f"{part({'alg': 'nOnE', 'kid': 'first'})}.{p.token().split('.')[1]}.",
    ),
    "no algorithm named": (
        "bad_signature",
        lambda p: f"{part({'kid': 'first'})}.{p.token().split('.')[1]}.AAAA",
    ),
    "the public key as a secret": ("bad_signature", lambda p: hs_with(p, rsa_pem(p))),
    "the JWK as a secret": ("bad_signature", lambda p: hs_with(p, p.jwks())),
    "an empty secret": ("bad_signature", lambda p: hs_with(p, b"")),
    "another key's signature": (
        "bad_signature",
        lambda p: p.token("second", headers={"kid": "first"}),
    ),
    "another algorithm than the key's": (
        "bad_signature",
        lambda p: p.token("rsa", headers={"kid": "first"}),
    ),
    "a key of its own": ("bad_signature", with_own_key),
    "a key of its own by another name": (
        "unknown_key",
        lambda p: with_own_key(p, kid="evil"),
    ),
    "other claims": ("bad_signature", lambda p: tampered(p.token())),
    "half a signature": ("bad_signature", lambda p: p.token()[:-42]),
    "no signature": ("bad_signature", lambda p: p.token().rpartition(".")[0] + "."),
    "a critical extension": (
        "malformed",
        lambda p: p.token(headers={"crit": ["exp"], "exp": 1}),
    ),
    "a kid that is no text": (
        "malformed",
        lambda p: f"{part({'alg': 'ES256', 'kid': {'a': 1}})}.{p.token().split('.')[1]}.AAAA",
    ),
    "no kid, with several keys": (
        "unknown_key",
        lambda p: f"{part({'alg': 'ES256'})}.{p.token().split('.')[1]}.AAAA",
    ),
    "deep JSON": ("malformed", lambda p: f"{part(b'[' * 4000)}.{part({})}.AAAA"),
    "a huge number": ("malformed", lambda p: f"{part(b'9' * 5000)}.{part({})}.AAAA"),
    "a list for a header": ("malformed", lambda p: f"{part([])}.{part({})}.AAAA"),
    "five parts": ("malformed", lambda p: p.token() + ".a.b"),
    "two parts": ("malformed", lambda p: p.token().rpartition(".")[0]),
    "too long": ("malformed", lambda p: p.token(more="x" * 8192)),
    "of another provider": ("bad_signature", lambda _: Provider("first").token()),
}


@pytest.mark.parametrize("what", FORGED)
async def test_a_forged_jwt_proves_nothing(tokens: WebTokens, provider: Provider, what: str):
    wanted, forge = FORGED[what]
    text = forge(provider)
    assert await cause(tokens, text) == wanted
    assert tokens.find(digest_of(text)) is None


KIDS = [
    "../../etc/passwd", "/dev/null", "https://evil.test/jwks", "file:///etc/passwd", "first\x00",
    "' OR 1=1 --", "", "first ", "FIRST", "x" * 4000, "$(id)",
]  # fmt: skip


@pytest.mark.parametrize("key_id", KIDS)
async def test_a_kid_is_a_name_and_nothing_else(tokens: WebTokens, provider: Provider, key_id: str):
    text = provider.token(headers={"kid": key_id})
    assert await cause(tokens, text) == "unknown_key"


def in_(seconds: float) -> int:
    return int(time.time() + seconds)


CLAIMS: dict[str, tuple[str, dict[str, Any]]] = {
    "expired": ("expired", {"exp": in_(-3600)}),
    "never expires": ("bad_claims", {"exp": None}),
    "expires at no number": ("malformed", {"exp": "soon"}),
    "expires at infinity": ("malformed", {"exp": float("inf")}),
    "not yet valid": ("bad_claims", {"nbf": in_(3600)}),
    "issued in the future": ("bad_claims", {"iat": in_(3600)}),
    "another issuer": ("bad_claims", {"iss": ISSUER + "/"}),
    "no issuer": ("bad_claims", {"iss": None}),
    "another audience": ("bad_claims", {"aud": "other"}),
    "no audience": ("bad_claims", {"aud": None}),
    "an empty audience": ("bad_claims", {"aud": []}),
    "a part of the audience": ("bad_claims", {"aud": AUDIENCE[:-1]}),
    "no subject": ("bad_claims", {"sub": None}),
    "an empty subject": ("bad_claims", {"sub": ""}),
    "a subject with a line break": ("bad_claims", {"sub": "a\nadmin"}),
    "a subject that is long": ("bad_claims", {"sub": "x" * 129}),
    "no tenant": ("bad_claims", {"tenant": None}),
    "an empty tenant": ("bad_claims", {"tenant": ""}),
    "a tenant with a separator": ("bad_claims", {"tenant": "acme/x"}),
    "two tenants": ("bad_claims", {"tenant": ["acme"]}),
    "a number for a tenant": ("bad_claims", {"tenant": 7}),
}


@pytest.mark.parametrize("what", CLAIMS)
async def test_what_a_jwt_has_to_say(tokens: WebTokens, provider: Provider, what: str):
    wanted, claims = CLAIMS[what]
    text = provider.token(**claims)
    assert await cause(tokens, text) == wanted
    assert tokens.find(digest_of(text)) is None


async def test_clocks_may_differ_by_the_leeway(tokens: WebTokens, provider: Provider):
    await verify(tokens, provider.token(exp=in_(-3), nbf=in_(4), iat=in_(4)))
    assert await cause(tokens, provider.token(exp=in_(-6))) == "expired"


async def test_an_expiry_beyond_all_dates_is_one(tokens: WebTokens, provider: Provider):
    text = provider.token(exp=10**400)
    assert tokens.find(digest_of(text)) is None
    identity = await verify(tokens, text)
    assert tokens.find(digest_of(text)) is identity


async def test_one_of_several_audiences_is_enough(tokens: WebTokens, provider: Provider):
    await verify(tokens, provider.token(aud=["other", AUDIENCE]))


async def test_claims_have_the_names_that_are_configured(file: Path, provider: Provider):
    keys = KeyRing(KeyFile(str(file)))
    await keys.read_now()
    names = {"tenant_claim": "https://acme.test/tenant", "scopes_claim": "permissions"}
    tokens = WebTokens(JwtSettings(ISSUER, AUDIENCE, **names), keys)
    text = provider.token(**{"https://acme.test/tenant": "beta", "permissions": ["admin"]})
    identity = await verify(tokens, text)
    assert (identity.tenant, identity.scopes) == ("beta", {Scope.ADMIN})


async def test_a_single_key_needs_no_name(tmp_path: Path):
    path = tmp_path / "one.json"
    provider = Provider("only")
    path.write_bytes(provider.jwks())
    keys = KeyRing(KeyFile(str(path)))
    await keys.read_now()
    tokens = WebTokens(SETTINGS, keys)
    text = jwt.encode(
        jwt.decode(provider.token("only"), options={"verify_signature": False}),
        provider.keys["only"],
        "ES256",
    )
    assert "kid" not in jwt.get_unverified_header(text)
    await verify(tokens, text)


async def test_a_rsa_key_without_alg_takes_its_family_only(tokens: WebTokens, provider: Provider):
    claims = jwt.decode(provider.token("rsa"), options={"verify_signature": False})
    for algorithm in ("RS512", "PS256"):
        await verify(tokens, jwt.encode(claims, provider.keys["rsa"], algorithm, {"kid": "rsa"}))


def test_what_is_no_key_for_signatures_is_left_out():
    provider = Provider("first")
    good = json.loads(provider.jwks())["keys"][0]
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024).public_key()
    entries = [
        {"kty": "oct", "k": "c2VjcmV0", "kid": "hmac"},
        good | {"kid": "encryption", "use": "enc"},
        good | {"kid": "signs", "key_ops": ["sign"]},
        good | {"kid": "hmac too", "alg": "HS256"},
        good | {"kid": "none", "alg": "none"},
        good | {"kid": "off its curve", "y": good["x"]},
        good | {"kid": 7},
        RSAAlgorithm.to_jwk(weak, as_dict=True) | {"kid": "weak"},
        {"kid": "empty"},
        good,
    ]
    found = parse_keys(json.dumps({"keys": entries}).encode())
    assert [one["kid"] for one in entries if found.find(str(one["kid"]))] == ["first"]


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b'{"keys": 7}', b'{"keys": [7]}', b'{"keys": []}', b"[" * 100_000]
)
def test_what_is_no_jwk_set_is_refused(data: bytes):
    with pytest.raises(ValueError, match=r"JWK set|no public key"):
        parse_keys(data)
