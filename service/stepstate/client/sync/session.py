"""A session of the synchronous client, in the order of `aio/session.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Literal, Self, overload

from stepstate.client._api import SessionAPI
from stepstate.client._protocol import calls
from stepstate.client._protocol.forecasts import ForecastProtocol, ForecastResult, listed
from stepstate.client._protocol.history import (
    IN_FLIGHT,
    PIECE_ROWS,
    History,
    HistoryReader,
    Progress,
    missing_pieces,
    missing_rows,
)
from stepstate.client._protocol.session import BaseSession, PlacedRows
from stepstate.client._protocol.steps import StepProtocol
from stepstate.client.forecast import Forecast, Levels, Scenarios
from stepstate.client.outputs import Outputs
from stepstate.client.sync.connection import Connection, ask
from stepstate.client.sync.stream import SyncStream, complete
from stepstate.client.times import RowsLike, each_row
from stepstate.client.types import Durability, Floats, Inspection, ModelInfo, SessionInfo
from stepstate.errors import NonFiniteInput, SessionClosed, StepstateError
from stepstate.v1 import stepstate_pb2 as pb

Rows = Iterable[RowsLike]


class Session(BaseSession, SessionAPI):
    """A session: applies rows and returns outputs, each row exactly once.

    `t` counts the rows whose outputs were returned; `durable_t` those of them that survive the end
    of the server. One thread at a time may step a session.

    With durability async or sync a session survives the end of its server. It keeps the rows after
    `durable_t`, up to the client's `resume_rows`. When the server comes back, or another one takes
    over, with an older state, the next step first sends it what it lacks, exactly once and in
    order. The outputs of these rows are dropped: the application has them already. This may take as
    long as there is progress; `timeout` counts from the last answer that made some.
    """

    def __init__(
        self, client: Connection, model: ModelInfo, info: SessionInfo, *, t: int | None = None
    ) -> None:
        super().__init__(model, info, t=t, resume_rows=client.resume_rows)
        self.client = client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @overload
    def step(
        self,
        x: RowsLike,
        *,
        last_only: bool = False,
        named: Literal[False] = False,
        timeout: float | None = None,
    ) -> Floats: ...

    @overload
    def step(
        self,
        x: RowsLike,
        *,
        last_only: bool = False,
        named: Literal[True],
        timeout: float | None = None,
    ) -> Outputs: ...

    def step(
        self,
        x: RowsLike,
        *,
        last_only: bool = False,
        named: bool = False,
        timeout: float | None = None,
    ) -> Floats | Outputs:
        placed = self.place(x, self.t)
        response = self._apply(placed, last_only=last_only, timeout=timeout)
        return self.step_result(response, placed, last_only=last_only, named=named)

    def inspect(self, x: RowsLike, *, timeout: float | None = None) -> Inspection:
        placed = self.place(x, self.t)
        response = self._apply(placed, inspect=True, timeout=timeout)
        return self.inspect_result(response, placed)

    def prime(
        self, history: History, *, progress: Progress | None = None, timeout: float | None = None
    ) -> Floats:
        reader = HistoryReader(self, history, progress)
        steps = SyncStream(self.client)
        seconds = self.client.timeout if timeout is None else timeout
        try:
            for y in steps.pieces(self, reader.pieces(), seconds, window=IN_FLIGHT):
                reader.take(y)
        except StepstateError as error:
            raise reader.error_in_history(error) from None
        finally:
            steps.end()
        return reader.finish()

    def advance(self, n: int, *, timeout: float | None = None) -> Floats:
        if n > PIECE_ROWS:
            return self.prime(missing_pieces(self.model, n), timeout=timeout)
        return self.step(missing_rows(self.model, n), last_only=True, timeout=timeout)

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
        (result,) = forecast(
            self.client, [self], horizon, quantiles=quantiles, scenarios=scenarios, timeout=timeout
        )
        if isinstance(result, StepstateError):
            raise result
        return result

    def catch_up(self, t: int, *, timeout: float | None = None) -> None:
        if t < self.t:
            protocol = self._protocol(timeout)
            protocol.repeat(t)
            self._complete(protocol)

    @overload
    def stream(self, xs: Rows, *, named: Literal[False] = False) -> Iterator[Floats]: ...

    @overload
    def stream(self, xs: Rows, *, named: Literal[True]) -> Iterator[Outputs]: ...

    def stream(self, xs: Rows, *, named: bool = False) -> Iterator[Floats | Outputs]:
        steps = SyncStream(self.client)
        try:
            for x in each_row(xs):
                y = steps.step(self, x, self.client.timeout)
                yield self.named(y) if named else y
        finally:
            steps.end()

    def refresh(self) -> SessionInfo:
        info = ask(self.client, calls.get_session(self.session_id))
        self.update(info)
        return info

    def fork(
        self,
        new_id: str | None = None,
        *,
        idle_timeout: timedelta | None = None,
        durability: Durability | None = None,
    ) -> Session:
        options = calls.NewSessionOptions(idle_timeout, durability)
        info = ask(self.client, calls.fork_session(self.session_id, new_id, options))
        forked = session_of(self.client, info)
        forked.continue_from(self, resume_rows=self.client.resume_rows)
        return forked

    def reset_accuracy(self) -> SessionInfo:
        return ask(self.client, calls.reset_accuracy(self.session_id))

    def close(self) -> SessionInfo:
        try:
            info = ask(self.client, calls.close_session(self.session_id))
        except SessionClosed as closed:
            info = self.close_result(closed)
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
        protocol = self._protocol(timeout)
        protocol.add(placed.rows, inspect=inspect, last_only=last_only)
        try:
            return self._complete(protocol)
        except NonFiniteInput as error:
            raise placed.error_of_given(error) from None

    def _protocol(self, timeout: float | None) -> StepProtocol[Self]:
        return StepProtocol(self, timeout=self.client.timeout if timeout is None else timeout)

    def _complete(self, protocol: StepProtocol[Self]) -> pb.StepResponse:
        step: Callable[..., pb.StepResponse] = self.client.stub.Step
        return complete(
            protocol,
            lambda request: step(request, timeout=protocol.left),
            client=self.client,
        )


def session_of(client: Connection, info: SessionInfo, t: int | None = None) -> Session:
    """The session with this status; `t`: rows whose outputs the application has."""
    return Session(client, client.model(info.model, info.version), info, t=t)


def forecast(
    client: Connection,
    sessions: Iterable[Session | str],
    horizon: int | None,
    *,
    quantiles: Levels | None,
    scenarios: Scenarios | None,
    timeout: float | None,
) -> Sequence[ForecastResult]:
    """The forecasts of many sessions; `timeout` also counts for each that has to catch up."""
    wanted = listed(sessions)
    protocol = ForecastProtocol(
        wanted,
        horizon,
        quantiles=quantiles,
        scenarios=scenarios,
        models=client.models() if any(isinstance(one, str) for one in wanted) else (),
        timeout=client.timeout if timeout is None else timeout,
    )
    while not protocol.done:
        for some, request in protocol.calls():
            try:
                left = protocol.backoff.left
                protocol.answered(some, client.call(client.stub.Forecast, request, left))
            except StepstateError as error:
                protocol.refused(some, error)
        for one, session, t in protocol.behind:
            try:
                session.catch_up(t, timeout=timeout)
            except StepstateError as error:
                protocol.caught_up(one, error)
            else:
                protocol.caught_up(one)
        time.sleep(protocol.pause())
    return protocol.results
