"""Who calls, and whose sessions a call may see.

An identity belongs to one tenant, and a session to the tenant that opened it. Ids are unique within
a tenant only, so everything below the APIs names a session by its *key*, which `session_key` makes
of both. The type `SessionKey` lets mypy find every path on which that was forgotten.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

DEFAULT_TENANT = "default"
"""Has the sessions of servers without identities, and those of earlier versions."""
_SEPARATOR = "/"
"""In no name of a tenant and in no valid id."""

TENANT_GRAMMAR = "a-z, 0-9, '.', '_' and '-', at most 63, the first a letter or digit"
"""Of the name of a tenant: it is part of keys in stores, and of labels in metrics."""
_TENANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")

SessionKey = NewType("SessionKey", str)
"""A session's name within the server: "TENANT/ID", or the id alone for the default tenant."""


class Scope(StrEnum):
    """What an identity may do."""

    STEP = "step"
    """Open, step, change and close the sessions of its tenant."""
    READ = "read"
    """Look at them, forecast and export them."""
    ADMIN = "admin"
    """Name another tenant, and do there what its other scopes allow."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who calls, as its credential proves."""

    name: str
    """For audit and logs; never secret."""
    tenant: str
    scopes: frozenset[Scope]
    expires_at: float | None = None
    """When its credential does, in Unix seconds; None: never."""
    credential: str = ""
    """Names its credential, so that it can be found revoked; never secret."""


ANONYMOUS = Identity("anonymous", DEFAULT_TENANT, frozenset(Scope))
"""Everyone, on a server that knows no identities."""
UNIDENTIFIED = Identity("unidentified", "", frozenset())
"""Whoever has proved nothing, on a server that knows identities: of no tenant."""


def is_tenant(name: str) -> bool:
    """Whether a text can be the name of a tenant: see `TENANT_GRAMMAR`."""
    return _TENANT.fullmatch(name) is not None


def session_key(tenant: str, session_id: str) -> SessionKey:
    """The key of a tenant's session. Different sessions have different keys, whatever the id is.

    An id that no session can have makes a key that no session has.
    """
    if tenant == DEFAULT_TENANT and _SEPARATOR not in session_id:
        return SessionKey(session_id)
    return SessionKey(f"{tenant}{_SEPARATOR}{session_id}")


def id_of(key: SessionKey) -> str:
    """The id that a key was made of: what a client calls the session."""
    return split_key(key)[1]


def split_key(key: SessionKey) -> tuple[str, str]:
    """The tenant and the id that a key was made of."""
    tenant, separator, session_id = key.partition(_SEPARATOR)
    return (tenant, session_id) if separator else (DEFAULT_TENANT, key)
