"""The times of rows: read from what the application gives, and compared with a session's clock.

Rule 1: times are UTC, in whole microseconds; a time without a zone is read as UTC.
Rule 2: row t of a session has the time start + t * interval.
Rule 3: rows are never sorted, moved or left out. A row that is later than the session's next row
        has missing rows before it, if the session takes those; else it is an error.

T rows. No I/O here, and no pandas: what has an index is found by its attributes.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepstate.client.types import Floats, ModelInfo
from stepstate.errors import InvalidField

Microseconds = NDArray[np.int64]
"""Times since 1970, UTC."""

MAX_GAP_ROWS = 100_000
"""A server's limit for one request: a longer gap is more likely a wrong date."""
_CALL_SPACINGS = 3
"""So many spacings in one call show that the rows have another step than the model."""
_SESSION_SPACINGS = 24
"""The same for rows that come one by one, of which some may be lost by chance."""
_NEXT = np.zeros(1, np.int64)
_HOUR = 3_600_000_000
_SAVING_BEGINS = (
    (3, range(8, 15)),  # the second Sunday of March in America
    (3, range(25, 32)),  # the last one in Europe
    (9, range(24, 31)),  # the last one of September in New Zealand
    (10, range(1, 8)),  # the first one of October in Australia
)
_ZONE = "give the times their zone (pandas: x.index.tz_localize('Europe/London'"
_BEGINS = f"if daylight saving begins there, {_ZONE})); if they are UTC, say that ('UTC')"
_ENDS = f"if daylight saving ends there, {_ZONE}, ambiguous='infer'))"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DATE = re.compile(r"\s*\d{4}-\d{1,2}-\d{1,2}|\s*\d{1,2}([./-])\d{1,2}\1\d{2,4}\b")


@dataclass(frozen=True, slots=True, eq=False)
class TimedRows:
    """Rows with their times, for data without an index of its own.

    It can be given wherever rows are given: to `step`, `stream`, `prime`, `open(history=...)`, as a
    scenario. A pandas Series or DataFrame with an index of times does not need it.

    >>> from datetime import datetime
    >>> row = TimedRows(22262.0, datetime(2000, 8, 28))

    Args:
        values: one row or many, as `step` takes them.
        times: of one row a datetime; of many [T] datetimes, or an array of datetime64. Without a
            time zone they are read as UTC.
    """

    values: ArrayLike
    times: Any


RowsLike = ArrayLike | TimedRows
"""What the application gives as rows: one row or many, with times or without."""


@dataclass(frozen=True, slots=True, eq=False)
class Times:
    """The times of some rows [T]; `naive`: they were given without a time zone."""

    utc: Microseconds
    naive: bool


