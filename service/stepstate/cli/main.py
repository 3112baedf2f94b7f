"""The group of all commands."""

from __future__ import annotations

import errno
import importlib
import sys
from contextlib import suppress

import click

from stepstate import __version__
from stepstate.cli.options import INTERRUPTED

COMMANDS = {
    "serve": ("stepstate.cli.serve:serve_command", "Serves the models of a folder."),
    "step": ("stepstate.cli.step:step_command", "Steps a session with rows of standard input."),
    "forecast": ("stepstate.cli.forecast:forecast_command", "Prints a session's forecast."),
    "sessions": ("stepstate.cli.sessions:sessions_group", "Lists, shows and moves sessions."),
    "models": ("stepstate.cli.models:models_group", "Prints the loaded models, or writes one."),
    "health": ("stepstate.cli.health:health_command", "Asks whether a server is serving."),
}
"""Where each command is, and what the list of all says of it: to show that imports none of them."""


class _Lazy(click.Group):
    """Imports a command when it is used: those of the client work without the server's extra."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name][0].split(":")
        try:
            command: click.Command = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            raise _lacking(cmd_name, error) from error
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Runs a command; what it could not read or write ends it in one line, Ctrl-C in none."""
        try:
            done: object = super().invoke(ctx)
            sys.stdout.flush()
        except (KeyboardInterrupt, click.Abort):
            ctx.exit(INTERRUPTED)
        except ModuleNotFoundError as error:  # what a command imports as it runs
            raise _lacking(ctx.invoked_subcommand, error) from error
        except OSError as error:
            # Click knows what a reader that left means; a server's surprise keeps its traceback.
            if error.errno == errno.EPIPE or ctx.invoked_subcommand == "serve":
                raise
            _drop_output()
            raise click.ClickException(_told(error)) from error
        return done


def _lacking(command: str | None, error: ModuleNotFoundError) -> click.ClickException:
    return click.ClickException(
        f"`stepstate {command}` needs {error.name}, which comes with the extra `server`: where "
        "`pip install X` installed stepstate, `pip install 'X[server]'` adds it"
    )


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
