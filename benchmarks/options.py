"""The options of the commands: the fields of a benchmark's plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field, fields
from enum import Enum
from typing import Any

import click

MAX_SESSIONS = 10_000
"""What a server with default settings keeps in memory."""
MAX_IDLE = 10_000_000
"""The most sessions that a server can be configured to keep in memory."""
MAX_RATE = 10_000_000
"""More than any machine can do."""


def option(default: object, kind: object, text: str, *, name: str = "") -> Any:
    """A field of a plan that is an option of its command.

    Args:
        default: as it is given on the command line.
        kind: what click calls its type.
        text: for `--help`.
        name: of the option, if it is not that of the field.
    """
    return field(metadata={"name": name, "default": default, "type": kind, "help": text})


def options_of(plan: type) -> list[click.Parameter]:
    """The options of a command, in the order of the fields."""
    return [
        click.Option(
            [metadata.pop("name") or f"--{one.name.replace('_', '-')}", one.name],
            show_default=True,
            **metadata,
        )
        for one in fields(plan)
        if (metadata := dict(one.metadata))
    ]


def command_line(context: click.Context) -> str:
    """The command with all its options, to measure the same again; without passwords."""
    words = [context.command_path]
    for parameter in context.command.params:
        value = context.params[parameter.name or ""]
        if parameter.name != "json" and value not in ("", (), None):
            words.append(f"{parameter.opts[0]} {_text_of(value)}")
    return " ".join(words)


def without_password(url: str) -> str:
    """A URL as it may be shown."""
    scheme, separator, rest = url.partition("://")
    return scheme + separator + rest.rpartition("@")[2]


def _text_of(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_text_of, value))
    if isinstance(value, Enum):
        return str(value.value)
    return f"{value:g}" if isinstance(value, float) else without_password(str(value))


def whole_numbers(largest: int) -> Callable[[str], tuple[int, ...]]:
    """A type for whole numbers separated by commas."""

    def counts(value: str) -> tuple[int, ...]:
        try:
            found = tuple(int(part) for part in value.split(","))
        except ValueError:
            found = ()
        if not found or not all(1 <= count <= largest for count in found):
            raise click.BadParameter(
                f"{value!r}: expected whole numbers from 1 to {largest:,} separated by commas, "
                "such as 1,16,64"
            )
        return found

    return counts


def rates(value: str) -> tuple[float, ...]:
    """A type for steps per second, separated by commas; empty means a closed loop."""
    try:
        found = tuple(float(part) for part in value.split(",") if value)
    except ValueError:
        found = (0.0,)
    if not all(0.1 <= rate <= MAX_RATE for rate in found):
        raise click.BadParameter(
            f"{value!r}: expected steps a second from 0.1 to {MAX_RATE:,} separated by commas"
        )
    return found


def some_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A type for some of the known names, separated by commas."""

    def names(value: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(value.split(",")))
        if not set(found) <= set(known):
            raise click.BadParameter(f"{value!r}: expected some of {','.join(known)}")
        return found

    return names
