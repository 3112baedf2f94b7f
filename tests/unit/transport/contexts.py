"""Calls without gRPC: what it says of one, and servers that are called directly."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stepstate.budget import MemoryBudget
from stepstate.identity import Identity, Scope
from stepstate.transport import Backend, CallAdmission, ExpectedRows, PeerTable
from stepstate.transport.authentication import Principal, current_principal
from stepstate.transport.methods import STREAM

if TYPE_CHECKING:
    from tests.unit.rig import Rig


class CallContext:
    """A call of a peer; it ends when a test says so."""

    def __init__(self, peer: str, *, forwarded_for: str | None = None) -> None:
        self._peer = peer
        self._metadata = () if forwarded_for is None else (("x-forwarded-for", forwarded_for),)
        self._callbacks: list[Callable[[object], None]] = []

    def peer(self) -> str:
        return self._peer

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def when_done(self, callback: Callable[[object], None]) -> None:
        self._callbacks.append(callback)

    def end(self) -> None:
        for callback in self._callbacks:
            callback(self)


def be_of_tenant(name: str) -> None:
    """The calls that this task and those it starts join from now on are a tenant's."""
    current_principal.set(Principal(Identity("somebody", name, frozenset(Scope)), name))


def called(rig: Rig) -> Backend:
    """What serves the sessions of a rig, in a call of which this task and those it starts are."""
    admission = CallAdmission(PeerTable(rig.memory, MemoryBudget(2**20)), rig.metrics)
    context = CallContext("peer")
    admission.begin(context, STREAM, context.when_done)
    return Backend(rig.sessions, rig.metrics, admission, ExpectedRows(rig.sessions.table.limit))
