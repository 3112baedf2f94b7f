"""Trains the model `electricity`: an LSTM that forecasts demand 1 to 48 half-hours ahead.

A first fit leaves the last training weeks out and is scored on them, as they
are and with demand lowered; the settings were chosen by such scores. The final
fit takes all training weeks. The test weeks are scored at the end, for the card.

Run: python models/electricity/train.py [--output FOLDER] [--seed SEED]
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import trange

from card import Run, write_card
from network import (
    DAILY_HARMONICS,
    DAY_SECONDS,
    Fitted,
    Network,
    calendar_inputs,
    forecast_primed,
    forecast_streamed,
    network_input,
)
from series import (
    HORIZONS,
    STEP_INTERVAL_SECONDS,
    STEPS_PER_DAY,
    STEPS_PER_WEEK,
    TRAIN_ROWS,
    Floats,
    Rows,
    Series,
    load_series,
    mape_by_horizon,
    naive_forecasts,
    origins_of_test_weeks,
    origins_within,
    truth,
)
from stepstate.models import write_model

TRAIN_WEEKS = TRAIN_ROWS // STEPS_PER_WEEK
PROFILE = "profile.demand"
PRIMED_ROWS = (1, 6, 24, 48, 96, 336)
"""Rows after which the card tells how good a session is that began at zero state."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How the model is trained; the values were chosen by the validation weeks."""

    hidden_size: int = 128  # 64 is a little worse, at half the cost
    updates: int = 2000  # at 500 it has not learnt to follow the last row; more gain nothing
    batch: int = 16  # windows of one update: small, for many updates in little time
    window_steps: int = 240  # five days; a week gains little and takes twice as long
    learning_rate: float = 5e-3  # falls to zero by a cosine
    gradient_norm: float = 1.0  # clips most updates early on and few at the end
    dropout: float = 0.2  # between h and head; 0.1 is no better
    width: float = 3.5  # scale in standard deviations: what lies beyond ±1 saturates the gates
    level_range: float = 0.05  # windows are scaled by 1 ± this: levels drift
    profile_noise: float = 0.02  # relative, smooth over the day: dusk moves from week to week
    near_weight: float = 4.0  # more weight on the next half-hours: they are learnt last
    averaged_updates: int = 100  # the model is the mean of these last ones: less left to chance
    validation_weeks: int = 2  # the last of the training weeks
    validation_drop: float = 0.05  # the last training week lies so far below the others' mean


