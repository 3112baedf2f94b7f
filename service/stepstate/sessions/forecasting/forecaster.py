"""Forecasts from where sessions stand, many sessions and scenarios to a forward.

Rule 1: a session is copied between two of its steps, after those that arrived before the call.
Rule 2: nothing of it changes, and it does not count as used.
Rule 3: one short block and one long one compute at a time, in pieces between the turns of the
        engines, and calls take turns block by block.
Rule 4: what a call takes is known, and refused if it is too much, before it computes.

K horizons, Q quantile levels, D inputs, P rows of a scenario.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Protocol, TypeVar

import numpy as np

from stepstate.engine import Floats, ForecastOrigins, HorizonForecast
from stepstate.errors import ForecastImpossible, InvalidField, StepstateError
from stepstate.models import Manifest, OutputSpec
from stepstate.sessions.arrivals import Call, Waiter
from stepstate.sessions.barrier import SessionBarrier
from stepstate.sessions.forecasting.limits import (
    MAX_FED_ROWS,
    MemoryBudget,
    check_bytes,
    check_wish,
    error_bytes,
    forecast_bytes,
    text_bytes,
)
from stepstate.sessions.forecasting.scenarios import ScenarioGroup, courses_of
from stepstate.sessions.options import ID_LENGTH
from stepstate.sessions.scheduler import StepScheduler
from stepstate.sessions.surprise import surprise
from stepstate.sessions.table import Table
from stepstate.sessions.types import ResidentSession

TOGETHER = 64
"""States to a forward: it and what is made of it take some two milliseconds."""
LONG_ROWS = 200
"""Rows fed back that make a block long: one of 64 states that is not takes some 0.2 s at most."""
COPIED_AT_ONCE = 500
FETCHED_AT_ONCE = 64


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
class OutputTrajectory:
    """One output: values [K, Q] in raw units, and how each horizon came about [K]."""

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
class _Origin:
    """Where one session stands: a copy of its state [R]."""

    session: ResidentSession
    t: int
    state: Floats


@dataclass(frozen=True, slots=True)
class _Group:
    """The sessions of one model, and how they are forecast."""

    scheduler: StepScheduler
    origins: Sequence[_Origin]
    courses: Sequence[ScenarioGroup]


_Item = tuple[_Origin, int]
"""A session, and the place of a scenario in a course."""
_Told = list[SessionForecast] | StepstateError
_Call = Call[SessionBarrier[_Origin | StepstateError]]
T = TypeVar("T")


class SessionLookup(Protocol):
    """What is used of the sessions."""

    def find(self, session_id: str) -> ResidentSession | None:
        """The resident session of this id if it takes steps now, and nobody waits for it."""
        ...

    def wait(self, session_id: str, waiter: Waiter, *, start: bool = True) -> None:
        """Lets a request stand in a session's line."""
        ...

    def load(self, session_id: str) -> None:
        """Makes the session resident that requests wait for without `start`."""
        ...

    def drop(self, session_id: str, waiter: Waiter) -> None:
        """Takes a request out of its line."""
        ...

    def turn(self, session: ResidentSession, act: Callable[[], T]) -> SessionBarrier[T]:
        """Calls a function after the steps that a session has accepted."""
        ...


