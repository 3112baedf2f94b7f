"""What both clients know of a session."""

from __future__ import annotations

from stepstate.client.backlog import Backlog
from stepstate.client.values import ModelInfo, SessionInfo


class Footing:
    """Where the application stands in a session, and the rows to get a server there again.

    Attributes:
        t: rows whose outputs the application has.
        durable_t: rows that survive the end of the server, by its last word.
        info: where the session stood when it was opened, or last asked about.
        imputed_rows: rows of the last call, or the last item of a stream, in which
            something stood in for a missing value.
        fallback_rows: rows of it for which the model's lagged inputs reached back
            before the session's first row, so that its fallback stood in.
    """

    def __init__(
        self, model: ModelInfo, info: SessionInfo, *, t: int | None = None, resume_rows: int
    ) -> None:
        self.session_id = info.session_id
        self.model = model
        self.info = info
        self.t = info.t if t is None else t
        self.durable_t = info.durable_t
        self.imputed_rows = self.fallback_rows = 0
        limit = resume_rows if info.resumable else 0
        self.backlog = Backlog(info.session_id, model.input_width, limit, self.t)

    def arrived(self, t: int, *, imputed_rows: int, fallback_rows: int) -> None:
        """The application has the outputs of t rows now."""
        self.t = t
        self.imputed_rows = imputed_rows
        self.fallback_rows = fallback_rows

    def saved(self, durable_t: int) -> None:
        """Takes the server's word for what survives it."""
        if durable_t > self.durable_t:
            self.durable_t = durable_t
            self.backlog.forget(durable_t)

    def placed(self, info: SessionInfo) -> None:
        """Takes the server's word for where the session stands.

        A server that was set back is brought up by the next step if all the
        rows for it are kept: t stays then.
        """
        self.info = info
        self.saved(info.durable_t)
        if info.t >= self.t or not self.backlog.holds(info.t, self.t - 1):
            self.t = info.t

    def follow(self, source: Footing, *, resume_rows: int) -> None:
        """Stands where the session stands that it is a fork of, with the same rows kept."""
        self.t = source.t
        limit = resume_rows if self.info.resumable else 0
        self.backlog = source.backlog.copy(self.session_id, limit=limit)
        self.backlog.forget(self.durable_t)
