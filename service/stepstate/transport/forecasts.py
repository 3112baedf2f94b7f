"""Between the messages of `Forecast` and the values of the sessions layer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from stepstate.engine import Method
from stepstate.errors import StepstateError
from stepstate.sessions import (
    ID_LENGTH,
    ForecastRequest,
    OutputTrajectory,
    Scenario,
    SessionForecast,
    check_scenario_count,
    error_bytes,
)
from stepstate.transport.convert import duration, timestamp
from stepstate.transport.status import status_of
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.floats import array_of, put_floats

Told = Sequence[SessionForecast] | StepstateError

ENCODED_AT_ONCE = 16_384
"""Bytes: about as many take a millisecond or two."""
_METHODS: dict[int, pb.ForecastMethod] = {
    Method.NONE: pb.FORECAST_METHOD_UNSPECIFIED,
    Method.DIRECT: pb.FORECAST_METHOD_DIRECT,
    Method.FED_BACK: pb.FORECAST_METHOD_FED_BACK,
    Method.GIVEN: pb.FORECAST_METHOD_GIVEN,
}
_VALUES = pb.OutputForecast.VALUES_FIELD_NUMBER


def decode_wish(request: pb.ForecastRequest) -> ForecastRequest:
    """What a client asks for.

    Raises:
        InvalidField: it has too many scenarios to be worth reading.
    """
    check_scenario_count(len(request.scenarios))
    scenarios = [Scenario(one.name, array_of(one.x)) for one in request.scenarios]
    return ForecastRequest(request.horizon, tuple(request.quantiles), tuple(scenarios))


def reply_bytes(told: Sequence[Told]) -> int:
    """About what the reply takes."""
    return sum(
        error_bytes(some)
        if isinstance(some, StepstateError)
        else sum(forecast.reply_bytes for forecast in some)
        for some in told
    )


async def encode_forecasts(session_ids: Sequence[str], told: Sequence[Told]) -> pb.ForecastResponse:
    """The reply, in the order of the request; made in pieces, others take turns in between.

    Raises:
        StepstateError: the one session that was asked for has none.
    """
    if len(told) == 1 and isinstance(told[0], StepstateError):
        raise told[0]
    response, made = pb.ForecastResponse(), 0
    for session_id, some in zip(session_ids, told, strict=True):
        for one in [some] if isinstance(some, StepstateError) else some:
            if isinstance(one, StepstateError):
                response.forecasts.append(_error(session_id, one))
                made += error_bytes(one)
            else:
                response.forecasts.append(_forecast(one))
                made += one.reply_bytes
            if made >= ENCODED_AT_ONCE:
                made = 0
                await asyncio.sleep(0)
    return response


def _error(session_id: str, error: StepstateError) -> pb.SessionForecast:
    return pb.SessionForecast(session_id=session_id[:ID_LENGTH], error=status_of(error))


def _forecast(forecast: SessionForecast) -> pb.SessionForecast:
    first, interval = forecast.first_time, forecast.step_interval_seconds
    return pb.SessionForecast(
        session_id=forecast.session_id,
        scenario=forecast.scenario,
        t=forecast.t,
        first_time=None if first is None else timestamp(first),
        step_interval=None if interval is None else duration(interval),
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
