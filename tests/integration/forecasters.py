"""Models that forecast, for both clients, and rows for them."""

from __future__ import annotations

from pathlib import Path

from stepstate.models import write_model
from tests.networks import Network, make_network

CLOSE = 1e-4  # of values around 5


def small() -> Network:
    return make_network("small", hidden=4, layers=1, seed=1)


def write_forecasters(sensor: Network, folder: Path) -> Path:
    """One that forecasts with quantiles, two that know the time, and a plain small one."""
    sensor.write(folder)
    small().write(folder)
    for name, interval in (("hourly", 3600), ("minutely", 60)):
        made = make_network(name, inputs=1, outputs=3, hidden=4, layers=1, seed=2)
        made.manifest.update(
            step_interval_seconds=interval,
            outputs=[{"name": "x0", "unit": "m", "horizons": [1, 2, 3]}],
        )
        write_model(folder / name / "1", made.manifest, made.tensors())
    return folder
