"""What commands share: options that are also environment variables, the client, and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from stepstate.errors import StepstateError

if TYPE_CHECKING:
    from stepstate.client import Client

Command = Callable[..., None]

INTERRUPTED = 128 + 2
"""The exit status of a command that Ctrl-C ends, as shells give it (SIGINT is 2)."""
_VARIABLES = {"--version": "STEPSTATE_MODEL_VERSION"}
"""Images use STEPSTATE_VERSION for the version of the software."""


def option(
    name: str, default: object, kind: object, text: str, *, hidden: bool = False
) -> Callable[[Command], Command]:
    """The option --some-name, which the variable STEPSTATE_SOME_NAME also sets.

    Args:
        name: with its dashes.
        default: its value if neither sets it.
        kind: its type in click; the option of a bool without a value means true.
        text: for --help.
        hidden: whether --help leaves it out.
    """
    variable = "STEPSTATE_" + name.removeprefix("--").replace("-", "_").upper()
    decorator = partial(
        click.option,
        name,
        type=kind,
        default=default,
        help=text,
        envvar=_VARIABLES.get(name, variable),
        show_envvar=True,
        show_default=True,
        hidden=hidden,
    )
    return decorator(is_flag=False, flag_value=True) if kind is bool else decorator()


server_option = option("--server", "127.0.0.1:50051", str, "The server's host:port.")


def format_options(command: Command) -> Command:
    """The options that say how a file of rows is read."""
    command = click.option(
        "--time-column",
        default="",
        help="The column with the times. Default: time, timestamp, datetime or date, if any.",
    )(command)
    return click.option(
        "--delimiter",
        type=click.Choice([",", ";", "tab"]),
        callback=lambda _context, _option, value: {"tab": "\t"}.get(value, value or ""),
        help="Separates cells. Default: found from the first line. With ; and tab, numbers may "
        "have a decimal comma.",
    )(command)


@contextmanager
def connect(server: str) -> Iterator[Client]:
    """A client whose errors end the command with one line."""
    from stepstate.client import Client  # noqa: PLC0415 - `--help` is shown without gRPC

    try:
        with Client(server) as client:
            yield client
    except StepstateError as error:
        raise click.ClickException(str(error)) from error


def without_nan(value: Any) -> Any:
    """A value for JSON, which has no NaN: null replaces it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return value


def short(value: float) -> str:
    """A float32 with the digits that it has; empty for NaN."""
    return "" if math.isnan(value) else f"{value:.7g}"
