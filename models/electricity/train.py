"""Trains the model `electricity`: an LSTM that forecasts demand 1 to 48 half-hours ahead.

Version 2, the default, has lagged inputs and quantiles; version 1 has neither.
A first fit leaves the last training weeks out and is scored on them, as they
are and with demand lowered; the settings were chosen by such scores. The final
fit takes all training weeks. The test weeks are scored at the end, for the card.

Run: python models/electricity/train.py [--version VERSION] [--output FOLDER] [--seed SEED]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import trange

import card_1
import card_2
from base import base_weights
from card import Run, picture
from declare import describe, tensors
from network import Fitted, Network, calendar_inputs
from scores import drift_cases, score_baselines, score_coverage, score_primed, score_streamed
from series import (
    HORIZONS,
    STEPS_PER_WEEK,
    TRAIN_ROWS,
    Floats,
    Series,
    load_series,
    origins_of_test_weeks,
    origins_within,
)
from settings import SETTINGS, Settings
from stepstate.models import write_model
from windows import Batch, Windows, deviation_spread

TRAIN_WEEKS = TRAIN_ROWS // STEPS_PER_WEEK
CARDS = {"1": card_1.card, "2": card_2.card}
PRIMED_ROWS = {"1": (1, 6, 24, 48, 96, 336), "2": (1, 24, 48, 336, 384, 1008)}
"""Rows after which the card tells how good a session is that began at zero state."""
OTHER_SEEDS = {"1": (), "2": (2, 3)}
"""Further fits, only to tell how much is chance."""


def fit(series: Series, week_count: int, settings: Settings, seed: int) -> Fitted:
    """Fits a model to the first weeks of the series."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    demand = series.demand[: week_count * STEPS_PER_WEEK]
    weeks = demand.reshape(week_count, STEPS_PER_WEEK)
    calendar = calendar_inputs(series.times)
    scale = settings.width * deviation_spread(weeks)
    network = new_network(settings, 1 + calendar.shape[1])
    windows = Windows(demand, calendar, scale, settings, np.random.default_rng(seed))
    optimise(network, windows, settings)
    return Fitted(network, weeks.mean(axis=0), scale, time.perf_counter() - started)


def new_network(settings: Settings, inputs: int) -> Network:
    """An untrained network; one with lags begins as the base forecast."""
    quantiles, lags = settings.quantiles, settings.lags
    network = Network(
        inputs, settings.hidden_size, settings.dropout, quantiles=quantiles, lags=lags
    )
    head = network.head
    if head.lags is not None:
        base = np.repeat(base_weights(lags), len(quantiles), axis=0)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        head.lags.data = torch.tensor(base, dtype=torch.float32)
    return network


def optimise(network: Network, windows: Windows, settings: Settings) -> None:
    """Trains a network and leaves it with the mean of its last weights; shows progress."""
    optimiser = _optimiser(network, settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.updates)
    averaged = AveragedModel(network)
    quantile_loss = QuantileLoss(settings)
    progress = trange(settings.updates, unit="update", mininterval=1.0)
    for update in progress:
        batch = windows.draw()
        loss, mape = quantile_loss(network(batch.x, batch.lagged), batch)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), settings.gradient_norm)
        optimiser.step()
        schedule.step()
        if update >= settings.updates - settings.averaged_updates:
            averaged.update_parameters(network)
        progress.set_postfix_str(f"MAPE {mape:.2f} %", refresh=False)
    network.load_state_dict(averaged.module.state_dict())
    network.eval()


def _optimiser(network: Network, settings: Settings) -> torch.optim.Optimizer:
    lags = network.head.lags
    others = [weight for weight in network.parameters() if weight is not lags]
    groups: list[dict[str, object]] = [{"params": others, "lr": settings.learning_rate}]
    if lags is not None:
        # Decay would pull them to 0, away from the base forecast.
        rate = settings.lags_learning_rate
        groups.append({"params": [lags], "lr": rate, "weight_decay": 0.0})
    return torch.optim.AdamW(groups)


