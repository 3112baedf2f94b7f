"""What one forecast call may ask for, and what it takes on the wire and in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stepstate.errors import InvalidField, QueueFull, StepstateError
from stepstate.models import OutputSpec

if TYPE_CHECKING:
    from stepstate.sessions.forecasting.forecaster import ForecastRequest

MAX_SESSIONS = 10_000
MAX_SCENARIOS = 1_000
MAX_HORIZON = 10_000
MAX_LEVELS = 100
NAME_LENGTH = 128
"""Characters of a scenario's name: as many as of a session's id."""
MAX_REPLY_BYTES = 4_000_000
"""As of every reply: a client with gRPC's default limit of 4 MiB can read it."""
MAX_FED_ROWS = 200_000
"""Rows fed back, times states, of one call: some seconds of work."""
MAX_BYTES = 256 * 2**20
"""Of all calls at once: each keeps its scenarios, copies of states and forecasts."""

_MESSAGE_BYTES = 60
"""A forecast's times, tags and lengths on the wire, at most."""
_OUTPUT_BYTES = 20
"""The tags and lengths of one of its outputs, at most."""
_ERROR_BYTES = 256
"""What an error's status takes beside its texts, at most."""


class MemoryBudget:
    """Bytes that calls under way hold, all together."""

    def __init__(self) -> None:
        self._used = 0

    @contextmanager
    def of_call(self) -> Iterator[Callable[[int], None]]:
        """What a call takes bytes with; they are given back when it ends.

        Taking raises:
            InvalidField: the call alone wants more than there is.
            QueueFull: others hold too much.
        """
        held = 0

        def take(count: int) -> None:
            nonlocal held
            if held + count > MAX_BYTES:
                raise InvalidField(
                    "session_id",
                    f"names sessions whose states take more than {MAX_BYTES} bytes together: ask "
                    "for fewer at once",
                )
            if self._used + count > MAX_BYTES:
                raise QueueFull("bytes of forecasts under way on this server", MAX_BYTES)
            held += count
            self._used += count

        try:
            yield take
        finally:
            self._used -= held


def error_bytes(error: StepstateError) -> int:
    """About what an error takes in a reply that has others too, without the session's id."""
    return _ERROR_BYTES + text_bytes(str(error), str(error), *error.fields().values())


def forecast_bytes(outputs: Sequence[OutputSpec], horizon: int, levels: int) -> int:
    """What one forecast takes in the reply, without the session's id and the scenario's name."""
    values = horizon * (4 * levels + 1)  # with their methods
    names = sum(text_bytes(output.name, output.unit) for output in outputs)
    return _MESSAGE_BYTES + 8 * levels + names + len(outputs) * (_OUTPUT_BYTES + values)


def text_bytes(*texts: str) -> int:
    """What texts take on the wire."""
    return sum(len(text.encode()) for text in texts)


def check_wish(session_ids: Sequence[str], wish: ForecastRequest) -> None:
    """Refuses what can be told to be too much without a look at the sessions.

    Raises:
        InvalidField: it names the field.
    """
    if not 0 < len(session_ids) <= MAX_SESSIONS:
        raise InvalidField(
            "session_id", f"names {len(session_ids)} sessions, expected 1 to {MAX_SESSIONS}"
        )
    if wish.horizon > MAX_HORIZON:
        raise InvalidField("horizon", f"is {wish.horizon}, expected at most {MAX_HORIZON}")
    _check_quantiles(wish.quantiles)
    check_scenario_count(len(wish.scenarios))
    for place, one in enumerate(wish.scenarios):
        if len(one.name) > NAME_LENGTH:
            raise InvalidField(
                f"scenarios[{place}].name",
                f"has {len(one.name)} characters, expected at most {NAME_LENGTH}",
            )
    least = _MESSAGE_BYTES + (wish.horizon or 1) * (4 * (len(wish.quantiles) or 1) + 1)
    check_bytes(len(session_ids), least * len(session_ids) * max(1, len(wish.scenarios)))


def check_scenario_count(count: int) -> None:
    """Refuses more scenarios than a call may have.

    Raises:
        InvalidField: it has more.
    """
    if count > MAX_SCENARIOS:
        raise InvalidField(
            "scenarios", f"holds {count}, expected at most {MAX_SCENARIOS}: send several calls"
        )


def _check_quantiles(levels: Sequence[float]) -> None:
    if len(levels) > MAX_LEVELS:
        raise InvalidField("quantiles", f"holds {len(levels)}, expected at most {MAX_LEVELS}")
    for place, level in enumerate(levels):
        if not 0 < level < 1:
            raise InvalidField(
                f"quantiles[{place}]", f"is {level:g}, expected more than 0 and less than 1"
            )


def check_bytes(sessions: int, size: int) -> None:
    """Refuses a reply that is larger than a client reads.

    Raises:
        InvalidField: it is.
    """
    if size > MAX_REPLY_BYTES:
        raise InvalidField(
            "session_id",
            f"names {sessions} sessions whose reply would take {size} bytes, more than "
            f"{MAX_REPLY_BYTES}: ask for fewer sessions, scenarios, horizons or quantiles at once",
        )
