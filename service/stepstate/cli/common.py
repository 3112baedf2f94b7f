"""What commands share: options that are also environment variables, the client, and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stepstate.errors import StepstateError

if TYPE_CHECKING:
    from stepstate.client import Client, Tls

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


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where a command finds its server, and who it is there."""

    target: str
    ca_file: str
    cert_file: str
    key_file: str
    token_file: str
    tenant: str

    def tls(self) -> Tls | None:
        """The files of TLS as a client takes them; None: there are none."""
        from stepstate.client import Tls  # noqa: PLC0415 - `--help` is shown without gRPC

        files = [name or None for name in (self.ca_file, self.cert_file, self.key_file)]
        return Tls(*files) if any(files) else None


_TARGET = click.option(
    "--server",
    "--target",
    "target",
    default="127.0.0.1:50051",
    envvar="STEPSTATE_TARGET",
    show_envvar=True,
    show_default=True,
    help="The server's host:port; grpcs://host:port with TLS.",
)
_SERVER = (
    _TARGET,
    option(
        "--ca-file",
        "",
        str,
        "PEM file with the CA certificates that have signed the server's.",
    ),
    option("--cert-file", "", str, "PEM file with a certificate of yours."),
    option("--key-file", "", str, "PEM file with its key."),
    option("--token-file", "", str, "File with your token."),
    option("--tenant", "", str, "For administrators: on whose sessions to act."),
)


def server_options(command: Callable[..., None]) -> Command:
    """The options that say where the server is; the command gets them as `server`."""

    @wraps(command)
    def with_server(*args: Any, **options: Any) -> None:
        names = [field.name for field in fields(ServerOptions)]
        command(*args, server=ServerOptions(*map(options.pop, names)), **options)

    decorated: Command = with_server
    for one in reversed(_SERVER):
        decorated = one(decorated)
    return decorated


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
def connect(server: ServerOptions) -> Iterator[Client]:
    """A client whose errors end the command with one line."""
    from stepstate.client import Client  # noqa: PLC0415 - `--help` is shown without gRPC

    token = Path(server.token_file) if server.token_file else None
    try:
        with Client(server.target, tls=server.tls(), token=token, tenant=server.tenant) as client:
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
