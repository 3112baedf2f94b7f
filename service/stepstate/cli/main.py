"""The group of all commands."""

from __future__ import annotations

import importlib

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


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="stepstate")
def main() -> None:
    """Steps trained recurrent networks, session by session."""
