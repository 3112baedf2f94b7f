"""Forecasts from where sessions stand, many sessions and scenarios to a forward.

Rule 1: a session is copied between two of its steps, after those that it had accepted.
Rule 2: nothing of it changes, and it does not count as used.
Rule 3: one call computes at a time, in pieces between the turns of the engines.

K horizons, Q quantile levels, D inputs, P rows of a scenario.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

import numpy as np

from stepstate.engine import Floats, Origins
from stepstate.errors import ForecastImpossible, InvalidField, QueueFull, StepstateError
from stepstate.models import Manifest, Output
from stepstate.sessions.lane import Lane
from stepstate.sessions.session import ReplyTo, Session
from stepstate.sessions.table import Table
from stepstate.sessions.turn import Turn

MOST_SESSIONS = 10_000
MOST_HORIZON = 10_000
MOST_VALUES = 1_000_000
"""Of one call: 4 MB, what a client reads by default."""
MOST_BYTES = 256 * 2**20
"""Of all calls at once: one computes, and each other keeps its scenarios and copies of states."""
COPY_BYTES = 4096
"""About what a copy takes."""
TOGETHER = 64
"""States to a forward: it and what is made of it take some two milliseconds."""
COPIED_AT_ONCE = 500
FETCHED_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Scenario:
    """Rows that might come: x row-major [P, D], raw units, NaN for the model's own forecast."""

    name: str
    x: Floats


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for; horizon 0: the model's longest; no quantiles: the usual ones."""

    horizon: int
    quantiles: tuple[float, ...]
    scenarios: tuple[Scenario, ...]


@dataclass(frozen=True, slots=True)
class OutputForecast:
    """One output: values [K, Q] in raw units, and how each horizon came about [K]."""

    output: Output
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
    step_interval_seconds: int | None
    levels: tuple[float, ...]
    outputs: tuple[OutputForecast, ...]


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where one session stands: a copy of its state [R]."""

    session: Session
    t: int
    state: Floats


class Doors(Protocol):
    """What is used of the sessions."""

    def find(self, session_id: str) -> Session | None:
        """The resident session of this id if it takes steps now."""
        ...

    async def get(self, session_id: str) -> Session:
        """The open session of this id, made resident if it is not."""
        ...

    def refuse(self, session_id: str, error: StepstateError, reply_to: ReplyTo) -> bool:
        """Lets something wait for the session's steps before it; False if there are none."""
        ...


