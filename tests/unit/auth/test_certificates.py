"""Identities of client certificates, by rules."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from stepstate.auth import CertificateMapping, CertificateRule, Credentials, TokenFile, make_token
from stepstate.errors import Unauthenticated
from stepstate.identity import Scope
from tests.credentials import token

READ = frozenset({Scope.READ})
KEY = ec.generate_private_key(ec.SECP256R1())


def certificate(
    *names: x509.GeneralName, common: tuple[str, ...] = ("meter-1",), days: int = 1
) -> bytes:
    """A client's certificate, as gRPC shows it."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one) for one in common])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder(subject, subject, KEY.public_key(), 1)
        .not_valid_before(now - timedelta(days=9))
        .not_valid_after(now + timedelta(days=days))
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(KEY, SHA256()).public_bytes(Encoding.PEM)


URI, DNS = x509.UniformResourceIdentifier, x509.DNSName
METERS = URI("spiffe://acme.test/meters/7")


def tenant_of(pem: bytes, *matches: str) -> str | None:
    """The tenant that rules give a certificate: the n-th rule gives the tenant n."""
    rules = [CertificateRule(match, str(place), READ) for place, match in enumerate(matches)]
    identity = CertificateMapping(rules).find(pem)
    return None if identity is None else identity.tenant


CASES: dict[str, tuple[str, Callable[[], bytes], bool]] = {
    "the URI": ("URI:spiffe://acme.test/meters/7", lambda: certificate(METERS), True),
    "a part of the path": ("URI:spiffe://acme.test/meters/*", lambda: certificate(METERS), True),
    "no more than a part": ("URI:spiffe://acme.test/*", lambda: certificate(METERS), False),
    "another domain": ("URI:spiffe://acme/meters/*", lambda: certificate(METERS), False),
    "a dot is a dot": ("URI:spiffe://acme?test/meters/7", lambda: certificate(METERS), False),
    "another case": ("URI:spiffe://ACME.test/meters/7", lambda: certificate(METERS), False),
    "the beginning": ("URI:spiffe://acme.test/meters", lambda: certificate(METERS), False),
    "two URIs": (
        "URI:spiffe://acme.test/meters/7",
        lambda: certificate(METERS, URI("spiffe://x.test/y")),
        False,
    ),
    "the common name": ("CN:meter-*", certificate, True),
    "a common name is no URI": (
        "URI:spiffe://acme.test/meters/7",
        lambda: certificate(common=("spiffe://acme.test/meters/7",)),
        False,
    ),
    "a common name that begins as a URI": (
        "URI:x",
        lambda: certificate(common=("URI:x",)),
        False,
    ),
    "two common names": ("CN:meter-1", lambda: certificate(common=("meter-1", "b")), False),
    "no common name": ("CN:*", lambda: certificate(common=()), False),
    "a host": ("DNS:a.acme.test", lambda: certificate(DNS("a.acme.test")), True),
}


@pytest.mark.parametrize("what", CASES)
def test_a_rule_fits_whole_names_of_its_kind(what: str):
    match, make, fits = CASES[what]
    assert tenant_of(make(), match) == ("0" if fits else None)


def test_the_first_rule_that_fits_says_it():
    assert tenant_of(certificate(METERS), "CN:other", "CN:*", "URI:*://*/*/*") == "1"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("CN:*", "CN:*"),
        ("CN:*", "CN:other"),
        ("CN:*", "URI:spiffe://acme.test/meters/*"),
        ("CN:*", "URI:spiffe://acme.test/meters/*=another"),
        ("URI:spiffe://acme.test/meters/*", "CN:*=another"),
    ],
)
def test_what_new_rules_say_of_a_certificate_counts_whichever_name_they_fit(
    before: str, after: str
):
    """A stream ends unless the same certificate proves as much now."""

    def mapping(*texts: str) -> CertificateMapping:
        parts = (text.partition("=") for text in texts)
        return CertificateMapping(
            [CertificateRule(match, tenant or "acme", READ) for match, _, tenant in parts]
        )

    pem = certificate(METERS, DNS("a b.test"))
    identity = mapping(before).find(pem)
    assert identity is not None
    for rules in ((after,), (after, before)):
        new = mapping(*rules)
        now = new.find(pem)
        assert new.is_usable(identity) is (now is not None and now.tenant == "acme")


def test_an_identity_has_the_name_of_its_rule_or_of_its_certificate():
    rules = [
        CertificateRule("URI:spiffe://acme.test/meters/*", "acme", READ),
        CertificateRule("CN:*", "acme", READ, "others"),
    ]
    mapping = CertificateMapping(rules)
    by_uri, by_common_name = mapping.find(certificate(METERS)), mapping.find(certificate())
    assert by_uri is not None
    assert by_common_name is not None
    assert by_uri.name == "cert:URI:spiffe://acme.test/meters/7"
    assert by_common_name.name == "cert:others"
    assert by_uri.expires_at == pytest.approx(datetime.now(UTC).timestamp() + 86_400, abs=60)


@pytest.mark.parametrize("data", [b"", b"x", certificate()[:100]], ids=["empty", "other", "cut"])
def test_what_is_no_certificate_has_no_identity(data: bytes):
    assert tenant_of(data, "CN:*") is None


@pytest.mark.parametrize(
    ("match", "tenant", "scopes"),
    [("meters", "acme", READ), ("CN:", "acme", READ), ("CN:a", "A", READ), ("CN:a", "a", ())],
)
def test_a_rule_that_means_nothing_is_refused(match: str, tenant: str, scopes: frozenset[Scope]):
    with pytest.raises(ValueError, match=r"match|tenant|scopes"):
        CertificateRule(match, tenant, frozenset(scopes))


def context(pem: bytes) -> dict[str, list[bytes]]:
    return {"x509_pem_cert": [pem]}


async def test_a_token_comes_first_and_a_wrong_one_is_not_made_up_for(tmp_path: Path):
    file = tmp_path / "tokens.json"
    text = token(file, "bearer")
    mapping = CertificateMapping([CertificateRule("CN:*", "acme", READ)])
    credentials = Credentials(tokens=TokenFile(str(file)), certificates=mapping)
    pem = certificate()

    def name(*authorization: str) -> str | None:
        identity = credentials.known(authorization, context(pem))
        return None if identity is None else identity.name.partition("#")[0]

    assert name() == "cert:CN:meter-1"
    assert name(f"Bearer {text}") == "bearer"
    for wrong in (f"Bearer {make_token()}", "Bearer x", "Basic x", "", f"Bearer {text} {text}"):
        assert name(wrong) is None
        with pytest.raises(Unauthenticated):
            await credentials.verify([wrong], context(pem), "client")


async def test_certificates_that_prove_nothing_say_why():
    mapping = CertificateMapping([CertificateRule("CN:meter-*", "acme", READ)])
    credentials = Credentials(certificates=mapping)
    for auth_context, cause in (
        ({}, "missing"),
        (context(certificate(common=("other",))), "unmapped_certificate"),
        (context(certificate(days=-1)), "expired"),
    ):
        assert credentials.known([], auth_context) is None
        with pytest.raises(Unauthenticated) as refused:
            await credentials.verify([], auth_context, "client")
        assert refused.value.cause == cause
