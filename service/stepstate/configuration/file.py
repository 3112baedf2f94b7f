"""The configuration file of a server: TOML, checked name by name.

Its tables are

- `[server]`: the settings of `ServerConfig`, by their names;
- `[limits]`: those of `TenantLimits`, for each tenant, and `[limits.together]`: those of
  `RateLimits`, for all tenants together;
- `[tenants.NAME]`: what of `[limits]` is different for one tenant;
- `[models."NAME"]`: the `tenants` that may use a model, where not every tenant may;
- `[[certificates]]`: a `CertificateRule`, which says whose certain client certificates are.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from reprlib import repr as shortened
from types import NoneType
from typing import TypeVar, get_args, get_type_hints

from stepstate.auth import CertificateRule
from stepstate.config import VARIABLES_ONLY, ConfigError, ServerConfig, has_secret
from stepstate.identity import TENANT_GRAMMAR, Scope, is_tenant
from stepstate.tenants import LimitTable, RateLimits, TenantLimits

MAX_FILE_BYTES = 2**20
"""A thousand tenants, each with limits of its own, take a tenth."""
MAX_LISTED = 12
"""Names that an error may list."""
SERVER, LIMITS, TOGETHER, TENANTS = "server", "limits", "together", "tenants"
MODELS, CERTIFICATES = "models", "certificates"
_TABLES = (SERVER, LIMITS, TENANTS, MODELS, CERTIFICATES)
UNLIMITED = "unlimited"
"""A limit of a tenant that has none where the others have one."""
_EXPECTED: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
}

Value = bool | int | float | str | Path
"""Of a setting."""
Table = Mapping[str, object]
Limits = TypeVar("Limits", RateLimits, TenantLimits)


@dataclass(frozen=True, slots=True)
class FileText:
    """Where a file is and what is in it, for errors that say where."""

    name: str
    text: str = ""

    def error(self, key: str, problem: str) -> ConfigError:
        """An error about a key, with its line if that can be told."""
        begins = re.compile(rf"[\s\[]*(?:[^=]*\.)?[\"']?{re.escape(key)}[\"']?\s*[=.\]]")
        lines = [at for at, line in enumerate(self.text.splitlines(), 1) if begins.match(line)]
        where = f"{self.name}, line {lines[0]}" if len(lines) == 1 else self.name
        return ConfigError(f"{where}: {problem}")

    def table(self, name: str, tables: Table) -> Table:
        """One of the tables in a table; if it is not there, an empty one."""
        table = tables.get(name, {})
        if not isinstance(table, dict):
            raise self.error(name, f"{name} is {_shown(table)}, expected a table")
        return table

    def check_name(self, key: str, known: Iterable[str], where: str) -> None:
        """Refuses a name that is not known, with the nearest that is."""
        names = list(known)
        if key in names:
            return
        nearest = difflib.get_close_matches(key[:100], names, n=1)
        if nearest:
            hint = f"did you mean {nearest[0]}?"
        elif len(names) <= MAX_LISTED:
            hint = f"there are {', '.join(names)}"
        else:
            hint = "`stepstate config show` prints all"
        raise self.error(key, f"{key[:100]!r} is no name in {where}: {hint}")

    def check_tenant(self, key: str, name: str) -> None:
        """Refuses what can't be the name of a tenant."""
        if not is_tenant(name):
            raise self.error(key, f"{name[:100]!r} is no tenant: expected {TENANT_GRAMMAR}")

    def checked(self, key: str, value: object, kind: type) -> Value:
        """A value, if it has the type that is expected."""
        if kind is float and type(value) is int:
            return value
        if type(value) is not kind:
            raise self.error(key, f"{key} is {_shown(value)}, expected {_EXPECTED[kind]}")
        assert isinstance(value, bool | int | float | str)
        return value


def _shown(value: object) -> str:
    """A value for an error: short, and without a password."""
    return "a text with a password" if has_secret(str(value)) else shortened(value)


@dataclass(frozen=True, slots=True)
class FileSettings:
    """What a configuration file says; by default nothing, as without a file."""

    source: FileText = FileText("")
    server: Mapping[str, Value] = field(default_factory=dict)
    """By the name of the setting."""
    limits: LimitTable = field(default_factory=LimitTable)
    model_tenants: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """By the name of a model that some tenants only may use."""
    certificates: tuple[CertificateRule, ...] = ()


