"""`stepstate models`: what the server has loaded."""

from __future__ import annotations

import click

from stepstate.cli.options import server_option
from stepstate.client import Client, ModelInfo
from stepstate.errors import StepstateError


@click.command("models")
@server_option
def models_command(server: str) -> None:
    """Prints the loaded models with their inputs and outputs."""
    try:
        with Client(server) as client:
            for model in client.models():
                _print(model)
    except StepstateError as error:
        raise click.ClickException(str(error)) from error


def _print(model: ModelInfo) -> None:
    click.echo(f"{model.name}/{model.version}  {model.description}")
    click.echo(f"  cell       {model.cell}, {model.num_layers} × {model.hidden_size} units")
    for name, unit in model.inputs.items():
        click.echo(f"  input      {name} [{unit or 'no unit'}]")
    for output in model.outputs:
        first, last = output.horizons[0], output.horizons[-1]
        ahead = f"{first} to {last}" if first != last else f"{first}"
        levels = ", ".join(f"{level:g}" for level in output.quantiles)
        click.echo(
            f"  output     {output.name} [{output.unit or 'no unit'}], {ahead} steps ahead"
            + (f", quantiles {levels}" if levels else "")
        )
    if model.step_interval is not None:
        click.echo(f"  interval   {model.step_interval}")
    if model.lag_rows:
        click.echo(f"  lags       reach back {model.lag_rows} rows")
    if model.tracked_horizons:
        click.echo(f"  tracked    {', '.join(map(str, model.tracked_horizons))} steps ahead")
    click.echo(f"  start_time {'needed' if model.needs_start_time else 'not needed'}")
    click.echo(f"  {model.fingerprint}")
