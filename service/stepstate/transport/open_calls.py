"""Open calls that last, and how they end when the credential that began them ends.

A call is asked for its credential once, when it begins. Those that last as long as their client
likes, streams and calls whose request has not come, are asked again, together, every second: rows
on an open stream cost nothing.

What a stream had accepted by then is answered before it ends; only if its client does not take the
replies within `GRACE_SECONDS`, it is cut, and accepted rows are as after any lost connection.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from stepstate.errors import StepstateError
from stepstate.h2grpc import Call
from stepstate.identity import Identity
from stepstate.transport.authentication import current_principal

GRACE_SECONDS = 2.0
"""For the replies to what was accepted."""


class OpenCall:
    """A call that can be ended from outside.

    Args:
        scope: cancels its task.
    """

    __slots__ = ("_finish", "_scope", "error")

    def __init__(self, scope: asyncio.Timeout) -> None:
        self._scope: asyncio.Timeout | None = scope
        self._finish: Callable[[StepstateError], None] | None = None
        self.error: StepstateError | None = None
        """What it ends with; None: it goes on."""

    def finish_with(self, finish: Callable[[StepstateError], None]) -> None:
        """Has a function called that ends the call when what it accepted is answered."""
        self._finish = finish
        if self.error is not None:
            finish(self.error)

    def end(self, error: StepstateError) -> None:
        """Ends the call: soon, and in any case after `GRACE_SECONDS`."""
        self.error = error
        patience = 0.0
        if self._finish is not None:
            self._finish(error)
            patience = GRACE_SECONDS
        if self._scope is not None:
            self._scope.reschedule(asyncio.get_running_loop().time() + patience)

    def close(self) -> None:
        """The call has ended: nothing refers to its task.

        Otherwise the task, which has this in its context, would be left to the cycle collector: 50
        ms of the event loop for each 30,000 objects.
        """
        self._scope = self._finish = None


current_call: ContextVar[OpenCall | None] = ContextVar("current_call", default=None)
"""The call that this task serves, if it can be ended from outside."""


class OpenCalls:
    """The calls that last, by the identity that began them."""

    def __init__(self) -> None:
        self._calls: defaultdict[Identity, set[OpenCall]] = defaultdict(set)

    def until_credential_ends(
        self, serve: Callable[[Any], Awaitable[Any]]
    ) -> Callable[[Any], Awaitable[Any]]:
        """A function that serves a call, until the credential of the call ends."""

        async def until_ended(context: Any) -> Any:
            identity = current_principal.get().identity
            if not identity.credential:
                return await serve(context)
            scope = asyncio.timeout(None)
            call = OpenCall(scope)
            self._calls[identity].add(call)
            current_call.set(call)
            try:
                async with scope:
                    return await serve(context)
            except TimeoutError:
                if not scope.expired() or call.error is None:
                    raise
                if isinstance(context, Call):  # grpcio's drops them itself
                    context.drop_responses()
                raise call.error from None
            finally:
                self._forget(identity, call)
                call.close()

        return until_ended

    def end_where(self, problem_of: Callable[[Identity], StepstateError | None]) -> None:
        """Ends the calls of identities that have a problem."""
        for identity, calls in list(self._calls.items()):
            while calls and (problem := problem_of(identity)) is not None:
                calls.pop().end(problem)  # an error of its own for each

    def _forget(self, identity: Identity, call: OpenCall) -> None:
        self._calls[identity].discard(call)
        if not self._calls[identity]:
            del self._calls[identity]
