"""The group of all commands."""

from __future__ import annotations

import click

from stepstate import __version__
from stepstate.cli.serve import serve_command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="stepstate")
def main() -> None:
    """Steps trained recurrent networks, session by session."""


main.add_command(serve_command)