class Forecaster:
    """Forecasts for the sessions of a server.

    Args:
        doors: find sessions.
        table: their numbers.
    """

    def __init__(self, doors: SessionLookup, table: Table) -> None:
        self._doors = doors
        self._table = table
        self._room = MemoryBudget()
        self._short = asyncio.Lock()
        self._long = asyncio.Lock()

    async def forecast(
        self, session_ids: Sequence[str], wish: ForecastRequest
    ) -> list[list[SessionForecast] | StepstateError]:
        """See `Sessions.forecast`."""
        check_wish(session_ids, wish)
        with self._room.of_call() as take:
            take(sum(one.x.nbytes for one in wish.scenarios))
            origins = await self._origins(dict.fromkeys(session_ids), take)
            told: dict[str, _Told] = {
                name: one for name, one in origins.items() if isinstance(one, StepstateError)
            }
            groups = []
            for scheduler, mine in _by_lane(origins).items():
                try:
                    groups.append(await _group(scheduler, mine, wish))
                except StepstateError as error:
                    names = [origin.session.session_id for origin in mine]
                    told.update(dict.fromkeys(names, error.with_traceback(None)))
            _check_fed_rows(groups)
            take(_check_reply(session_ids, wish, told, groups))
            for group in groups:
                told.update(await self._of_group(group, wish))
        return [told[session_id] for session_id in session_ids]

    async def _origins(
        self, session_ids: Iterable[str], take: Callable[[int], None]
    ) -> dict[str, _Origin | StepstateError]:
        few = asyncio.Semaphore(FETCHED_AT_ONCE)
        found: dict[str, _Origin | StepstateError] = {}
        calls: dict[str, _Call] = {}
        tasks: dict[str, asyncio.Task[_Origin | StepstateError]] = {}
        try:
            for session_id in session_ids:  # each has its place before anything is waited for
                if not self._copied_at_once(session_id, found):
                    calls[session_id] = self._arrive(session_id)
            for origin in found.values():
                _counted(origin, take)
            for place, (session_id, call) in enumerate(calls.items()):
                tasks[session_id] = asyncio.create_task(self._fetch(session_id, call, few, take))
                if place % COPIED_AT_ONCE == COPIED_AT_ONCE - 1:
                    await asyncio.sleep(0)
            found.update(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))
        finally:
            for session_id, call in calls.items():
                self._doors.drop(session_id, call)
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        return found

    def _copied_at_once(self, session_id: str, found: dict[str, _Origin | StepstateError]) -> bool:
        """Copies a session that has nothing to finish, unless many have been copied."""
        session = self._doors.find(session_id) if len(found) < COPIED_AT_ONCE else None
        if session is None or self._table.busy[session.handle]:
            return False
        found[session_id] = self._copied(session)
        return True

    def _arrive(self, session_id: str) -> _Call:
        """Takes a place in a session's line, and then one among its steps."""
        call = Call(lambda session: self._doors.turn(session, lambda: self._copied(session)))
        session = self._doors.find(session_id)
        if session is not None and self._table.busy[session.handle]:
            call.found(session)
        else:
            self._doors.wait(session_id, call, start=False)
        return call

    async def _fetch(
        self, session_id: str, call: _Call, few: asyncio.Semaphore, take: Callable[[int], None]
    ) -> _Origin | StepstateError:
        """Copies a session that has to be loaded, or has steps to finish."""
        async with few:
            try:
                self._doors.load(session_id)
                origin = await (await call.result).result()
            except StepstateError as error:
                return error.with_traceback(None)  # or it would keep this frame, in a circle
            return _counted(origin, take)

    def _copied(self, session: ResidentSession) -> _Origin | StepstateError:
        try:
            return self._copy(session)
        except Exception as error:  # noqa: BLE001 - it is this session's, not the call's
            return surprise("a forecast failed", error, session.session_id)

    def _copy(self, session: ResidentSession) -> _Origin | StepstateError:
        t = self._table.t[session.handle]
        if not t:
            return ForecastImpossible(
                f"session {session.session_id!r}", "it has no rows yet: step it, or prime it, first"
            )
        state = session.scheduler.engine.read_states(np.array([session.slot]))[0]
        return _Origin(session, t, state)

    async def _of_group(self, group: _Group, wish: ForecastRequest) -> dict[str, _Told]:
        """The forecasts of some sessions of a model under every scenario."""
        made: dict[str, dict[int, SessionForecast]] = {
            origin.session.session_id: {} for origin in group.origins
        }
        failed: dict[str, StepstateError] = {}
        for course in group.courses:
            computing = self._long if course.plan.fed_rows > LONG_ROWS else self._short
            places = range(len(course.numbers))
            items = [(origin, place) for origin in group.origins for place in places]
            for first in range(0, len(items), TOGETHER):
                block = items[first : first + TOGETHER]
                async with computing:
                    forecasts = await _run_isolated(group.scheduler, course, block, wish)
                for (origin, place), one in zip(block, forecasts, strict=True):
                    if isinstance(one, StepstateError):
                        failed[origin.session.session_id] = one
                    else:
                        made[one.session_id][course.numbers[place]] = one
                await asyncio.sleep(0)
        told = {name: [mine[number] for number in sorted(mine)] for name, mine in made.items()}
        return {**told, **failed}


