"""What would stop a server before it listens, found without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from stepstate.auth import TokenFile
from stepstate.config import ServerConfig
from stepstate.configuration.effective import Configuration
from stepstate.configuration.exposure import check_exposure
from stepstate.errors import StartError
from stepstate.models import load_catalog
from stepstate.stores import read_password
from stepstate.transport import read_keys


def problems(configuration: Configuration) -> list[str]:
    """What would stop a server with this configuration; it reads the files that are named."""
    found = []
    for check in _checks(configuration.server):
        try:
            check()
        except StartError as error:
            found.append(str(error))
    return found


def _checks(config: ServerConfig) -> Iterator[Callable[[], object]]:
    yield lambda: check_exposure(config, tls=False, identities=bool(config.tokens_file))
    yield lambda: load_catalog(config.models, skip_invalid=config.skip_invalid_models)
    yield lambda: read_keys(config.snapshot_key)
    if config.tokens_file:
        yield lambda: TokenFile(config.tokens_file)
    if config.store_password_file:
        yield lambda: read_password(config.store_password_file)
