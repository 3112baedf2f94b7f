import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from stepstate.v1.google_rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Durability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DURABILITY_UNSPECIFIED: _ClassVar[Durability]
    DURABILITY_NONE: _ClassVar[Durability]
    DURABILITY_ASYNC: _ClassVar[Durability]
    DURABILITY_SYNC: _ClassVar[Durability]

class Residency(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESIDENCY_UNSPECIFIED: _ClassVar[Residency]
    RESIDENCY_RESIDENT: _ClassVar[Residency]
    RESIDENCY_SPILLED: _ClassVar[Residency]

class MissingPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MISSING_POLICY_UNSPECIFIED: _ClassVar[MissingPolicy]
    MISSING_POLICY_REJECT: _ClassVar[MissingPolicy]
    MISSING_POLICY_IMPUTE: _ClassVar[MissingPolicy]
    MISSING_POLICY_HOLD: _ClassVar[MissingPolicy]

class SessionStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SESSION_STATUS_UNSPECIFIED: _ClassVar[SessionStatus]
    SESSION_STATUS_OPEN: _ClassVar[SessionStatus]
    SESSION_STATUS_EXPIRED: _ClassVar[SessionStatus]
    SESSION_STATUS_MODEL_MISSING: _ClassVar[SessionStatus]
    SESSION_STATUS_UNREADABLE: _ClassVar[SessionStatus]

class ForecastMethod(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FORECAST_METHOD_UNSPECIFIED: _ClassVar[ForecastMethod]
    FORECAST_METHOD_DIRECT: _ClassVar[ForecastMethod]
    FORECAST_METHOD_FED_BACK: _ClassVar[ForecastMethod]
    FORECAST_METHOD_GIVEN: _ClassVar[ForecastMethod]
DURABILITY_UNSPECIFIED: Durability
DURABILITY_NONE: Durability
DURABILITY_ASYNC: Durability
DURABILITY_SYNC: Durability
RESIDENCY_UNSPECIFIED: Residency
RESIDENCY_RESIDENT: Residency
RESIDENCY_SPILLED: Residency
MISSING_POLICY_UNSPECIFIED: MissingPolicy
MISSING_POLICY_REJECT: MissingPolicy
MISSING_POLICY_IMPUTE: MissingPolicy
MISSING_POLICY_HOLD: MissingPolicy
SESSION_STATUS_UNSPECIFIED: SessionStatus
SESSION_STATUS_OPEN: SessionStatus
SESSION_STATUS_EXPIRED: SessionStatus
SESSION_STATUS_MODEL_MISSING: SessionStatus
SESSION_STATUS_UNREADABLE: SessionStatus
FORECAST_METHOD_UNSPECIFIED: ForecastMethod
FORECAST_METHOD_DIRECT: ForecastMethod
FORECAST_METHOD_FED_BACK: ForecastMethod
FORECAST_METHOD_GIVEN: ForecastMethod

class OpenSessionRequest(_message.Message):
    __slots__ = ("session_id", "model", "version", "idle_timeout", "start_time", "durability", "missing", "interval_level")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_LEVEL_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    model: str
    version: str
    idle_timeout: _duration_pb2.Duration
    start_time: _timestamp_pb2.Timestamp
    durability: Durability
    missing: MissingPolicy
    interval_level: float
    def __init__(self, session_id: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., idle_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., durability: _Optional[_Union[Durability, str]] = ..., missing: _Optional[_Union[MissingPolicy, str]] = ..., interval_level: _Optional[float] = ...) -> None: ...

class OpenSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class Session(_message.Message):
    __slots__ = ("session_id", "model", "version", "fingerprint", "t", "idle_timeout", "start_time", "open_time", "expire_time", "queued_requests", "durable_t", "durability", "residency", "owner", "epoch", "accuracy", "missing", "interval_level", "drift", "status", "purge_time", "tenant")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    T_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    OPEN_TIME_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    DURABLE_T_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_LEVEL_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PURGE_TIME_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    model: str
    version: str
    fingerprint: str
    t: int
    idle_timeout: _duration_pb2.Duration
    start_time: _timestamp_pb2.Timestamp
    open_time: _timestamp_pb2.Timestamp
    expire_time: _timestamp_pb2.Timestamp
    queued_requests: int
    durable_t: int
    durability: Durability
    residency: Residency
    owner: str
    epoch: int
    accuracy: _containers.RepeatedCompositeFieldContainer[Accuracy]
    missing: MissingPolicy
    interval_level: float
    drift: Drift
    status: SessionStatus
    purge_time: _timestamp_pb2.Timestamp
    tenant: str
    def __init__(self, session_id: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., fingerprint: _Optional[str] = ..., t: _Optional[int] = ..., idle_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., open_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., queued_requests: _Optional[int] = ..., durable_t: _Optional[int] = ..., durability: _Optional[_Union[Durability, str]] = ..., residency: _Optional[_Union[Residency, str]] = ..., owner: _Optional[str] = ..., epoch: _Optional[int] = ..., accuracy: _Optional[_Iterable[_Union[Accuracy, _Mapping]]] = ..., missing: _Optional[_Union[MissingPolicy, str]] = ..., interval_level: _Optional[float] = ..., drift: _Optional[_Union[Drift, _Mapping]] = ..., status: _Optional[_Union[SessionStatus, str]] = ..., purge_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., tenant: _Optional[str] = ...) -> None: ...

class Accuracy(_message.Message):
    __slots__ = ("output", "horizon", "scored", "mean_absolute_error", "mean_absolute_scaled_error", "coverage", "offset", "recent_scored", "recent_mean_absolute_error", "recent_mean_absolute_scaled_error", "recent_coverage", "recent_median_absolute_error")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    HORIZON_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIELD_NUMBER: _ClassVar[int]
    MEAN_ABSOLUTE_ERROR_FIELD_NUMBER: _ClassVar[int]
    MEAN_ABSOLUTE_SCALED_ERROR_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    RECENT_SCORED_FIELD_NUMBER: _ClassVar[int]
    RECENT_MEAN_ABSOLUTE_ERROR_FIELD_NUMBER: _ClassVar[int]
    RECENT_MEAN_ABSOLUTE_SCALED_ERROR_FIELD_NUMBER: _ClassVar[int]
    RECENT_COVERAGE_FIELD_NUMBER: _ClassVar[int]
    RECENT_MEDIAN_ABSOLUTE_ERROR_FIELD_NUMBER: _ClassVar[int]
    output: str
    horizon: int
    scored: int
    mean_absolute_error: float
    mean_absolute_scaled_error: float
    coverage: float
    offset: float
    recent_scored: int
    recent_mean_absolute_error: float
    recent_mean_absolute_scaled_error: float
    recent_coverage: float
    recent_median_absolute_error: float
    def __init__(self, output: _Optional[str] = ..., horizon: _Optional[int] = ..., scored: _Optional[int] = ..., mean_absolute_error: _Optional[float] = ..., mean_absolute_scaled_error: _Optional[float] = ..., coverage: _Optional[float] = ..., offset: _Optional[float] = ..., recent_scored: _Optional[int] = ..., recent_mean_absolute_error: _Optional[float] = ..., recent_mean_absolute_scaled_error: _Optional[float] = ..., recent_coverage: _Optional[float] = ..., recent_median_absolute_error: _Optional[float] = ...) -> None: ...

class Drift(_message.Message):
    __slots__ = ("drifting", "alarms", "last_t", "learning", "score")
    DRIFTING_FIELD_NUMBER: _ClassVar[int]
    ALARMS_FIELD_NUMBER: _ClassVar[int]
    LAST_T_FIELD_NUMBER: _ClassVar[int]
    LEARNING_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    drifting: bool
    alarms: int
    last_t: int
    learning: bool
    score: float
    def __init__(self, drifting: bool = ..., alarms: _Optional[int] = ..., last_t: _Optional[int] = ..., learning: bool = ..., score: _Optional[float] = ...) -> None: ...

class GetSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class GetSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "model", "show_expired")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SHOW_EXPIRED_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    model: str
    show_expired: bool
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., model: _Optional[str] = ..., show_expired: bool = ...) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions", "next_page_token")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[Session]
    next_page_token: str
    def __init__(self, sessions: _Optional[_Iterable[_Union[Session, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class RestoreSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class RestoreSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class CloseSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class CloseSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class ForkSessionRequest(_message.Message):
    __slots__ = ("session_id", "new_session_id", "idle_timeout", "durability")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NEW_SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    new_session_id: str
    idle_timeout: _duration_pb2.Duration
    durability: Durability
    def __init__(self, session_id: _Optional[str] = ..., new_session_id: _Optional[str] = ..., idle_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., durability: _Optional[_Union[Durability, str]] = ...) -> None: ...

class ForkSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class ExportSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class ExportSessionResponse(_message.Message):
    __slots__ = ("snapshot", "session")
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    snapshot: bytes
    session: Session
    def __init__(self, snapshot: _Optional[bytes] = ..., session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class ImportSessionRequest(_message.Message):
    __slots__ = ("snapshot", "session_id", "idle_timeout", "durability")
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    snapshot: bytes
    session_id: str
    idle_timeout: _duration_pb2.Duration
    durability: Durability
    def __init__(self, snapshot: _Optional[bytes] = ..., session_id: _Optional[str] = ..., idle_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., durability: _Optional[_Union[Durability, str]] = ...) -> None: ...

class ImportSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class StreamExportRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class StreamExportResponse(_message.Message):
    __slots__ = ("data", "session", "size")
    DATA_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    session: Session
    size: int
    def __init__(self, data: _Optional[bytes] = ..., session: _Optional[_Union[Session, _Mapping]] = ..., size: _Optional[int] = ...) -> None: ...

class StreamImportRequest(_message.Message):
    __slots__ = ("data", "size", "session_id", "idle_timeout", "durability")
    DATA_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    size: int
    session_id: str
    idle_timeout: _duration_pb2.Duration
    durability: Durability
    def __init__(self, data: _Optional[bytes] = ..., size: _Optional[int] = ..., session_id: _Optional[str] = ..., idle_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., durability: _Optional[_Union[Durability, str]] = ...) -> None: ...

class StreamImportResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class StepRequest(_message.Message):
    __slots__ = ("session_id", "t", "x", "inspect", "last_only", "advance")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    T_FIELD_NUMBER: _ClassVar[int]
    X_FIELD_NUMBER: _ClassVar[int]
    INSPECT_FIELD_NUMBER: _ClassVar[int]
    LAST_ONLY_FIELD_NUMBER: _ClassVar[int]
    ADVANCE_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    t: int
    x: _containers.RepeatedScalarFieldContainer[float]
    inspect: bool
    last_only: bool
    advance: int
    def __init__(self, session_id: _Optional[str] = ..., t: _Optional[int] = ..., x: _Optional[_Iterable[float]] = ..., inspect: bool = ..., last_only: bool = ..., advance: _Optional[int] = ...) -> None: ...

class StepResponse(_message.Message):
    __slots__ = ("session_id", "t", "y", "replayed", "layers", "error", "durable_t", "imputed_rows", "fallback_rows")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    T_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DURABLE_T_FIELD_NUMBER: _ClassVar[int]
    IMPUTED_ROWS_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_ROWS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    t: int
    y: _containers.RepeatedScalarFieldContainer[float]
    replayed: bool
    layers: _containers.RepeatedCompositeFieldContainer[LayerTrace]
    error: _status_pb2.Status
    durable_t: int
    imputed_rows: int
    fallback_rows: int
    def __init__(self, session_id: _Optional[str] = ..., t: _Optional[int] = ..., y: _Optional[_Iterable[float]] = ..., replayed: bool = ..., layers: _Optional[_Iterable[_Union[LayerTrace, _Mapping]]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., durable_t: _Optional[int] = ..., imputed_rows: _Optional[int] = ..., fallback_rows: _Optional[int] = ...) -> None: ...

class Binding(_message.Message):
    __slots__ = ("handle", "session_id")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    handle: int
    session_id: str
    def __init__(self, handle: _Optional[int] = ..., session_id: _Optional[str] = ...) -> None: ...

class StreamPackedRequest(_message.Message):
    __slots__ = ("id", "bindings", "handles", "t", "x")
    ID_FIELD_NUMBER: _ClassVar[int]
    BINDINGS_FIELD_NUMBER: _ClassVar[int]
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    T_FIELD_NUMBER: _ClassVar[int]
    X_FIELD_NUMBER: _ClassVar[int]
    id: int
    bindings: _containers.RepeatedCompositeFieldContainer[Binding]
    handles: bytes
    t: bytes
    x: bytes
    def __init__(self, id: _Optional[int] = ..., bindings: _Optional[_Iterable[_Union[Binding, _Mapping]]] = ..., handles: _Optional[bytes] = ..., t: _Optional[bytes] = ..., x: _Optional[bytes] = ...) -> None: ...

class StreamPackedResponse(_message.Message):
    __slots__ = ("id", "y", "t", "durable_t", "flags", "errors", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    T_FIELD_NUMBER: _ClassVar[int]
    DURABLE_T_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: int
    y: bytes
    t: bytes
    durable_t: bytes
    flags: bytes
    errors: _containers.RepeatedCompositeFieldContainer[RowError]
    error: _status_pb2.Status
    def __init__(self, id: _Optional[int] = ..., y: _Optional[bytes] = ..., t: _Optional[bytes] = ..., durable_t: _Optional[bytes] = ..., flags: _Optional[bytes] = ..., errors: _Optional[_Iterable[_Union[RowError, _Mapping]]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class RowError(_message.Message):
    __slots__ = ("row", "status")
    ROW_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    row: int
    status: _status_pb2.Status
    def __init__(self, row: _Optional[int] = ..., status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class LayerTrace(_message.Message):
    __slots__ = ("i", "f", "g", "o", "c", "m", "h", "r", "z", "n")
    I_FIELD_NUMBER: _ClassVar[int]
    F_FIELD_NUMBER: _ClassVar[int]
    G_FIELD_NUMBER: _ClassVar[int]
    O_FIELD_NUMBER: _ClassVar[int]
    C_FIELD_NUMBER: _ClassVar[int]
    M_FIELD_NUMBER: _ClassVar[int]
    H_FIELD_NUMBER: _ClassVar[int]
    R_FIELD_NUMBER: _ClassVar[int]
    Z_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    i: _containers.RepeatedScalarFieldContainer[float]
    f: _containers.RepeatedScalarFieldContainer[float]
    g: _containers.RepeatedScalarFieldContainer[float]
    o: _containers.RepeatedScalarFieldContainer[float]
    c: _containers.RepeatedScalarFieldContainer[float]
    m: _containers.RepeatedScalarFieldContainer[float]
    h: _containers.RepeatedScalarFieldContainer[float]
    r: _containers.RepeatedScalarFieldContainer[float]
    z: _containers.RepeatedScalarFieldContainer[float]
    n: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, i: _Optional[_Iterable[float]] = ..., f: _Optional[_Iterable[float]] = ..., g: _Optional[_Iterable[float]] = ..., o: _Optional[_Iterable[float]] = ..., c: _Optional[_Iterable[float]] = ..., m: _Optional[_Iterable[float]] = ..., h: _Optional[_Iterable[float]] = ..., r: _Optional[_Iterable[float]] = ..., z: _Optional[_Iterable[float]] = ..., n: _Optional[_Iterable[float]] = ...) -> None: ...

class ForecastRequest(_message.Message):
    __slots__ = ("session_id", "horizon", "quantiles", "scenarios")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    HORIZON_FIELD_NUMBER: _ClassVar[int]
    QUANTILES_FIELD_NUMBER: _ClassVar[int]
    SCENARIOS_FIELD_NUMBER: _ClassVar[int]
    session_id: _containers.RepeatedScalarFieldContainer[str]
    horizon: int
    quantiles: _containers.RepeatedScalarFieldContainer[float]
    scenarios: _containers.RepeatedCompositeFieldContainer[Scenario]
    def __init__(self, session_id: _Optional[_Iterable[str]] = ..., horizon: _Optional[int] = ..., quantiles: _Optional[_Iterable[float]] = ..., scenarios: _Optional[_Iterable[_Union[Scenario, _Mapping]]] = ...) -> None: ...

class Scenario(_message.Message):
    __slots__ = ("name", "x")
    NAME_FIELD_NUMBER: _ClassVar[int]
    X_FIELD_NUMBER: _ClassVar[int]
    name: str
    x: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, name: _Optional[str] = ..., x: _Optional[_Iterable[float]] = ...) -> None: ...

class ForecastResponse(_message.Message):
    __slots__ = ("forecasts",)
    FORECASTS_FIELD_NUMBER: _ClassVar[int]
    forecasts: _containers.RepeatedCompositeFieldContainer[SessionForecast]
    def __init__(self, forecasts: _Optional[_Iterable[_Union[SessionForecast, _Mapping]]] = ...) -> None: ...

class SessionForecast(_message.Message):
    __slots__ = ("session_id", "scenario", "t", "first_time", "quantiles", "outputs", "error", "step_interval")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SCENARIO_FIELD_NUMBER: _ClassVar[int]
    T_FIELD_NUMBER: _ClassVar[int]
    FIRST_TIME_FIELD_NUMBER: _ClassVar[int]
    QUANTILES_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    STEP_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    scenario: str
    t: int
    first_time: _timestamp_pb2.Timestamp
    quantiles: _containers.RepeatedScalarFieldContainer[float]
    outputs: _containers.RepeatedCompositeFieldContainer[OutputForecast]
    error: _status_pb2.Status
    step_interval: _duration_pb2.Duration
    def __init__(self, session_id: _Optional[str] = ..., scenario: _Optional[str] = ..., t: _Optional[int] = ..., first_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., quantiles: _Optional[_Iterable[float]] = ..., outputs: _Optional[_Iterable[_Union[OutputForecast, _Mapping]]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., step_interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class OutputForecast(_message.Message):
    __slots__ = ("name", "unit", "values", "methods")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    METHODS_FIELD_NUMBER: _ClassVar[int]
    name: str
    unit: str
    values: _containers.RepeatedScalarFieldContainer[float]
    methods: _containers.RepeatedScalarFieldContainer[ForecastMethod]
    def __init__(self, name: _Optional[str] = ..., unit: _Optional[str] = ..., values: _Optional[_Iterable[float]] = ..., methods: _Optional[_Iterable[_Union[ForecastMethod, str]]] = ...) -> None: ...

class ResetAccuracyRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class ResetAccuracyResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "next_page_token")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    next_page_token: str
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ListTenantsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListTenantsResponse(_message.Message):
    __slots__ = ("tenants", "next_page_token")
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    tenants: _containers.RepeatedCompositeFieldContainer[Tenant]
    next_page_token: str
    def __init__(self, tenants: _Optional[_Iterable[_Union[Tenant, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class Tenant(_message.Message):
    __slots__ = ("name", "weight", "limits")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    name: str
    weight: float
    limits: _containers.RepeatedCompositeFieldContainer[TenantLimit]
    def __init__(self, name: _Optional[str] = ..., weight: _Optional[float] = ..., limits: _Optional[_Iterable[_Union[TenantLimit, _Mapping]]] = ...) -> None: ...

class TenantLimit(_message.Message):
    __slots__ = ("name", "value", "used", "refused")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    used: float
    refused: int
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ..., used: _Optional[float] = ..., refused: _Optional[int] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: Model
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "version", "description", "fingerprint", "cell", "inputs", "outputs", "step_interval", "needs_start_time", "lag_rows", "tracked_horizons")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CELL_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    STEP_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    NEEDS_START_TIME_FIELD_NUMBER: _ClassVar[int]
    LAG_ROWS_FIELD_NUMBER: _ClassVar[int]
    TRACKED_HORIZONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    description: str
    fingerprint: str
    cell: Cell
    inputs: _containers.RepeatedCompositeFieldContainer[Input]
    outputs: _containers.RepeatedCompositeFieldContainer[Output]
    step_interval: _duration_pb2.Duration
    needs_start_time: bool
    lag_rows: int
    tracked_horizons: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., description: _Optional[str] = ..., fingerprint: _Optional[str] = ..., cell: _Optional[_Union[Cell, _Mapping]] = ..., inputs: _Optional[_Iterable[_Union[Input, _Mapping]]] = ..., outputs: _Optional[_Iterable[_Union[Output, _Mapping]]] = ..., step_interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., needs_start_time: bool = ..., lag_rows: _Optional[int] = ..., tracked_horizons: _Optional[_Iterable[int]] = ...) -> None: ...

class Cell(_message.Message):
    __slots__ = ("kind", "hidden_size", "num_layers", "proj_size")
    KIND_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    PROJ_SIZE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    hidden_size: int
    num_layers: int
    proj_size: int
    def __init__(self, kind: _Optional[str] = ..., hidden_size: _Optional[int] = ..., num_layers: _Optional[int] = ..., proj_size: _Optional[int] = ...) -> None: ...

class Input(_message.Message):
    __slots__ = ("name", "unit")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    name: str
    unit: str
    def __init__(self, name: _Optional[str] = ..., unit: _Optional[str] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("name", "unit", "horizons", "quantiles")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    HORIZONS_FIELD_NUMBER: _ClassVar[int]
    QUANTILES_FIELD_NUMBER: _ClassVar[int]
    name: str
    unit: str
    horizons: _containers.RepeatedScalarFieldContainer[int]
    quantiles: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, name: _Optional[str] = ..., unit: _Optional[str] = ..., horizons: _Optional[_Iterable[int]] = ..., quantiles: _Optional[_Iterable[float]] = ...) -> None: ...
