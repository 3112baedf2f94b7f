"""The settings of a server as options and variables, and the configuration that they make."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from stepstate.cli.common import Command, option
from stepstate.config import VARIABLES_ONLY, ServerConfig, has_secret
from stepstate.configuration import (
    Configuration,
    FileSettings,
    GivenValue,
    SettingOrigin,
    read_file,
    resolve,
)

_ORIGINS = {
    ParameterSource.COMMANDLINE: SettingOrigin.OPTION,
    ParameterSource.ENVIRONMENT: SettingOrigin.VARIABLE,
}

_PATH = click.Path(path_type=Path)


def settings_options(command: Command, *, hidden: bool = False) -> Command:
    """An option for every setting that may be one.

    Args:
        command: gets them.
        hidden: whether its help leaves them out.
    """
    for one in reversed(fields(ServerConfig)):
        if one.name not in VARIABLES_ONLY:
            name, text = "--" + one.name.replace("_", "-"), one.metadata["help"]
            kind = _PATH if isinstance(one.default, Path) else type(one.default)
            command = option(name, one.default, kind, text, hidden=hidden)(command)
    return command


config_option = option(
    "--config", "", str, "A TOML file with settings. Options and variables win over it."
)


def loader(config: str, settings: Mapping[str, Any]) -> Callable[[], Configuration]:
    """What makes the configuration of the command that runs.

    Args:
        config: the configuration file; empty: none.
        settings: the values of its other options.

    Raises:
        click.ClickException: there is a secret on the command line.
    """
    given = _given(settings)
    return partial(_load, given, config)


def _load(given: Mapping[str, GivenValue], config: str) -> Configuration:
    return resolve(given, read_file(config) if config else FileSettings())


def _given(settings: Mapping[str, Any]) -> dict[str, GivenValue]:
    """What options and variables say; not what they leave open."""
    context = click.get_current_context()
    given = {}
    for name, value in settings.items():
        source = context.get_parameter_source(name)
        if source in _ORIGINS:
            _refuse_visible_secret(name, value, _ORIGINS[source])
            given[name] = GivenValue(value, _ORIGINS[source])
    for name in VARIABLES_ONLY:
        value = os.environ.get(f"STEPSTATE_{name.upper()}", "")
        if value:
            given[name] = GivenValue(value, SettingOrigin.VARIABLE)
    return given


def _refuse_visible_secret(name: str, value: object, origin: SettingOrigin) -> None:
    """Every user of the machine can read a command line, for example with `ps`."""
    if origin is SettingOrigin.OPTION and isinstance(value, str) and has_secret(value):
        other = (
            "give it in a file (--store-password-file FILE) or in the variable "
            "STEPSTATE_STORE_PASSWORD, with --store redis://USER@HOST:PORT/DB, or the whole URL in "
            "the variable STEPSTATE_STORE"
            if name == "store"
            else f"give the whole URL in the variable STEPSTATE_{name.upper()}"
        )
        raise click.ClickException(
            f"--{name.replace('_', '-')}: other users of this machine can read a password on the "
            f"command line; {other}; and change the password, which was visible"
        )
