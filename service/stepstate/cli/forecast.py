"""`stepstate forecast`: a session's forecast, as a table, CSV, JSON lines or a plot."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from stepstate.cli.common import (
    ServerOptions,
    connect,
    format_options,
    server_options,
    short,
    without_nan,
)
from stepstate.cli.plot import plot_forecasts
from stepstate.cli.rows import BadRow, Format, RowReader, whole
from stepstate.client import Forecast, ModelInfo, OutputForecast, TimedRows

Scenarios = dict[str, list[list[float]] | TimedRows]


def _levels(_context: click.Context, _parameter: click.Parameter, value: str) -> list[float]:
    """Quantile levels separated by commas."""
    try:
        return [float(part) for part in value.split(",")] if value else []
    except ValueError as error:
        raise click.BadParameter(
            f"{value!r}: expected numbers separated by commas, such as 0.05,0.5,0.95"
        ) from error


@click.command("forecast")
@server_options
@click.argument("session_id")
@click.option(
    "--horizon",
    type=click.IntRange(min=1),
    help="Steps ahead. Default: the longest horizon of the model.",
)
@click.option(
    "--quantiles",
    default="",
    callback=_levels,
    help="Levels, such as 0.05,0.5,0.95. Default: the bounds of the interval and the median.",
)
@click.option(
    "--scenario",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A CSV file with rows of a scenario, named after the file. Can be given several times.",
)
@format_options
@click.option(
    "--output",
    type=click.Choice(["table", "csv", "jsonl"]),
    default="table",
    show_default=True,
    help="A table, CSV with a header, or JSON lines.",
)
@click.option(
    "--plot/--no-plot", default=None, help="Also draw a plot. Default: only on a terminal."
)
def forecast_command(
    server: ServerOptions,
    session_id: str,
    horizon: int | None,
    quantiles: Sequence[float],
    files: Sequence[Path],
    delimiter: str,
    time_column: str,
    output: str,
    *,
    plot: bool | None,
) -> None:
    """Forecasts the next rows of a session. The session does not change.

    The file of a scenario has one line per step. If its first line holds names it is a header,
    and columns may be missing. The model's own forecast is used for empty cells, and after the
    last row. A column named time has the times from the session's next row on; the model's own
    forecast is also used for rows that are missing in between.
    """
    if plot and output != "table":
        raise click.UsageError(f"--plot draws below a table: leave out --output {output}")
    with connect(server) as client:
        session = client.session(session_id)
        scenarios = _scenarios(session.model, files, Format(delimiter, time_column))
        result = session.forecast(horizon, quantiles=quantiles or None, scenarios=scenarios)
    forecasts = [result] if isinstance(result, Forecast) else list(result.values())
    _PRINT[output](forecasts)
    if plot or (plot is None and output == "table" and sys.stdout.isatty()):
        click.echo(plot_forecasts(forecasts, color=sys.stdout.isatty()))


def _scenarios(model: ModelInfo, files: Iterable[Path], format_: Format) -> Scenarios | None:
    """The rows of each file by its name, without ending; None if there are none."""
    found: Scenarios = {}
    for file in files:
        if file.stem in found:
            raise BadRow(f"two scenarios have the name {file.stem!r}: rename {file}")
        with file.open("rb") as lines:
            rows = RowReader(lines, model, str(file), empty=True, part=True, format_=format_)
            found[file.stem], _ = whole(rows)
    return found or None


def _each(forecasts: Sequence[Forecast]) -> Iterator[tuple[Forecast, OutputForecast]]:
    for forecast in forecasts:
        for output in forecast.outputs.values():
            yield forecast, output


def _moments(forecast: Forecast) -> list[str]:
    """The time of each horizon, empty where it is not known."""
    if forecast.times is None:
        return [""] * len(forecast)
    return [f"{time}Z" for time in forecast.times]


def _table(forecasts: Sequence[Forecast]) -> None:
    for number, (forecast, output) in enumerate(_each(forecasts)):
        scenario = f", {forecast.scenario}" if forecast.scenario else ""
        blank = "\n" if number else ""
        click.echo(f"{blank}{output.label} from t={forecast.t}{scenario}")
        titles = ["ahead", *(f"{level:g}" for level in output.levels), "how"]
        lines = [
            [str(ahead), *map(short, values.tolist()), method or "-"]
            for ahead, values, method in zip(
                forecast.horizons, output.values, output.methods, strict=True
            )
        ]
        if forecast.times is not None:
            for line, moment in zip([titles, *lines], ["time", *_moments(forecast)], strict=True):
                line.insert(1, moment)
        _columns([titles, *lines])


def _columns(lines: Sequence[Sequence[str]]) -> None:
    """Prints lines in columns, all but the last right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for *cells, last in lines:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=False)]
        click.echo("  ".join([*padded, last]))


def _csv(forecasts: Sequence[Forecast]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    levels = [f"{level:g}" for level in forecasts[0].levels]
    writer.writerow(["scenario", "output", "horizon", "time", *levels, "method"])
    for forecast, output, ahead, moment, values, method in _lines(forecasts):
        cells = [short(value) for value in values]
        writer.writerow([forecast.scenario, output.name, ahead, moment, *cells, method])


def _jsonl(forecasts: Sequence[Forecast]) -> None:
    for forecast, output, ahead, moment, values, method in _lines(forecasts):
        quantiles = {
            f"{level:g}": value for level, value in zip(output.levels, values, strict=True)
        }
        line = {
            "session_id": forecast.session_id,
            "t": forecast.t,
            "scenario": forecast.scenario,
            "output": output.name,
            "horizon": ahead,
            "time": moment or None,
            "quantiles": quantiles,
            "method": method,
        }
        click.echo(json.dumps(without_nan(line), allow_nan=False))


def _lines(
    forecasts: Sequence[Forecast],
) -> Iterator[tuple[Forecast, OutputForecast, int, str, list[float], str]]:
    for forecast, output in _each(forecasts):
        moments = _moments(forecast)
        for row, method in enumerate(output.methods):
            values = [float(f"{value:.9g}") for value in output.values[row]]
            yield forecast, output, row + 1, moments[row], values, method


_PRINT: dict[str, Callable[[Sequence[Forecast]], Any]] = {
    "table": _table,
    "csv": _csv,
    "jsonl": _jsonl,
}
