"""Who calls: bearer tokens, JWTs and client certificates, as values. It knows no gRPC."""

from stepstate.auth.certificates import CertificateMapping, CertificateRule
from stepstate.auth.credentials import MAX_CREDENTIAL_BYTES, AuthContext, Credentials
from stepstate.auth.signing_keys import KeyFile, KeyRing, KeyUrl
from stepstate.auth.token_file import TokenFile, change_tokens, read_tokens
from stepstate.auth.tokens import TokenRecord, digest_of, is_token, make_token
from stepstate.auth.web_tokens import JwtSettings, WebTokens

__all__ = [
    "MAX_CREDENTIAL_BYTES",
    "AuthContext",
    "CertificateMapping",
    "CertificateRule",
    "Credentials",
    "JwtSettings",
    "KeyFile",
    "KeyRing",
    "KeyUrl",
    "TokenFile",
    "TokenRecord",
    "WebTokens",
    "change_tokens",
    "digest_of",
    "is_token",
    "make_token",
    "read_tokens",
]
