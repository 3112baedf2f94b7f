"""Sessions: which are open, where they are, and in which order steps are applied.

Transport uses `SessionService` and the values that it takes and returns, nothing else.
"""

from stepstate.sessions.context import Limits, SchedulerSettings
from stepstate.sessions.forecasting.forecaster import OutputTrajectory, SessionForecast
from stepstate.sessions.forecasting.limits import check_scenario_count, error_bytes
from stepstate.sessions.forecasting.scenarios import ForecastRequest, Scenario
from stepstate.sessions.options import ID_LENGTH, CopyOptions, OpenOptions, check_id, new_id
from stepstate.sessions.queues import Hold, Waiter
from stepstate.sessions.scheduler import StepScheduler
from stepstate.sessions.service import SessionService
from stepstate.sessions.status import SessionStatus, SessionSummary
from stepstate.sessions.table import Table
from stepstate.sessions.types import (
    MAX_SOURCE_RUNNING,
    PackedReplyTo,
    PackedStep,
    Pause,
    ReplyTo,
    ResidentSession,
    RowBatch,
    RowReplyTo,
    Scheduler,
    SessionObserver,
    SessionRef,
    SessionState,
    SingleRow,
    Source,
    Step,
    StepObserver,
    next_round,
)

__all__ = [
    "ID_LENGTH",
    "MAX_SOURCE_RUNNING",
    "CopyOptions",
    "ForecastRequest",
    "Hold",
    "Limits",
    "OpenOptions",
    "OutputTrajectory",
    "PackedReplyTo",
    "PackedStep",
    "Pause",
    "ReplyTo",
    "ResidentSession",
    "RowBatch",
    "RowReplyTo",
    "Scenario",
    "Scheduler",
    "SchedulerSettings",
    "SessionForecast",
    "SessionObserver",
    "SessionRef",
    "SessionService",
    "SessionState",
    "SessionStatus",
    "SessionSummary",
    "SingleRow",
    "Source",
    "Step",
    "StepObserver",
    "StepScheduler",
    "Table",
    "Waiter",
    "check_id",
    "check_scenario_count",
    "error_bytes",
    "new_id",
    "next_round",
]
