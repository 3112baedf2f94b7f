"""What would stop a server before it listens, or a reload, found without doing either."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from stepstate.auth import KeyFile, KeyRing, TokenFile
from stepstate.config import ServerConfig
from stepstate.configuration.effective import Configuration
from stepstate.configuration.exposure import check_exposure
from stepstate.engine import Runtime, check_accelerator, check_runtime
from stepstate.errors import AuditLogError, StartError
from stepstate.models import ModelAccess, check_access, load_catalog
from stepstate.stores import read_password
from stepstate.stores.redis.factory import check_authorities
from stepstate.tls import ClientAuth, TlsFiles, load_tls
from stepstate.transport import read_keys

Check = Callable[[], object]
"""Raises `StartError` with the problem, if there is one."""


def problems(configuration: Configuration) -> list[str]:
    """What would stop a server with this configuration; it reads the files that are named."""
    return _problems((*_of_reload(configuration), *_of_start(configuration.server)))


def problems_of_reload(configuration: Configuration) -> list[str]:
    """What speaks against putting a configuration into use; it reads files that are read again."""
    return _problems(_of_reload(configuration))


def tls_files(config: ServerConfig) -> TlsFiles | None:
    """The files of TLS; None: the server speaks plain text."""
    if not config.tls_cert:
        return None
    authority = Path(config.tls_client_ca) if config.tls_client_ca else None
    client_auth = ClientAuth(config.client_auth)
    return TlsFiles(Path(config.tls_cert), Path(config.tls_key), authority, client_auth)


def _problems(checks: Iterable[Check]) -> list[str]:
    found = []
    for check in checks:
        try:
            check()
        except StartError as error:
            found.append(str(error))
    return found


def _of_reload(configuration: Configuration) -> Iterator[Check]:
    config = configuration.server
    yield lambda: check_exposure(config, identities=configuration.identities)
    if configuration.model_tenants:
        access = ModelAccess(configuration.model_tenants)
        yield lambda: check_access(config.models, access)
    files = tls_files(config)
    if files is not None:
        yield lambda: load_tls(files)
    if config.tokens_file:
        yield lambda: TokenFile(config.tokens_file)
    if config.jwt_jwks and "://" not in config.jwt_jwks:
        yield lambda: asyncio.run(KeyRing(KeyFile(config.jwt_jwks)).read_now())


def _of_start(config: ServerConfig) -> Iterator[Check]:
    if config.device != "cpu":
        yield lambda: check_accelerator(config.device)
    yield lambda: check_runtime(Runtime(config.engine))
    yield lambda: load_catalog(config.models, skip_invalid=config.skip_invalid_models)
    yield lambda: read_keys(config.snapshot_key)
    if config.store_password_file:
        yield lambda: read_password(config.store_password_file)
    if config.store_ca_file:
        yield lambda: check_authorities(config.store_ca_file)
    if config.audit_log not in {"", "-"}:
        yield lambda: _check_audit_log(config.audit_log)


def _check_audit_log(file: str) -> None:
    """It makes no file where there is none yet."""
    path = Path(file)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise AuditLogError(file, "there is no such folder, or no right to write there")
