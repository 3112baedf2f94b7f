"""What both clients offer: their public methods, each documented once.

`aio` and `sync` implement these classes and hold the signatures. `help()`, editors and the
documentation site show the text of this file for both. With the asyncio client a call is awaited,
and an iterator is asynchronous.

D inputs a row, O outputs, T rows, N rows of a pack, P rows of a scenario.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class ConnectionAPI(ABC):
    """What a client does by the id of a session, or without one."""

    @property
    @abstractmethod
    def stub(self) -> Any:
        """The calls of the contract.

        Raises:
            Cancelled: the client was disconnected.
        """

    @abstractmethod
    def disconnect(self) -> Any:
        """Closes the connection; sessions stay open on the server."""

    @abstractmethod
    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Makes a unary call that may be repeated, until it is answered or time is up.

        Args:
            rpc: one of the calls of `stub`.
            request: its message.
            timeout: seconds for all tries; default: the client's timeout.

        Raises:
            StepstateError: as the server answered.
            Unavailable: no answer in time; from a server that never answered, after the client's
                `connect_timeout`.
        """

    @abstractmethod
    def info(self, *args: Any, **kwargs: Any) -> Any:
        """Asks the server for the status of a session.

        Args:
            session_id: the session's id.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session is gone.
            InvalidField: there can be no such id.
            Unavailable: no answer in time.
        """

    @abstractmethod
    def sessions(self, *args: Any, **kwargs: Any) -> Any:
        """Lists all open sessions, page by page.

        Args:
            model: only sessions of this model; empty: of all models.
            show_expired: also those that were idle for too long and are still kept.

        Raises:
            InvalidField: there can be no such model.
            Unavailable: no answer in time.
        """

    @abstractmethod
    def close(self, *args: Any, **kwargs: Any) -> Any:
        """Closes a session on the server and returns its last status.

        Args:
            session_id: the session's id.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session is gone.
            InvalidField: there can be no such id.
            Unavailable: no answer in time.
        """

    @abstractmethod
    def reset_accuracy(self, *args: Any, **kwargs: Any) -> Any:
        """Starts a session's accuracy and drift statistics anew, after the steps accepted so far.

        Its state, t, forecasts and intervals do not change. If the session's steps are saved, the
        reset is saved before this returns.

        Args:
            session_id: the session's id.

        Returns:
            The session's status after the reset.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session is gone.
            InvalidField: there can be no such id.
            Unavailable: no answer in time.
        """

    @abstractmethod
    def export(self, *args: Any, **kwargs: Any) -> Any:
        """Returns a session's snapshot: all that a server with the same model needs to continue it.

        The session stays open; `restore` opens the snapshot elsewhere.

        Args:
            session_id: the session's id.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session is gone.
            InvalidField: there can be no such id.
            Unavailable: no answer in time.
        """

    @abstractmethod
    def models(self) -> Any:
        """Lists the loaded models, every version.

        Raises:
            Unavailable: no answer in time.
        """

    @abstractmethod
    def tenants(self) -> Any:
        """Lists the tenants of the server with their limits and what they use; for admins.

        Raises:
            PermissionDenied: the credential lacks the scope admin.
            Unavailable: no answer in time.
        """

    @abstractmethod
    def model(self, *args: Any, **kwargs: Any) -> Any:
        """Returns one loaded model.

        Args:
            name: the model's name; may be left out if the server has one model.
            version: empty for the newest.

        Raises:
            ModelUnknown: no such model or version is loaded.
            InvalidField: the name is left out, and there are several models.
            Unavailable: no answer in time.
        """


