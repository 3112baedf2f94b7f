"""Forecasts from where sessions are now, many sessions and scenarios to a forward.

Rule 1: a session is copied between two of its steps, after those that arrived before the call.
Rule 2: the session does not change, and a forecast does not count as use.
Rule 3: at most one short block and one long block compute at a time, in pieces between the turns
        of the engines; calls take turns block by block.
Rule 4: what a call takes is known before it computes, and refused if it is too much.

K horizons, Q quantile levels, D inputs, P rows of a scenario.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np

from stepstate.engine import Floats, ForecastOrigins, HorizonForecast
from stepstate.errors import InvalidField, StepstateError, without_frames
from stepstate.identity import SessionKey, id_of
from stepstate.models import Manifest, OutputSpec
from stepstate.sessions.forecasting.limits import (
    Reserve,
    check_bytes,
    check_fed_rows,
    check_request,
    error_bytes,
    forecast_bytes,
    text_bytes,
    within_call,
)
from stepstate.sessions.forecasting.origins import Origin, OriginCopier
from stepstate.sessions.forecasting.scenarios import (
    ForecastRequest,
    ScenarioGroup,
    group_scenarios,
)
from stepstate.sessions.options import ID_LENGTH
from stepstate.sessions.queues import RequestQueues
from stepstate.sessions.table import Table
from stepstate.sessions.types import Scheduler, unexpected

BLOCK_STATES = 64
"""States in one forward: it and its results take about two milliseconds."""
LONG_ROWS = 200
"""Rows fed back that make a block long: a block of 64 states below that takes at most 0.2 s."""


@dataclass(frozen=True, slots=True)
class OutputTrajectory:
    """One output: values [K, Q] in raw units, and how each horizon was made [K]."""

    output: OutputSpec
    values: Floats
    methods: Sequence[int]
    """Values of `engine.Method`."""


@dataclass(frozen=True, slots=True)
class SessionForecast:
    """One session's forecast under one scenario."""

    session_id: str
    scenario: str
    t: int
    first_time: datetime | None
    """Of the row at horizon 1."""
    step_interval_seconds: float | None
    levels: tuple[float, ...]
    outputs: tuple[OutputTrajectory, ...]
    reply_bytes: int
    """About what it takes in the reply, and at most that."""


@dataclass(frozen=True, slots=True)
class _ModelOrigins:
    """The sessions of one model, and the scenarios by plan."""

    scheduler: Scheduler
    origins: Sequence[Origin]
    groups: Sequence[ScenarioGroup]

    @property
    def fed_rows(self) -> int:
        """Rows to be fed back, of all sessions and scenarios."""
        each = sum(group.plan.fed_rows * len(group.indices) for group in self.groups)
        return each * len(self.origins)


_Item = tuple[Origin, int]
"""A session, and the position of a scenario in its group."""
_Result = list[SessionForecast] | StepstateError


