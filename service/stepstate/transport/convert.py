"""Between messages of `stepstate.v1` and the values of the sessions layer.

Steps have a module of their own, `steps`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from stepstate.engine import ForecastQuality, Method
from stepstate.errors import InvalidField, StepstateError
from stepstate.models import Model
from stepstate.sessions import (
    ID_LENGTH,
    CopyOptions,
    ForecastRequest,
    OpenOptions,
    OutputTrajectory,
    Pause,
    Scenario,
    SessionForecast,
    SessionStatus,
    SessionSummary,
    check_scenario_count,
    error_bytes,
    new_id,
    next_round,
)
from stepstate.stores import Durability, MissingPolicy, UnreadableSession
from stepstate.tenants import LIMITS, Tenant
from stepstate.transport.status import status_of
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.floats import array_of, put_floats

log = logging.getLogger(__name__)

T = TypeVar("T")
M = TypeVar("M", pb.Session, pb.Model)

ForecastResult = Sequence[SessionForecast] | StepstateError
"""Of one session: its forecasts, one for each scenario, or why there are none."""

REPLY_BYTES = 4_000_000
"""A client with gRPC's default limit of 4 MiB can read every reply."""
ENCODED_AT_ONCE = 16_384
"""Bytes of a long reply that are encoded before others take turns: a millisecond or two."""
LISTED_AT_ONCE = 32
"""Sessions of a page, for the same: the shortest has 70 bytes, and takes 12 microseconds."""
_ITEM_BYTES = 8
"""The tag and the length of an item of a list, at most."""
_TOKEN_BYTES = 512

_DURABILITY_NUMBERS = {
    Durability.NONE: pb.DURABILITY_NONE,
    Durability.ASYNC: pb.DURABILITY_ASYNC,
    Durability.SYNC: pb.DURABILITY_SYNC,
}
_DURABILITIES: dict[int, Durability | None] = {
    pb.DURABILITY_UNSPECIFIED: None,
    **{number: durability for durability, number in _DURABILITY_NUMBERS.items()},
}
_MISSING_NUMBERS = {
    MissingPolicy.REJECT: pb.MISSING_POLICY_REJECT,
    MissingPolicy.IMPUTE: pb.MISSING_POLICY_IMPUTE,
    MissingPolicy.HOLD: pb.MISSING_POLICY_HOLD,
}
_MISSING: dict[int, MissingPolicy] = {
    pb.MISSING_POLICY_UNSPECIFIED: MissingPolicy.REJECT,
    **{number: policy for policy, number in _MISSING_NUMBERS.items()},
}
_STATUS_NUMBERS = {
    SessionStatus.OPEN: pb.SESSION_STATUS_OPEN,
    SessionStatus.EXPIRED: pb.SESSION_STATUS_EXPIRED,
    SessionStatus.MODEL_MISSING: pb.SESSION_STATUS_MODEL_MISSING,
}
_METHODS: dict[int, pb.ForecastMethod] = {
    Method.NONE: pb.FORECAST_METHOD_UNSPECIFIED,
    Method.DIRECT: pb.FORECAST_METHOD_DIRECT,
    Method.FED_BACK: pb.FORECAST_METHOD_FED_BACK,
    Method.GIVEN: pb.FORECAST_METHOD_GIVEN,
}
_VALUES = pb.OutputForecast.VALUES_FIELD_NUMBER


def decode_opening(request: pb.OpenSessionRequest, tenant: str) -> OpenOptions:
    """What a client asks for when it opens a session."""
    return OpenOptions(
        session_id=request.session_id,
        model=request.model,
        version=request.version,
        idle_timeout_seconds=_idle_timeout(request),
        start_time=_moment(request) if request.HasField("start_time") else None,
        durability=_durability(request.durability),
        missing=_known("missing", request.missing, _MISSING),
        interval_level=request.interval_level or None,
        tenant=tenant,
    )


def decode_fork(request: pb.ForkSessionRequest, tenant: str) -> CopyOptions:
    """What a client asks for when it forks a session."""
    session_id = request.new_session_id or new_id()
    idle, durability = _idle_timeout(request), _durability(request.durability)
    return CopyOptions(session_id, idle, durability, tenant)


def decode_import(
    request: pb.ImportSessionRequest | pb.StreamImportRequest, tenant: str
) -> CopyOptions:
    """What a client asks for when it imports a session, beside the snapshot."""
    idle, durability = _idle_timeout(request), _durability(request.durability)
    return CopyOptions(request.session_id, idle, durability, tenant)


