"""Tokens for tests: `token` adds one to a file, `bearer` is the metadata that carries it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from stepstate.auth import TokenRecord, change_tokens, digest_of, make_token
from stepstate.identity import DEFAULT_TENANT, Scope


def token(
    file: Path,
    identity: str = "tester",
    *,
    tenant: str = DEFAULT_TENANT,
    scopes: str = "step read",
    expires: datetime | None = None,
) -> str:
    """Makes a token, and adds it to the file of a server's `tokens_file`.

    >>> server = running_server(replace(config, tokens_file=str(file)))
    >>> client = AsyncClient(server.address, metadata=bearer(token(file)))
    """
    text = make_token()
    record = TokenRecord(
        identity=identity,
        tenant=tenant,
        scopes=tuple(Scope(scope) for scope in scopes.split()),
        created=datetime.now(UTC),
        expires=expires,
        sha256=digest_of(text),
    )
    change_tokens(str(file), lambda tokens: (*tokens, record))
    return text


def revoke(file: Path, text: str) -> None:
    """Revokes a token of a file."""
    change_tokens(
        str(file),
        lambda tokens: tuple(
            token.model_copy(update={"revoked": datetime.now(UTC)})
            if token.sha256 == digest_of(text)
            else token
            for token in tokens
        ),
    )


def bearer(text: str) -> tuple[tuple[str, str], ...]:
    """The metadata that carry a credential."""
    return (("authorization", f"Bearer {text}"),)