class Forecaster:
    """Forecasts for the sessions of a server.

    Args:
        queues: where a copy of a session waits for its turn.
        table: their numbers.
    """

    def __init__(self, queues: RequestQueues, table: Table) -> None:
        self._copier = OriginCopier(queues, table)
        self._short = asyncio.Lock()
        self._long = asyncio.Lock()

    async def forecast(
        self,
        keys: Sequence[SessionKey],
        request: ForecastRequest,
        admit: Callable[[int], None],
        reserve: Reserve,
    ) -> list[list[SessionForecast] | StepstateError]:
        """See `SessionService.forecast`."""
        check_request(len(keys), request)
        admit(len(keys) * max(1, len(request.scenarios)))
        reserve = within_call(reserve)
        reserve(sum(scenario.x.nbytes for scenario in request.scenarios))
        origins = await self._copier.copy(dict.fromkeys(keys), reserve)
        results: dict[SessionKey, _Result] = {
            name: one for name, one in origins.items() if isinstance(one, StepstateError)
        }
        models = []
        for scheduler, its in _by_scheduler(origins).items():
            try:
                models.append(await _model_origins(scheduler, its, request))
            except StepstateError as error:
                failure = without_frames(error)
                results.update({origin.key: failure for origin in its})
        check_fed_rows(sum(model.fed_rows for model in models))
        size = _reply_bytes(keys, request, results, models)
        check_bytes(len(keys), size)
        reserve(size)
        for model in models:
            results.update(await self._roll_forward(model, request))
        return [results[key] for key in keys]

    async def _roll_forward(
        self, model: _ModelOrigins, request: ForecastRequest
    ) -> dict[SessionKey, _Result]:
        """The forecasts of a model's sessions under every scenario."""
        found: dict[SessionKey, dict[int, SessionForecast]] = {o.key: {} for o in model.origins}
        failed: dict[SessionKey, StepstateError] = {}
        for group in model.groups:
            lock = self._long if group.plan.fed_rows > LONG_ROWS else self._short
            positions = range(len(group.indices))
            items = [(origin, position) for origin in model.origins for position in positions]
            for first in range(0, len(items), BLOCK_STATES):
                block = items[first : first + BLOCK_STATES]
                async with lock:
                    forecasts = await _run_isolated(model.scheduler, group, block, request)
                for (origin, position), one in zip(block, forecasts, strict=True):
                    if isinstance(one, StepstateError):
                        failed[origin.key] = one
                    else:
                        found[origin.key][group.indices[position]] = one
                await asyncio.sleep(0)
        in_order = {name: [its[index] for index in sorted(its)] for name, its in found.items()}
        return {**in_order, **failed}


def _by_scheduler(
    origins: dict[SessionKey, Origin | StepstateError],
) -> dict[Scheduler, list[Origin]]:
    """The sessions of each model."""
    found: dict[Scheduler, list[Origin]] = {}
    for origin in origins.values():
        if isinstance(origin, Origin):
            found.setdefault(origin.session.scheduler, []).append(origin)
    return found


async def _model_origins(
    scheduler: Scheduler, origins: Sequence[Origin], request: ForecastRequest
) -> _ModelOrigins:
    """The sessions of a model with the plans of the scenarios.

    Raises:
        InvalidField, ForecastImpossible: none of them can be forecast.
    """
    _check_levels(scheduler, origins[0], request)
    horizon = _horizon(scheduler.model.manifest, request)
    groups = await group_scenarios(scheduler, request.scenarios, horizon)
    return _ModelOrigins(scheduler, origins, groups)


async def _run_isolated(
    scheduler: Scheduler,
    group: ScenarioGroup,
    block: Sequence[_Item],
    request: ForecastRequest,
) -> Sequence[SessionForecast | StepstateError]:
    """The forecasts of a block; where that raises, of each half of it, down to one."""
    try:
        return await _run(scheduler, group, block, request)
    except Exception as error:  # noqa: BLE001 - it is one session's, not the call's
        if len(block) == 1:
            return [unexpected("a forecast failed", error, block[0][0].key)]
    middle = len(block) // 2
    return [
        one
        for half in (block[:middle], block[middle:])
        for one in await _run_isolated(scheduler, group, half, request)
    ]


async def _run(
    scheduler: Scheduler,
    group: ScenarioGroup,
    block: Sequence[_Item],
    request: ForecastRequest,
) -> list[SessionForecast]:
    """The forecasts of sessions under scenarios of a group, run as one batch."""
    manifest = scheduler.model.manifest
    origins = [origin for origin, _ in block]
    states = np.stack([origin.state for origin in origins])
    at = np.array([origin.t for origin in origins])
    phases = np.array([origin.session.phase for origin in origins]) + at
    rows = group.rows[[position for _, position in block]]
    forecasts = await scheduler.engine.forecast(
        ForecastOrigins(states, at, phases), group.plan, rows
    )
    levels = [_levels(scheduler, origin, request) for origin in origins]
    outputs = _outputs(scheduler, states, forecasts, levels)
    specs = [forecast.output for forecast in forecasts]
    return [
        SessionForecast(
            session_id=origin.session.session_id,
            scenario=group.names[position],
            t=origin.t,
            first_time=_first_time(manifest, origin),
            step_interval_seconds=manifest.step_interval_seconds,
            levels=its_levels,
            outputs=its_outputs,
            reply_bytes=text_bytes(origin.session.session_id, group.names[position])
            + forecast_bytes(specs, group.plan.horizon, len(its_levels)),
        )
        for (origin, position), its_levels, its_outputs in zip(block, levels, outputs, strict=True)
    ]