def read_file(path: str) -> FileSettings:
    """Reads a configuration file.

    Raises:
        ConfigError: it can't be read, or what it says can't be used.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return parse(path, content)


def parse(name: str, content: bytes) -> FileSettings:
    """What a configuration file with this content says.

    Args:
        name: of the file, for errors.
        content: of the file.

    Raises:
        ConfigError: it can't be used.
    """
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{name}: more than {MAX_FILE_BYTES} bytes")
    try:
        text = content.decode()
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: this is no TOML: {error}") from error
    source = FileText(name, text)
    for key, table in tables.items():
        if key in _SETTINGS and not isinstance(table, dict):
            raise source.error(key, f"{key} stands before any table: move it below [{SERVER}]")
        source.check_name(key, _TABLES, "the file")
    return FileSettings(
        source,
        _server(source, source.table(SERVER, tables)),
        _limits(source, tables),
        _model_tenants(source, source.table(MODELS, tables)),
        _certificates(source, tables.get(CERTIFICATES, [])),
    )


_SETTINGS: Mapping[str, Field[Value]] = {one.name: one for one in fields(ServerConfig)}


def _server(source: FileText, table: Table) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for key, value in table.items():
        source.check_name(key, _SETTINGS, f"[{SERVER}]")
        if key in VARIABLES_ONLY:
            raise source.error(key, f"{key} is a secret, {_ways_of_secrets(key)}")
        default = _SETTINGS[key].default
        is_path = isinstance(default, Path)
        given = source.checked(key, value, str if is_path else type(default))
        if isinstance(given, str) and has_secret(given):
            raise source.error(key, f"{key} contains a password, {_ways_of_secrets(key)}")
        found[key] = Path(given) if isinstance(given, str) and is_path else given
    return found


def _limits(source: FileText, tables: Table) -> LimitTable:
    table = source.table(LIMITS, tables)
    own = {key: value for key, value in table.items() if key != TOGETHER}
    defaults = _filled(source, f"[{LIMITS}]", own, TenantLimits())
    rates = source.table(TOGETHER, table)
    together = _filled(source, f"[{LIMITS}.{TOGETHER}]", rates, RateLimits())
    exceptions = source.table(TENANTS, tables)
    for name in exceptions:
        source.check_tenant(name, name)
    return LimitTable(
        defaults=defaults,
        together=together,
        tenants={
            name: _filled(source, f"[{TENANTS}.{name}]", source.table(name, exceptions), defaults)
            for name in exceptions
        },
    )


def _model_tenants(source: FileText, models: Table) -> dict[str, frozenset[str]]:
    found = {}
    for model in models:
        table = source.table(model, models)
        for key in table:
            source.check_name(key, (TENANTS,), f"[{MODELS}.{model}]")
        names = table.get(TENANTS)
        if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            problem = f"tenants of {model} is {_shown(names)}, expected a list of names"
            raise source.error(TENANTS, problem)
        for name in names:
            source.check_tenant(TENANTS, name)
        found[model] = frozenset(names)
    return found


def _certificates(source: FileText, tables: object) -> tuple[CertificateRule, ...]:
    if not isinstance(tables, list) or not all(isinstance(one, dict) for one in tables):
        raise source.error(CERTIFICATES, f"certificates are tables: [[{CERTIFICATES}]]")
    return tuple(_certificate(source, table) for table in tables)


def _certificate(source: FileText, table: Table) -> CertificateRule:
    where = f"[[{CERTIFICATES}]]"
    names = [one.name for one in fields(CertificateRule)]
    for key in table:
        source.check_name(key, names, where)
    match, tenant, identity = (
        str(source.checked(key, table.get(key, ""), str)) for key in ("match", "tenant", "identity")
    )
    scopes = table.get("scopes", [])
    if not isinstance(scopes, list) or not all(one in list(Scope) for one in scopes):
        known = ", ".join(f'"{scope}"' for scope in Scope)
        raise source.error("scopes", f"scopes is {_shown(scopes)}, expected a list of {known}")
    try:
        return CertificateRule(match, tenant, frozenset(map(Scope, scopes)), identity)
    except ValueError as error:
        raise source.error(str(error).partition(" ")[0], f"{where}: {error}") from error


def _filled(source: FileText, where: str, table: Table, base: Limits) -> Limits:
    """Limits with what a table says, and else those of `base`."""
    hints = get_type_hints(type(base))
    said = {}
    for key, value in table.items():
        source.check_name(key, hints, where)
        kinds = get_args(hints[key]) or (hints[key],)
        is_none = value == UNLIMITED and NoneType in kinds
        said[key] = None if is_none else source.checked(key, value, kinds[0])
    try:
        return replace(base, **said)  # type: ignore[arg-type]
    except ValueError as error:
        problem = str(error)
        raise source.error(problem.partition(" ")[0], f"{where}: {problem}") from error


def _ways_of_secrets(variable: str) -> str:
    return (
        "and many may read this file: write the password alone into a file that only the server's "
        f"user can read, and name it as store_password_file, or set STEPSTATE_{variable.upper()}"
    )
