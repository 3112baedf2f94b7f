"""The group of all commands."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from contextlib import suppress

import click

from stepstate import __version__
from stepstate.cli.common import INTERRUPTED

# Commands say in words what is wrong; gRPC, which reads this when it is imported, would log each
# failed handshake.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

COMMANDS = {
    "serve": ("stepstate.cli.serve:serve_command", "Serves the models of a folder."),
    "config": ("stepstate.cli.config:config_group", "Checks and shows the settings of a server."),
    "step": ("stepstate.cli.step:step_command", "Steps a session with rows of standard input."),
    "forecast": ("stepstate.cli.forecast:forecast_command", "Prints a session's forecast."),
    "sessions": ("stepstate.cli.sessions:sessions_group", "Lists, shows and moves sessions."),
    "models": ("stepstate.cli.models:models_group", "Prints the loaded models, or writes one."),
    "tokens": ("stepstate.cli.tokens:tokens_group", "Makes, lists and revokes bearer tokens."),
    "tenants": ("stepstate.cli.tenants:tenants_command", "Prints what tenants use, and may use."),
    "health": ("stepstate.cli.health:health_command", "Asks whether a server is serving."),
}
"""Where each command is, and its line in the list, which is shown without importing it."""


class _LazyGroup(click.Group):
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
            raise _missing_extra(cmd_name, error) from error
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Runs a command; a failed read or write ends it with one line, Ctrl-C with none."""
        try:
            result: object = super().invoke(ctx)
            sys.stdout.flush()
        except (KeyboardInterrupt, click.Abort):
            ctx.exit(INTERRUPTED)
        except ModuleNotFoundError as error:  # what a command imports as it runs
            raise _missing_extra(ctx.invoked_subcommand, error) from error
        except OSError as error:
            # Click handles a closed pipe; an unexpected error of a server keeps its traceback.
            if error.errno == errno.EPIPE or ctx.invoked_subcommand == "serve":
                raise
            _drop_output()
            where = error.filename or "reading or writing failed"
            raise click.ClickException(f"{where}: {error.strerror or error}") from error
        return result


def _missing_extra(command: str | None, error: ModuleNotFoundError) -> click.ClickException:
    return click.ClickException(
        f"`stepstate {command}` needs {error.name}, which comes with the extra `server`: where "
        "`pip install X` installed stepstate, `pip install 'X[server]'` adds it"
    )


def _drop_output() -> None:
    """Closes standard output, so that Python does not try to write the rest as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            sys.stdout.close()


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="stepstate")
def main() -> None:
    """Steps trained recurrent networks, session by session."""