class Forecaster:
    """Forecasts for the sessions of a server.

    Args:
        doors: find sessions.
        table: their numbers.
    """

    def __init__(self, doors: Doors, table: Table) -> None:
        self._doors = doors
        self._table = table
        self._bytes = 0
        self._computing = asyncio.Lock()

    async def forecast(
        self, session_ids: Sequence[str], wish: Wish
    ) -> list[list[SessionForecast] | StepstateError]:
        """See `Sessions.forecast`."""
        _check(session_ids, wish)
        size = COPY_BYTES * len(session_ids) + sum(one.x.nbytes for one in wish.scenarios)
        if self._bytes and self._bytes + size > MOST_BYTES:
            raise QueueFull("bytes of forecasts under way on this server", MOST_BYTES)
        self._bytes += size
        try:
            origins = await self._origins(session_ids)
            _check_size(origins, wish)
            async with self._computing:
                return await self._forecast(origins, wish)
        finally:
            self._bytes -= size

    async def _origins(self, session_ids: Sequence[str]) -> list[_Origin | StepstateError]:
        few = asyncio.Semaphore(FETCHED_AT_ONCE)
        found: list[_Origin | StepstateError | asyncio.Task[_Origin | StepstateError]] = []
        for place, session_id in enumerate(session_ids):
            session = self._doors.find(session_id)
            if session is not None and session.current is None:
                found.append(self._copy(session))
            else:
                found.append(asyncio.create_task(self._fetch(session_id, few)))
            if place % COPIED_AT_ONCE == COPIED_AT_ONCE - 1:
                await asyncio.sleep(0)
        tasks = [origin for origin in found if isinstance(origin, asyncio.Task)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return [one.result() if isinstance(one, asyncio.Task) else one for one in found]

    async def _fetch(self, session_id: str, few: asyncio.Semaphore) -> _Origin | StepstateError:
        """Copies a session that has to be loaded, or has steps to finish."""
        async with few:
            try:
                session = await self._doors.get(session_id)
                turn = Turn(lambda: self._copy(session))
                if not self._doors.refuse(session_id, turn.mark, turn):
                    turn.now()
                return await turn.result()
            except StepstateError as error:
                return error.with_traceback(None)  # or it would keep this frame, in a circle

    def _copy(self, session: Session) -> _Origin | StepstateError:
        t = self._table.t[session.handle]
        if not t:
            return ForecastImpossible(
                f"session {session.session_id!r}", "it has no rows yet: step it, or prime it, first"
            )
        state = session.lane.engine.read_states(np.array([session.slot]))[0]
        return _Origin(session, t, state)

    async def _forecast(
        self, origins: Sequence[_Origin | StepstateError], wish: Wish
    ) -> list[list[SessionForecast] | StepstateError]:
        results: list[list[SessionForecast] | StepstateError] = [
            origin if isinstance(origin, StepstateError) else [] for origin in origins
        ]
        size = max(1, TOGETHER // max(1, len(wish.scenarios)))
        for lane, places in _by_lane(origins).items():
            for first in range(0, len(places), size):
                some = places[first : first + size]
                group = [origin for p in some if isinstance(origin := origins[p], _Origin)]
                try:
                    told: Sequence[list[SessionForecast] | StepstateError]
                    told = await _of_group(lane, group, wish)
                except StepstateError as error:
                    told = [error.with_traceback(None)] * len(group)
                for place, one in zip(some, told, strict=True):
                    results[place] = one
                await asyncio.sleep(0)
        return results


async def _of_group(
    lane: Lane, group: Sequence[_Origin], wish: Wish
) -> list[list[SessionForecast]]:
    """The forecasts of some sessions of a model under every scenario."""
    manifest = lane.model.manifest
    told: list[dict[int, SessionForecast]] = [{} for _ in group]
    for numbers, ahead in _alike(manifest, wish.scenarios, _horizon(manifest, wish)):
        names = [wish.scenarios[number].name for number in numbers] if wish.scenarios else [""]
        forecasts = await _run(lane, group, names, ahead, wish)
        for place, mine in enumerate(told):
            of_session = forecasts[place * len(numbers) : (place + 1) * len(numbers)]
            mine.update(zip(numbers, of_session, strict=True))
    return [[mine[number] for number in sorted(mine)] for mine in told]


async def _run(
    lane: Lane, group: Sequence[_Origin], names: Sequence[str], ahead: Floats, wish: Wish
) -> list[SessionForecast]:
    """The forecasts of each session under each of the scenarios [S, P, D], run as one batch."""
    manifest = lane.model.manifest
    given = np.asarray((~np.isnan(ahead)).all(axis=0))
    plan = lane.engine.plan(_horizon(manifest, wish), given)
    items = [origin for origin in group for _ in ahead]
    states = np.stack([origin.state for origin in items])
    at = np.array([origin.t for origin in items])
    phases = (np.array([origin.session.phase for origin in items]) + at) % lane.timeline.phases
    every = np.tile(ahead, (len(group), 1, 1))
    outlooks = await lane.engine.forecast(Origins(states, at, phases), plan, every)
    levels = [_levels(lane, origin, wish) for origin in items]
    values = {
        some: [lane.engine.quantiles(outlook, some, states) for outlook in outlooks]
        for some in set(levels)
    }
    return [
        SessionForecast(
            session_id=origin.session.session_id,
            scenario=names[place % len(names)],
            t=origin.t,
            first_time=_first_time(manifest, origin),
            step_interval_seconds=manifest.step_interval_seconds,
            levels=some,
            outputs=tuple(
                OutputForecast(
                    outlook.output,
                    found[place],
                    outlook.methods[place].tolist(),
                )
                for outlook, found in zip(outlooks, values[some], strict=True)
            ),
        )
        for place, (origin, some) in enumerate(zip(items, levels, strict=True))
    ]


def _by_lane(origins: Sequence[_Origin | StepstateError]) -> dict[Lane, list[int]]:
    """The places of the sessions of each model."""
    found: dict[Lane, list[int]] = {}
    for place, origin in enumerate(origins):
        if isinstance(origin, _Origin):
            found.setdefault(origin.session.lane, []).append(place)
    return found


def _alike(
    manifest: Manifest, scenarios: Sequence[Scenario], horizon: int
) -> Iterator[tuple[list[int], Floats]]:
    """Scenarios of the same length: their numbers, and their rows [S, P, D], at most K of them."""
    if not scenarios:
        yield [0], np.zeros((1, 0, manifest.input_width), np.float32)
        return
    rows = [_scenario_rows(manifest, *one)[:horizon] for one in enumerate(scenarios)]
    for length in sorted({len(one) for one in rows}):
        numbers = [number for number, one in enumerate(rows) if len(one) == length]
        yield numbers, np.stack([rows[number] for number in numbers])


def _scenario_rows(manifest: Manifest, number: int, scenario: Scenario) -> Floats:
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


def _horizon(manifest: Manifest, wish: Wish) -> int:
    return wish.horizon or max(max(output.horizons) for output in manifest.outputs) or 1


def _levels(lane: Lane, origin: _Origin, wish: Wish) -> tuple[float, ...]:
    """The quantile levels of a session's forecast.

    Raises:
        InvalidField: the model knows no such thing.
    """
    manifest = lane.model.manifest
    level = lane.engine.interval_level(origin.state)
    quantiles = next((output.quantiles for output in manifest.outputs if output.quantiles), ())
    if wish.quantiles:
        if level is None and not quantiles and wish.quantiles != (0.5,):
            raise InvalidField(
                "quantiles",
                f"are not known of {manifest.name}/{manifest.version}: its outputs have none, and "
                "it tracks no horizon; ask for 0.5, or add `tracking` to its manifest",
            )
        return wish.quantiles
    if level is not None:
        return round((1 - level) / 2, 7), 0.5, round((1 + level) / 2, 7)
    return (quantiles[0], 0.5, quantiles[-1]) if quantiles else (0.5,)


def _first_time(manifest: Manifest, origin: _Origin) -> datetime | None:
    start, interval = origin.session.record.start_time, manifest.step_interval_seconds
    if start is None or interval is None:
        return None
    try:
        return start + timedelta(seconds=origin.t * interval)
    except OverflowError:  # beyond the year 9999
        return None


def _check(session_ids: Sequence[str], wish: Wish) -> None:
    if not 0 < len(session_ids) <= MOST_SESSIONS:
        raise InvalidField(
            "session_id", f"names {len(session_ids)} sessions, expected 1 to {MOST_SESSIONS}"
        )
    if wish.horizon > MOST_HORIZON:
        raise InvalidField("horizon", f"is {wish.horizon}, expected at most {MOST_HORIZON}")
    for place, level in enumerate(wish.quantiles):
        if not 0 < level < 1:
            raise InvalidField(
                f"quantiles[{place}]", f"is {level:g}, expected more than 0 and less than 1"
            )


def _check_size(origins: Sequence[_Origin | StepstateError], wish: Wish) -> None:
    """Refuses a call whose answer would be larger than a client reads."""
    values = 0
    for origin in origins:
        if isinstance(origin, _Origin):
            manifest = origin.session.lane.model.manifest
            outputs = len(manifest.outputs) * max(1, len(wish.scenarios))
            values += _horizon(manifest, wish) * outputs * (len(wish.quantiles) or 3)
    if values > MOST_VALUES:
        raise InvalidField(
            "session_id",
            f"sessions, scenarios, horizon and quantiles together make {values} values, expected "
            f"at most {MOST_VALUES}: ask for fewer at once",
        )