def _counted(
    origin: _Origin | StepstateError, take: Callable[[int], None]
) -> _Origin | StepstateError:
    """It, once there is room for its copy."""
    if isinstance(origin, _Origin):
        take(origin.state.nbytes)
    return origin


async def _group(
    scheduler: StepScheduler, origins: Sequence[_Origin], wish: ForecastRequest
) -> _Group:
    """How sessions of a model are forecast.

    Raises:
        InvalidField, ForecastImpossible: none of them can be.
    """
    _check_levels(scheduler, origins[0], wish)
    courses = await courses_of(scheduler, wish.scenarios, _horizon(scheduler.model.manifest, wish))
    return _Group(scheduler, origins, courses)


async def _run_isolated(
    scheduler: StepScheduler, course: ScenarioGroup, block: Sequence[_Item], wish: ForecastRequest
) -> Sequence[SessionForecast | StepstateError]:
    """The forecasts of a block; where that raises, of each half of it, down to one."""
    try:
        return await _run(scheduler, course, block, wish)
    except Exception as error:  # noqa: BLE001 - it is one session's, not the call's
        if len(block) == 1:
            return [surprise("a forecast failed", error, block[0][0].session.session_id)]
    middle = len(block) // 2
    return [
        one
        for half in (block[:middle], block[middle:])
        for one in await _run_isolated(scheduler, course, half, wish)
    ]


async def _run(
    scheduler: StepScheduler, course: ScenarioGroup, block: Sequence[_Item], wish: ForecastRequest
) -> list[SessionForecast]:
    """The forecasts of sessions under scenarios of a course, run as one batch."""
    manifest = scheduler.model.manifest
    origins = [origin for origin, _ in block]
    states = np.stack([origin.state for origin in origins])
    at = np.array([origin.t for origin in origins])
    phases = np.array([origin.session.phase for origin in origins]) + at
    ahead = course.ahead[[place for _, place in block]]
    outlooks = await scheduler.engine.forecast(
        ForecastOrigins(states, at, phases), course.plan, ahead
    )
    levels = [_levels(scheduler, origin, wish) for origin in origins]
    outputs = _outputs(scheduler, states, outlooks, levels)
    looking = [outlook.output for outlook in outlooks]
    return [
        SessionForecast(
            session_id=origin.session.session_id,
            scenario=course.names[place],
            t=origin.t,
            first_time=_first_time(manifest, origin),
            step_interval_seconds=manifest.step_interval_seconds,
            levels=some,
            outputs=mine,
            reply_bytes=text_bytes(origin.session.session_id, course.names[place])
            + forecast_bytes(looking, course.plan.horizon, len(some)),
        )
        for (origin, place), some, mine in zip(block, levels, outputs, strict=True)
    ]


def _outputs(
    scheduler: StepScheduler,
    states: Floats,
    outlooks: Sequence[HorizonForecast],
    levels: Sequence[tuple[float, ...]],
) -> list[tuple[OutputTrajectory, ...]]:
    """The outputs of each session of a batch, with the quantiles that are wanted of it."""
    found: list[tuple[OutputTrajectory, ...]] = [()] * len(levels)
    for some in set(levels):
        here = [place for place, mine in enumerate(levels) if mine == some]
        for outlook in outlooks:
            part = replace(outlook, values=outlook.values[here], methods=outlook.methods[here])
            quantiles = scheduler.engine.quantiles(part, some, states[here])
            for place, values, methods in zip(here, quantiles, part.methods, strict=True):
                found[place] += (OutputTrajectory(part.output, values, methods.tolist()),)
    return found


