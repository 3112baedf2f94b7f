"""Who makes a call, and on whose sessions it acts.

Authentication is one call of an `Authenticator` before anything else is done for an RPC, on both
transports and for every API. What a method needs is in `METHODS`.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from stepstate.auth import Credentials
from stepstate.errors import InvalidField, PermissionDenied
from stepstate.identity import (
    ANONYMOUS,
    TENANT_GRAMMAR,
    UNIDENTIFIED,
    Identity,
    Scope,
    SessionKey,
    is_tenant,
    session_key,
)
from stepstate.transport.addresses import Network, client_name, network_of
from stepstate.transport.methods import METHODS

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

CREDENTIAL_KEY = "authorization"
"""Metadata that have a token: "Bearer TOKEN"."""
TENANT_KEY = "x-stepstate-tenant"
"""Metadata in which an admin names the tenant on whose sessions a call is to act."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who makes a call, and on whose sessions it acts."""

    identity: Identity
    tenant: str

    @property
    def acts_for_another(self) -> bool:
        """Whether it acts on the sessions of another tenant than its own, as an admin may."""
        return self.tenant != self.identity.tenant

    def key(self, session_id: str) -> SessionKey:
        """The key of the session that this principal means by an id."""
        return session_key(self.tenant, session_id)


NOBODY = Principal(ANONYMOUS, ANONYMOUS.tenant)
STRANGER = Principal(UNIDENTIFIED, UNIDENTIFIED.tenant)
"""Makes calls that need no credential, and those that are refused for theirs."""
current_principal: ContextVar[Principal] = ContextVar("current_principal", default=NOBODY)
"""The principal of the RPC that this task serves."""


class Authenticator(Protocol):
    """Knows who makes a call."""

    async def identify(self, context: Context) -> Identity:
        """The identity that a call's credentials prove.

        Raises:
            Unauthenticated: there are none, or they prove nothing.
            TooManyAuthFailures, KeysUnavailable: they can't be checked now.
        """
        ...


class NoAuthentication:
    """Of a server without identities: everyone is `ANONYMOUS`."""

    async def identify(self, context: Context) -> Identity:  # noqa: ARG002 - nothing is asked
        """See `Authenticator`."""
        return ANONYMOUS


class CredentialAuthenticator:
    """Of a server with identities.

    Args:
        credentials: knows what proves what.
        trusted_proxies: networks of proxies that say whose calls they forward.
    """

    def __init__(self, credentials: Credentials, trusted_proxies: tuple[Network, ...] = ()) -> None:
        self._credentials = credentials
        self._trusted = trusted_proxies

    async def identify(self, context: Context) -> Identity:
        """See `Authenticator`."""
        metadata = context.invocation_metadata() or ()
        authorization = [value for key, value in metadata if key == CREDENTIAL_KEY]
        auth_context = {} if authorization else context.auth_context()
        known = self._credentials.known(authorization, auth_context)
        if known is not None:
            return known
        client = network_of(client_name(context.peer(), tuple(metadata), self._trusted))
        return await self._credentials.verify(authorization, auth_context, client)


async def authenticate(authenticator: Authenticator, context: Context, method: str) -> None:
    """Sets `current_principal` to who makes a call, if it may; else to `STRANGER`.

    Args:
        authenticator: knows who it is.
        context: of the call.
        method: the name of its RPC.

    Raises:
        Unauthenticated: its credentials prove nothing.
        TooManyAuthFailures, KeysUnavailable: they can't be checked now.
        PermissionDenied: it lacks a scope.
        InvalidField: it names what is no tenant.
    """
    needed = METHODS[method].scopes
    if not isinstance(authenticator, NoAuthentication):
        current_principal.set(STRANGER)
    if not needed:
        return
    identity = await authenticator.identify(context)
    tenant = _named_tenant(context)
    if tenant is None or tenant == identity.tenant:
        tenant = identity.tenant
    else:
        needed |= {Scope.ADMIN}
    missing = needed - identity.scopes
    if missing:
        raise PermissionDenied(identity.name, ", ".join(sorted(missing)))
    current_principal.set(Principal(identity, tenant))


def _named_tenant(context: Context) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == TENANT_KEY:
            tenant = str(value)
            if not is_tenant(tenant):
                raise InvalidField(TENANT_KEY, f"is no name of a tenant: {TENANT_GRAMMAR}")
            return tenant
    return None
