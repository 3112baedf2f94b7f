"""`stepstate tenants`: what the tenants of a server may use, and what they use."""

from __future__ import annotations

import click

from stepstate.cli.common import ServerOptions, connect, server_options
from stepstate.client import LimitUsage, TenantUsage

_RATES = ("rows_per_second", "forecasts_per_second")


@click.command("tenants")
@server_options
def tenants_command(server: ServerOptions) -> None:
    """Prints the tenants of a server: their limits, and what they use.

    It needs a credential with the scope admin. Of a limit that is not set, only the use is shown;
    of rates, how many rows and forecasts were asked for in all.
    """
    with connect(server) as client:
        for tenant in client.tenants():
            _print(tenant)


def _print(tenant: TenantUsage) -> None:
    click.echo(f"{tenant.name}  weight {tenant.weight:g}")
    for name, limit in tenant.limits.items():
        click.echo(f"  {name:<20} {_use(name, limit)}")


def _use(name: str, limit: LimitUsage) -> str:
    used = f"{limit.used:,.0f}" + (" in all" if name in _RATES else "")
    value = "no limit" if limit.value is None else f"limit {limit.value:,g}"
    refused = f", {limit.refused:,} refused" if limit.refused else ""
    return f"{used}, {value}{refused}"
