"""Two tenants on one server, before anything is proved: each caller says which one it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepstate.errors import Unauthenticated
from stepstate.identity import DEFAULT_TENANT, Identity, Scope

if TYPE_CHECKING:
    import grpc

CREDENTIAL_KEY = "authorization"
_SCHEME = "Tenant "
_ALL = ",".join(Scope)


class SaidTenants:
    """An `Authenticator` that believes the tenant and the scopes that a call's metadata names.

    A call without them is one of the default tenant, with all scopes.
    """

    async def identify(self, context: grpc.aio.ServicerContext[Any, Any]) -> Identity:
        """See `Authenticator`."""
        said = dict(context.invocation_metadata() or ()).get(CREDENTIAL_KEY)
        if said is None:
            return Identity("test", DEFAULT_TENANT, frozenset(Scope))
        if not str(said).startswith(_SCHEME):
            raise Unauthenticated("the test's credential is of another kind")
        tenant, _, scopes = str(said).removeprefix(_SCHEME).partition(" ")
        return Identity(f"test-{tenant}", tenant, frozenset(map(Scope, scopes.split(","))))


def as_tenant(tenant: str, scopes: str = _ALL) -> tuple[tuple[str, str], ...]:
    """The metadata of a call that is a tenant's."""
    return ((CREDENTIAL_KEY, f"{_SCHEME}{tenant} {scopes}"),)
