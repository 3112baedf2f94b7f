"""Who makes a call, on whose sessions it may act, and whose failures count together."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from stepstate.auth import Credentials
from stepstate.errors import (
    InvalidField,
    PermissionDenied,
    StepstateError,
    TooManyAuthFailures,
    Unauthenticated,
)
from stepstate.identity import ANONYMOUS, Identity, Scope
from stepstate.transport.authentication import (
    NOBODY,
    STRANGER,
    CredentialAuthenticator,
    NoAuthentication,
    Principal,
    authenticate,
    current_principal,
)
from stepstate.transport.methods import METHODS

ADMIN, READ, STEP = Scope.ADMIN, Scope.READ, Scope.STEP


class Call:
    """What a server sees of a call."""

    def __init__(self, *metadata: tuple[str, str], peer: str = "ipv4:10.0.0.7:50000") -> None:
        self._metadata = metadata
        self._peer = peer

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def peer(self) -> str:
        return self._peer


class Known:
    """Knows everyone as one identity."""

    def __init__(self, *scopes: Scope) -> None:
        self.identity = Identity("ci", "acme", frozenset(scopes))

    async def identify(self, context: Call) -> Identity:
        return self.identity


async def principal(authenticator: object, method: str, *metadata: tuple[str, str]) -> Principal:
    await authenticate(authenticator, Call(*metadata), method)
    return current_principal.get()


@pytest.fixture(autouse=True)
def own_context():
    token = current_principal.set(NOBODY)
    yield
    current_principal.reset(token)


@pytest.mark.parametrize(
    ("scopes", "method", "tenant", "missing"),
    [
        ((READ,), "GetSession", None, ""),
        ((READ,), "Step", None, "step"),
        ((STEP,), "Forecast", None, "read"),
        ((), "ListModels", None, "read"),
        ((READ, STEP), "GetSession", "acme", ""),
        ((READ, STEP), "GetSession", "other", "admin"),
        ((ADMIN, READ), "GetSession", "other", ""),
        ((ADMIN,), "GetSession", "other", "read"),
        ((ADMIN,), "Step", None, "step"),
        ((), "Step", "other", "admin, step"),
        ((), "Check", None, ""),
    ],
)
async def test_a_call_needs_the_scopes_of_its_method(scopes, method, tenant, missing):
    metadata = [("x-stepstate-tenant", tenant)] if tenant else []
    if missing:
        with pytest.raises(PermissionDenied) as refused:
            await principal(Known(*scopes), method, *metadata)
        assert refused.value.missing == missing
        assert current_principal.get() is STRANGER
    elif method == "Check":  # nobody is asked
        assert await principal(Known(*scopes), method) is STRANGER
    else:
        found = await principal(Known(*scopes), method, *metadata)
        assert (found.identity.name, found.tenant) == ("ci", tenant or "acme")


@pytest.mark.parametrize("name", ["", "Acme", "a/b", "-a", "a" * 64, "a b", "ä", "a\n"])
async def test_what_is_no_tenant_is_refused(name: str):
    for authenticator in (Known(ADMIN, READ), NoAuthentication()):
        with pytest.raises(InvalidField, match="x-stepstate-tenant: is no name of a tenant"):
            await principal(authenticator, "GetSession", ("x-stepstate-tenant", name))


async def test_without_identities_everyone_is_anonymous_and_may_do_all():
    for method in METHODS:
        found = await principal(NoAuthentication(), method)
        assert (found.identity, found.tenant) == (ANONYMOUS, "default")


async def refusal(authenticator: CredentialAuthenticator, call: Call) -> type[StepstateError]:
    with pytest.raises((Unauthenticated, TooManyAuthFailures)) as refused:
        await authenticator.identify(call)
    return type(refused.value)


TOGETHER = {
    "ports of an address": ("ipv4:10.0.0.7:1", "ipv4:10.0.0.7:2"),
    "IPv4 within IPv6": ("ipv4:10.0.0.7:1", "ipv6:[::ffff:10.0.0.7]:1"),
    "a network of IPv6": ("ipv6:[2001:db8::1]:1", "ipv6:%5B2001:db8:0:0:9::2%5D:1"),
}
APART = {
    "addresses": ("ipv4:10.0.0.7:1", "ipv4:10.0.0.8:1"),
    "networks of IPv6": ("ipv6:[2001:db8::1]:1", "ipv6:[2001:db8:0:1::1]:1"),
}


@pytest.mark.parametrize("what", [*TOGETHER, *APART])
async def test_failures_of_one_client_count_together(what: str):
    first, second = (TOGETHER | APART)[what]
    authenticator = CredentialAuthenticator(Credentials())
    while await refusal(authenticator, Call(peer=first)) is Unauthenticated:
        pass
    wanted = TooManyAuthFailures if what in TOGETHER else Unauthenticated
    assert await refusal(authenticator, Call(peer=second)) is wanted


async def test_failures_behind_a_proxy_are_those_of_its_clients():
    authenticator = CredentialAuthenticator(Credentials(), (ip_network("10.0.0.7"),))

    async def of(address: str) -> type[StepstateError]:
        return await refusal(authenticator, Call(("x-forwarded-for", address)))

    while await of("2001:db8::1") is Unauthenticated:
        pass
    assert await of("2001:db8::2") is TooManyAuthFailures
    assert await of("2001:db8:0:1::2") is Unauthenticated
