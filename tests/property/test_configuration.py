"""What holds for every configuration file, and for every mix of options, variables and files."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import patch

import click
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from stepstate.cli.settings import loader, settings_options
from stepstate.config import VARIABLES_ONLY, ConfigError, ServerConfig
from stepstate.configuration import Configuration, GivenValue, SettingOrigin, as_toml, resolve
from stepstate.configuration.file import parse

SETTINGS = {one.name: one.default for one in fields(ServerConfig)}

plain = st.one_of(
    st.booleans().map(lambda value: str(value).lower()),
    st.integers().map(str),
    st.floats().map(str),
    st.text(alphabet='ab/:@"\\ \n', max_size=8),
    st.sampled_from(["'a'", '"127.0.0.1:1"', "2020-01-01", "12:00:00", "[", "{", "1e400", "'''x"]),
)
written = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda all_: f"[{', '.join(all_)}]")
        | st.tuples(st.sampled_from(["a", "slots", '"b c"']), inner).map(
            lambda one: "{" + "=".join(one) + "}"
        )
    ),
    max_leaves=4,
)
keys = st.sampled_from([*SETTINGS, "tenants", "weight", "rows_per_second", "x", "a.b", '"c d"'])
lines = st.one_of(
    st.tuples(keys, written).map(" = ".join),
    st.sampled_from(
        [
            "[server]",
            "[limits]",
            "[limits.together]",
            "[tenants.a]",
            '[models."m"]',
            "[x]",
            "[[certificates]]",
            "[server.slots]",
            "server = 1",
            "limits = 1",
            "models = 'm'",
        ]
    ),
)
files = st.lists(lines, max_size=6).map(lambda all_: "\n".join(all_).encode()) | st.binary()


@given(files)
@example(b"[server]\nslots = 1\n[server.slots]\n")
@example(b'server.slots = 3\nserver.listen = "a:1"\n')
@example(b"x." * 5000 + b"y = 1")
def test_any_file_is_a_configuration_or_a_configuration_error(content: bytes):
    with suppress(ConfigError):
        resolve({}, parse("f", content))


valid = st.fixed_dictionaries(
    {},
    optional={
        "models": st.text(min_size=1).filter(lambda text: "\0" not in text).map(Path),
        "slots": st.integers(1, 10**6),
        "snapshot_interval": st.floats(0.001, 1e9),
        "store_fsync": st.booleans(),
        "server_name": st.text(),
        "engine": st.sampled_from(["torch", "onnxruntime"]),
        "listen": st.sampled_from(["[::1]:1", "localhost:65535"]),
    },
)


limits = st.fixed_dictionaries(
    {},
    optional={
        "streams": st.just("unlimited") | st.integers(0, 10**9),
        "rows_per_second": st.floats(0.001, 1e9),
        "weight": st.floats(0.01, 100),
    },
)
tenants = st.dictionaries(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,5}", fullmatch=True), limits)


def quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False).replace("\x7f", "\\u007f")


models = st.dictionaries(st.text(min_size=1, max_size=5), st.lists(st.sampled_from("abc")))


@given(valid, limits, tenants, models)
@example(
    {"server_name": "".join(map(chr, range(0x20))) + "\x7f\"\\'\u2028"}, {}, {}, {'a"\x7f': ["b"]}
)
def test_what_is_shown_is_a_file_that_says_the_same(settings, defaults, exceptions, models):
    said = {name: GivenValue(value, SettingOrigin.OPTION) for name, value in settings.items()}
    tables = [f"[limits]\n{_lines(defaults)}"]
    tables += [f'[tenants."{name}"]\n{_lines(own)}' for name, own in exceptions.items()]
    tables += [f"[models.{quoted(name)}]\ntenants = {own}" for name, own in models.items()]
    made = resolve(said, parse("f", "\n".join(tables).encode()))
    again = resolve({}, parse("shown", as_toml(made).encode()))
    assert replace(again, origins={}, file="") == replace(made, origins={}, file="")
    assert set(again.origins.values()) <= {SettingOrigin.FILE, SettingOrigin.DEFAULT}
    assert as_toml(resolve({}, parse("shown", as_toml(again).encode()))) == as_toml(again)


def _lines(table: dict[str, object]) -> str:
    return "\n".join(f"{name} = {value!r}" for name, value in table.items())


NOTHING = parse("none", b"")
PRECEDENCE = {
    "slots": (1, 2, 3),
    "listen": ("a:1", "b:2", "c:3"),
    "idle_timeout": (1.5, 2.5, 3.5),
    "store_fsync": (True, False, True),
    "models": (Path("a"), Path("b"), Path("c")),
}
"""By setting, what its option, its variable and the file say if they say something."""


@given(st.dictionaries(st.sampled_from(list(PRECEDENCE)), st.sets(st.integers(0, 2))))
def test_an_option_wins_over_a_variable_and_that_over_the_file(sources):
    options, variables, file = [], {}, ["[server]"]
    for name, said in sources.items():
        option, variable, written_value = PRECEDENCE[name]
        if 0 in said:
            options += [f"--{name.replace('_', '-')}", str(option)]
        if 1 in said:
            variables[f"STEPSTATE_{name.upper()}"] = str(variable)
        if 2 in said:
            text = str(written_value).lower()
            is_text = isinstance(written_value, str | Path)
            file.append(f"{name} = {text!r}" if is_text else f"{name} = {text}")
    made = _by_command(options, variables, "\n".join(file).encode())
    for name, default in SETTINGS.items():
        first = min(sources.get(name, ()), default=3)
        expected = default if first == 3 else PRECEDENCE[name][first]
        assert getattr(made.server, name) == expected
        assert made.origins[name] is list(SettingOrigin)[first]


def _by_command(options: list[str], variables: dict[str, str], file: bytes) -> Configuration:
    """The configuration of a command that has the settings' options."""
    made = []

    def run(**settings: object) -> None:
        with patch("stepstate.cli.settings.read_file", lambda _: parse("f", file)):
            made.append(loader("f", settings)())

    command = click.command()(settings_options(run))
    done = CliRunner(env=variables).invoke(command, options, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return made[0]


def test_every_setting_is_an_option_or_a_variable():
    names = {one.name for one in click.command()(settings_options(lambda **_: None)).params}
    assert names | set(VARIABLES_ONLY) == set(SETTINGS)
