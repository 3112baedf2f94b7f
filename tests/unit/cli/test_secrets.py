"""No secret is the value of an option: every user of the machine can read a command line."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click

from stepstate.cli import main

SECRET = re.compile(r"token|password|secret|key|credential")


def commands(group: click.Group, ctx: click.Context) -> Iterator[click.Command]:
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        yield command
        if isinstance(command, click.Group):
            yield from commands(command, ctx)


def test_options_about_secrets_name_files():
    found = {
        option.opts[0]: option.help or ""
        for command in commands(main, click.Context(main))
        for option in command.params
        if isinstance(option, click.Option) and SECRET.search(option.opts[0])
    }
    assert {"--token-file", "--key-file", "--store-password-file", "--tls-key"} <= found.keys()
    wrong = {
        name for name, text in found.items() if not re.search(r"\bfiles?\b", text, re.IGNORECASE)
    }
    assert not wrong