def to_microseconds(moment: datetime) -> int:
    """A time as microseconds since 1970; without a zone it is read as UTC."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (aware - _EPOCH) // timedelta(microseconds=1)


def to_datetime(microseconds: int) -> datetime:
    """The time, in UTC."""
    return _EPOCH + timedelta(microseconds=int(microseconds))


def format_time(microseconds: int) -> str:
    """The time in UTC, as it is printed."""
    return f"{to_datetime(microseconds).replace(tzinfo=None)}Z"


def split_times(x: Any, field: str) -> tuple[Any, Times | None]:
    """Rows without their times, and the times; None if they have none.

    Raises:
        InvalidField: the times can't be read.
    """
    if isinstance(x, TimedRows):
        return x.values, _read(x.times, field)
    index = getattr(x, "index", None)
    if index is None or callable(index):  # a list has a method of that name
        return x, None
    if _holds_times(index, field):
        return x, _read(index, field)
    name = getattr(x, "name", None)  # a row of a DataFrame is named by its time
    if isinstance(name, date) or hasattr(name, "to_timestamp"):
        return x, _read(name, field)
    return x, None


def read_rows(model: ModelInfo, x: Any, field: str) -> tuple[Floats, bool, Times | None]:
    """Rows [T, D] as the model takes them, whether it was a single one, and their times if any.

    Raises:
        InvalidField: x has another shape, or times that can't be read.
    """
    if not _is_list_of_labelled(x):
        values, times = split_times(x, field)
        rows, single = model.rows(values, field)
        if times is not None and len(times.utc) != len(rows):
            raise InvalidField(field, f"has {len(times.utc)} times for {len(rows)} rows")
        return rows, single, times
    parts = [read_rows(model, part, field) for part in x]
    found = [one for _, _, one in parts if one is not None]
    if len(found) not in {0, len(parts)}:
        raise InvalidField(field, "has times for some of its rows: expected all or none")
    rows = np.concatenate([rows for rows, _, _ in parts])
    if not found:
        return rows, False, None
    naive = any(one.naive for one in found)
    return rows, False, Times(np.concatenate([one.utc for one in found]), naive)


def each_row(xs: Any) -> Any:
    """The items of a stream: a table is taken row by row, each with its time.

    Raises:
        InvalidField: it has another number of times than of rows.
    """
    if isinstance(xs, TimedRows):
        if isinstance(xs.times, date | np.datetime64):
            return [xs]
        values, times = list(_slices(xs.values)), list(xs.times)
        if len(values) != len(times):
            raise InvalidField("x", f"has {len(times)} times for {len(values)} rows")
        return [TimedRows(value, time) for value, time in zip(values, times, strict=True)]
    is_series = getattr(xs, "ndim", None) == 1
    if not hasattr(xs, "iloc") or (is_series and not _holds_times(xs.index, "x")):
        return xs
    return _slices(xs)


def _slices(x: Any) -> Iterable[Any]:
    return (x.iloc[n : n + 1] for n in range(len(x))) if hasattr(x, "iloc") else x


def first_time(x: Any, field: str) -> datetime | None:
    """The time of the first row, if it has one."""
    _, times = split_times(x[0] if _is_list_of_labelled(x) else x, field)
    return to_datetime(times.utc[0]) if times is not None and len(times.utc) else None


def _is_list_of_labelled(x: Any) -> bool:
    """Whether it is a list of rows that each have an index or times."""
    if not isinstance(x, list | tuple) or not x:
        return False
    return isinstance(x[0], TimedRows) or not callable(getattr(x[0], "index", callable))


def _holds_times(index: Any, field: str) -> bool:
    if getattr(getattr(index, "dtype", None), "kind", "") == "M" or hasattr(index, "to_timestamp"):
        return True
    first = next(iter(index), None)
    if isinstance(first, str) and _DATE.match(first):
        raise InvalidField(
            field,
            f"has an index of text such as {first!r}: make times of it, in pandas with "
            "x.index = pd.to_datetime(x.index), or drop it with x.reset_index(drop=True)",
        )
    return isinstance(first, date)


def _read(given: Any, field: str) -> Times:
    if type(given) is datetime:  # the usual one of a stream
        return Times(np.array([to_microseconds(given)]), given.tzinfo is None)
    if hasattr(given, "to_timestamp") and hasattr(given, "freq"):  # a period means its start
        given = given.to_timestamp()
    dtype = getattr(given, "dtype", None)
    try:
        if getattr(dtype, "kind", "") == "M":
            found, naive = np.asarray(given, "datetime64[us]"), getattr(dtype, "tz", None) is None
        else:
            moments = [given] if isinstance(given, date | np.datetime64) else list(given)
            naive = any(getattr(moment, "tzinfo", None) is None for moment in moments)
            found = np.array([_plain(moment) for moment in moments], "datetime64[us]")
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidField(field, f"has times that can't be read: {error}") from error
    times = np.atleast_1d(found)
    if np.isnat(times).any():
        raise InvalidField(field, f"has no time for row {int(np.isnat(times).argmax())} (NaT)")
    return Times(times.astype(np.int64), naive)


def _plain(moment: Any) -> Any:
    """A time as NumPy takes it, in UTC."""
    if isinstance(moment, datetime) and moment == moment:  # noqa: PLR0124 - pandas' NaT is not
        return np.datetime64(to_microseconds(moment), "us")
    if isinstance(moment, datetime):
        return np.datetime64("NaT", "us")
    if isinstance(moment, date | np.datetime64):
        return moment
    if hasattr(moment, "to_timestamp"):
        return _plain(moment.to_timestamp())
    raise TypeError(f"{moment!r} is a {type(moment).__name__}, not a datetime")


class RowClock:
    """The times of a session's rows.

    Args:
        model: the model's name, for errors.
        interval: time between two rows; None: the model knows no time.
        start: time of row 0; None: not known until rows with times come.
        takes_missing: rows may be missing, since the session's policy says what replaces them.
    """

    def __init__(
        self, model: str, interval: timedelta | None, start: datetime | None, *, takes_missing: bool
    ) -> None:
        self._model = model
        self._interval = interval // timedelta(microseconds=1) if interval else None
        self._start = None if start is None else to_microseconds(start)
        self._takes_missing = takes_missing
        self._last: tuple[int, int] | None = None  # without an interval: t and time of a row
        self._steps: deque[int] = deque(maxlen=_SESSION_SPACINGS)  # rows from one row to the next

    def continue_from(self, source: RowClock) -> None:
        """Takes the state of the clock of the session that this one is a fork of."""
        self._start, self._last = source._start, source._last
        self._steps = source._steps.copy()

    def time(self, t: int) -> datetime | None:
        """The time of row t, in UTC; None if it is not known."""
        if self._interval is None or self._start is None:
            return None
        return to_datetime(self._start + t * self._interval)

    def times(self, rows: NDArray[np.int64]) -> NDArray[np.datetime64] | None:
        """The times of rows by their t, in UTC; None if they are not known."""
        if self._interval is None or self._start is None:
            return None
        return (self._start + rows * self._interval).astype("datetime64[us]")

    def place(
        self,
        times: Times,
        t: int,
        field: str,
        *,
        first_row: int = 0,
        takes_missing: bool | None = None,
    ) -> NDArray[np.int64]:
        """The place of each row, counted from row t on [T]: 0, 1, 2, … if none is missing.

        If the time of row 0 is not known yet, these rows set it.

        Args:
            times: of the rows.
            t: rows that the session has before them.
            field: the argument's name, for errors.
            first_row: the number of the first of them, for errors.
            takes_missing: whether rows may be missing; default: as the session.

        Raises:
            InvalidField: a row has a wrong time; it names the first one.
        """
        if len(times.utc) == 1 and self._is_next(int(times.utc[0]), t):
            self._steps.append(1)
            return _NEXT
        report = TimeErrors(field, times, first_row)
        if self._interval is None:
            return self._place_by_order(times, t, report)
        fill = self._takes_missing if takes_missing is None else takes_missing
        start, after = self._check(times, t, report, fill=fill)
        steps = np.diff(after, prepend=-1)
        self._note(steps if t and self._start is not None else steps[1:], report)
        self._start = start
        return after

    def _is_next(self, time: int, t: int) -> bool:
        """Whether it is exactly the time of row t, as nearly always in a stream."""
        if self._interval is None or self._start is None:
            return False
        return time == self._start + t * self._interval

    def place_scenario(self, times: Times, t: int, field: str) -> NDArray[np.int64]:
        """The same for the rows of a scenario, of which some may be missing."""
        report = TimeErrors(field, times, 0)
        if self._interval is None:
            report.check_order()
            return np.arange(len(times.utc))
        return self._check(times, t, report, fill=True)[1]

    def _check(
        self, times: Times, t: int, report: TimeErrors, *, fill: bool
    ) -> tuple[int, NDArray[np.int64]]:
        """The time of row 0, and the place of each row, counted from row t on."""
        interval = self._interval or 1
        start = int(times.utc[0]) - t * interval if self._start is None else self._start
        next_time = start + t * interval
        since = times.utc - next_time
        after = (since + interval // 2) // interval
        # Times that were float seconds or whole milliseconds are rounded: that is no other time.
        off = np.abs(since - after * interval) > max(1, min(1_000, interval // 10))
        self._check_spacing(times, report)
        wrong = off | (np.diff(after, prepend=-1) <= 0)
        row = int(wrong.argmax()) if wrong.any() else len(after)
        self._check_gaps(np.diff(after[:row], prepend=-1), report, fill=fill)
        if row == len(after):
            return start, after
        if row == 0 and after[0] < 0:
            raise self._early(int(after[0]), next_time, t, report)
        if row and (not off[row] or times.utc[row] <= times.utc[row - 1]):
            raise report.out_of_order(row, interval)
        raise report.error(
            row,
            f"{{}}, between two rows: {self._model} has a row every "
            f"{timedelta(microseconds=interval)}, one of them at {format_time(next_time)}",
        )

    def _early(self, after: int, next_time: int, t: int, report: TimeErrors) -> InvalidField:
        problem = (
            f"{{}}; the session is at t={t}, and its next row is that of {format_time(next_time)}"
        )
        hint = "leave out the rows that it has already"
        if -after * (self._interval or 1) == _HOUR and report.may_end_saving(0):
            hint = _ENDS
        return report.error(0, f"{problem}: {hint}")

    def _place_by_order(self, times: Times, t: int, report: TimeErrors) -> NDArray[np.int64]:
        """For a model that knows no time: only the order can be checked."""
        if self._last is not None and self._last[0] == t - 1 and times.utc[0] <= self._last[1]:
            raise report.error(
                0, f"{{}}, not after the row before it at {format_time(self._last[1])}"
            )
        report.check_order()
        self._last = t + len(times.utc) - 1, int(times.utc[-1])
        return np.arange(len(times.utc))

    def _check_spacing(self, times: Times, report: TimeErrors) -> None:
        """Raises a clearer error for rows in reverse order, or of another step than the model's."""
        spacings = np.diff(times.utc)
        if len(spacings) and (spacings < 0).all():
            raise report.out_of_order(1, self._interval)
        if len(spacings) < _CALL_SPACINGS or spacings[0] <= 0:
            return
        if (spacings == spacings[0]).all() and abs(spacings[0] - (self._interval or 0)) > 1_000:
            raise self._other_step(int(spacings[0]), report)

    def _other_step(self, spacing: int, report: TimeErrors) -> InvalidField:
        return InvalidField(
            report.field,
            f"has a row every {timedelta(microseconds=spacing)} by its times; {self._model} has "
            f"one every {timedelta(microseconds=self._interval or 0)}: resample the rows first",
        )

    def _check_gaps(self, steps: NDArray[np.int64], report: TimeErrors, *, fill: bool) -> None:
        for row in np.flatnonzero(steps > 1).tolist():
            missing = int(steps[row]) - 1
            problem = f"{{}}, and {missing:,} row{'s' * (missing > 1)} of {self._model} before it "
            problem += f"{'are' if missing > 1 else 'is'} missing"
            if missing * (self._interval or 1) == _HOUR and report.may_begin_saving(row):
                hint = f": {_BEGINS}"
            elif not fill and self._takes_missing:
                hint = ": send them, as rows of NaN where they are not known"
            elif not fill:
                hint = (
                    ": send them, or open the session with missing='impute' or 'hold', which says "
                    "what stands in"
                )
            elif missing > MAX_GAP_ROWS:
                hint = f": expected at most {MAX_GAP_ROWS:,}; `advance` takes more"
            else:
                continue
            raise report.error(row, problem + hint)

    def _note(self, steps: NDArray[np.int64], report: TimeErrors) -> None:
        """Raises an error if all rows leave the same number of rows out: they have another step."""
        inner = steps[-_SESSION_SPACINGS:].tolist()
        self._steps.extend(inner)
        enough = len(inner) >= _CALL_SPACINGS or len(self._steps) == _SESSION_SPACINGS
        common = gcd(*(inner if len(inner) >= _CALL_SPACINGS else self._steps))
        if enough and common > 1:
            self._steps.clear()
            raise self._other_step(common * (self._interval or 0), report)


