"""The synchronous client's connection: unary calls with retries, and what needs no session."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import ClassVar, Self, TypeVar

import grpc

from stepstate.client._connection import BaseConnection
from stepstate.client._protocol import calls
from stepstate.client.types import ModelInfo, SessionInfo, TenantUsage
from stepstate.errors import ServerUnreachable, SessionExists
from stepstate.v1 import stepstate_pb2 as pb

R = TypeVar("R")


class Connection(BaseConnection):
    """A connection to a server; threads may share it."""

    _grpc: ClassVar[ModuleType] = grpc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()

    def disconnect(self) -> None:
        self._disconnected = True
        self._channel.close()

    def call(self, rpc: Callable[..., R], request: object, timeout: float | None = None) -> R:
        attempts = self._attempts(timeout)
        while True:
            connected = self._connected(attempts.connect_seconds)
            error_of = self.call_errors.begin()
            try:
                reply = rpc(request, timeout=attempts.left(connected=connected))
            except grpc.RpcError as failure:
                error = error_of(failure)
            else:
                attempts.answered()
                return reply
            try:
                delay = attempts.wait(error)
            except ServerUnreachable as last:
                raise self._explained(last) from None
            time.sleep(delay)

    def info(self, session_id: str) -> SessionInfo:
        return ask(self, calls.get_session(session_id))

    def sessions(self, model: str = "", *, show_expired: bool = False) -> Iterator[SessionInfo]:
        return self._all(calls.list_sessions(model, show_expired=show_expired))

    def close(self, session_id: str) -> SessionInfo:
        return ask(self, calls.close_session(session_id))

    def reset_accuracy(self, session_id: str) -> SessionInfo:
        return ask(self, calls.reset_accuracy(session_id))

    def export(self, session_id: str) -> bytes:
        def joined(request: object, timeout: float) -> bytes:
            replies = self.stub.StreamExport(request, timeout=timeout)
            return b"".join(reply.data for reply in replies)

        return self.call(joined, pb.StreamExportRequest(session_id=session_id))

    def models(self) -> list[ModelInfo]:
        return list(self._all(calls.list_models()))

    def tenants(self) -> list[TenantUsage]:
        return list(self._all(calls.list_tenants()))

    def model(self, name: str = "", version: str = "") -> ModelInfo:
        known = self._models.get((name, version))
        if known is None:
            known = ask(self, calls.get_model(name, version))
            if version:  # without one it is the newest, which may change
                self._models[name, version] = known
        return known

    def _all(self, first: calls.UnaryCall[calls.ListPage[R]]) -> Iterator[R]:
        """What a list has, page by page."""
        call: calls.UnaryCall[calls.ListPage[R]] | None = first
        while call is not None:
            page = ask(self, call)
            yield from page.items
            call = page.next

    def _connected(self, seconds: float | None) -> bool:
        """Waits for the first connection; returns whether it came in time."""
        if seconds is None:
            return True
        ready = grpc.channel_ready_future(self._channel)
        try:
            ready.result(timeout=seconds)
        except grpc.FutureTimeoutError:
            return False
        finally:
            ready.cancel()
        return True


def ask(connection: Connection, call: calls.UnaryCall[R], timeout: float | None = None) -> R:
    """Makes a call, and reads its reply.

    Raises:
        StepstateError: as the server answered.
        Unavailable: no answer in time.
    """
    rpc: Callable[..., object] = getattr(connection.stub, call.rpc)
    try:
        return call.read(connection.call(rpc, call.request, timeout))
    except SessionExists:
        if call.if_exists is None:
            raise
        return ask(connection, call.if_exists, timeout)
