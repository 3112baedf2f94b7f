"""The configuration of a server, from all that says something: what it is, and why."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path

from stepstate.auth import CertificateRule
from stepstate.config import VARIABLES_ONLY, ConfigError, ServerConfig, has_secret
from stepstate.configuration.file import (
    CERTIFICATES,
    LIMITS,
    MODELS,
    SERVER,
    TENANTS,
    TOGETHER,
    UNLIMITED,
    FileSettings,
    Value,
)
from stepstate.tenants import LimitTable, RateLimits, TenantLimits


class SettingOrigin(StrEnum):
    """Where a setting's value is from; an earlier one wins."""

    OPTION = "option"
    VARIABLE = "variable"
    FILE = "file"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class GivenValue:
    """What an option or a variable says."""

    value: Value
    origin: SettingOrigin


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """All settings of a server, and where each is from."""

    server: ServerConfig
    origins: Mapping[str, SettingOrigin]
    """By the name of the setting."""
    limits: LimitTable
    model_tenants: Mapping[str, frozenset[str]]
    """By the name of a model that some tenants only may use."""
    certificates: tuple[CertificateRule, ...]
    """Like limits and models' tenants, they can be set in the file only."""
    file: str
    """Its name; empty: there is none."""

    @property
    def identities(self) -> bool:
        """See `has_identities`."""
        return has_identities(self.server, self.certificates)


def has_identities(config: ServerConfig, certificates: Sequence[CertificateRule]) -> bool:
    """Whether callers have to prove who they are."""
    return bool(config.tokens_file or config.jwt_jwks or certificates)


Load = Callable[[], Configuration]
"""Reads the file again, and makes the configuration of it and of the same options and variables."""


def resolve(given: Mapping[str, GivenValue], file: FileSettings) -> Configuration:
    """The configuration by options and variables, a file, and defaults, in this order.

    Raises:
        ConfigError: a value can't be used.
    """
    origins = dict.fromkeys((one.name for one in fields(ServerConfig)), SettingOrigin.DEFAULT)
    origins |= dict.fromkeys(file.server, SettingOrigin.FILE)
    origins |= {name: one.origin for name, one in given.items()}
    values = {**file.server, **{name: one.value for name, one in given.items()}}
    try:
        server = ServerConfig(**values)  # type: ignore[arg-type]
    except ConfigError as error:
        name = str(error).partition(" ")[0].rstrip(":")
        if origins.get(name) is SettingOrigin.FILE:
            raise file.source.error(name, str(error)) from error
        raise
    if file.certificates and server.client_auth == "none":
        problem = "[[certificates]] are for clients that show one: set tls_client_ca, too"
        raise file.source.error(CERTIFICATES, problem)
    return Configuration(
        server=server,
        origins=origins,
        limits=file.limits,
        model_tenants=file.model_tenants,
        certificates=file.certificates,
        file=file.source.name,
    )


def as_toml(configuration: Configuration) -> str:
    """A configuration file that says the same, with the origin of each setting; without secrets."""
    limits = configuration.limits
    lines = [f"[{SERVER}]", *_settings(configuration)]
    lines += ["", f"[{LIMITS}]", *_limits(limits.defaults, TenantLimits())]
    lines += ["", f"[{LIMITS}.{TOGETHER}]", *_limits(limits.together, RateLimits())]
    for name, exception in limits.tenants.items():
        lines += ["", f"[{TENANTS}.{_toml(name)}]", *_limits(exception, limits.defaults)]
    for model, allowed in configuration.model_tenants.items():
        lines += ["", f"[{MODELS}.{_toml(model)}]", f"{TENANTS} = {_toml(sorted(allowed))}"]
    for rule in configuration.certificates:
        lines += ["", f"[[{CERTIFICATES}]]"]
        lines += [f"{name} = {_toml(getattr(rule, name))}" for name in ("match", "tenant")]
        lines += [f"scopes = {_toml(sorted(rule.scopes))}", f"identity = {_toml(rule.identity)}"]
    return "\n".join(lines) + "\n"


def _settings(configuration: Configuration) -> Iterator[str]:
    for name, origin in configuration.origins.items():
        value: Value = getattr(configuration.server, name)
        variable = f"STEPSTATE_{name.upper()}"
        if name in VARIABLES_ONLY:
            if value:
                yield f"# {name}: a secret, from {variable}"
        elif isinstance(value, str) and has_secret(value):
            yield f"# {name}: contains a password, from {variable}"
        else:
            yield f"{name} = {_toml(value)}  # {origin}"


def _limits(limits: RateLimits, base: RateLimits) -> Iterator[str]:
    for one in fields(limits):
        value = getattr(limits, one.name)
        if value != getattr(base, one.name):
            yield f"{one.name} = {_toml(UNLIMITED if value is None else value)}"


def _toml(value: object) -> str:
    """A value as TOML writes it: as JSON does, which has no escape for DEL."""
    if isinstance(value, Path):
        value = str(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
