"""What a forecast call may ask for, and how many bytes it takes on the wire and in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stepstate.errors import InvalidField, StepstateError
from stepstate.models import OutputSpec
from stepstate.sessions.forecasting.scenarios import MAX_HORIZON, ForecastRequest

MAX_SESSIONS = 10_000
MAX_SCENARIOS = 1_000
MAX_LEVELS = 100
NAME_LENGTH = 128
"""Characters of a scenario's name: as for a session's id."""
MAX_REPLY_BYTES = 4_000_000
"""As for every reply: a client with gRPC's default limit of 4 MiB can read it."""
MAX_FED_ROWS = 200_000
"""Rows fed back in one call, of all sessions and scenarios: some seconds of work."""
MAX_BYTES = 256 * 2**20
"""Of a call: its scenarios, copies of states, and forecasts."""

_MESSAGE_BYTES = 60
"""At most, of a forecast's times, tags and lengths on the wire."""
_OUTPUT_BYTES = 20
"""At most, of the tags and lengths of one of its outputs."""
_ERROR_BYTES = 256
"""At most, of an error's status without its texts."""


Reserve = Callable[[int], None]
"""Reserves bytes for a call."""


def within_call(reserve: Reserve) -> Reserve:
    """Reserves bytes for one call, as long as they are not more than a call may have.

    It raises InvalidField if they are, and what `reserve` raises.
    """
    held = 0

    def reserve_within(count: int) -> None:
        nonlocal held
        held += count
        if held > MAX_BYTES:
            raise InvalidField(
                "session_id",
                f"names sessions whose states take more than {MAX_BYTES} bytes together: ask "
                "for fewer at once",
            )
        reserve(count)

    return reserve_within


def error_bytes(error: StepstateError) -> int:
    """About what an error takes in a reply for several sessions, without the session's id."""
    return _ERROR_BYTES + text_bytes(str(error), str(error), *error.fields().values())


def forecast_bytes(outputs: Sequence[OutputSpec], horizon: int, levels: int) -> int:
    """What a forecast takes in the reply, without the session's id and the scenario's name."""
    values = horizon * (4 * levels + 1)  # with their methods
    names = sum(text_bytes(output.name, output.unit) for output in outputs)
    return _MESSAGE_BYTES + 8 * levels + names + len(outputs) * (_OUTPUT_BYTES + values)


def text_bytes(*texts: str) -> int:
    """What texts take on the wire."""
    return sum(len(text.encode()) for text in texts)


def check_request(sessions: int, request: ForecastRequest) -> None:
    """Refuses a request that is too large, whatever its sessions are.

    Raises:
        InvalidField.
    """
    if not 0 < sessions <= MAX_SESSIONS:
        raise InvalidField("session_id", f"names {sessions} sessions, expected 1 to {MAX_SESSIONS}")
    if request.horizon > MAX_HORIZON:
        raise InvalidField("horizon", f"is {request.horizon}, expected at most {MAX_HORIZON}")
    _check_quantiles(request.quantiles)
    check_scenario_count(len(request.scenarios))
    for index, one in enumerate(request.scenarios):
        if len(one.name) > NAME_LENGTH:
            raise InvalidField(
                f"scenarios[{index}].name",
                f"has {len(one.name)} characters, expected at most {NAME_LENGTH}",
            )
    least = _MESSAGE_BYTES + (request.horizon or 1) * (4 * (len(request.quantiles) or 1) + 1)
    check_bytes(sessions, least * sessions * max(1, len(request.scenarios)))


def check_scenario_count(count: int) -> None:
    """Refuses more scenarios than a call may have.

    Raises:
        InvalidField.
    """
    if count > MAX_SCENARIOS:
        raise InvalidField(
            "scenarios", f"holds {count}, expected at most {MAX_SCENARIOS}: send several calls"
        )


def _check_quantiles(levels: Sequence[float]) -> None:
    if len(levels) > MAX_LEVELS:
        raise InvalidField("quantiles", f"holds {len(levels)}, expected at most {MAX_LEVELS}")
    for index, level in enumerate(levels):
        if not 0 < level < 1:
            raise InvalidField(
                f"quantiles[{index}]", f"is {level:g}, expected more than 0 and less than 1"
            )


def check_bytes(sessions: int, size: int) -> None:
    """Refuses a reply that is larger than a client reads.

    Raises:
        InvalidField.
    """
    if size > MAX_REPLY_BYTES:
        raise InvalidField(
            "session_id",
            f"names {sessions} sessions whose reply would take {size} bytes, more than "
            f"{MAX_REPLY_BYTES}: ask for fewer sessions, scenarios, horizons or quantiles at once",
        )


def check_fed_rows(rows: int) -> None:
    """Refuses a call that would compute for very long.

    Raises:
        InvalidField.
    """
    if rows > MAX_FED_ROWS:
        raise InvalidField(
            "horizon",
            f"needs {rows} rows to be fed back, of all sessions and scenarios together, expected "
            f"at most {MAX_FED_ROWS}: ask for fewer of them at once, or for a shorter horizon",
        )
