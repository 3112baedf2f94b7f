"""Structured logs on standard error: JSON lines, or readable text on a terminal.

Rule 1: a log call never waits. It captures what the line will say and puts that into a queue; a
thread makes the line and writes it. If nobody reads standard error, the queue becomes full, and
further lines are dropped and counted.
Rule 2: no place in the code writes more than `LINES_PER_SECOND` for one reason. Once a second a
line says how many were left out.
Rule 3: a line has at most `MAX_LINE_BYTES`, and no text in it, wherever it is from, ends the line
or controls a terminal. Only a traceback in text format has lines of its own, each behind a bar.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from stepstate.logging.audit import AUDIT_DROPPED, audit_lines
from stepstate.logging.limit import LINES_PER_SECOND, LineLimit
from stepstate.logging.lines import MAX_LINE_BYTES, renderer
from stepstate.logging.writer import DROPPED, DescriptorOutput, LineQueue, LineWriter

__all__ = [
    "AUDIT_DROPPED",
    "DROPPED",
    "LINES_PER_SECOND",
    "MAX_LINE_BYTES",
    "audit_lines",
    "logs_on_stderr",
]

log = logging.getLogger(__name__)

STDERR = 2
"""Its file descriptor."""


@contextmanager
def logs_on_stderr(level: str, style: str) -> Iterator[None]:
    """Writes all logs to standard error. The end of the block waits for those on their way.

    Also what Python itself would write there: warnings, and exceptions that nobody can catch.

    Args:
        level: a name such as "INFO".
        style: "json", "text", or "auto" for text on a terminal and JSON elsewhere.
            Text has colours on a terminal, unless NO_COLOR is set.
    """
    limit = LineLimit()
    render = renderer(style, terminal=os.isatty(STDERR))
    writer = LineWriter(DescriptorOutput(STDERR), render, limit, dropped=DROPPED)
    root = logging.getLogger()
    root.handlers[:] = [LineQueue(writer.lines, limit, DROPPED)]
    root.setLevel(level)
    logging.captureWarnings(capture=True)
    sys.unraisablehook = _log_unraisable
    threading.excepthook = _log_end_of_thread
    writer.start()
    try:
        yield
    finally:
        writer.stop()


def _log_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    extra = {"where": repr(unraisable.object)}
    log.error("an exception was ignored", exc_info=unraisable.exc_value, extra=extra)


def _log_end_of_thread(end: threading.ExceptHookArgs) -> None:
    extra = {"name_of_thread": end.thread.name if end.thread else ""}
    log.error("a thread ended", exc_info=end.exc_value, extra=extra)
