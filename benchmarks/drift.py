"""What drift tests are worth: false alarms on stable errors, and delay after real changes.

`python -m benchmarks.drift` prints two tables. In the first the errors of a forecast have one
distribution throughout (but for "flat, then noise"), and every alarm is a false one. In the second
they change for good after `CHANGED_AT` rows, and an alarm before that is a false one that the test
has to live with. Seeds are fixed, so the figures are the same at each run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stepstate.engine.tracking.drift import drift_test
from stepstate.models import CusumSpec, DriftSpec, PageHinkleySpec

Errors = NDArray[np.float64]
Rng = np.random.Generator
Noise = Callable[[Rng, int], Errors]
Change = Callable[[Errors, float], Errors]

ROWS, SEEDS = 20_000, 20
CHANGED_AT, CHANGED_ROWS = 5_000, 8_000
WARM_UP = 2_000
"""The first rows of a correlated noise, which are dropped: they are not yet typical."""
MIN_UNIT = 1e-6


def autoregressive(coefficient: float, rng: Rng, rows: int) -> Errors:
    """Each error is the one before times the coefficient, plus noise."""
    chance = rng.normal(size=WARM_UP + rows) * np.sqrt(1 - coefficient**2)
    error, found = 0.0, np.empty(len(chance))
    for row, more in enumerate(chance.tolist()):
        found[row] = error = coefficient * error + more
    return found[WARM_UP:]


def seasonal(period: int, rng: Rng, rows: int) -> Errors:
    """Normal errors whose deviation goes up and down by 60 %."""
    deviation: Errors = 1 + 0.6 * np.sin(2 * np.pi * np.arange(rows) / period)
    return rng.normal(size=rows) * deviation


def garch(rng: Rng, rows: int) -> Errors:
    """Calm and rough times: the variance follows the last errors for long (half-life 34 rows)."""
    found, variance = np.empty(WARM_UP + rows), 1.0
    for row, chance in enumerate(rng.normal(size=len(found)).tolist()):
        found[row] = error = np.sqrt(variance) * chance
        variance = 0.02 + 0.1 * error**2 + 0.88 * variance
    return found[WARM_UP:]


def overlapping(horizon: int, rng: Rng, rows: int) -> Errors:
    """Errors of forecasts of a random walk: those of neighbouring rows share most of their rows."""
    walk = np.cumsum(rng.normal(size=rows + horizon))
    found: Errors = (walk[horizon:] - walk[:-horizon]) / np.sqrt(horizon)
    return found


def regimes(rng: Rng, rows: int) -> Errors:
    """Errors that are at times twice as large, for some 200 rows."""
    rough = np.cumsum(rng.random(rows) < 1 / 200) % 2
    return rng.normal(size=rows) * (1 + rough)


def flat_then_noise(rng: Rng, rows: int) -> Errors:
    """The first tenth of the rows is constant, and forecast without an error."""
    return np.where(np.arange(rows) < rows // 10, 0.0, rng.normal(size=rows))


def glitches(rng: Rng, rows: int) -> Errors:
    """One row in 500 is 99,999."""
    return np.where(rng.random(rows) < 0.002, 99_999.0, rng.normal(size=rows))


def counts(mean: float, rng: Rng, rows: int) -> Errors:
    """Poisson counts, forecast as their mean."""
    return rng.poisson(mean, rows).astype(np.float64) - mean


def intermittent(rng: Rng, rows: int) -> Errors:
    """Demand in one row of ten, forecast as none."""
    return (rng.random(rows) < 0.1) * rng.lognormal(1.0, 0.7, rows)


NOISES: Mapping[str, Noise] = {
    "normal": lambda rng, rows: rng.normal(size=rows),
    "uniform": lambda rng, rows: rng.uniform(-1.7, 1.7, rows),
    "Laplace": lambda rng, rows: rng.laplace(size=rows),
    "Student t, 3 degrees": lambda rng, rows: rng.standard_t(3, size=rows),
    "lognormal": lambda rng, rows: rng.lognormal(0.0, 1.0, rows) - np.exp(0.5),
    "AR(0.5)": partial(autoregressive, 0.5),
    "AR(0.9)": partial(autoregressive, 0.9),
    "AR(0.98)": partial(autoregressive, 0.98),
    "24 steps ahead": partial(overlapping, 24),
    "seasonal variance, 48": partial(seasonal, 48),
    "seasonal variance, 336": partial(seasonal, 336),
    "GARCH": garch,
    "two regimes": regimes,
    "Poisson 0.05": partial(counts, 0.05),
    "Poisson 3": partial(counts, 3.0),
    "intermittent demand": intermittent,
    "single glitches": glitches,
    "flat, then noise": flat_then_noise,
    "constant": lambda _, rows: np.full(rows, 5.0),
}
UNCHANGED = ("flat, then noise", "constant")
"""They are in the first table only."""


def slowly_worse(errors: Errors, _: float, *, season: int) -> Errors:
    """Each season one per cent larger."""
    return errors * 1.01 ** (np.arange(len(errors)) / season)


CHANGES: Mapping[str, Change] = {
    "× 1.5": lambda errors, _: errors * 1.5,
    "× 2": lambda errors, _: errors * 2,
    "+ 1 sd": lambda errors, deviation: errors + deviation,
    "+ 2 sd": lambda errors, deviation: errors + 2 * deviation,
    "+ 3 sd": lambda errors, deviation: errors + 3 * deviation,
    "1 % a season of 48": partial(slowly_worse, season=48),
}


class Detector(Protocol):
    """Finds the rows of errors at which an alarm is raised."""

    def __call__(self, errors: Errors) -> NDArray[np.int64]:
        """The rows [A] of the alarms."""
        ...


def server_test(spec: DriftSpec) -> Detector:
    """A drift test of the server, on float32 as in a session's state.

    The naive forecast is the row before.
    """

    def alarms(errors: Errors) -> NDArray[np.int64]:
        test = drift_test(spec, MIN_UNIT)
        numbers = np.zeros(test.width, np.float32)
        values: memoryview[float] = memoryview(numbers)  # type: ignore[arg-type]
        naive = np.abs(np.diff(errors, prepend=np.nan)).tolist()
        rows = zip(np.abs(errors).tolist(), naive, strict=True)
        return np.flatnonzero([test.take(values, 0, error, beside) for error, beside in rows])

    return alarms


def river_adwin(errors: Errors) -> NDArray[np.int64]:
    """ADWIN (Bifet and Gavalda 2007) with river's defaults; it keeps windows of rows."""
    from river.drift import ADWIN  # noqa: PLC0415 - of the development tools

    test = ADWIN()
    alarms = []
    for error in np.abs(errors).tolist():
        test.update(error)
        alarms.append(test.drift_detected)
    return np.flatnonzero(alarms)


