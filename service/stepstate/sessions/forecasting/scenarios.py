"""What a forecast call asks for, and which of its scenarios share a plan.

K horizons, P rows of a scenario, D inputs, S scenarios.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stepstate.engine import Floats, Plan
from stepstate.errors import ForecastImpossible, InvalidField
from stepstate.models import Manifest
from stepstate.sessions.types import Scheduler

MAX_HORIZON = 10_000


@dataclass(frozen=True, slots=True)
class Scenario:
    """Rows that might come: x row-major [P, D], raw units, NaN for the model's own forecast."""

    name: str
    x: Floats


@dataclass(frozen=True, slots=True)
class ForecastRequest:
    """What is asked for; horizon 0: the model's longest; no quantiles: the usual ones."""

    horizon: int
    quantiles: tuple[float, ...]
    scenarios: tuple[Scenario, ...]


@dataclass(frozen=True, slots=True)
class ScenarioGroup:
    """Scenarios that give the same values, and so share a plan.

    Their indices in the request [S], names [S] and rows [S, P, D], P at most K.
    """

    indices: Sequence[int]
    names: Sequence[str]
    rows: Floats
    plan: Plan


async def group_scenarios(
    scheduler: Scheduler, scenarios: Sequence[Scenario], horizon: int
) -> list[ScenarioGroup]:
    """The scenarios of a request by plan; without any, one group without rows.

    Raises:
        InvalidField: a scenario is not whole rows, or not finite.
        ForecastImpossible: the model can't forecast so far, or not under a scenario that it names.
    """
    manifest = scheduler.model.manifest
    if not scenarios:
        none = np.zeros((1, 0, manifest.input_width), np.float32)
        plan = scheduler.engine.plan(horizon, np.isnan(none[0]))
        return [ScenarioGroup([0], [""], none, plan)]
    rows = [_rows(manifest, index, one)[:horizon] for index, one in enumerate(scenarios)]
    groups = []
    for indices in _same_shape(rows):
        names = [scenarios[index].name for index in indices]
        together = np.stack([rows[index] for index in indices])
        try:
            plan = scheduler.engine.plan(horizon, ~np.isnan(together[0]))
        except ForecastImpossible as error:
            subject = f"{error.subject} under scenarios[{indices[0]}] {names[0]!r}"
            raise ForecastImpossible(subject, error.problem) from None
        groups.append(ScenarioGroup(indices, names, together, plan))
        await asyncio.sleep(0)
    return groups


def _same_shape(rows: Sequence[Floats]) -> list[list[int]]:
    """The indices of scenarios that are equally long and have NaN at the same places."""
    found: dict[tuple[int, bytes], list[int]] = {}
    for index, one in enumerate(rows):
        found.setdefault((len(one), np.isnan(one).tobytes()), []).append(index)
    return list(found.values())


def _rows(manifest: Manifest, index: int, scenario: Scenario) -> Floats:
    """A scenario's rows [P, D].

    Raises:
        InvalidField: it is not whole rows, has too many, or is not finite.
    """
    field, width = f"scenarios[{index}].x", manifest.input_width
    count = len(scenario.x)
    if not count or count % width:
        raise InvalidField(
            field,
            f"holds {count} values; {manifest.name}/{manifest.version} takes rows of {width}: send "
            f"P * {width} values, P = 1 or more",
        )
    if count > MAX_HORIZON * width:
        raise InvalidField(field, f"holds {count // width} rows, expected at most {MAX_HORIZON}")
    if np.isinf(scenario.x).any():
        raise InvalidField(field, "holds an infinite value; NaN is the model's own forecast")
    return scenario.x.reshape(-1, width)
