"""The standard health service (grpc.health.v1), whose callers can't hold each other up.

grpcio-health-checking has one too. There a watch holds a lock of its service while it writes: one
client that reads nothing stops every change of a status, and so the drain. And each watch that ends
cuts off the others of its service.

Rule 1: a change of a status waits for nobody.
Rule 2: a watch is told the status of now. It is not told what has passed while its client took
        nothing, so that nothing piles up.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeAlias

import grpc
from grpc_health.v1.health_pb2 import DESCRIPTOR, HealthCheckRequest, HealthCheckResponse

from stepstate.transport.registration import add_service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from stepstate.transport.peers import Context

SERVICE = DESCRIPTOR.services_by_name["Health"]
Status: TypeAlias = HealthCheckResponse.ServingStatus


class HealthService:
    """The health of the server (the service with the empty name), and of its services."""

    def __init__(self) -> None:
        self._statuses: dict[str, Status] = {}
        self._changed = asyncio.Event()  # each is set once: when something changes
        self._shut_down = False

    def set(self, service: str, status: Status) -> None:
        """Changes the status of a service, unless `shut_down` was called."""
        if not self._shut_down:
            self._statuses[service] = status
            self._changed.set()
            self._changed = asyncio.Event()

    def shut_down(self) -> None:
        """Sets all services to NOT_SERVING, for good."""
        for service in self._statuses:
            self.set(service, HealthCheckResponse.NOT_SERVING)
        self._shut_down = True

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers it."""
        add_service(server, SERVICE, self, lambda request: request.FromString)

    async def Check(self, request: HealthCheckRequest, context: Context) -> HealthCheckResponse:
        """See the contract: NOT_FOUND for a service that is not known."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service is known here")
        return HealthCheckResponse(status=status)

    async def Watch(
        self, request: HealthCheckRequest, context: Context
    ) -> AsyncIterator[HealthCheckResponse]:
        """See the contract: SERVICE_UNKNOWN for a service that is not known, which may change."""
        told: Status | None = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, HealthCheckResponse.SERVICE_UNKNOWN)
            if status != told:
                yield HealthCheckResponse(status=status)
                told = status
            else:
                await changed.wait()
