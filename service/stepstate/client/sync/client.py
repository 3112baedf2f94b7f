"""The synchronous client, in the order of `aio/client.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import overload

from stepstate.client._api import ClientAPI
from stepstate.client._protocol import calls
from stepstate.client._protocol.forecasts import ForecastResult
from stepstate.client._protocol.history import History, Progress, start_of
from stepstate.client._protocol.session import result_of
from stepstate.client.forecast import Forecast, Levels, Scenarios
from stepstate.client.sync.connection import Connection, ask
from stepstate.client.sync.pack import Pack
from stepstate.client.sync.session import Session, forecast, session_of
from stepstate.client.sync.stream import SyncStream
from stepstate.client.times import RowsLike
from stepstate.client.types import Durability, Floats, MissingPolicy, Result
from stepstate.errors import Draining, ServerUnreachable, StepstateError, Unavailable


class Client(Connection, ClientAPI):
    """A connection to a server; threads may share it.

    Its sessions survive the end of the server: the text of `Session` says how.
    """

    def open(
        self,
        model: str = "",
        *,
        version: str = "",
        session_id: str | None = None,
        start_time: datetime | None = None,
        idle_timeout: timedelta | None = None,
        durability: Durability | None = None,
        missing: MissingPolicy | None = None,
        interval_level: float | None = None,
        history: History | None = None,
        progress: Progress | None = None,
    ) -> Session:
        if history is not None and start_time is None:
            start_time, history = start_of(history)
        call = calls.open_session(
            model,
            version,
            session_id,
            calls.NewSessionOptions(idle_timeout, durability),
            start_time=start_time,
            missing=missing,
            interval_level=interval_level,
        )
        session = session_of(self, ask(self, call))
        if history is not None:
            _prime(session, history, progress)
        return session

    def session(self, session_id: str, t: int | None = None) -> Session:
        return session_of(self, self.info(session_id), t)

    def fork(
        self,
        session: Session | str,
        new_id: str | None = None,
        *,
        idle_timeout: timedelta | None = None,
        durability: Durability | None = None,
    ) -> Session:
        if not isinstance(session, str):
            return session.fork(new_id, idle_timeout=idle_timeout, durability=durability)
        options = calls.NewSessionOptions(idle_timeout, durability)
        return session_of(self, ask(self, calls.fork_session(session, new_id, options)))

    def restore_expired(self, session_id: str) -> Session:
        return session_of(self, ask(self, calls.restore_session(session_id)))

    def restore(
        self,
        snapshot: bytes,
        *,
        session_id: str | None = None,
        idle_timeout: timedelta | None = None,
        durability: Durability | None = None,
    ) -> Session:
        options = calls.NewSessionOptions(idle_timeout, durability)
        call = calls.import_session(snapshot, session_id, options)
        reply = self.call(
            lambda parts, timeout: self.stub.StreamImport(iter(parts), timeout=timeout),
            call.request,
        )
        return session_of(self, call.read(reply))

    def stream(self, items: Iterable[tuple[Session, RowsLike]]) -> Iterator[Result[Session]]:
        """Steps many sessions on one connection, and yields a result for every item.

        One item is in flight at a time, so that each output is there before the next item is asked
        for: results come in the order of the items. `AsyncClient.stream` has many items in flight.
        An item may be one row [D] or many [T, D], with times or without; its result is that of its
        last row.

        When the connection breaks it is made again, and what was not answered is sent again with
        the same t. Each output is yielded once.

        An error that ends a session (a row that can't be applied, a closed session, `RowsMissing`)
        is the result of its item and of all later items of that session, none of which is applied;
        the other sessions go on. A session's t is that of its last result.

        Args:
            items: pairs (session, x), from an iterable.

        Raises:
            ServerUnreachable, Draining: no connection for `timeout` seconds.
            Exception: what `items` raised.
        """
        steps = SyncStream(self)
        ended: dict[str, StepstateError] = {}
        try:
            for session, x in items:
                y: Floats | None = None
                if session.session_id not in ended:
                    try:
                        y = steps.step(session, x, self.timeout)
                    except (ServerUnreachable, Draining):
                        raise
                    except StepstateError as error:
                        ended[session.session_id] = error
                yield result_of(session, y, ended.get(session.session_id))
        finally:
            steps.end()

    def packed(self, sessions: Sequence[Session]) -> Pack:
        return Pack(self, sessions)

    @overload
    def forecast(
        self,
        sessions: Iterable[Session | str],
        horizon: int | None = None,
        *,
        quantiles: Levels | None = None,
        scenarios: None = None,
        timeout: float | None = None,
    ) -> list[Forecast | StepstateError]: ...

    @overload
    def forecast(
        self,
        sessions: Iterable[Session | str],
        horizon: int | None = None,
        *,
        quantiles: Levels | None = None,
        scenarios: Scenarios,
        timeout: float | None = None,
    ) -> list[dict[str, Forecast] | StepstateError]: ...

    def forecast(
        self,
        sessions: Iterable[Session | str],
        horizon: int | None = None,
        *,
        quantiles: Levels | None = None,
        scenarios: Scenarios | None = None,
        timeout: float | None = None,
    ) -> Sequence[ForecastResult]:
        return forecast(
            self, sessions, horizon, quantiles=quantiles, scenarios=scenarios, timeout=timeout
        )


def _prime(session: Session, history: History, progress: Progress | None) -> None:
    """Applies a new session's history; if that can't be done, the session is closed again."""
    try:
        session.prime(history, progress=progress)
    except Unavailable:
        raise  # the session can go on when the server is there again
    except Exception:
        with suppress(StepstateError):
            session.close()
        raise
