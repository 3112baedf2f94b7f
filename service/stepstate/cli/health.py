"""`stepstate health`: the standard health check, for containers."""

from __future__ import annotations

import sys

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stepstate.cli.options import option, server_option


@click.command("health")
@server_option
@option("--service", "", str, "Of what: the server, or stepstate.store, its store of sessions.")
@option("--timeout", 3.0, float, "Seconds to wait for the answer.")
def health_command(server: str, service: str, timeout: float) -> None:
    """Asks grpc.health.v1 whether the server serves; exit status 0 if it does."""
    with grpc.insecure_channel(server) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout)
        except grpc.RpcError as error:
            raise click.ClickException(f"no answer from {server}: {error.details()}") from error
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    click.echo(name)
    sys.exit(0 if name == "SERVING" else 1)