class ClientAPI(ConnectionAPI):
    """What a client does with sessions; `stream` differs, and has its text in each client."""

    @abstractmethod
    def open(self, *args: Any, **kwargs: Any) -> Any:
        """Opens a session with zero state.

        Args:
            model: its name; may be left out if the server has one model.
            version: empty for the newest.
            session_id: 1 to 128 of A-Z a-z 0-9 . _ : -; default: the client makes one.
            start_time: time of the first row; without a zone it is read as UTC. Default: that of
                the first row of `history`, if it has times.
            idle_timeout: the session expires when no step came for this long; default: the server's
                setting.
            durability: "async": steps are answered at once and saved a little later, and the
                session sends again what a server lost. "sync": a step is answered after it is
                saved. "none": the session is lost if its server ends unexpectedly. Default: the
                server's setting, async if it has a store that lasts.
            missing: what a NaN in a row means. "reject", the default: the row is refused. "impute":
                the model's forecast replaces the value, or the value of the row before if there is
                no forecast. "hold": the value of the row before replaces it; before a column's
                first value, its level (the mean and profile that the model subtracts from it).
            interval_level: the share of true values that the session's intervals are to cover, for
                example 0.9; default: the model's level.
            history: rows [T, D] that are applied first: an array, a DataFrame, `TimedRows`, or an
                iterable of such chunks, with the asyncio client also an async iterable. If they
                can't be applied, the session is closed again. If the server can't be reached, it
                stays open at the row it got to.
            progress: called with the number of rows of the history that are done, and the total,
                which is None if it is not known.

        Raises:
            SessionExists: the id is open already.
            ModelUnknown: no such model or version is loaded.
            InvalidField: an argument can't be accepted.
            SessionLimit: the server has no room for one more session.
            Unavailable: no answer in time.
            NonFiniteInput, NonFiniteResult: the history can't be applied; `row` is its place in the
                history.
        """

    @abstractmethod
    def session(self, *args: Any, **kwargs: Any) -> Any:
        """Returns an open session, to continue where it is, or from the application's own t.

        An application that was stopped, and knows from its records that it has the outputs of t
        rows, gives this t and continues with row t. For rows that were applied without its
        knowledge it gets the same outputs again, as far back as the server remembers them (by
        default the last 32 requests). If the server is before t, a step raises `RowsMissing`, which
        names the rows that it needs: this object never had them.

        Args:
            session_id: the session's id.
            t: rows whose outputs the application has; default: as many as the server has applied.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session is gone.
            InvalidField: there can be no such id.
            Unavailable: no answer in time.
        """

    @abstractmethod
    def fork(self, *args: Any, **kwargs: Any) -> Any:
        """Opens a new session that starts from a copy of another one.

        Args:
            session: the session to copy, or its id. The fork of a session object is at its t, and
                keeps the same rows to send them again.
            new_id: the fork's id, 1 to 128 of A-Z a-z 0-9 . _ : -; default: the client makes one.
            idle_timeout: the session expires when no step came for this long; default: that of the
                source.
            durability: "async": steps are saved a little after their answers; "sync": before them;
                "none": the session is lost if its server ends unexpectedly. Default: that of the
                source.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the source is gone.
            SessionExists: the new id is open already.
            InvalidField: an argument can't be accepted.
            SessionLimit: the server has no room for one more session.
            Unavailable: no answer in time.
        """

    @abstractmethod
    def restore_expired(self, *args: Any, **kwargs: Any) -> Any:
        """Opens a session again that expired because it was idle for too long.

        Its state, its t and the replies that it remembers are as they were, and its idle time
        starts anew.

        Args:
            session_id: the session's id.

        Raises:
            SessionExists: it is open. If a first reply was lost, this call may have opened it:
                `session` returns it with its t.
            SessionExpired: it was kept until its `purge_time`, and is deleted.
            SessionUnknown, SessionClosed, SessionLost: there is nothing to open again.
            SessionLimit: the server has no room for one more session.
            InvalidField: there can be no such id.
            Unavailable: no answer in time.
        """

    @abstractmethod
    def restore(self, *args: Any, **kwargs: Any) -> Any:
        """Opens a session from a snapshot that `export` made, on this server or another one.

        Args:
            snapshot: its bytes.
            session_id: 1 to 128 of A-Z a-z 0-9 . _ : -; default: that of the exported session.
            idle_timeout: the session expires when no step came for this long; default: that of the
                exported session.
            durability: "async": steps are saved a little after their answers; "sync": before them;
                "none": the session is lost if its server ends unexpectedly. Default: that of the
                exported session, or what this server can keep.

        Raises:
            SnapshotCorrupt, SnapshotModelMismatch: it is damaged, or of another model.
            SnapshotUntrusted: it is not signed with a key that the server has.
            SessionExists: the id is open. If a first reply was lost, this snapshot may have opened
                it: `session` returns it with its t.
            InvalidField: an argument can't be accepted.
            SessionLimit: the server has no room for one more session.
            Unavailable: no answer in time.
        """

    @abstractmethod
    def packed(self, *args: Any, **kwargs: Any) -> Any:
        """Combines many sessions of one model, to step them together by columns.

        >>> def meters(client, sessions, readings):  # readings yields x [sessions, D]
        ...     with client.packed(sessions) as pack:
        ...         for x in readings:
        ...             result = pack.step(x)
        ...             print(result.y.mean(), result.errors)

        With the asyncio client use `async with` and `await pack.step(x)`.

        For gateways: one message carries hundreds of rows, so that a step costs a fraction of what
        it does in `stream`. The pack has a stream of its own, which ends with the block; the
        sessions stay open.

        Args:
            sessions: at least one; a session is named by its place in this list.

        Raises:
            InvalidField: there are none, one comes twice, or they are of several models.
        """

    @abstractmethod
    def forecast(self, *args: Any, **kwargs: Any) -> Any:
        """Forecasts the next rows of many sessions, each from where it is.

        Sessions of one call share forwards on the server; very many sessions take several calls.
        None of them advances, and none counts as used. For a session object the forecast starts at
        its `t`, and a server that lost rows is sent them first; for an id it starts where the
        server is.

        Args:
            sessions: session objects or ids, of any models.
            horizon: steps ahead; default: the longest of each model.
            quantiles: levels, each more than 0 and less than 1; default: the bounds of each
                session's interval and the median, or the median alone for a model without
                intervals.
            scenarios: assumed future rows, [P, D] by name, the same for all sessions. NaN means the
                model's own forecast of the value, which also continues after the last row. A
                DataFrame may lack columns, but needs some by which the model is found. Rows with
                times start at each session's next row, and need session objects.
            timeout: seconds for all tries; default: the client's timeout.

        Returns:
            For each session in order its forecast, or with scenarios its forecasts by the name of
            the scenario, or its error: `isinstance(one, StepstateError)`.

        Raises:
            InvalidField: an argument is wrong for all sessions.
            Unavailable: no answer in time.
        """