@dataclass(frozen=True, slots=True)
class Windows:
    """Draws training windows from whole weeks of demand [T] in MW."""

    demand: Floats
    calendar: Floats
    scale: float
    settings: Settings
    random: np.random.Generator

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """One batch: x [N, T, D], the y to come [N, T, 48], and its demand in the same unit."""
        rows = self._rows()
        demand = self.demand[rows] * self._levels()
        deviation = demand - np.stack([self._profile(window) for window in rows])
        seen = slice(self.settings.window_steps)
        x = network_input(deviation[:, seen] / self.scale, self.calendar[rows[:, seen]])
        return x, self._ahead(deviation), self._ahead(demand)

    def _rows(self) -> Rows:
        steps = self.settings.window_steps + HORIZONS
        starts = self.random.integers(0, len(self.demand) - steps + 1, self.settings.batch)
        return starts[:, None] + np.arange(steps)

    def _levels(self) -> Floats:
        reach = self.settings.level_range
        return self.random.uniform(1.0 - reach, 1.0 + reach, (self.settings.batch, 1))

    def _profile(self, window: Rows) -> Floats:
        # A profile that has seen the window would teach the network to trust it.
        weeks = self.demand.reshape(-1, STEPS_PER_WEEK)
        profile = profile_without(weeks, np.unique(window // STEPS_PER_WEEK))
        found: Floats = (profile * np.tile(self._distortion(), 7))[window % STEPS_PER_WEEK]
        return found

    def _distortion(self) -> Floats:
        """Factors [48] near 1 for the half-hours of a day, alike for neighbours.

        The same every day of a window: the network learns to see it in the days before.
        """
        white = np.tile(self.random.normal(0.0, 1.0, STEPS_PER_DAY), 3)
        smooth = np.convolve(white, np.ones(5) / np.sqrt(5), "same")
        found: Floats = 1.0 + self.settings.profile_noise * smooth[STEPS_PER_DAY:-STEPS_PER_DAY]
        return found

    def _ahead(self, values: Floats) -> Tensor:
        ahead = sliding_window_view(values[:, 1:], HORIZONS, axis=1)
        return torch.tensor(ahead / self.scale, dtype=torch.float32)


def profile_without(weeks: Floats, left_out: Rows) -> Floats:
    """The mean [336] of weeks [W, 336] but for those left out."""
    found: Floats = np.delete(weeks, left_out, axis=0).mean(axis=0)
    return found


def deviation_spread(weeks: Floats) -> float:
    """Standard deviation in MW of each of the weeks [W, 336] from the profile of the others."""
    profiles = [profile_without(weeks, np.array([week])) for week in range(len(weeks))]
    return float(np.std(weeks - np.stack(profiles)))


def fit(series: Series, week_count: int, settings: Settings, seed: int) -> Fitted:
    """Fits a model to the first weeks of the series."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    demand = series.demand[: week_count * STEPS_PER_WEEK]
    weeks = demand.reshape(week_count, STEPS_PER_WEEK)
    calendar = calendar_inputs(series.times)
    scale = settings.width * deviation_spread(weeks)
    network = Network(1 + calendar.shape[1], settings.hidden_size, settings.dropout)
    windows = Windows(demand, calendar, scale, settings, np.random.default_rng(seed))
    optimise(network, windows, settings)
    return Fitted(network, weeks.mean(axis=0), scale, time.perf_counter() - started)


def optimise(network: Network, windows: Windows, settings: Settings) -> None:
    """Trains a network and leaves it with the mean of its last weights; shows progress."""
    optimiser = torch.optim.AdamW(network.parameters(), settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.updates)
    averaged = AveragedModel(network)
    weights = 1 + settings.near_weight * torch.exp(-torch.arange(HORIZONS) / 1.5)
    progress = trange(settings.updates, unit="update", mininterval=1.0)
    for update in progress:
        x, y, demand = windows.draw()
        errors = 100 * torch.abs(network(x) - y) / demand  # in %, which is also the score
        loss = torch.mean(errors * weights)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), settings.gradient_norm)
        optimiser.step()
        schedule.step()
        if update >= settings.updates - settings.averaged_updates:
            averaged.update_parameters(network)
        progress.set_postfix_str(f"MAPE {errors.mean().item():.2f} %", refresh=False)
    network.load_state_dict(averaged.module.state_dict())
    network.eval()


def validate(series: Series, settings: Settings, seed: int) -> dict[str, Floats]:
    """MAPE [48] in % on the last training weeks, of a fit to the weeks before them.

    Once as they are and once with demand lowered throughout: what comes after
    the training weeks may lie where they never were.
    """
    weeks = TRAIN_WEEKS - settings.validation_weeks
    fitted = fit(series, weeks, settings, seed)
    origins = origins_within(weeks * STEPS_PER_WEEK, TRAIN_ROWS)
    lowered = Series(series.times, series.demand * (1.0 - settings.validation_drop))
    cases = {"as they are": series, f"lowered by {settings.validation_drop:.0%}": lowered}
    return {
        name: mape_by_horizon(forecast_streamed(fitted, case, origins), truth(case.demand, origins))
        for name, case in cases.items()
    }


def score_streamed(fitted: Fitted, series: Series) -> dict[str, Floats]:
    """MAPE [48] in % on the test weeks, of the model and then of the naive forecasts."""
    origins = origins_of_test_weeks(series)
    forecasts = {"this model": forecast_streamed(fitted, series, origins)}
    forecasts |= naive_forecasts(series.demand, origins)
    actual = truth(series.demand, origins)
    return {name: mape_by_horizon(found, actual) for name, found in forecasts.items()}


def score_primed(fitted: Fitted, series: Series) -> dict[int, Floats]:
    """MAPE [48] in % on the test weeks by the rows that a session has seen since zero state."""
    # Every 7th origin saves time, and 7 and 48 share no factor: no half-hour is left out.
    origins = origins_of_test_weeks(series)[::7]
    actual = truth(series.demand, origins)
    return {
        rows: mape_by_horizon(forecast_primed(fitted, series, origins, rows), actual)
        for rows in PRIMED_ROWS
    }


def describe(fitted: Fitted, series: Series) -> dict[str, object]:
    """The keys of `manifest.json`."""
    column = {"name": "demand", "unit": "MW", "mean": 0.0, "scale": fitted.scale}
    column["profile"] = PROFILE
    cell = {"kind": "lstm", "hidden_size": fitted.network.cell.hidden_size}
    return {
        "format": "stepstate.model/1",
        "name": "electricity",
        "version": "1",
        "description": "Electricity demand of England and Wales, the next 48 half-hours.",
        "cell": {**cell, "num_layers": 1, "proj_size": 0},
        "step_interval_seconds": STEP_INTERVAL_SECONDS,
        "inputs": [column],
        "calendar": [
            {"kind": "fourier", "period_seconds": DAY_SECONDS, "harmonics": DAILY_HARMONICS},
            {"kind": "day_of_week"},
        ],
        "profiles": {PROFILE: {"period_steps": STEPS_PER_WEEK, "origin": f"{series.times[0]}Z"}},
        "outputs": [{**column, "horizons": list(range(1, HORIZONS + 1))}],
    }


def tensors(fitted: Fitted) -> dict[str, NDArray[np.float32]]:
    """The tensors of `model.safetensors`: the network's and the profile."""
    network = {name: tensor.numpy() for name, tensor in fitted.network.state_dict().items()}
    return {**network, PROFILE: fitted.profile.astype(np.float32)}


def train(output: Path, seed: int) -> None:
    """Validates, fits and scores, and writes the model's folder."""
    settings, series = Settings(), load_series()
    print(f"1 of 2: fit without the last {settings.validation_weeks} training weeks", flush=True)
    validation = validate(series, settings, seed)
    for name, mape in validation.items():
        print(f"validation weeks {name}: MAPE {mape.mean():.2f} %, mean of all horizons")
    print(f"2 of 2: fit to all {TRAIN_WEEKS} training weeks", flush=True)
    fitted = fit(series, TRAIN_WEEKS, settings, seed)
    fingerprint = write_model(output, describe(fitted, series), tensors(fitted))
    run = Run(
        seed=seed,
        settings=dataclasses.asdict(settings),
        seconds=fitted.seconds,
        parameters=sum(tensor.numel() for tensor in fitted.network.parameters()),
        fingerprint=fingerprint,
        validation=validation,
        test=score_streamed(fitted, series),
        primed=score_primed(fitted, series),
    )
    write_card(output, run)
    print(f"test MAPE {run.model.mean():.2f} %, mean of all horizons; wrote {output}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Train the model electricity.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "1")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)  # one order of additions: the same bytes again on this machine
    train(options.output, options.seed)


if __name__ == "__main__":
    main()
