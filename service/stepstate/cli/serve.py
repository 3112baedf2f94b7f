"""`stepstate serve`: runs a server."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from stepstate.cli.common import INTERRUPTED, option
from stepstate.config import VARIABLES_ONLY, ConfigError, ServerConfig, has_secret
from stepstate.errors import StartError
from stepstate.logging import logs_on_stderr
from stepstate.loop import ServerLoop, set_up_grpc

if TYPE_CHECKING:
    from stepstate.server import Server

set_up_grpc()  # before gRPC is imported


def _settings(command: Callable[..., None]) -> Callable[..., None]:
    """An option for every field of `ServerConfig` that may be one."""
    for field in reversed(fields(ServerConfig)):
        if field.name in VARIABLES_ONLY:
            continue
        name = "--" + field.name.replace("_", "-")
        kind = type(field.default)
        command = option(name, field.default, kind, field.metadata["help"])(command)
    return command


@click.command("serve")
@_settings
@option(
    "--log-level",
    "INFO",
    click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"]),
    "Lowest level that is logged.",
)
@option(
    "--log-format",
    "auto",
    click.Choice(["auto", "json", "text"]),
    "auto: text on a terminal, otherwise JSON.",
)
def serve_command(log_level: str, log_format: str, **settings: Any) -> None:
    """Serves the models of a folder. SIGTERM drains and stops; a second signal forces the end.

    SIGINT (Ctrl-C) and SIGHUP (a terminal that closes) also drain. The exit status is 0 after a
    complete drain, and 1 if it was cut short or the server could not start.
    """
    _refuse_visible_password(settings["store"])
    settings |= {name: os.environ.get(f"STEPSTATE_{name.upper()}", "") for name in VARIABLES_ONLY}
    try:
        config = ServerConfig(**settings)
    except ConfigError as error:
        raise click.ClickException(str(error)) from error
    with logs_on_stderr(log_level, log_format), _interruptible_start():
        drained = _run(config)
    sys.exit(0 if drained else 1)


def _refuse_visible_password(store: str) -> None:
    """Every user of the machine can read a command line, for example with `ps`."""
    source = click.get_current_context().get_parameter_source("store")
    if source is click.core.ParameterSource.COMMANDLINE and has_secret(store):
        raise click.ClickException(
            "--store: other users of this machine can read a password on the command line; give it "
            "in a file (--store-password-file FILE) or in the variable STEPSTATE_STORE_PASSWORD, "
            "with --store redis://USER@HOST:PORT/DB, or the whole URL in the variable "
            "STEPSTATE_STORE; and change the password, which was visible"
        )


def _run(config: ServerConfig) -> bool:
    from stepstate.server import serve  # noqa: PLC0415 - torch: --help is answered before

    try:
        with asyncio.Runner(loop_factory=ServerLoop) as runner:
            return runner.run(serve(config, _announce))
    except StartError as error:
        raise click.ClickException(str(error)) from error
    except MemoryError as error:
        raise click.ClickException(
            f"not enough memory for slots={config.slots}: choose fewer ({error})"
        ) from error


@contextmanager
def _interruptible_start() -> Iterator[None]:
    """Lets SIGINT end the process at once until the server installs its own handler.

    Nothing can be lost yet, and an import may swallow KeyboardInterrupt.
    """
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _announce(server: Server) -> None:
    """Prints the chosen addresses, so that port 0 can be used by scripts."""
    models = ", ".join(model.key for model in server.sessions.catalog)
    http = "http" if server.tls is None else "https"
    click.echo(
        f"serving {models} on {server.address}, "
        f"metrics on {http}://{server.metrics_address}/metrics"
    )