def encode_session(summary: SessionSummary | UnreadableSession) -> pb.Session:
    """A session's state: what it was opened with, and where it is now.

    One with a value that the contract can't hold is shown as unreadable, beside the others.
    """
    if not isinstance(summary, UnreadableSession):
        try:
            return _session(summary)
        except (ValueError, OverflowError):
            record = summary.record
            extra = {"tenant": record.tenant, "session_id": record.session_id}
            log.exception("a session can't be shown", extra=extra)
            summary = UnreadableSession(summary.record.key, "")
    return pb.Session(
        session_id=summary.session_id,
        status=pb.SESSION_STATUS_UNREADABLE,
        tenant=summary.tenant,
    )


def _session(summary: SessionSummary) -> pb.Session:
    record, now = summary.record, datetime.now(UTC)
    return pb.Session(
        session_id=record.session_id,
        model=record.model,
        version=record.version,
        fingerprint=record.fingerprint,
        t=summary.t,
        idle_timeout=_duration(record.idle_timeout_seconds),
        start_time=_timestamp(record.start_time),
        open_time=_timestamp(record.open_time),
        expire_time=_later(now, summary.seconds_left),
        queued_requests=summary.queued_requests,
        durable_t=summary.durable_t,
        durability=_DURABILITY_NUMBERS[record.durability],
        residency=pb.RESIDENCY_RESIDENT if summary.resident else pb.RESIDENCY_SPILLED,
        owner=summary.owner,
        epoch=summary.epoch,
        missing=_MISSING_NUMBERS[record.missing],
        status=_STATUS_NUMBERS[summary.status],
        **_quality(summary.quality),
        purge_time=_later(now, summary.delete_seconds),
        tenant=record.tenant,
    )


class ReplyPage(list[M]):
    """Messages of one reply, as long as they fit."""

    def __init__(self) -> None:
        super().__init__()
        self.size = _TOKEN_BYTES

    def take(self, message: M) -> bool:
        """Adds a message if there is room; the first always fits."""
        size = message.ByteSize() + _ITEM_BYTES
        if self and self.size + size > REPLY_BYTES:
            return False
        self.append(message)
        self.size += size
        return True


def encode_tenant(tenant: Tenant, open_sessions: int) -> pb.Tenant:
    """A tenant, with what it uses."""
    refused = tenant.refused
    limits = [
        pb.TenantLimit(
            name=name,
            value=getattr(tenant.limits, name),
            used=open_sessions if name == "open_sessions" else tenant.used(name),
            refused=refused[name],
        )
        for name in LIMITS
    ]
    return pb.Tenant(name=tenant.name, weight=tenant.limits.weight, limits=limits)


async def encode_page(
    found: Sequence[SessionSummary | UnreadableSession], pause: Pause = next_round
) -> ReplyPage[pb.Session]:
    """As many sessions as fit; others take turns in between, by `pause`."""
    page, encoded = ReplyPage[pb.Session](), 0
    for place, summary in enumerate(found, 1):
        if not page.take(encode_session(summary)):
            break
        if page.size - encoded >= ENCODED_AT_ONCE or place % LISTED_AT_ONCE == 0:
            encoded = page.size
            await pause()
    return page


def _later(now: datetime, seconds: float | None) -> Timestamp | None:
    if seconds is None:
        return None
    try:
        return _timestamp(now + timedelta(seconds=seconds))
    except OverflowError:  # a damaged store may hold the year 10,000
        return _timestamp(datetime.max.replace(tzinfo=UTC))


def _quality(quality: ForecastQuality | None) -> dict[str, Any]:
    """The fields of a session for the quality of its forecasts."""
    if quality is None:
        return {}
    drift = quality.drift
    return {
        "interval_level": quality.level,
        "accuracy": [
            pb.Accuracy(
                output=one.output,
                horizon=one.horizon,
                scored=one.lifetime.scored,
                mean_absolute_error=one.lifetime.mean_absolute_error,
                mean_absolute_scaled_error=one.lifetime.mean_absolute_scaled_error,
                coverage=one.lifetime.coverage,
                offset=one.offset,
                recent_scored=one.recent.scored,
                recent_mean_absolute_error=one.recent.mean_absolute_error,
                recent_mean_absolute_scaled_error=one.recent.mean_absolute_scaled_error,
                recent_coverage=one.recent.coverage,
                recent_median_absolute_error=one.median_absolute_error,
            )
            for one in quality.accuracy
        ],
        "drift": pb.Drift(
            drifting=drift.drifting,
            alarms=drift.alarms,
            last_t=drift.last_t,
            learning=drift.learning,
            score=drift.score,
        ),
    }


