"""Whatever texts are logged, a record is one line, short, and harmless to a terminal."""

from __future__ import annotations

import json
import logging
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stepstate.logging import MAX_LINE_BYTES
from stepstate.logging.lines import Render, entry_of, line_of, renderer

FORGED = "x\n2026-01-01T00:00:00Z [error    ] forged"
"""What a name in a snapshot once wrote into the log."""

texts = st.one_of(
    st.text(st.characters()),  # also unpaired surrogates
    st.text(st.sampled_from("\n\r\x1b\x07\x7f\x85\u2028\u202e\ud800\udfff\\'\"=a ")),
    st.integers(1, 3).map(lambda much: "\x1b[2J\n" * 10 ** (much + 2)),
    st.sampled_from([FORGED, "\U0001f600" * 5_000, "a" * 10_000, "\x00" * 5_000]),
)
values = st.recursive(
    st.one_of(texts, st.none(), st.booleans(), st.integers(), st.floats(), st.binary()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=6,
)
keys = st.one_of(st.from_regex(r"[a-z_]{1,12}", fullmatch=True), texts)
extras = st.dictionaries(keys, values, max_size=40)
TEXT, JSON = renderer("text", terminal=False), renderer("json", terminal=False)


class Away(Exception):
    """An error whose text comes from outside."""


def record(message: str, extra: dict[str, object], error: Exception | None) -> logging.LogRecord:
    """As `logger.info("said: %s", message, extra=extra, exc_info=error)` makes it."""
    exc_info = None
    if error is not None:
        try:
            raise error  # noqa: TRY301
        except Exception:  # noqa: BLE001 - its traceback is wanted
            exc_info = sys.exc_info()
    made = logging.LogRecord("stepstate.x", logging.INFO, "x.py", 1, "%s", (message,), exc_info)
    for key, value in extra.items():
        vars(made).setdefault(key, value)
    return made


errors = st.one_of(st.none(), texts.map(Away), texts.map(KeyError))


@pytest.mark.parametrize("render", [TEXT, JSON], ids=["text", "json"])
@given(message=texts, extra=extras, error=errors)
@example(message=FORGED, extra={"model": FORGED, FORGED: "\x1b[31m"}, error=Away(FORGED))
@example(message="m" * 10**7, extra={"id": "i" * 10**7}, error=Away("e" * 10**7))
@example(message="m", extra={str(n) * 60: "v" * 500 for n in range(40)}, error=None)
def test_a_record_is_one_short_line_of_printable_characters(
    render: Render, message: str, extra: dict[str, object], error: Exception | None
):
    line = line_of(entry_of(record(message, extra, error)), render)
    assert len(line) <= MAX_LINE_BYTES
    assert line.endswith(b"\n")
    first, *others = line.decode()[:-1].split("\n")  # it is valid UTF-8
    assert first.isprintable()
    assert bool(others) is (render is TEXT and error is not None)
    for other in others:
        assert other.startswith("  | ")
        assert other.isprintable()


@given(message=texts, extra=extras, error=errors)
def test_json_stays_json_and_says_the_essential(
    message: str, extra: dict[str, object], error: Exception | None
):
    """What is cut is the longest text, at its end, and of a traceback the front."""
    line = json.loads(line_of(entry_of(record(message, extra, error)), JSON))
    assert (line["level"], line["logger"]) == ("info", "stepstate.x")
    kept, mark, rest = line["event"].rpartition("...[cut]")
    assert message.startswith(kept) if mark and not rest else line["event"] == message
    if error is not None and len(str(error)) < 100 and not extra:
        assert line["exception"].endswith(str(error))


@pytest.mark.parametrize("render", [TEXT, JSON], ids=["text", "json"])
def test_short_records_are_whole(render: Render):
    error = Away("it was short")
    extra = {"session_id": "a b", "rows": 3, "left": 1.5, "last": False, "nothing": None}
    line = line_of(entry_of(record("hello", extra, error)), render).decode()
    for text in ("hello", "session_id", "a b", "rows", "3", "left", "1.5", "Away: it was short"):
        assert text in line
    assert "[cut]" not in line


def test_the_last_line_of_a_deep_traceback_stays():
    def deep(left: int) -> None:
        if left == 0:
            raise Away("at the bottom")
        if left % 2:
            deep(left - 1)
        else:
            deeper(left - 1)

    def deeper(left: int) -> None:
        deep(left)

    try:
        deep(200)
    except Away:
        made = record("failed", {}, None)
        made.exc_info = sys.exc_info()
    for render in (TEXT, JSON):
        line = line_of(entry_of(made), render).decode()
        assert "Away: at the bottom" in line
        assert "[cut]" in line
