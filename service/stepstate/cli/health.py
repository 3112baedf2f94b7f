"""`stepstate health`: the standard health check, for containers."""

from __future__ import annotations

import sys

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stepstate.cli.common import ServerOptions, option, server_options
from stepstate.client.diagnosis import why_unreachable
from stepstate.client.security import endpoint_of
from stepstate.errors import InvalidField


@click.command("health")
@server_options
@option("--service", "", str, "Empty: the server. stepstate.store: its store.")
@option("--timeout", 3.0, float, "Seconds to wait for a reply.")
def health_command(server: ServerOptions, service: str, timeout: float) -> None:
    """Asks grpc.health.v1 whether the server is serving. The exit status is 0 if it is."""
    try:
        endpoint = endpoint_of(server.target, tls=server.tls())
    except InvalidField as error:
        raise click.ClickException(str(error)) from error
    with endpoint.channel(grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout)
        except grpc.RpcError as error:
            detail = str(error.details())
            raise click.ClickException(
                f"no answer from {server.target}: {detail} ({why_unreachable(endpoint, detail)})"
            ) from error
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    click.echo(name)
    sys.exit(0 if name == "SERVING" else 1)
