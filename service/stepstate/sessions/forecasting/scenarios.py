"""Which scenarios are forecast together: those that give the same values, so share one plan.

K horizons, P rows of a scenario, D inputs, S scenarios.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stepstate.engine import Floats, Plan
from stepstate.errors import ForecastImpossible, InvalidField
from stepstate.models import Manifest

if TYPE_CHECKING:
    from stepstate.sessions.forecasting.forecaster import Scenario
    from stepstate.sessions.scheduler import StepScheduler


@dataclass(frozen=True, slots=True)
class ScenarioGroup:
    """Scenarios with one plan: their numbers [S], names [S] and rows [S, P, D], P at most K."""

    numbers: Sequence[int]
    names: Sequence[str]
    ahead: Floats
    plan: Plan


async def courses_of(
    scheduler: StepScheduler, scenarios: Sequence[Scenario], horizon: int
) -> list[ScenarioGroup]:
    """The courses of a model's sessions; without scenarios, the one of its own forecasts.

    Raises:
        InvalidField: a scenario is not whole rows, or not finite.
        ForecastImpossible: the model can't forecast so far, or not under a scenario that it names.
    """
    manifest = scheduler.model.manifest
    if not scenarios:
        nothing = np.zeros((1, 0, manifest.input_width), np.float32)
        return [
            ScenarioGroup([0], [""], nothing, scheduler.engine.plan(horizon, np.isnan(nothing[0])))
        ]
    rows = [_rows(manifest, number, one)[:horizon] for number, one in enumerate(scenarios)]
    courses = []
    for numbers in _alike(rows):
        ahead = np.stack([rows[number] for number in numbers])
        try:
            plan = scheduler.engine.plan(horizon, ~np.isnan(ahead[0]))
        except ForecastImpossible as error:
            number = numbers[0]
            under = f"{error.subject} under scenarios[{number}] {scenarios[number].name!r}"
            raise ForecastImpossible(under, error.problem) from None
        names = [scenarios[number].name for number in numbers]
        courses.append(ScenarioGroup(numbers, names, ahead, plan))
        await asyncio.sleep(0)
    return courses


def _alike(rows: Sequence[Floats]) -> list[list[int]]:
    """The numbers of scenarios that are as long as each other, and give the same values."""
    found: dict[tuple[int, bytes], list[int]] = {}
    for number, one in enumerate(rows):
        found.setdefault((len(one), np.isnan(one).tobytes()), []).append(number)
    return list(found.values())


def _rows(manifest: Manifest, number: int, scenario: Scenario) -> Floats:
    """A scenario's rows [P, D].

    Raises:
        InvalidField: it is not whole rows, or not finite.
    """
    where, width = f"scenarios[{number}].x", manifest.input_width
    count = len(scenario.x)
    if not count or count % width:
        raise InvalidField(
            where,
            f"holds {count} values; {manifest.name}/{manifest.version} takes rows of {width}: send "
            f"P * {width} values, P = 1 or more",
        )
    if np.isinf(scenario.x).any():
        raise InvalidField(where, "holds an infinite value; NaN is the model's own forecast")
    return scenario.x.reshape(-1, width)
