"""The command line against a server, in this process or on a terminal."""

from __future__ import annotations

import os
from collections.abc import Callable

from click.testing import CliRunner, Result

from stepstate.cli import main

Ask = Callable[..., Result]
"""Runs `stepstate` with some arguments; `given` is its standard input."""


def ask_at(address: str) -> Ask:
    """Runs commands for the server at an address; only an exit status may end them early."""

    def invoke(*arguments: object, given: str = "") -> Result:
        found = CliRunner().invoke(main, [*map(str, arguments), "--server", address], input=given)
        assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
        return found

    return invoke


def read_terminal(terminal: int) -> bytes:
    """What a program has written to a terminal; empty when it has ended."""
    try:
        return os.read(terminal, 65_536)
    except OSError:  # nobody has its other end any more
        return b""