DETECTORS: Mapping[str, Detector] = {
    "CUSUM (default)": server_test(CusumSpec()),
    "Page-Hinkley": server_test(PageHinkleySpec()),
    "ADWIN (river)": river_adwin,
}


@dataclass(frozen=True, slots=True)
class Found:
    """How soon a change was found."""

    delay: float
    """The median over the seeds, in rows; infinite where half of them or more have none."""
    share: float
    """Of the seeds in which it was found."""

    def __str__(self) -> str:
        delay = f"{self.delay:.0f}" if np.isfinite(self.delay) else "–"
        return delay if self.share == 1 else f"{delay} ({self.share:.0%})"


def false_alarms(detector: Detector, noise: str, *, rows: int, seeds: range) -> list[int]:
    """Alarms in so many stable rows, for each seed."""
    return [len(detector(NOISES[noise](rng, rows))) for rng in _generators(seeds)]


def delays(detector: Detector, noise: str, change: str, *, seeds: range) -> Found:
    """How soon a change is found, within 8,000 rows."""
    first = []
    for rng in _generators(seeds):
        errors = NOISES[noise](rng, CHANGED_AT + CHANGED_ROWS)
        deviation = float(np.std(np.clip(errors[:CHANGED_AT], -50, 50)))
        errors[CHANGED_AT:] = CHANGES[change](errors[CHANGED_AT:], deviation)
        alarms = detector(errors) - CHANGED_AT
        first.append(min(alarms[alarms >= 0].tolist(), default=np.inf) + 1)
    found = np.isfinite(first)
    return Found(float(np.quantile(first, 0.5, method="higher")), float(np.mean(found)))


def _generators(seeds: range) -> Iterator[Rng]:
    return map(np.random.default_rng, seeds)


def _first_table(rows: int, seeds: range, names: Sequence[str]) -> Iterator[str]:
    yield f"False alarms in {rows:,} stable rows, mean of {len(seeds)} seeds (most):"
    yield from ("", f"| noise | {' | '.join(names)} |", "|---|" + "---|" * len(names))
    for noise in NOISES:
        cells = []
        for name in names:
            counts = false_alarms(DETECTORS[name], noise, rows=rows, seeds=seeds)
            cells.append(f"{np.mean(counts):.2f} ({max(counts)})")
        yield f"| {noise} | {' | '.join(cells)} |"


def _second_table(name: str, seeds: range) -> Iterator[str]:
    yield f"{name}: rows until a change is found, median of {len(seeds)} seeds (share, if not all):"
    yield from ("", f"| noise | {' | '.join(CHANGES)} |", "|---|" + "---|" * len(CHANGES))
    for noise in NOISES:
        if noise not in UNCHANGED:
            cells = [str(delays(DETECTORS[name], noise, change, seeds=seeds)) for change in CHANGES]
            yield f"| {noise} | {' | '.join(cells)} |"


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help="stable rows of a seed")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many")
    parser.add_argument(
        "--first-seed", type=int, default=0, help="0: those that the test was chosen with"
    )
    parser.add_argument("--delays-of", nargs="*", default=["CUSUM (default)"], choices=DETECTORS)
    given = parser.parse_args()
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    for line in _first_table(given.rows, seeds, list(DETECTORS)):
        print(line, flush=True)
    for name in given.delays_of:
        print()
        for line in _second_table(name, seeds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
