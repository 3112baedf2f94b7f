"""Who has a client certificate, by a list of rules. TLS has verified the certificate before."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from cryptography import x509
from cryptography.x509.oid import NameOID

from stepstate.errors import Unauthenticated
from stepstate.identity import TENANT_GRAMMAR, Identity, Scope, is_tenant

MAX_KNOWN = 4096
"""Certificates that are known by their bytes, of 2 KiB each."""
_MATCH = re.compile(r"(URI|DNS|CN):(.+)")


@dataclass(frozen=True, slots=True)
class CertificateRule:
    """Whose are the certificates that have a certain name.

    Args:
        match: the name: "URI:spiffe://example.org/meters/*", "DNS:meters.example.org" or
            "CN:meter-*", the common name of the subject. A * stands for anything but "/".
        tenant: whose sessions they work on.
        scopes: what they may do.
        identity: their name in logs; empty: the name in the certificate.

    Raises:
        ValueError: one of them is not valid.
    """

    match: str
    tenant: str
    scopes: frozenset[Scope]
    identity: str = ""

    def __post_init__(self) -> None:
        if _MATCH.fullmatch(self.match) is None:
            raise ValueError(f"match is {self.match!r}, expected URI:…, DNS:… or CN:…")
        if not is_tenant(self.tenant):
            raise ValueError(f"tenant is {self.tenant!r}, expected {TENANT_GRAMMAR}")
        if not self.scopes:
            raise ValueError("scopes are missing")

    def fits(self, name: str) -> bool:
        """Whether a name, such as "CN:meter-1", is one of those that are meant."""
        pattern = "[^/]*".join(map(re.escape, self.match.split("*")))
        return re.fullmatch(pattern, name) is not None


class CertificateMapping:
    """Knows who has a certificate: the first rule that fits one of its names says it.

    Args:
        rules: in the order in which they are tried.
    """

    def __init__(self, rules: Sequence[CertificateRule]) -> None:
        self._rules = tuple(rules)
        self._known = lru_cache(MAX_KNOWN)(self._identity_of)

    def find(self, pem: bytes) -> Identity | None:
        """The identity of a certificate; None: no rule fits."""
        return self._known(pem)

    def verify(self, pem: bytes) -> Identity:
        """The identity of a certificate.

        Raises:
            Unauthenticated: no rule fits.
        """
        identity = self._known(pem)
        if identity is None:
            raise Unauthenticated(
                "the names in the client's certificate belong to no identity here",
                "unmapped_certificate",
            )
        return identity

    def is_usable(self, identity: Identity) -> bool:
        """Whether the certificate that proved an identity still proves as much."""
        found = self._rule_for(json.loads(identity.credential.partition(" ")[2]))
        if found is None:
            return False
        rule, _ = found
        return rule.tenant == identity.tenant and identity.scopes <= rule.scopes

    def _identity_of(self, pem: bytes) -> Identity | None:
        try:
            certificate = x509.load_pem_x509_certificate(pem)
            names = tuple(_names(certificate))
        except Exception:  # noqa: BLE001 - cryptography raises many kinds for what OpenSSL takes
            return None
        found = self._rule_for(names)
        if found is None:
            return None
        rule, name = found
        return Identity(
            f"cert:{rule.identity or name}",
            rule.tenant,
            rule.scopes,
            expires_at=certificate.not_valid_after_utc.timestamp(),
            credential=f"certificate {json.dumps(names)}",
        )

    def _rule_for(self, names: Sequence[str]) -> tuple[CertificateRule, str] | None:
        """The first rule that fits one of the names of a certificate, and that name."""
        fitting = ((rule, name) for rule in self._rules for name in names if rule.fits(name))
        return next(fitting, None)


def _names(certificate: x509.Certificate) -> Iterator[str]:
    """What a certificate is called: "URI:…", "DNS:…", "CN:…".

    Of several URIs none counts: a SPIFFE identity has exactly one (SPIFFE's X509-SVID, section 2).
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName(())
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) == 1:
        yield f"URI:{uris[0]}"
    yield from (f"DNS:{name}" for name in names.get_values_for_type(x509.DNSName))
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(common) == 1:
        yield f"CN:{common[0].value!s}"
