"""Sessions: who is open, where each stands, and in which order steps are applied."""

from stepstate.sessions.lane import Lane, LaneObserver
from stepstate.sessions.opening import ID_LENGTH, Limits, Opening, check_id
from stepstate.sessions.session import ReplyTo, Session, Step
from stepstate.sessions.sessions import SessionObserver, Sessions
from stepstate.sessions.table import Table

__all__ = [
    "ID_LENGTH",
    "Lane",
    "LaneObserver",
    "Limits",
    "Opening",
    "ReplyTo",
    "Session",
    "SessionObserver",
    "Sessions",
    "Step",
    "Table",
    "check_id",
]
