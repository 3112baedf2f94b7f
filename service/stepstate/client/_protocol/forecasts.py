"""A forecast of many sessions: what is still to be asked, and the results. No I/O.

Rule 1: each session has a result of its own; an error of one does not affect the others.
Rule 2: a session that can't be forecast just now is asked for again, and so is one in which the
        server was rolled back, when it has caught up.
Rule 3: a reply stays below 4 MiB: many sessions take several calls.

K horizons, Q quantile levels, P rows of a scenario, D inputs a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from stepstate.client import convert
from stepstate.client._protocol.retry import Backoff, is_retryable
from stepstate.client._protocol.session import BaseSession, fill
from stepstate.client.forecast import Forecast, Levels, Scenarios
from stepstate.client.times import Times, read_rows, split_times
from stepstate.client.types import Floats, ModelInfo, floats
from stepstate.errors import (
    Cancelled,
    Draining,
    ForecastImpossible,
    InvalidField,
    PermissionDenied,
    ServerUnreachable,
    StepAhead,
    StepstateError,
    Unauthenticated,
    UnexpectedStatus,
)
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.floats import put_floats

S = TypeVar("S", bound=BaseSession)
T = TypeVar("T")

ForecastResult = Forecast | dict[str, Forecast] | StepstateError
"""With scenarios a forecast for each of them, by name."""

CALL_SESSIONS = 5_000
"""Half of a server's limit for a request."""
CALL_VALUES = 500_000
"""Half of a server's limit for a reply."""
MAX_HORIZON = 10_000
"""A server's limit."""
USUAL_HORIZON = 48
"""If neither the horizon nor the model is known."""
MAX_TIMES_AHEAD = 10
"""How often scenarios are placed anew, for a session that is stepped at the same time."""
_ERRORS_OF_CALL = (
    InvalidField, ServerUnreachable, Draining, Cancelled, UnexpectedStatus, Unauthenticated,
    PermissionDenied,
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class ScenarioRows:
    """A scenario: its rows [P, D], and their times if they have some."""

    name: str
    rows: Floats
    times: Times | None


@dataclass(slots=True, eq=False)
class PendingForecast(Generic[S]):
    """One session, and its result.

    `t`: rows whose outputs the application had when the forecast was asked for. `behind`: the
    server's t, before that. `error`: why there is no result yet. `ahead`: the server's t, after
    that, which it was `times_ahead` times.
    """

    session_id: str
    session: S | None
    result: ForecastResult | None = None
    t: int = 0
    behind: int | None = None
    error: StepstateError | None = None
    ahead: int = 0
    times_ahead: int = 0


class ForecastProtocol(Generic[S]):
    """The calls for the forecasts of many sessions.

    Args:
        sessions: those to forecast, or their ids.
        horizon: K; None for the longest.
        quantiles: levels; None for the default ones.
        scenarios: rows by name; None for none.
        models: those that are loaded; needed if ids are given.
        timeout: seconds for all tries.

    Raises:
        InvalidField: a scenario is not rows, there are none, the levels are not numbers, or the
            horizon is out of range.
    """

    def __init__(
        self,
        sessions: Iterable[S | str],
        horizon: int | None,
        *,
        quantiles: Levels | None,
        scenarios: Scenarios | None,
        models: Sequence[ModelInfo],
        timeout: float,
    ) -> None:
        self._wanted: list[PendingForecast[S]] = [
            PendingForecast(one, None)
            if isinstance(one, str)
            else PendingForecast(one.session_id, one)
            for one in sessions
        ]
        if scenarios is not None:
            _check_scenarios(scenarios)
        known = [one.session.model for one in self._wanted if one.session is not None]
        self._named = scenarios is not None
        self._request = _request(horizon, quantiles)
        self._scenarios = [
            _scenario(name, x, known or models) for name, x in (scenarios or {}).items()
        ]
        self._timed = any(one.times is not None for one in self._scenarios)
        if self._timed:
            self._check_sessions()
        for one in self._scenarios:
            _add(self._request, one.name, one.rows)
        self._call_sessions = _sessions_of_a_call(self._request, [*known, *models])
        self.backoff = Backoff(timeout)

    @property
    def done(self) -> bool:
        """Whether every session has its result."""
        return all(one.result is not None for one in self._wanted)

    @property
    def results(self) -> list[ForecastResult]:
        """The results, in the order of the sessions."""
        return [one.result for one in self._wanted if one.result is not None]

    @property
    def behind(self) -> list[tuple[PendingForecast[S], S, int]]:
        """Sessions in which the server was rolled back, and its t in them."""
        return [
            (one, one.session, one.behind)
            for one in self._wanted
            if one.behind is not None and one.session is not None
        ]

    @staticmethod
    def caught_up(one: PendingForecast[S], error: StepstateError | None = None) -> None:
        """The server has all rows of the application now, or can't catch up."""
        one.behind, one.result = None, error

    def calls(self) -> Iterator[tuple[list[PendingForecast[S]], pb.ForecastRequest]]:
        """The sessions that have no result yet, in parts, with the request for each part."""
        waiting = [one for one in self._wanted if one.result is None]
        for group, common in self._groups(waiting):
            for first in range(0, len(group), self._call_sessions):
                some = group[first : first + self._call_sessions]
                request = pb.ForecastRequest(session_id=[one.session_id for one in some])
                request.MergeFrom(common)
                yield some, request

    def _groups(
        self, waiting: list[PendingForecast[S]]
    ) -> list[tuple[list[PendingForecast[S]], pb.ForecastRequest]]:
        """Sessions whose scenarios are the same rows: all, if those have no times."""
        for one in waiting:
            one.t = one.session.t if one.session is not None else 0
        if not self._timed:
            return [(waiting, self._request)]
        groups: dict[bytes, tuple[list[PendingForecast[S]], pb.ForecastRequest]] = {}
        for one in waiting:
            try:
                request = self._placed(one)
            except InvalidField as error:
                one.result = error
                continue
            key = request.SerializeToString(deterministic=True)
            groups.setdefault(key, ([], request))[0].append(one)
        return list(groups.values())

    def _placed(self, one: PendingForecast[S]) -> pb.ForecastRequest:
        """The request for a session, with each scenario from the session's next row on.

        Raises:
            InvalidField: the times of a scenario do not go on from there.
        """
        request = pb.ForecastRequest(horizon=self._request.horizon)
        request.quantiles.extend(self._request.quantiles)
        for scenario in self._scenarios:
            rows = scenario.rows
            if scenario.times is not None and one.session is not None:
                rows = self._rows_from(scenario, scenario.times, one, one.session)
            _add(request, scenario.name, rows)
        return request

    def _rows_from(
        self, scenario: ScenarioRows, times: Times, one: PendingForecast[S], session: S
    ) -> Floats:
        t, field = max(one.t, one.ahead), f"scenarios[{scenario.name!r}]"
        after = session.clock.place_scenario(times, t, field)
        longest = (k for output in session.model.outputs for k in output.horizons)
        horizon = self._request.horizon or max(1, *longest)
        if after[0] >= horizon:
            problem = f"begins {after[0] + 1:,} steps ahead, after the forecast ({horizon:,})"
            raise InvalidField(field, problem)
        if after[-1] >= MAX_HORIZON:
            raise InvalidField(field, f"goes on for more than {MAX_HORIZON:,} steps")
        return fill(scenario.rows, after, single=False).rows

    def _check_sessions(self) -> None:
        for one in self._wanted:
            if one.session is None:
                raise InvalidField(
                    "scenarios",
                    f"have times, and session {one.session_id!r} is given by its id: give "
                    f"client.session({one.session_id!r}), which knows its own",
                )

    def answered(self, some: Sequence[PendingForecast[S]], reply: pb.ForecastResponse) -> None:
        """Takes the reply to a call."""
        messages = iter(reply.forecasts)
        others = max(1, len(self._request.scenarios)) - 1
        for one in some:
            first = next(messages)
            if first.HasField("error"):
                self._failed(one, convert.from_status(first.error))
                continue
            group = [first, *(next(messages) for _ in range(others))]
            if first.t < one.t:
                self._rolled_back(one, first.t)
            elif self._timed and first.t != max(one.t, one.ahead):
                self._moved_on(one, first.t)
            else:
                forecasts = [convert.forecast(message) for message in group]
                named = {forecast.scenario: forecast for forecast in forecasts}
                one.result = named if self._named else forecasts[0]

    def refused(self, some: Sequence[PendingForecast[S]], error: StepstateError) -> None:
        """Takes the error of a call.

        Raises:
            StepstateError: it is about more than its one session.
        """
        if len(some) > 1 or isinstance(error, _ERRORS_OF_CALL):
            raise error
        if _is_without_rows(some[0], error):
            self._rolled_back(some[0], 0)
        else:
            some[0].result = error

    def pause(self) -> float:
        """Seconds to wait before the next round; when time is up, errors are results."""
        late = [one for one in self._wanted if one.result is None and one.error is not None]
        if not late or late[0].error is None:
            return 0.0
        try:
            return self.backoff.wait(late[0].error)
        except StepstateError:
            for one in late:
                one.result = one.error
            return 0.0

    def _failed(self, one: PendingForecast[S], error: StepstateError) -> None:
        one.error = error
        if _is_without_rows(one, error):
            self._rolled_back(one, 0)
        elif not is_retryable(error):
            one.result = error

    @staticmethod
    def _moved_on(one: PendingForecast[S], t: int) -> None:
        """Rows were applied meanwhile: its scenarios are placed after them."""
        one.ahead, one.times_ahead = t, one.times_ahead + 1
        if one.times_ahead > MAX_TIMES_AHEAD:
            one.result = ForecastImpossible(
                f"session {one.session_id!r}",
                "rows are applied while scenarios with times are asked for, so that these never "
                "begin at its next row: ask between its steps",
            )

    @staticmethod
    def _rolled_back(one: PendingForecast[S], t: int) -> None:
        one.behind, one.error = t, StepAhead(one.session_id, one.t, t)


def listed(sessions: Iterable[T]) -> list[T]:
    """The sessions of a call.

    Raises:
        InvalidField: it is one session, and not several.
    """
    if isinstance(sessions, str | BaseSession):
        raise InvalidField("sessions", "is a single session: put it into a list")
    return list(sessions)


def _is_without_rows(one: PendingForecast[S], error: StepstateError) -> bool:
    """Whether the server was rolled back to before the session's first row."""
    if not isinstance(error, ForecastImpossible):
        return False
    return one.t > 0 and error.subject == f"session {one.session_id!r}"


def _check_scenarios(scenarios: object) -> None:
    if not isinstance(scenarios, Mapping) or not all(isinstance(name, str) for name in scenarios):
        raise InvalidField("scenarios", "are not rows by name, such as {'cold': [[1.0]]}")
    if not scenarios:
        raise InvalidField("scenarios", "are none: leave them out, or name one")


def _request(horizon: int | None, quantiles: Levels | None) -> pb.ForecastRequest:
    """The request without sessions and scenarios."""
    if horizon is not None and horizon < 1:
        raise InvalidField("horizon", f"is {horizon}, expected 1 or more")
    if horizon is not None and horizon > MAX_HORIZON:
        raise InvalidField("horizon", f"is {horizon}, expected at most {MAX_HORIZON}")
    return pb.ForecastRequest(horizon=horizon or 0, quantiles=_levels(quantiles))


def _scenario(name: str, x: Any, models: Sequence[ModelInfo]) -> ScenarioRows:
    """A scenario, its rows as they were given."""
    field = f"scenarios[{name!r}]"
    rows, times = _rows(field, x, models)
    if np.isinf(rows).any():
        raise InvalidField(field, "holds an infinite value; NaN is the model's own forecast")
    return ScenarioRows(name, rows, times)


def _add(request: pb.ForecastRequest, name: str, rows: Floats) -> None:
    scenario = request.scenarios.add(name=name)
    data = np.ascontiguousarray(rows, "<f4").tobytes()
    put_floats(scenario, pb.Scenario.X_FIELD_NUMBER, data)


def _levels(quantiles: Levels | None) -> list[float]:
    """None for the default ones."""
    try:
        return [] if quantiles is None else [float(level) for level in quantiles]
    except (TypeError, ValueError) as error:
        raise InvalidField("quantiles", f"are not numbers: {error}") from error


def _rows(field: str, x: Any, models: Sequence[ModelInfo]) -> tuple[Floats, Times | None]:
    """A scenario's rows; the server checks them if their model is not known here."""
    columns = getattr(x, "columns", None)
    if columns is None:
        if len({model.input_width for model in models}) == 1:
            rows, _, times = read_rows(models[0], x, field)
            return rows, times
        values, times = split_times(x, field)
        return floats(values, field), times
    for model in models:
        if set(columns) <= set(model.inputs):
            missing = {name: np.nan for name in model.inputs if name not in columns}
            rows, _, times = read_rows(model, x.assign(**missing), field)
            return rows, times
    names = ", ".join(map(str, columns))
    raise InvalidField(field, f"has the columns {names}, which no model takes")


def _sessions_of_a_call(request: pb.ForecastRequest, models: Sequence[ModelInfo]) -> int:
    """How many sessions go into one call."""
    longest = max((max(o.horizons) for model in models for o in model.outputs), default=0)
    outputs = max((len(model.outputs) for model in models), default=1)
    horizon = request.horizon or longest or USUAL_HORIZON
    values = horizon * outputs * max(1, len(request.scenarios)) * (len(request.quantiles) or 3)
    return max(1, min(CALL_SESSIONS, CALL_VALUES // values))
