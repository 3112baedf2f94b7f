"""The promise of the default drift test, on fewer seeds than `python -m benchmarks.drift`.

Seeds are fixed, so these are the same figures at each run.
"""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.drift import DETECTORS, NOISES, delays, false_alarms

CUSUM, PAGE_HINKLEY = DETECTORS["CUSUM (default)"], DETECTORS["Page-Hinkley"]


@pytest.mark.long
@pytest.mark.parametrize("noise", NOISES)
def test_a_stable_series_of_any_noise_has_at_most_one_alarm_in_20_000_rows(noise):
    assert np.mean(false_alarms(CUSUM, noise, rows=20_000, seeds=range(4))) <= 1


@pytest.mark.long
@pytest.mark.parametrize("noise", ["AR(0.9)", "AR(0.98)", "Poisson 0.05", "single glitches"])
def test_the_bench_tells_a_test_that_raises_tens_of_them(noise):
    """Page-Hinkley with river's defaults: the issue had 13 to 81, and 29 to 36."""
    assert np.mean(false_alarms(PAGE_HINKLEY, noise, rows=20_000, seeds=range(2))) > 10


@pytest.mark.long
@pytest.mark.parametrize(
    ("noise", "change", "rows"),
    [
        ("normal", "× 1.5", 300),
        ("normal", "× 2", 100),
        ("normal", "+ 1 sd", 300),
        ("normal", "1 % a season of 48", 3000),
        ("Student t, 3 degrees", "× 2", 150),
        ("lognormal", "× 2", 150),
        ("Poisson 0.05", "× 2", 200),
        ("AR(0.9)", "× 2", 600),
        ("AR(0.98)", "+ 2 sd", 1500),
        ("seasonal variance, 48", "× 2", 300),
        ("GARCH", "+ 2 sd", 400),
        ("single glitches", "+ 2 sd", 100),
    ],
)
def test_a_change_for_good_is_found_soon(noise, change, rows):
    """A test that never raises an alarm would pass all the others."""
    found = delays(CUSUM, noise, change, seeds=range(3))
    assert found.share == 1
    assert found.delay <= rows


@pytest.mark.long
def test_the_command_prints_both_tables():
    options = ["--rows", "200", "--seeds", "1", "--delays-of"]
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.drift", *options],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    lines = told.splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")][1:] == [
        f"| {noise}" for noise in NOISES
    ]
    assert not math.isnan(float(lines[4].split("|")[2].split()[0]))
