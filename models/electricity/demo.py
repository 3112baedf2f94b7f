"""The main job, end to end: replays the four held-out weeks as online clients would.

It starts `stepstate serve` with the shipped models, opens one session for each
test week, brings it up to date with the history before that week, and then
sends one half-hour after the other. Each reply forecasts the next day.

Run: make demo
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import uvloop
from tqdm import tqdm

from picture import draw
from series import (
    STEPS_PER_WEEK,
    Floats,
    Rows,
    Series,
    load_series,
    mape_by_horizon,
    origins_of_test_weeks,
    seasonal_naive,
    truth,
)
from stepstate.client import AsyncClient

if TYPE_CHECKING:
    Bar = tqdm[NoReturn]

SESSIONS = 4
SHOWN = (1, 6, 12, 24, 36, 48)
OUT = Path("out")
MODELS = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class RunningServer:
    """Where a server can be reached."""

    address: str
    metrics_url: str


@contextmanager
def running_server() -> Iterator[RunningServer]:
    """Runs `stepstate serve` on free ports; drains it at the end of the block."""
    command = [sys.executable, "-m", "stepstate.cli", "serve", "--models", str(MODELS)]
    command += ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
    command += ["--log-level", "WARNING"]
    with TemporaryDirectory() as folder:
        yield from _run([*command, "--store", f"sqlite:{folder}/stepstate.db"])


def _run(command: list[str]) -> Iterator[RunningServer]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        print(line.strip() or "the server did not start: its message is above")
        found = re.search(r" on (\S+), metrics on (\S+)", line)
        if found is None:
            sys.exit(1)
        yield RunningServer(found[1], found[2])
    finally:
        process.terminate()
        status = process.wait(timeout=60)
        print(f"the server drained and stopped (exit status {status})")


async def replay(target: str, series: Series, origins: Rows) -> tuple[Floats, float]:
    """Forecasts [N, 48] in MW from every origin [N], and rows stepped per second."""
    parts = np.array_split(origins, SESSIONS)
    async with AsyncClient(target) as client:
        with tqdm(total=len(origins), unit="step", desc="replaying 4 weeks") as bar:
            started = time.perf_counter()
            found = await asyncio.gather(*(_week(client, series, part, bar) for part in parts))
            seconds = time.perf_counter() - started
    return np.concatenate(found), len(origins) / seconds


async def _week(client: AsyncClient, series: Series, origins: Rows, bar: Bar) -> Floats:
    """One session: its history in one request, then its origins row by row."""
    start_time: datetime = series.times[0].item()
    forecasts = []
    async with await client.open("electricity", version="1", start_time=start_time) as session:
        await session.step(series.demand[: origins[0]], last_only=True)
        async for y in session.stream(series.demand[origins]):
            forecasts.append(y)
            bar.update()
    return np.array(forecasts, np.float64)


def print_accuracy(model: Floats, weekly: Floats) -> None:
    """The table of accuracy by horizon."""
    print("\nMean absolute percentage error on the test weeks, by horizon (half-hours ahead)")
    print(f"{'':<24}" + "".join(f"{f'h{h}':>8}" for h in SHOWN) + f"{'1-48':>8}")
    for name, scores in (("Stepstate, live", model), ("seasonal naive, weekly", weekly)):
        cells = [f"{scores[h - 1]:>8.2f}" for h in SHOWN]
        print(f"{name:<24}{''.join(cells)}{scores.mean():>8.2f}")


def main() -> None:
    """Runs the demo."""
    OUT.mkdir(exist_ok=True)
    series = load_series()
    origins = origins_of_test_weeks(series)
    with running_server() as server:
        forecasts, rate = uvloop.run(replay(server.address, series, origins))
        with urllib.request.urlopen(server.metrics_url) as reply:
            (OUT / "metrics.txt").write_bytes(reply.read())
    actual = truth(series.demand, origins)
    weekly = seasonal_naive(series.demand, origins, STEPS_PER_WEEK)
    scores = mape_by_horizon(forecasts, actual), mape_by_horizon(weekly, actual)
    print_accuracy(*scores)
    draw(OUT / "demo.png", series, origins, forecasts, scores)
    print(f"\n{len(origins)} steps over {SESSIONS} sessions at {rate:,.0f} steps/s")
    print(f"metrics, as Prometheus scrapes them: {OUT}/metrics.txt")
    print(f"forecasts against truth:             {OUT}/demo.png")


if __name__ == "__main__":
    main()
