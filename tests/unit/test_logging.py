"""Logs as text, where they go to a file and where they go to a terminal."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest

from stepstate.logging import configure_logs


@pytest.fixture(autouse=True)
def _root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "variable", "escapes"),
    [(io.StringIO, "", 0), (_Terminal, "", 1), (_Terminal, "NO_COLOR", 0)],
)
def test_text_has_colours_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], variable: str, escapes: int
):
    written = stream()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    configure_logs("INFO", "text")
    logging.getLogger("x").info("hello")
    assert "hello" in written.getvalue()
    assert ("\x1b[" in written.getvalue()) is bool(escapes)