class QuantileLoss:
    """Twice the quantile loss in % of demand, weighted; of a median, the weighted MAPE."""

    def __init__(self, settings: Settings) -> None:
        nearness = torch.exp(-torch.arange(HORIZONS) / 1.5)
        weights = torch.tensor(settings.quantile_weights)
        self._weights = (1 + settings.near_weight * nearness)[:, None] * weights
        self._levels = torch.tensor(settings.quantiles)

    def __call__(self, y: Tensor, batch: Batch) -> tuple[Tensor, float]:
        """The loss of forecasts y [N, T, 48, Q], and the MAPE of their median."""
        errors = 100 * (batch.y[..., None] - y) / batch.demand[..., None]
        losses = 2 * torch.maximum(self._levels * errors, (self._levels - 1) * errors)
        median = losses.detach()[..., len(self._levels) // 2]
        return torch.mean(losses * self._weights), float(median.mean())


def validate(series: Series, settings: Settings, seed: int) -> dict[str, Floats]:
    """MAPE [48] in % on the last training weeks, of a fit to the weeks before them.

    Once as they are and once with demand lowered throughout: what comes after
    the training weeks may lie where they never were.
    """
    weeks = TRAIN_WEEKS - settings.validation_weeks
    adapt = fit(series, weeks, settings, seed)
    origins = origins_within(weeks * STEPS_PER_WEEK, TRAIN_ROWS)
    lowered = Series(series.times, series.demand * (1.0 - settings.validation_drop))
    cases = {"as they are": series, f"lowered by {settings.validation_drop:.0%}": lowered}
    return {name: score_streamed(adapt, case, origins) for name, case in cases.items()}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be trained."""

    version: str
    seed: int
    output: Path

    @property
    def settings(self) -> Settings:
        """How."""
        return SETTINGS[self.version]


def train(plan: Plan) -> None:
    """Validates, fits and scores, and writes the model's folder."""
    settings, series = plan.settings, load_series()
    print(f"fit without the last {settings.validation_weeks} training weeks", flush=True)
    validation = validate(series, settings, plan.seed)
    for name, mape in validation.items():
        print(f"validation weeks {name}: MAPE {mape.mean():.2f} %, mean of all horizons")
    print(f"fit to all {TRAIN_WEEKS} training weeks", flush=True)
    adapt = fit(series, TRAIN_WEEKS, settings, plan.seed)
    model = describe(plan.version, adapt, series)
    fingerprint = write_model(plan.output, model, tensors(adapt))
    run = score(plan, series, adapt, fingerprint, validation)
    (plan.output / "card.md").write_text(CARDS[plan.version](run, series), encoding="utf-8")
    picture(run).savefig(plan.output / "accuracy.png", dpi=150)
    print(f"test MAPE {run.model.mean():.2f} %, mean of all horizons; wrote {plan.output}")


def score(
    plan: Plan, series: Series, adapt: Fitted, fingerprint: str, validation: dict[str, Floats]
) -> Run:
    """All that the card tells, from the test weeks."""
    origins = origins_of_test_weeks(series)
    lagged = bool(plan.settings.lags)
    model = score_streamed(adapt, series, origins)
    baselines = score_baselines(series, holt_winters=lagged)
    return Run(
        seed=plan.seed,
        settings=plan.settings.numbers(),
        seconds=adapt.seconds,
        parameters=sum(tensor.numel() for tensor in adapt.network.parameters()),
        fingerprint=fingerprint,
        validation=validation,
        test={"this model": model, **baselines},
        primed=score_primed(adapt, series, PRIMED_ROWS[plan.version]),
        seeds={plan.seed: model, **score_other_seeds(plan, series)},
        coverage=score_coverage(adapt, series, origins) if lagged else {},
        drift=drift_cases(adapt, series, TRAIN_ROWS) if lagged else {},
    )


def score_other_seeds(plan: Plan, series: Series) -> dict[int, Floats]:
    """MAPE [48] in % on the test weeks of the same fit with other seeds."""
    found = {}
    for seed in OTHER_SEEDS[plan.version]:
        print(f"fit to all {TRAIN_WEEKS} training weeks with seed {seed}, to compare", flush=True)
        adapt = fit(series, TRAIN_WEEKS, plan.settings, seed)
        found[seed] = score_streamed(adapt, series, origins_of_test_weeks(series))
    return found


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Train the model electricity.")
    parser.add_argument("--version", choices=sorted(SETTINGS), default="2")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)  # one order of additions: the same bytes again on this machine
    output = options.output or Path(__file__).parent / options.version
    train(Plan(options.version, options.seed, output))


if __name__ == "__main__":
    main()
