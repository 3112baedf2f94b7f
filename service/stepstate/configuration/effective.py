"""The configuration of a server, from all that says something: what it is, and why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path

from stepstate.config import VARIABLES_ONLY, ConfigError, ServerConfig, has_secret
from stepstate.configuration.file import SERVER, FileSettings, Value


class Origin(StrEnum):
    """Where a setting's value is from; an earlier one wins."""

    OPTION = "option"
    VARIABLE = "variable"
    FILE = "file"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Given:
    """What an option or a variable says."""

    value: Value
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """All settings of a server, and where each is from."""

    server: ServerConfig
    origins: Mapping[str, Origin]
    """By the name of the setting."""


def resolve(given: Mapping[str, Given], file: FileSettings) -> Configuration:
    """The configuration by options and variables, a file, and defaults, in this order.

    Raises:
        ConfigError: a value can't be used.
    """
    origins = dict.fromkeys((one.name for one in fields(ServerConfig)), Origin.DEFAULT)
    origins |= dict.fromkeys(file.server, Origin.FILE)
    origins |= {name: one.origin for name, one in given.items()}
    values = {**file.server, **{name: one.value for name, one in given.items()}}
    try:
        server = ServerConfig(**values)  # type: ignore[arg-type]
    except ConfigError as error:
        name = str(error).partition(" ")[0].rstrip(":")
        if origins.get(name) is Origin.FILE:
            raise file.source.error(name, str(error)) from error
        raise
    return Configuration(server=server, origins=origins)


def as_toml(configuration: Configuration) -> str:
    """A configuration file that says the same, with the origin of each setting; without secrets."""
    return "\n".join([f"[{SERVER}]", *_settings(configuration)]) + "\n"


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
            yield f"{name} = {toml_value(value)}  # {origin}"


def toml_value(value: object) -> str:
    """A value as TOML writes it: as JSON does, which has no escape for DEL."""
    if isinstance(value, Path):
        value = str(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
