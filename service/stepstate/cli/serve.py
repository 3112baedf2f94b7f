"""`stepstate serve`: runs a server."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from stepstate.cli.common import INTERRUPTED
from stepstate.cli.settings import config_option, loader, settings_options
from stepstate.config import ConfigError
from stepstate.configuration import Configuration, Load
from stepstate.errors import StartError
from stepstate.logging import logs_on_stderr
from stepstate.loop import ServerLoop, set_up_grpc

if TYPE_CHECKING:
    from stepstate.server import Server

set_up_grpc()  # before gRPC is imported


@click.command("serve")
@config_option
@settings_options
def serve_command(config: str, **settings: Any) -> None:
    """Serves the models of a folder. SIGTERM drains and stops; a second signal forces the end.

    SIGINT (Ctrl-C) and SIGHUP (a terminal that closes) also drain. With --config, SIGHUP reloads
    the file unless a terminal closes; so does a change of it. The exit status is 0 after a complete
    drain, and 1 if it was cut short or the server could not start.
    """
    load = loader(config, settings)
    try:
        configuration = load()
    except ConfigError as error:
        raise click.ClickException(str(error)) from error
    server = configuration.server
    with logs_on_stderr(server.log_level, server.log_format), _interruptible_start():
        drained = _run(load, configuration)
    sys.exit(0 if drained else 1)


def _run(load: Load, configuration: Configuration) -> bool:
    from stepstate.server import serve  # noqa: PLC0415 - torch: --help is answered before

    try:
        with asyncio.Runner(loop_factory=ServerLoop) as runner:
            return runner.run(serve(load, configuration, _announce))
    except StartError as error:
        raise click.ClickException(str(error)) from error
    except MemoryError as error:
        raise click.ClickException(
            f"not enough memory for slots={configuration.server.slots}: choose fewer ({error})"
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
