"""Rows of CSV as people have them, without a server."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone

import pytest

from stepstate.cli.rows import BadRow, Format, RowReader, whole
from stepstate.client import TimedRows
from tests.unit.client.test_types import ONE, THREE

COLUMNS = "the columns of m/1 are a, b, c, and time if it is known"


def read(text: str, model=THREE, *, empty: bool = True, part: bool = False, **format_: str):
    lines = text.encode().splitlines(keepends=True)
    rows = RowReader(lines, model, "the input", empty=empty, part=part, format_=Format(**format_))
    return list(rows)


def values(rows) -> list[list[float]]:
    return [row.values if isinstance(row, TimedRows) else row for row in rows]


@pytest.mark.parametrize(
    "text",
    [
        "1,2,3\n4.5,5,6\n",
        "a,b,c\n1,2,3\n4.5,5,6\n",
        "c,a,b\n3,1,2\n6,4.5,5\n",
        " c , a,b\r\n3,1,2\r\n6,4.5,5\r\n",
        "1;2;3\n4,5;5;6\n",
        "b;c;a\n2;3;1\n5;6;4,5\n",
        "b\tc\ta\n2\t3\t1\n5\t6\t4.5\n",
        "\n\nc,a,b\n\n3,1,2\n\n6,4.5,5",
        '"a","b","c"\n"1","2","3"\n4.5,5,6\n',
        "\ufeffa;b;c\n1;2;3\n4,5;5;6\n",
    ],
)
def test_cells_are_found_by_their_separator_and_columns_by_their_names(text: str):
    assert values(read(text)) == [[1, 2, 3], [4.5, 5, 6]]


@pytest.mark.parametrize("cell", ["", " ", "NA", "na", "N/A", "NULL", "None", "nan", "NaN", "#N/A"])
def test_what_says_that_a_value_is_missing_is_one(cell: str):
    ((a, b, c),) = read(f"1,{cell},3\n")
    assert (a, math.isnan(b), c) == (1, True, 3)
    if not cell.lower().startswith("nan"):
        with pytest.raises(
            BadRow, match="is a missing value, which takes --missing impute or hold"
        ):
            read(f"1,{cell},3\n", empty=False)


@pytest.mark.parametrize(
    ("cell", "moment"),
    [
        ("2026-03-29T02:30", datetime(2026, 3, 29, 2, 30)),  # noqa: DTZ001 - as it was written
        ("2026-03-29 02:30:00", datetime(2026, 3, 29, 2, 30)),  # noqa: DTZ001
        ("2026-03-29T02:30Z", datetime(2026, 3, 29, 2, 30, tzinfo=UTC)),
        (
            "2026-03-29T02:30+02:00",
            datetime(2026, 3, 29, 2, 30, tzinfo=timezone(timedelta(hours=2))),
        ),
        ("2026-03-29", datetime(2026, 3, 29)),  # noqa: DTZ001
    ],
)
@pytest.mark.parametrize(
    "text",
    ["time,b,a,c\n{},2,1,3\n", "b;a;c;Timestamp\n2;1;3;{}\n", "{},1,2,3\n", "a,b,c,date\n1,2,3,{}"],
)
def test_a_column_of_times_is_found(text: str, cell: str, moment: datetime):
    (row,) = read(text.format(cell))
    assert isinstance(row, TimedRows)
    assert (row.values, row.times) == ([1, 2, 3], moment)


def test_a_column_of_times_may_have_any_name():
    (row,) = read("a,b,c,when,time\n1,2,3,2026-03-29,x\n", time_column="when")
    assert row.times == datetime(2026, 3, 29)  # noqa: DTZ001 - as it was written
    (plain,) = read("when,a,b,c\nx,1,2,3\n")
    assert plain == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a,b\n1,2\n", f"line 1 of the input is a header without c: {COLUMNS}"),
        ("x,y,z\n1,2,3\n", f"line 1 of the input is a header without a, b, c: {COLUMNS}"),
        ("a,b,c,a\n1,2,3,4\n", f"line 1 of the input has a twice: {COLUMNS}"),
        ("1,2\n", f"is '1,2': expected 3 numbers separated by commas (it has 2); {COLUMNS}"),
        ("1;2\n", f"is '1;2': expected 3 numbers separated by semicolons (it has 2); {COLUMNS}"),
        ("1,2,3\n\n1,2,x\n", "line 3 of the input is '1,2,x': expected 3 numbers separated by"),
        ("a,b,c\n1,2\n", "line 2 of the input is '1,2': expected 3 cells separated by commas"),
        ("1;2;3\n1.000,5;2;3\n", "line 2 of the input is '1.000,5;2;3'"),
        ("time,a,b,c\nsoon,1,2,3\n", "'soon' is no time such as 2026-03-29T02:30"),
        ("time,a,b,c\n,1,2,3\n", "line 2 of the input is ',1,2,3'"),
        ("1,2,3\n1,2,x\n", "('x' is not a number)"),
        ("time,date,a,b,c\n", "which of time or date holds the time? Say it by --time-column"),
    ],
)
def test_what_is_wrong_is_told_with_its_line_and_the_columns(text: str, told: str):
    with pytest.raises(BadRow) as refused:
        read(text)
    assert told in str(refused.value)


@pytest.mark.parametrize("before", ["", "1,2,3\n"])
def test_another_encoding_is_told_with_its_line(before: str):
    lines = [line.encode() for line in before.splitlines(keepends=True)]
    rows = RowReader([*lines, "1,2,°\n".encode("latin-1")], THREE, "the input", empty=False)
    with pytest.raises(BadRow, match=f"line {len(lines) + 1} of the input is not UTF-8: .*0xb0"):
        list(rows)


def test_a_column_of_times_that_is_not_there_is_told():
    with pytest.raises(BadRow, match="line 1 of the input is a header without when"):
        read("a,b,c\n", time_column="when")


def test_a_decimal_comma_in_a_file_of_one_column_takes_a_separator():
    with pytest.raises(BadRow, match=r"expected 1 number \(it has 2\).*give --delimiter ';'"):
        read("22262,5\n", ONE)
    assert read("22262,5\n", ONE, delimiter=";") == [[22262.5]]


def test_columns_that_are_not_used_are_named_once(capsys: pytest.CaptureFixture[str]):
    read("a,note,b,c,unit\n1,x,2,3,m\n1,x,2,3,m\n")
    assert capsys.readouterr().err == "columns of the input that are not used: note, unit\n"
    read("a;b;c;\n1;2;3;\n")  # lines that end with a separator
    assert capsys.readouterr().err == ""


def test_a_scenario_may_lack_columns():
    ((a, b, c),) = values(read("b,time\n2,2026-03-29\n", part=True))
    assert (math.isnan(a), b, math.isnan(c)) == (True, 2, True)
    with pytest.raises(BadRow, match="a header without a, b, c"):
        read("x,y\n2,1\n", part=True)


def test_a_whole_file_knows_the_lines_of_its_rows():
    rows = RowReader([b"a;b;c;time\n", b"\n", b"1;2;3;2026-03-29\n"], THREE, "file", empty=False)
    found, lines = whole(rows)
    assert (found.values, lines) == ([[1, 2, 3]], [3])
    with pytest.raises(BadRow, match="has no rows"):
        whole(RowReader([b"a;b;c\n"], THREE, "file", empty=False))
