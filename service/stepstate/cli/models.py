"""`stepstate models`: what a server has loaded, and an example to start with."""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path

import click

from stepstate.cli.common import ServerOptions, connect, server_options
from stepstate.client import ModelInfo

EXAMPLE = "electricity/2"


@click.group("models", invoke_without_command=True)
@server_options
@click.pass_context
def models_group(ctx: click.Context, server: ServerOptions) -> None:
    """Prints the models that a server has loaded, with their inputs and outputs."""
    if ctx.invoked_subcommand is not None:
        return
    with connect(server) as client:
        for model in client.models():
            _print(model)


@models_group.command("example")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default="models")
def example_command(folder: Path) -> None:
    """Writes the example model to FOLDER (default: models), for `stepstate serve`.

    It forecasts the electricity demand of England and Wales, half an hour to a day ahead.
    """
    target = folder / EXAMPLE
    if target.exists():
        raise click.ClickException(f"{target} is there already; nothing was written")
    with as_file(files("stepstate") / "examples" / EXAMPLE) as source:
        shutil.copytree(source, target)
    click.echo(f"{target} is written: stepstate serve --models {folder}")


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
