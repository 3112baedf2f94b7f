"""Sessions: who is open, where each stands, and in which order steps are applied."""

from stepstate.sessions.arrivals import Hold, Waiter
from stepstate.sessions.forecaster import (
    OutputForecast,
    Scenario,
    SessionForecast,
    Wish,
)
from stepstate.sessions.lane import Lane, LaneObserver
from stepstate.sessions.opening import ID_LENGTH, Copying, Limits, Opening, check_id, new_id
from stepstate.sessions.packed import Columns, PackedRows, PackReplyTo, Seat
from stepstate.sessions.residency import ResidencyObserver
from stepstate.sessions.session import ReplyTo, Session, Step
from stepstate.sessions.sessions import Sessions
from stepstate.sessions.standing import SessionStatus, Standing
from stepstate.sessions.table import Table

__all__ = [
    "ID_LENGTH",
    "Columns",
    "Copying",
    "Hold",
    "Lane",
    "LaneObserver",
    "Limits",
    "Opening",
    "OutputForecast",
    "PackReplyTo",
    "PackedRows",
    "ReplyTo",
    "ResidencyObserver",
    "Scenario",
    "Seat",
    "Session",
    "SessionForecast",
    "SessionStatus",
    "Sessions",
    "Standing",
    "Step",
    "Table",
    "Waiter",
    "Wish",
    "check_id",
    "new_id",
]
