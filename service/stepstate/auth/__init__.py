"""Who calls: bearer tokens, JWTs and client certificates, as values. It knows no gRPC."""

from stepstate.auth.credentials import MAX_CREDENTIAL_BYTES, AuthContext, Credentials
from stepstate.auth.token_file import TokenFile, change_tokens, read_tokens
from stepstate.auth.tokens import TokenRecord, digest_of, is_token, make_token

__all__ = [
    "MAX_CREDENTIAL_BYTES",
    "AuthContext",
    "Credentials",
    "TokenFile",
    "TokenRecord",
    "change_tokens",
    "digest_of",
    "is_token",
    "make_token",
    "read_tokens",
]