def _outputs(
    scheduler: Scheduler,
    states: Floats,
    forecasts: Sequence[HorizonForecast],
    levels: Sequence[tuple[float, ...]],
) -> list[tuple[OutputTrajectory, ...]]:
    """The outputs of each session of a batch, at its quantile levels."""
    found: list[tuple[OutputTrajectory, ...]] = [()] * len(levels)
    for some in set(levels):
        rows = [row for row, its in enumerate(levels) if its == some]
        for forecast in forecasts:
            part = replace(forecast, values=forecast.values[rows], methods=forecast.methods[rows])
            quantiles = scheduler.engine.quantiles(part, some, states[rows])
            for row, values, methods in zip(rows, quantiles, part.methods, strict=True):
                found[row] += (OutputTrajectory(part.output, values, methods.tolist()),)
    return found


def _horizon(manifest: Manifest, request: ForecastRequest) -> int:
    return request.horizon or max(max(output.horizons) for output in manifest.outputs) or 1


def _levels(scheduler: Scheduler, origin: Origin, request: ForecastRequest) -> tuple[float, ...]:
    """The quantile levels of a session's forecast."""
    if request.quantiles:
        return request.quantiles
    level = scheduler.engine.interval_level(origin.state)
    if level is not None:
        return round((1 - level) / 2, 7), 0.5, round((1 + level) / 2, 7)
    quantiles = _quantiles(scheduler.model.manifest)
    return (quantiles[0], 0.5, quantiles[-1]) if quantiles else (0.5,)


def _quantiles(manifest: Manifest) -> Sequence[float]:
    """Those of the model's outputs, if they have any."""
    return next((output.quantiles for output in manifest.outputs if output.quantiles), ())


def _check_levels(scheduler: Scheduler, origin: Origin, request: ForecastRequest) -> None:
    """Refuses quantiles that the model can't give.

    Raises:
        InvalidField.
    """
    manifest = scheduler.model.manifest
    if request.quantiles in {(), (0.5,)} or _quantiles(manifest):
        return
    if scheduler.engine.interval_level(origin.state) is None:
        raise InvalidField(
            "quantiles",
            f"are not known of {manifest.name}/{manifest.version}: its outputs have none, and "
            "it tracks no horizon; ask for 0.5, or add `tracking` to its manifest",
        )


def _first_time(manifest: Manifest, origin: Origin) -> datetime | None:
    start, interval = origin.session.record.start_time, manifest.step_interval
    if start is None or interval is None:
        return None
    try:
        return start + origin.t * interval
    except OverflowError:  # beyond the year 9999
        return None


def _reply_bytes(
    keys: Sequence[SessionKey],
    request: ForecastRequest,
    results: dict[SessionKey, _Result],
    models: Sequence[_ModelOrigins],
) -> int:
    """What the reply takes."""
    sizes = {
        name: text_bytes(id_of(name)[:ID_LENGTH]) + error_bytes(one)
        for name, one in results.items()
        if isinstance(one, StepstateError)
    }
    names, count = text_bytes(*(s.name for s in request.scenarios)), len(request.scenarios) or 1
    for model in models:
        manifest = model.scheduler.model.manifest
        horizon, levels = _horizon(manifest, request), len(request.quantiles) or 3
        each = names + count * forecast_bytes(manifest.outputs, horizon, levels)
        sizes |= {o.key: each + count * len(o.session.session_id) for o in model.origins}
    return sum(sizes[key] for key in keys)
