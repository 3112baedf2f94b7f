"""Structured logs on standard error: JSON lines, or readable text on a terminal."""

from __future__ import annotations

import logging
import os
import sys

import structlog


def configure_logs(level: str, style: str) -> None:
    """Sends all logs through structlog to standard error.

    Args:
        level: a name such as "INFO".
        style: "json", "text", or "auto" for text on a terminal and JSON elsewhere.
            Text has colours on a terminal, unless NO_COLOR is set.
    """
    text = sys.stderr.isatty() if style == "auto" else style == "text"
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if text:
        colors = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        last: list[structlog.typing.Processor] = [structlog.dev.ConsoleRenderer(colors=colors)]
    else:
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
