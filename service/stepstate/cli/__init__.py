"""The command `stepstate`."""

from stepstate.cli.main import main

__all__ = ["main"]
