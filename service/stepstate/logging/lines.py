"""What a line of the log says, and how it is made."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from datetime import UTC, datetime

import structlog

MAX_LINE_BYTES = 4096
"""With its newline. A pipe takes as much at once, so the lines of several processes do not mix."""
MAX_EXTRAS = 32
MAX_KEY_LENGTH = 64
MAX_TRACEBACK_LINES = 60
MAX_TRACEBACK_LINE_LENGTH = 500

Value = str | int | float | bool | None
Entry = dict[str, Value]
"""What a line says, by key."""
Render = Callable[[Entry], str]

_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime"}
"""The fields that every record has; the others are from `extra`."""
_ESSENTIAL = ("event", "level", "logger", "timestamp")
_LENGTHS = (4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 192, 128, 64, 32, 16)
"""To which the texts of a line are cut, one after the other, until it fits."""


def entry_of(record: logging.LogRecord) -> Entry:
    """What a record says, in texts and numbers that are short and never change.

    A traceback becomes text: its frames would keep whole requests.
    """
    entry: Entry = {
        "event": cut(record.getMessage(), MAX_LINE_BYTES),
        "level": record.levelname.lower(),
        "logger": record.name,
    }
    extras = [key for key in vars(record) if key not in _STANDARD]
    for key in extras[:MAX_EXTRAS]:
        entry.setdefault(cut(key, MAX_KEY_LENGTH), plain(getattr(record, key)))
    entry["timestamp"] = iso_time(record.created)
    if isinstance(record.exc_info, tuple) and record.exc_info[0] is not None:
        entry["exception"] = _shorten(logging.Formatter().formatException(record.exc_info))
    return entry


def line_of(entry: Entry, render: Render) -> bytes:
    """The line of an entry. The longest texts are cut until it fits, a traceback at its front."""
    for keys in (tuple(entry), _ESSENTIAL):
        for length in _LENGTHS:
            fitting = {key: _fit(key, entry[key], length) for key in keys if key in entry}
            line = render(fitting).encode("utf-8", "backslashreplace") + b"\n"
            if len(line) <= MAX_LINE_BYTES:
                return line
    raise ValueError("the name of the logger is too long")


def renderer(style: str, *, terminal: bool) -> Render:
    """What makes the text of a line: see `logs_on_stderr`."""
    if style == "json" or (style == "auto" and not terminal):
        to_json = structlog.processors.JSONRenderer()
        return lambda entry: str(to_json(None, "", dict(entry))).replace("\x7f", r"\u007f")
    colors = terminal and "NO_COLOR" not in os.environ
    to_text = structlog.dev.ConsoleRenderer(colors=colors)
    return lambda entry: to_text(None, "", _printable_entry(entry))


def plain(value: object) -> Value:
    """A short text or a number for any value."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    return cut(str(value), MAX_LINE_BYTES)


def cut(text: str, length: int, *, front: bool = False) -> str:
    """At most about `length` characters of a text: its beginning, or without its `front`."""
    if len(text) <= length:
        return text
    return f"[cut]...{text[-length:]}" if front else f"{text[:length]}...[cut]"


def iso_time(unix_seconds: float) -> str:
    """A time in UTC, as in "2026-11-28T19:00:00.123456Z"."""
    return datetime.fromtimestamp(unix_seconds, UTC).isoformat().replace("+00:00", "Z")


def _shorten(traceback: str) -> str:
    """The last lines of a traceback, none of them long."""
    lines = traceback.rsplit("\n", MAX_TRACEBACK_LINES)
    if len(lines) > MAX_TRACEBACK_LINES:
        lines[0] = "[cut]..."
    return "\n".join(cut(line, MAX_TRACEBACK_LINE_LENGTH) for line in lines)


def _fit(key: str, value: Value, length: int) -> Value:
    return cut(value, length, front=key == "exception") if isinstance(value, str) else value


def _printable_entry(entry: Entry) -> dict[str, Value]:
    printable = {
        _printable(key): _printable(value) if isinstance(value, str) else value
        for key, value in entry.items()
        if key != "exception"
    }
    if "exception" in entry:
        lines = str(entry["exception"]).split("\n")
        printable["exception"] = "\n".join(f"  | {_printable(line)}" for line in lines)
    return printable


def _printable(text: str) -> str:
    """A text with escapes for what ends lines, controls terminals or is no character."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
