"""A session of the synchronous client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, overload

from numpy.typing import ArrayLike

from stepstate.client import wire
from stepstate.client.footing import Footing, PlacedRows
from stepstate.client.forecast import Forecast, Levels, Scenarios
from stepstate.client.history import (
    IN_FLIGHT,
    PIECE_ROWS,
    Feed,
    History,
    Progress,
    nothing,
    nothings,
)
from stepstate.client.outputs import Outputs
from stepstate.client.times import TimedRows
from stepstate.client.track import Track
from stepstate.client.turns import Turns, bring
from stepstate.client.values import Durability, Floats, Inspection, ModelInfo, SessionInfo
from stepstate.errors import NonFiniteInput, SessionClosed, StepstateError
from stepstate.v1 import stepstate_pb2 as pb

if TYPE_CHECKING:
    from stepstate.client.sync import Client


class Session(Footing):
    """A session: applies rows and returns outputs, each row exactly once.

    `t` counts the rows whose outputs were returned; `durable_t` those of them
    that survive the end of the server. One thread at a time may step a session.
    It survives the end of its server as an `AsyncSession` does, and every method
    raises what the same one there does.
    """

    def __init__(
        self, client: Client, model: ModelInfo, info: SessionInfo, *, t: int | None = None
    ) -> None:
        super().__init__(model, info, t=t, resume_rows=client.resume_rows)
        self.client = client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @overload
    def step(
        self,
        x: ArrayLike | TimedRows,
        *,
        last_only: bool = False,
        named: Literal[False] = False,
        timeout: float | None = None,
    ) -> Floats: ...

    @overload
    def step(
        self,
        x: ArrayLike | TimedRows,
        *,
        last_only: bool = False,
        named: Literal[True],
        timeout: float | None = None,
    ) -> Outputs: ...

    def step(
        self,
        x: ArrayLike | TimedRows,
        *,
        last_only: bool = False,
        named: bool = False,
        timeout: float | None = None,
    ) -> Floats | Outputs:
        """Applies one row or many, and returns their outputs. See `AsyncSession.step`."""
        placed = self.place(x, self.t)
        response = self._apply(placed, last_only=last_only, timeout=timeout)
        y = wire.outputs(response, self.model)
        self.arrived(response.t, **wire.stand_ins(response))
        y = y[-1] if placed.alone or last_only else placed.of_given(y)
        return self.named(y, placed) if named else y

    def inspect(self, x: ArrayLike | TimedRows, *, timeout: float | None = None) -> Inspection:
        """Applies rows like `step`, and also returns the gates and states of every layer."""
        placed = self.place(x, self.t)
        response = self._apply(placed, inspect=True, timeout=timeout)
        found = wire.inspection(response, self.model, placed.of_given)
        self.arrived(response.t, **wire.stand_ins(response))
        return found

    def prime(
        self,
        history: History,
        *,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Floats:
        """Applies many rows at once, and returns the last outputs. See `AsyncSession.prime`."""
        feed = Feed(self, history, progress)
        turns = Turns(self.client.stub.StreamSteps, self.client.target)
        seconds = self.client.timeout if timeout is None else timeout
        try:
            for y in turns.flow(self, feed.pieces(), seconds, window=IN_FLIGHT):
                feed.take(y)
        except StepstateError as error:
            raise feed.placed(error) from None
        finally:
            turns.end()
        return feed.finish()

    def advance(self, n: int, *, timeout: float | None = None) -> Floats:
        """Applies n rows in which every value is missing. See `AsyncSession.advance`."""
        if n > PIECE_ROWS:
            return self.prime(nothings(self.model, n), timeout=timeout)
        return self.step(nothing(self.model, n), last_only=True, timeout=timeout)

    @overload
    def forecast(
        self,
        horizon: int | None = None,
        *,
        quantiles: Levels | None = None,
        scenarios: None = None,
        timeout: float | None = None,
    ) -> Forecast: ...

    @overload
    def forecast(
        self,
        horizon: int | None = None,
        *,
        quantiles: Levels | None = None,
        scenarios: Scenarios,
        timeout: float | None = None,
    ) -> dict[str, Forecast]: ...

    def forecast(
        self,
        horizon: int | None = None,
        *,
        quantiles: Levels | None = None,
        scenarios: Scenarios | None = None,
        timeout: float | None = None,
    ) -> Forecast | dict[str, Forecast]:
        """Forecasts the rows to come; the session does not advance. See `AsyncSession.forecast`."""
        (told,) = self.client.forecast(
            [self], horizon, quantiles=quantiles, scenarios=scenarios, timeout=timeout
        )
        if isinstance(told, StepstateError):
            raise told
        return told

    def catch_up(self, t: int, *, timeout: float | None = None) -> None:
        """Sends a server that stands at t what it lacks. See `AsyncSession.catch_up`."""
        if t < self.t:
            track = self._track(timeout)
            track.repeat(t)
            self._bring(track)

    @overload
    def stream(
        self, xs: Iterable[ArrayLike | TimedRows], *, named: Literal[False] = False
    ) -> Iterator[Floats]: ...

    @overload
    def stream(
        self, xs: Iterable[ArrayLike | TimedRows], *, named: Literal[True]
    ) -> Iterator[Outputs]: ...

    def stream(
        self, xs: Iterable[ArrayLike | TimedRows], *, named: bool = False
    ) -> Iterator[Floats | Outputs]:
        """Applies rows as they come and yields the outputs [O] of each.

        One row is in flight at a time, so that each output is there before the
        next row is asked for. For speed over many rows that are known already,
        give them to `step` at once, or use `AsyncSession.stream`.
        """
        turns = Turns(self.client.stub.StreamSteps, self.client.target)
        try:
            for x in xs:
                y = turns.step(self, x, self.client.timeout)
                yield self.named(y) if named else y
        finally:
            turns.end()

    def refresh(self) -> SessionInfo:
        """Asks the server where the session stands. See `AsyncSession.refresh`."""
        info = self.client.info(self.session_id)
        self.placed(info)
        return info

    def fork(
        self,
        new_id: str | None = None,
        *,
        idle_timeout: timedelta | None = None,
        durability: Durability | None = None,
    ) -> Session:
        """Opens a session that starts from a copy of this one. See `AsyncClient.fork`."""
        return self.client.fork(self, new_id, idle_timeout=idle_timeout, durability=durability)

    def reset_accuracy(self) -> SessionInfo:
        """Begins its accuracy and drift anew. See `AsyncClient.reset_accuracy`."""
        return self.client.reset_accuracy(self.session_id)

    def close(self) -> SessionInfo:
        """Closes the session on the server; that it is closed already is no error."""
        try:
            info = self.client.close(self.session_id)
        except SessionClosed as closed:  # perhaps by a first try, whose reply was lost
            info = replace(self.info, t=closed.t)
        self.closed = True
        return info

    def _apply(
        self,
        placed: PlacedRows,
        *,
        inspect: bool = False,
        last_only: bool = False,
        timeout: float | None,
    ) -> pb.StepResponse:
        track = self._track(timeout)
        track.add(placed.rows, inspect=inspect, last_only=last_only)
        try:
            return self._bring(track)
        except NonFiniteInput as error:
            raise placed.named(error) from None

    def _track(self, timeout: float | None) -> Track:
        return Track(self, timeout=self.client.timeout if timeout is None else timeout)

    def _bring(self, track: Track) -> pb.StepResponse:
        ask: Callable[..., pb.StepResponse] = self.client.stub.Step
        return bring(
            track, lambda request: ask(request, timeout=track.left), target=self.client.target
        )
