"""The main job, end to end: replays the four held-out weeks as online clients would.

It starts `stepstate serve` with the shipped models, opens one session for each
test week, primes it with the history before that week, and then sends one
half-hour after the other. After each it asks for the forecast of the next day,
with intervals that are to cover 90 % of what comes. At the end a fork of a
session loses some hours of data, and the server tells how good its forecasts were.

Run: make demo
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
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
    HORIZONS,
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
from stepstate.client import Accuracy, AsyncClient, AsyncSession

if TYPE_CHECKING:
    Bar = tqdm[NoReturn]

SESSIONS = 4
LEVEL = 0.9
"""What the model's intervals are to cover: see its manifest."""
GAP_STEPS = 12
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


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of it: quantiles [N, 48, 3] in MW from every origin [N], and how fast."""

    forecasts: Floats
    seconds: float
    told: tuple[Accuracy, ...]
    """By the server, of the last session."""
    gap: Floats
    """A forecast [48] in MW after hours without data, and that without such a gap: [2, 48]."""


async def replay(target: str, series: Series, origins: Rows) -> Replay:
    """Steps one session for each test week, all at the same time."""
    async with AsyncClient(target) as client:
        parts = np.array_split(origins, SESSIONS)
        opened = await asyncio.gather(*(_open(client, series, part) for part in parts))
        with tqdm(total=len(origins), unit="step", desc="replaying 4 weeks") as bar:
            started = time.perf_counter()
            weeks = zip(opened, parts, strict=True)
            found = await asyncio.gather(*(_week(*week, series, bar) for week in weeks))
            seconds = time.perf_counter() - started
        told = (await opened[-1].refresh()).accuracy
        gap = await _gap(opened[0], series)
        for session in opened:
            await session.close()
    return Replay(np.concatenate(found), seconds, told, gap)


async def _open(client: AsyncClient, series: Series, origins: Rows) -> AsyncSession:
    """A session that has seen all before its first origin."""
    start_time: datetime = series.times[0].item()
    return await client.open(
        "electricity",
        version="2",
        start_time=start_time,
        missing="impute",
        history=series.demand[: origins[0]],
    )


async def _week(session: AsyncSession, origins: Rows, series: Series, bar: Bar) -> Floats:
    """Each origin's row, and the forecast from there."""
    forecasts = []
    for megawatts in series.demand[origins]:
        await session.step(megawatts)
        forecasts.append((await session.forecast(HORIZONS)).values)
        bar.update()
    return np.array(forecasts, np.float64)


async def _gap(session: AsyncSession, series: Series) -> Floats:
    """Forks a session twice: one sees the next hours, the other does without."""
    async with await session.fork() as seeing, await session.fork() as blind:
        await seeing.step(series.demand[session.t : session.t + GAP_STEPS])
        await blind.advance(GAP_STEPS)
        forecasts = [await one.forecast(HORIZONS) for one in (blind, seeing)]
    return np.array([forecast.median for forecast in forecasts], np.float64)


def print_accuracy(scores: Mapping[str, Floats]) -> None:
    """The table of accuracy by horizon."""
    print("\nMean absolute percentage error on the test weeks, by horizon (half-hours ahead)")
    print(f"{'':<24}" + "".join(f"{f'h{h}':>8}" for h in SHOWN) + f"{'1-48':>8}")
    for name, mape in scores.items():
        cells = [f"{mape[h - 1]:>8.2f}" for h in SHOWN]
        print(f"{name:<24}{''.join(cells)}{mape.mean():>8.2f}")


def print_coverage(coverage: Floats) -> None:
    """Shares of the truths within the intervals, by horizon."""
    print(f"\nShare of truths within the intervals, %; {LEVEL:.0%} is wanted")
    print(f"{'':<24}" + "".join(f"{f'h{h}':>8}" for h in SHOWN) + f"{'1-48':>8}")
    cells = [f"{coverage[h - 1]:>8.1f}" for h in SHOWN]
    print(f"{'Stepstate, live':<24}{''.join(cells)}{coverage.mean():>8.1f}")


def print_told(found: Replay, series: Series, origins: Rows) -> None:
    """What the server itself says, and what a gap costs."""
    print("\nWhat the server tells of its forecasts for the last session, history too")
    for one in found.told:
        print(
            f"  h{one.horizon:<3} {one.scored} scored, "
            f"mean error {one.mean_absolute_error:.0f} MW, "
            f"{one.mean_absolute_scaled_error:.2f} of the seasonal naive one's, "
            f"{one.coverage:.1%} within the interval"
        )
    first = np.array_split(origins, SESSIONS)[0][-1] + GAP_STEPS
    actual = truth(series.demand, np.array([first]))
    blind, seeing = 100 * np.mean(np.abs(found.gap - actual) / actual, axis=1)
    print(
        f"\nAfter {GAP_STEPS // 2} hours without data the day ahead is {blind:.2f} % off, "
        f"with them {seeing:.2f} %\n"
        "(one gap: a few hundredths of a per cent either way are noise)"
    )


def main() -> None:
    """Runs the demo."""
    OUT.mkdir(exist_ok=True)
    series = load_series()
    origins = origins_of_test_weeks(series)
    with running_server() as server:
        found = uvloop.run(replay(server.address, series, origins))
        with urllib.request.urlopen(server.metrics_url) as reply:
            (OUT / "metrics.txt").write_bytes(reply.read())
    actual = truth(series.demand, origins)
    weekly = seasonal_naive(series.demand, origins, STEPS_PER_WEEK)
    low, median, high = np.moveaxis(found.forecasts, 2, 0)
    scores = {
        "Stepstate, live": mape_by_horizon(median, actual),
        "seasonal naive, weekly": mape_by_horizon(weekly, actual),
    }
    coverage = 100 * np.mean((low <= actual) & (actual <= high), axis=0)
    print_accuracy(scores)
    print_coverage(coverage)
    print_told(found, series, origins)
    draw(OUT / "demo.png", series, origins, found.forecasts, scores=scores, coverage=coverage)
    rate = len(origins) / found.seconds
    print(f"\n{len(origins)} steps and forecasts over {SESSIONS} sessions, {rate:,.0f} a second")
    print(f"metrics, as Prometheus scrapes them: {OUT}/metrics.txt")
    print(f"forecasts against truth:             {OUT}/demo.png")


if __name__ == "__main__":
    main()
