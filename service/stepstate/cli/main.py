"""The group of all commands."""

from __future__ import annotations

import errno
import importlib
import sys
from contextlib import suppress

import click

from stepstate import __version__

_COMMANDS = {
    "serve": "stepstate.cli.serve:serve_command",
    "step": "stepstate.cli.step:step_command",
    "forecast": "stepstate.cli.forecast:forecast_command",
    "sessions": "stepstate.cli.sessions:sessions_group",
    "models": "stepstate.cli.models:models_command",
    "health": "stepstate.cli.health:health_command",
    "bench": "stepstate.cli.bench:bench_command",
}


class _Lazy(click.Group):
    """Imports a command when it is used: those of the client work without the server's extra."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, name = _COMMANDS[cmd_name].split(":")
        try:
            command: click.Command = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            raise click.ClickException(
                f"`stepstate {cmd_name}` needs {error.name}: pip install 'stepstate[server]'"
            ) from error
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Runs a command; what it could not read or write ends it in one line."""
        try:
            done: object = super().invoke(ctx)
            sys.stdout.flush()
        except OSError as error:
            # Click knows what a reader that left means; a server's surprise keeps its traceback.
            if error.errno == errno.EPIPE or ctx.invoked_subcommand == "serve":
                raise
            _drop_output()
            raise click.ClickException(_told(error)) from error
        return done


def _told(error: OSError) -> str:
    return f"{error.filename or 'reading or writing failed'}: {error.strerror or error}"


def _drop_output() -> None:
    """What can't be written is not tried again when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            sys.stdout.close()


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="stepstate")
def main() -> None:
    """Steps trained recurrent networks, session by session."""