@dataclass(frozen=True, slots=True, eq=False)
class TimeErrors:
    """Errors about rows by their times.

    `first_row` is the number of the first one.
    """

    field: str
    times: Times
    first_row: int

    def error(self, row: int, problem: str) -> InvalidField:
        """An error about a row; `{}` in the problem stands for its number and time."""
        named = f"row {self.first_row + row} is at {format_time(self.times.utc[row])}"
        return InvalidField(self.field, problem.format(named))

    def check_order(self) -> None:
        """Checks that each row is later than the one before it.

        Raises:
            InvalidField: it names the first one that is not.
        """
        late = np.flatnonzero(np.diff(self.times.utc) <= 0)
        if len(late):
            raise self.out_of_order(int(late[0]) + 1, None)

    def out_of_order(self, row: int, interval: int | None) -> InvalidField:
        """An error about a row that is not later than the one before it."""
        spacings = np.diff(self.times.utc)
        back = -int(spacings[row - 1])
        before = f"row {self.first_row + row - 1} at {format_time(self.times.utc[row - 1])}"
        problem = f"{{}}, before {before}" if back > 0 else f"{{}}, as {before}"
        hint = "sort the rows by time" if back > 0 else "give each time once"
        once = np.count_nonzero(spacings <= 0) == 1
        if once and interval and back == _HOUR - interval and self.may_end_saving(row):
            hint = _ENDS
        return self.error(row, f"{problem}: {hint}")

    def may_begin_saving(self, row: int) -> bool:
        """Whether daylight saving may begin with the hour before a row of times without a zone."""
        skipped = to_datetime(int(self.times.utc[row]) - _HOUR)
        on = any(month == skipped.month and skipped.day in days for month, days in _SAVING_BEGINS)
        return (
            self.times.naive
            and on
            and skipped.weekday() == 6
            and skipped.hour in {1, 2, 3}
            and not skipped.minute
        )

    def may_end_saving(self, row: int) -> bool:
        """Whether it may end at a row of times without a zone: on a Sunday, in the first hours."""
        moment = to_datetime(int(self.times.utc[row]))
        autumn = moment.month in {3, 4, 9, 10, 11}
        return self.times.naive and autumn and moment.weekday() == 6 and moment.hour <= 3
