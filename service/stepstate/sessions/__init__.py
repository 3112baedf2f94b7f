"""Sessions: who is open, where each stands, and in which order steps are applied."""

from stepstate.sessions.arrivals import Hold, Waiter
from stepstate.sessions.forecasting.forecaster import OutputTrajectory, SessionForecast
from stepstate.sessions.forecasting.limits import check_scenario_count, error_bytes
from stepstate.sessions.forecasting.scenarios import ForecastRequest, Scenario
from stepstate.sessions.loader import LoaderObserver
from stepstate.sessions.options import ID_LENGTH, CopyOptions, Limits, OpenOptions, check_id, new_id
from stepstate.sessions.packed import PackedReplyTo, PackedStep, RowBatch, SessionRef
from stepstate.sessions.scheduler import SchedulerObserver, StepScheduler
from stepstate.sessions.service import SessionService
from stepstate.sessions.status import SessionStatus, SessionSummary
from stepstate.sessions.table import Table
from stepstate.sessions.types import ReplyTo, ResidentSession, Step

__all__ = [
    "ID_LENGTH",
    "CopyOptions",
    "ForecastRequest",
    "Hold",
    "Limits",
    "LoaderObserver",
    "OpenOptions",
    "OutputTrajectory",
    "PackedReplyTo",
    "PackedStep",
    "ReplyTo",
    "ResidentSession",
    "RowBatch",
    "Scenario",
    "SchedulerObserver",
    "SessionForecast",
    "SessionRef",
    "SessionService",
    "SessionStatus",
    "SessionSummary",
    "Step",
    "StepScheduler",
    "Table",
    "Waiter",
    "check_id",
    "check_scenario_count",
    "error_bytes",
    "new_id",
]