def _by_lane(origins: dict[str, _Origin | StepstateError]) -> dict[StepScheduler, list[_Origin]]:
    """The sessions of each model."""
    found: dict[StepScheduler, list[_Origin]] = {}
    for origin in origins.values():
        if isinstance(origin, _Origin):
            found.setdefault(origin.session.scheduler, []).append(origin)
    return found


def _horizon(manifest: Manifest, wish: ForecastRequest) -> int:
    return wish.horizon or max(max(output.horizons) for output in manifest.outputs) or 1


def _levels(scheduler: StepScheduler, origin: _Origin, wish: ForecastRequest) -> tuple[float, ...]:
    """The quantile levels of a session's forecast."""
    if wish.quantiles:
        return wish.quantiles
    level = scheduler.engine.interval_level(origin.state)
    if level is not None:
        return round((1 - level) / 2, 7), 0.5, round((1 + level) / 2, 7)
    quantiles = _quantiles(scheduler.model.manifest)
    return (quantiles[0], 0.5, quantiles[-1]) if quantiles else (0.5,)


def _quantiles(manifest: Manifest) -> Sequence[float]:
    """Those of the model's outputs, if they have any."""
    return next((output.quantiles for output in manifest.outputs if output.quantiles), ())


def _first_time(manifest: Manifest, origin: _Origin) -> datetime | None:
    start, interval = origin.session.record.start_time, manifest.step_interval
    if start is None or interval is None:
        return None
    try:
        return start + origin.t * interval
    except OverflowError:  # beyond the year 9999
        return None


def _check_levels(scheduler: StepScheduler, origin: _Origin, wish: ForecastRequest) -> None:
    """Refuses quantiles of a model that knows none.

    Raises:
        InvalidField: it knows no such thing.
    """
    manifest = scheduler.model.manifest
    if wish.quantiles in {(), (0.5,)} or _quantiles(manifest):
        return
    if scheduler.engine.interval_level(origin.state) is None:
        raise InvalidField(
            "quantiles",
            f"are not known of {manifest.name}/{manifest.version}: its outputs have none, and "
            "it tracks no horizon; ask for 0.5, or add `tracking` to its manifest",
        )


def _check_fed_rows(groups: Sequence[_Group]) -> None:
    """Refuses a call that would compute for very long."""
    rows = sum(
        course.plan.fed_rows * len(course.numbers) * len(group.origins)
        for group in groups
        for course in group.courses
    )
    if rows > MAX_FED_ROWS:
        raise InvalidField(
            "horizon",
            f"needs {rows} rows to be fed back, of all sessions and scenarios together, expected "
            f"at most {MAX_FED_ROWS}: ask for fewer of them at once, or for a shorter horizon",
        )


def _check_reply(
    session_ids: Sequence[str],
    wish: ForecastRequest,
    told: dict[str, _Told],
    groups: Sequence[_Group],
) -> int:
    """What the reply takes.

    Raises:
        InvalidField: it is more than a client reads.
    """
    sizes = {
        name: text_bytes(name[:ID_LENGTH]) + error_bytes(one)
        for name, one in told.items()
        if isinstance(one, StepstateError)
    }
    names, times = text_bytes(*(one.name for one in wish.scenarios)), max(1, len(wish.scenarios))
    for group in groups:
        manifest = group.scheduler.model.manifest
        horizon, levels = _horizon(manifest, wish), len(wish.quantiles) or 3
        each = names + times * forecast_bytes(manifest.outputs, horizon, levels)
        for origin in group.origins:
            name = origin.session.session_id
            sizes[name] = each + times * len(name)
    size = sum(sizes[session_id] for session_id in session_ids)
    check_bytes(len(session_ids), size)
    return size