class SessionAPI(ABC):
    """What a session does."""

    @abstractmethod
    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Applies one row or many, all or none of them, and returns their outputs.

        A lost reply is asked for again with the same t, which applies nothing twice. If a task is
        cancelled meanwhile, call again with the same x, also after a restart of the server.

        Rows with times, from an index of pandas or in `TimedRows`, must start with the session's
        next row, by its start and the model's interval. Rows that are missing between them are
        missing values, if the session takes those. Nothing is sorted.

        Args:
            x: one row [D], or many [T, D], in raw units; or a pandas Series or DataFrame, or
                `TimedRows`. NaN is a missing value, which a session takes that was opened with
                `missing`; `imputed_rows` says afterwards in how many rows a value was replaced.
            last_only: return the outputs of the last row only.
            named: return them by name, with their times.
            timeout: seconds without progress until it gives up; default: the client's timeout.

        Returns:
            y [O] for one row or with last_only, else [T, O], in raw units; with `named`, `Outputs`.

        Raises:
            InvalidField: x has another shape or other columns, or times that do not start with the
                session's next row; it names the first wrong row.
            NonFiniteInput, NonFiniteResult: x can't be applied.
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session is gone.
            StepMismatch, StepTooOld: another client steps the session too.
            RowsMissing: the server lacks the rows `first` to `last`, and they are not kept here
                (any more). Set `t` to `first` and apply your own records again from there.
            Unavailable, StaleOwner: no answer in time.
        """

    @abstractmethod
    def inspect(self, *args: Any, **kwargs: Any) -> Any:
        """Applies rows like `step`, and also returns the gates and states of every layer.

        Rows with times must start with the session's next row; nothing is sorted.

        Args:
            x: one row [D], or many [T, D], in raw units; or a pandas Series or DataFrame, or
                `TimedRows`. NaN is a missing value, which a session takes that was opened with
                `missing`; `imputed_rows` says afterwards in how many rows a value was replaced.
            timeout: seconds without progress until it gives up; default: the client's timeout.

        Returns:
            The outputs [T, O] of the rows, and what each layer computed.

        Raises:
            InvalidField: x has another shape or other columns, or times that do not start with the
                session's next row; it names the first wrong row.
            NonFiniteInput, NonFiniteResult: x can't be applied.
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session is gone.
            StepMismatch, StepTooOld: another client steps the session too.
            RowsMissing: the server lacks the rows `first` to `last`, and they are not kept here
                (any more). Set `t` to `first` and apply your own records again from there.
            Unavailable, StaleOwner: no answer in time.
        """

    @abstractmethod
    def prime(self, *args: Any, **kwargs: Any) -> Any:
        """Applies many rows at once, to bring the session up to date, and returns the last outputs.

        The rows go some thousand to a request, a few requests in flight, each row exactly once. `t`
        says how many were applied. After an error, or when a task was cancelled, call `refresh`,
        and continue with the rows from `t` on.

        Rows with times, from an index of pandas or in `TimedRows`, must start with the session's
        next row, by its start and the model's interval. Rows that are missing between them are
        missing values, if the session takes those. Nothing is sorted.

        Args:
            history: rows [T, D], a DataFrame, `TimedRows`, or an iterable of such chunks, which
                need not be in memory as a whole; with the asyncio client also an async iterable.
            progress: called with the number of rows that are done, and the total, which is None if
                it is not known.
            timeout: seconds without progress until it gives up; default: the client's timeout.

        Returns:
            y [O] of the last row, in raw units.

        Raises:
            InvalidField: the history has no rows, or rows of another shape or with times that do
                not start with the session's next row.
            NonFiniteInput, NonFiniteResult: a row can't be applied; `row` is its place in the
                history.
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session is gone.
            StepMismatch, StepTooOld: another client steps the session too.
            RowsMissing: the server lacks the rows `first` to `last`, and they are not kept here
                (any more). Set `t` to `first` and apply your own records again from there.
            Unavailable, StaleOwner: no answer in time.
            Exception: what an iterable raised.
        """

    @abstractmethod
    def advance(self, *args: Any, **kwargs: Any) -> Any:
        """Applies n rows in which every value is missing, and returns the outputs of the last one.

        The session's missing policy says what replaces them: with impute its own forecasts, so that
        it runs on by itself.

        Args:
            n: how many, 1 or more.
            timeout: seconds without progress until it gives up; default: the client's timeout.

        Returns:
            y [O], in raw units.

        Raises:
            NonFiniteInput: the session was opened without `missing`.
            InvalidField: n is less than 1.
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session is gone.
            StepMismatch, StepTooOld: another client steps the session too.
            RowsMissing: the server lacks the rows `first` to `last`, and they are not kept here
                (any more). Set `t` to `first` and apply your own records again from there.
            Unavailable, StaleOwner: no answer in time.
        """

    @abstractmethod
    def forecast(self, *args: Any, **kwargs: Any) -> Any:
        """Forecasts the next rows from where the session is; the session does not advance.

        A server that was rolled back is first sent the rows that it lacks, so that a forecast never
        starts before `t`. It starts after `t`, as its own `t` says, if rows were applied whose
        outputs were not taken yet, for example by a stream.

        Args:
            horizon: steps ahead; default: the model's longest.
            quantiles: levels, each more than 0 and less than 1; default: the bounds of the
                session's interval and the median, or the median alone for a model without
                intervals.
            scenarios: assumed future rows, [P, D] by name: one forecast for each. NaN means the
                model's own forecast of the value, which also continues after the last row. A
                DataFrame may lack columns, which are then all NaN. Rows with times must not begin
                before the session's next row; for rows that are missing between them the model's
                own forecasts are taken.
            timeout: seconds for all tries; default: the client's timeout.

        Returns:
            A forecast, or with scenarios one for each by its name.

        Raises:
            ForecastImpossible: the session has no rows yet, or the model can't look so far ahead.
            InvalidField: an argument can't be accepted.
            RowsMissing: the server was rolled back, and the rows are not kept here.
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session is gone.
            Unavailable: no answer in time.
        """

    @abstractmethod
    def catch_up(self, *args: Any, **kwargs: Any) -> Any:
        """Sends a server that is at t the rows that it lacks; their outputs are dropped.

        `step` and `forecast` do so by themselves.

        Args:
            t: rows that the server has.
            timeout: seconds without progress until it gives up; default: the client's timeout.

        Raises:
            RowsMissing: they are not kept here.
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session is gone.
            Unavailable: no answer in time.
        """

    @abstractmethod
    def stream(self, *args: Any, **kwargs: Any) -> Any:
        """Applies rows as they come and yields the outputs [O] of each, in order.

        An item may also be many rows [T, D], whose last outputs are then yielded. `Session` has one
        item in flight, so that each output is there before it asks for the next row; for speed over
        rows that are known already, give them to `step` at once. `AsyncSession` has up to `WINDOW`
        items in flight.

        When the connection breaks it is made again, and what was not answered is sent again with
        the same t; a server that was rolled back is sent what it lacks first. Ends with the error
        if a row can't be applied; `t` says how many were. After leaving the loop early, continue
        from `t` with the same rows, or call `refresh` first: rows in flight may have been applied.

        Rows with times, from an index of pandas or in `TimedRows`, must start with the session's
        next row, by its start and the model's interval. Rows that are missing between them are
        missing values, if the session takes those. Nothing is sorted.

        Args:
            xs: rows [D], from an iterable, or for `AsyncSession` also from an async iterable; with
                times or without.
            named: yield the outputs by name, with their times.

        Raises:
            InvalidField: x has another shape or other columns, or times that do not start with the
                session's next row; it names the first wrong row.
            NonFiniteInput, NonFiniteResult: x can't be applied.
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session is gone.
            StepMismatch, StepTooOld: another client steps the session too.
            RowsMissing: the server lacks the rows `first` to `last`, and they are not kept here
                (any more). Set `t` to `first` and apply your own records again from there.
            Unavailable, StaleOwner: no answer in time.
            Exception: what `xs` raised, after the outputs of the rows before.
        """

    @abstractmethod
    def refresh(self) -> Any:
        """Asks the server for the session's status, and takes its t.

        If the server was rolled back and all the rows that it lacks are kept here, t stays: the
        next step sends them.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session is gone.
            Unavailable: no answer in time.
        """

    @abstractmethod
    def fork(self, *args: Any, **kwargs: Any) -> Any:
        """Opens a new session that starts from a copy of this one.

        The fork is at this session's t, and keeps the same rows to send them again.

        Args:
            new_id: the fork's id, 1 to 128 of A-Z a-z 0-9 . _ : -; default: the client makes one.
            idle_timeout: the fork expires when no step came for this long; default: that of this
                session.
            durability: "async": steps are saved a little after their answers; "sync": before them;
                "none": the session is lost if its server ends unexpectedly. Default: that of this
                session.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session is gone.
            SessionExists: the new id is open already.
            InvalidField: an argument can't be accepted.
            SessionLimit: the server has no room for one more session.
            Unavailable: no answer in time.
        """

    @abstractmethod
    def reset_accuracy(self) -> Any:
        """Starts the session's accuracy and drift statistics anew, after the steps accepted so far.

        Its state, t, forecasts and intervals do not change. If the session's steps are saved, the
        reset is saved before this returns.

        Returns:
            The session's status after the reset.

        Raises:
            SessionUnknown, SessionExpired, SessionClosed, SessionLost: the session is gone.
            Unavailable: no answer in time.
        """

    @abstractmethod
    def close(self) -> Any:
        """Closes the session on the server; it is no error if it is closed already.

        Returns:
            Its last status.

        Raises:
            SessionUnknown, SessionExpired, SessionLost: the session is gone.
            Unavailable: no answer in time.
        """


class PackAPI(ABC):
    """What a pack does."""

    @abstractmethod
    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Applies one row to each session, or rows to some of them, each row exactly once.

        If a row can't be applied, only this row and later rows of its session are refused: look at
        the result's `errors`. What is lost on the way is sent again with the same t, and a server
        that was rolled back is sent what it lacks.

        With the asyncio client several calls may run at the same time for different sessions; if a
        task is cancelled, call again with the same rows.

        Args:
            x: rows [N, D] in raw units; NaN is a missing value. Rows with times, from an index of
                pandas or in `TimedRows`, must each be their session's next one.
            which: the session of each row [N], as a place in the pack; a session may come several
                times. Default: one row for each session in order.
            timeout: seconds without progress until it gives up; default: the client's timeout.

        Returns:
            The outcome of each row.

        Raises:
            InvalidField: x or `which` has another shape, or a row has another time.
            Cancelled: the client was disconnected.
        """

    @abstractmethod
    def end(self) -> Any:
        """Ends the stream; the sessions stay open."""