def encode_model(model: Model) -> pb.Model:
    """A loaded model, as its manifest describes it."""
    manifest = model.manifest
    cell = manifest.cell
    return pb.Model(
        name=manifest.name,
        version=manifest.version,
        description=manifest.description,
        fingerprint=manifest.fingerprint,
        cell=pb.Cell(
            kind=cell.kind.value,
            hidden_size=cell.hidden_size,
            num_layers=cell.num_layers,
            proj_size=cell.proj_size,
        ),
        inputs=[pb.Input(name=column.name, unit=column.unit) for column in manifest.inputs],
        outputs=[
            pb.Output(
                name=output.name,
                unit=output.unit,
                horizons=output.horizons,
                quantiles=output.quantiles,
            )
            for output in manifest.outputs
        ],
        step_interval=_duration(manifest.step_interval_seconds),
        needs_start_time=manifest.needs_time,
        lag_rows=manifest.lag_rows,
        tracked_horizons=manifest.tracking.horizons if manifest.tracking else (),
    )


def _known(field: str, number: int, meanings: Mapping[int, T]) -> T:
    """The value of a number of an enum.

    Raises:
        InvalidField: it is a number of a later version of the contract.
    """
    if number not in meanings:
        raise InvalidField(field, f"is {number}, which means nothing to this server")
    return meanings[number]


def _idle_timeout(
    request: pb.OpenSessionRequest
    | pb.ForkSessionRequest
    | pb.ImportSessionRequest
    | pb.StreamImportRequest,
) -> float | None:
    if not request.HasField("idle_timeout"):
        return None
    idle = request.idle_timeout  # as a float it can be beyond every timedelta, and then be refused
    return idle.seconds + idle.nanos / 1e9


def _durability(number: int) -> Durability | None:
    return _known("durability", number, _DURABILITIES)


def _moment(request: pb.OpenSessionRequest) -> datetime:
    try:
        return request.start_time.ToDatetime(tzinfo=UTC)
    except ValueError as error:
        raise InvalidField("start_time", f"is not a time: {error}") from error


def decode_forecast(request: pb.ForecastRequest) -> ForecastRequest:
    """What a client asks for.

    Raises:
        InvalidField: it has more scenarios than are read.
    """
    check_scenario_count(len(request.scenarios))
    scenarios = [Scenario(one.name, array_of(one.x)) for one in request.scenarios]
    return ForecastRequest(request.horizon, tuple(request.quantiles), tuple(scenarios))


def forecast_reply_bytes(results: Sequence[ForecastResult]) -> int:
    """About what the reply takes."""
    return sum(
        error_bytes(result)
        if isinstance(result, StepstateError)
        else sum(forecast.reply_bytes for forecast in result)
        for result in results
    )


async def encode_forecasts(
    session_ids: Sequence[str], results: Sequence[ForecastResult], pause: Pause = next_round
) -> pb.ForecastResponse:
    """The reply, in the order of the request; others take turns in between, by `pause`.

    Raises:
        StepstateError: one session was asked for, and it has no forecast.
    """
    if len(results) == 1 and isinstance(results[0], StepstateError):
        raise results[0]
    response, encoded = pb.ForecastResponse(), 0
    for session_id, result in zip(session_ids, results, strict=True):
        for one in [result] if isinstance(result, StepstateError) else result:
            if isinstance(one, StepstateError):
                response.forecasts.add(session_id=session_id[:ID_LENGTH], error=status_of(one))
                encoded += error_bytes(one)
            else:
                response.forecasts.append(_forecast(one))
                encoded += one.reply_bytes
            if encoded >= ENCODED_AT_ONCE:
                encoded = 0
                await pause()
    return response


def _forecast(forecast: SessionForecast) -> pb.SessionForecast:
    return pb.SessionForecast(
        session_id=forecast.session_id,
        scenario=forecast.scenario,
        t=forecast.t,
        first_time=_timestamp(forecast.first_time),
        step_interval=_duration(forecast.step_interval_seconds),
        quantiles=forecast.levels,
        outputs=map(_output, forecast.outputs),
    )


def _output(forecast: OutputTrajectory) -> pb.OutputForecast:
    message = pb.OutputForecast(
        name=forecast.output.name,
        unit=forecast.output.unit,
        methods=[_METHODS[method] for method in forecast.methods],
    )
    put_floats(message, _VALUES, forecast.values.astype("<f4", copy=False).tobytes())
    return message


def _duration(seconds: float | None) -> Duration | None:
    if seconds is None:
        return None
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e6) * 1_000)
    return message


def _timestamp(moment: datetime | None) -> Timestamp | None:
    if moment is None:
        return None
    message = Timestamp()
    message.FromDatetime(moment)
    return message
