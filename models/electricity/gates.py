"""What the gates do over a week of demand, asked of a running server.

It starts `stepstate serve`, brings a session of each model to the last test week, steps
that week with `inspect`, prints a table for both, and draws the gates f, i and o and the
memory c of `electricity/1`, which has nothing but its state to remember by.

Run: python models/electricity/gates.py [--output PNG]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import dates
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from demo import running_server
from series import STEPS_PER_DAY, STEPS_PER_WEEK, Floats, Series, load_series
from stepstate.client import Client

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "gates.png"
TITLES = {
    "f": "f, forget gate: what is kept of c",
    "i": "i, input gate: what is written to c",
    "o": "o, output gate: what of c is shown as h",
    "c": "c, memory",
}


def inspect_week(client: Client, version: str, series: Series) -> Mapping[str, Floats]:
    """The gates and states [336, H] of a model's LSTM over the last week, by name."""
    first = len(series.demand) - STEPS_PER_WEEK
    start_time = series.times[0].item()
    with client.open("electricity", version=version, start_time=start_time) as session:
        session.step(series.demand[:first], last_only=True)
        (lstm,) = session.inspect(series.demand[first:]).layers
        return {name: values.astype(np.float64) for name, values in lstm.items()}


def half_life_hours(f: Floats) -> Floats:
    """After how long half of a unit's memory is left, at its mean forget gate: ln 0.5 / ln f."""
    hours: Floats = np.log(0.5) / np.log(f.mean(axis=0)) * 24 / STEPS_PER_DAY
    return hours


def daily_share(values: Floats) -> Floats:
    """How much of each unit's variance over the week repeats from day to day, 0 to 1."""
    days = values.reshape(-1, STEPS_PER_DAY, values.shape[1])
    share: Floats = days.mean(axis=0).var(axis=0) / values.var(axis=0)
    return share


def peak_hours(values: Floats) -> Floats:
    """The time of day at which each unit is highest, over the mean of all days."""
    days = values.reshape(-1, STEPS_PER_DAY, values.shape[1])
    hours: Floats = days.mean(axis=0).argmax(axis=0) * 24 / STEPS_PER_DAY
    return hours


def print_table(version: str, gates: Mapping[str, Floats]) -> None:
    """What the week says in figures: over units, the quartiles."""
    rows = {f"{name}, mean over the week": gates[name].mean(axis=0) for name in "fio"}
    rows |= {f"{name}, share that repeats daily": daily_share(gates[name]) for name in "fio"}
    rows["half-life of a unit's memory, hours"] = half_life_hours(gates["f"])
    units, steps = gates["f"].shape[1], len(gates["f"])
    print(f"\nelectricity/{version}: {units} units over {steps} half-hours")
    print(f"{'':<36}{'25 %':>8}{'50 %':>8}{'75 %':>8}")
    for name, values in rows.items():
        quartiles = np.percentile(values, [25, 50, 75])
        print(f"{name:<36}{''.join(f'{value:>8.2f}' for value in quartiles)}")


def draw(path: Path, series: Series, gates: Mapping[str, Floats]) -> None:
    """Draws demand, and below it each gate as an image: a line a unit, by the hour of c's peak.

    Args:
        path: where the PNG goes.
        series: the whole series.
        gates: [336, H] by name.
    """
    figure = Figure(figsize=(11, 11), layout="constrained")
    demand, *images = figure.subplots(5, 1, sharex=True, height_ratios=(1.2, 1, 1, 1, 1))
    times = dates.date2num(series.times[-STEPS_PER_WEEK:])
    _draw_demand(demand, times, series.demand[-STEPS_PER_WEEK:])
    order = np.argsort(peak_hours(gates["c"]))
    for axes, name in zip(images, TITLES, strict=True):
        _draw_units(axes, times, gates[name][:, order], name)
    images[-1].xaxis.set_major_locator(dates.DayLocator())
    images[-1].xaxis.set_major_formatter(dates.DateFormatter("%a %d %b"))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _draw_demand(axes: Axes, times: Floats, demand: Floats) -> None:
    axes.plot(times, demand / 1000, color="#222222", lw=1.8)
    axes.set_title("Demand in England and Wales, the last test week", loc="left")
    axes.set_ylabel("GW")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_units(axes: Axes, times: Floats, values: Floats, name: str) -> None:
    reach = float(np.percentile(np.abs(values), 99)) if name == "c" else 1.0
    image = axes.imshow(
        values.T,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap="RdBu_r" if name == "c" else "cividis",
        vmin=-reach if name == "c" else 0.0,
        vmax=reach,
        extent=(times[0], times[-1], 0, values.shape[1]),
    )
    axes.set_title(TITLES[name], loc="left")
    axes.set_ylabel("unit")
    axes.figure.colorbar(image, ax=axes, pad=0.01)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Draw the gates over a week of demand.")
    parser.add_argument("--output", type=Path, default=PICTURE)
    options = parser.parse_args()
    series = load_series()
    with running_server() as server, Client(server.address) as client:
        gates = {version: inspect_week(client, version, series) for version in ("1", "2")}
    for version, found in gates.items():
        print_table(version, found)
    draw(options.output, series, gates["1"])
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
