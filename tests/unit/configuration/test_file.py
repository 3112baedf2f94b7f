from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from stepstate.auth import CertificateRule
from stepstate.config import ConfigError, ServerConfig
from stepstate.configuration.file import MAX_FILE_BYTES, FileSettings, parse, read_file
from stepstate.identity import Scope
from stepstate.tenants import LimitTable, RateLimits, TenantLimits

RULE = "[[certificates]]\nmatch = 'CN:a'\ntenant = 'acme'\nscopes = ['step']\n"


def parsed(text: str) -> FileSettings:
    return parse("stepstate.toml", text.encode())


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parsed(text)
    return str(caught.value)


def test_settings_have_the_types_of_their_fields():
    text = 'models = "here"\nslots = 5\nidle_timeout = 7\nstore_fsync = true\nlisten = "h:1"'
    assert parsed(f"[server]\n{text}").server == {
        "models": Path("here"),
        "slots": 5,
        "idle_timeout": 7,
        "store_fsync": True,
        "listen": "h:1",
    }


def test_a_tenant_has_the_limits_of_all_but_for_its_own():
    limits = parsed(
        "[limits]\nstreams = 3\nrows_per_second = 7\nopen_sessions = 5\n"
        "[limits.together]\nrows_per_second = 100\n"
        "[tenants.acme]\nopen_sessions = 9\nstreams = 'unlimited'\nweight = 2\n"
    ).limits
    assert limits.together == RateLimits(rows_per_second=100)
    assert limits.of("other") == TenantLimits(streams=3, rows_per_second=7, open_sessions=5)
    assert limits.of("acme") == TenantLimits(rows_per_second=7, open_sessions=9, weight=2)


def test_models_may_have_tenants_of_their_own():
    text = '[models.lstm]\ntenants = ["a", "b"]\n[models."x.y"]\ntenants = []'
    assert parsed(text).model_tenants == {"lstm": {"a", "b"}, "x.y": set()}


def test_certificates_are_rules_in_their_order():
    second = RULE.replace("'CN:a'", "'URI:spiffe://x/*'") + "identity = 'meters'\n"
    assert parsed(RULE + second).certificates == (
        CertificateRule("CN:a", "acme", frozenset({Scope.STEP})),
        CertificateRule("URI:spiffe://x/*", "acme", frozenset({Scope.STEP}), "meters"),
    )


def test_an_empty_file_says_nothing():
    assert parsed("").server == {}
    assert parsed("").limits == LimitTable()
    assert parsed("").certificates == ()
    assert parsed("").model_tenants == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\n\nslotz = 3", "line 3: 'slotz' is no name in [server]: did you mean slots?"),
        ("[sever]", "line 1: 'sever' is no name in the file: did you mean server?"),
        ("[server]\nzzz = 1", "line 2: 'zzz' is no name in [server]: `stepstate config show`"),
        ("[zzz]", "line 1: 'zzz' is no name in the file: there are "),
        ("slots = 3", "line 1: slots stands before any table: move it below [server]"),
        ("server = 3", "line 1: server is 3, expected a table"),
        ("[server]\nslots = '3'", "line 2: slots is '3', expected a whole number"),
        ("[server]\nslots = 3.0", "line 2: slots is 3.0, expected a whole number"),
        ("[server]\nslots = true", "line 2: slots is True, expected a whole number"),
        ("[server]\nidle_timeout = 'x'", "line 2: idle_timeout is 'x', expected a number"),
        ("[server]\nidle_timeout = false", "line 2: idle_timeout is False, expected a number"),
        ("[server]\ninsecure = 1", "line 2: insecure is 1, expected true or false"),
        ("[server]\nlisten = 50051", "line 2: listen is 50051, expected a text in quotes"),
        ("[server]\nmodels = ['m']", "line 2: models is ['m'], expected a text in quotes"),
        ("[limits]\nstream = 1", "line 2: 'stream' is no name in [limits]: did you mean streams?"),
        ("[limits]\nstreams = 1.5", "line 2: streams is 1.5, expected a whole number"),
        ("[limits]\nweight = 'unlimited'", "line 2: weight is 'unlimited', expected a number"),
        ("[limits]\nweight = 0", "line 2: [limits]: weight is 0, expected 0.01 to 100"),
        ("[limits.together]\nstreams = 1", "'streams' is no name in [limits.together]: there are"),
        ("limits.together = 1", "line 1: together is 1, expected a table"),
        ("[tenants.a]\nweight = -1", "line 2: [tenants.a]: weight is -1, expected 0.01 to 100"),
        ("[tenants.A]", "line 1: 'A' is no tenant: expected a-z, 0-9"),
        ("[tenants]\na = 1", "line 2: a is 1, expected a table"),
        ("models = 'm'", "line 1: models stands before any table: move it below [server]"),
        ("[models]\nm = 1", "line 2: m is 1, expected a table"),
        ("[models.m]", "tenants of m is None, expected a list of names"),
        ("[models.m]\ntenants = 'a'", "line 2: tenants of m is 'a', expected a list of names"),
        ("[models.m]\ntenants = [1]", "line 2: tenants of m is [1], expected a list of names"),
        ("[models.m]\ntenants = ['A']", "line 2: 'A' is no tenant: expected a-z, 0-9"),
        ("[models.m]\ntenant = ['a']", "line 2: 'tenant' is no name in [models.m]: did you mean t"),
        ("certificates = 1", "line 1: certificates are tables: [[certificates]]"),
        ("[certificates]", "line 1: certificates are tables: [[certificates]]"),
        (f"{RULE}name = 'x'", "line 5: 'name' is no name in [[certificates]]: there are match, "),
        (RULE.replace("'CN:a'", "1"), "line 2: match is 1, expected a text in quotes"),
        (RULE.replace("CN:", ""), "line 2: [[certificates]]: match is 'a', expected URI:"),
        (RULE.replace("'acme'", "'A'"), "line 3: [[certificates]]: tenant is 'A', expected a-z"),
        (RULE.replace("['step']", "'step'"), "line 4: scopes is 'step', expected a list of "),
        (RULE.replace("['step']", "['stop']"), "line 4: scopes is ['stop'], expected a list of "),
        (RULE.replace("['step']", "[[]]"), "line 4: scopes is [[]], expected a list of "),
        (RULE.replace("['step']", "[]"), "line 4: [[certificates]]: scopes are missing"),
        ("[[certificates]]\nmatch = 'CN:a'", "tenant is '', expected a-z"),
        ("[[certificates]]", "match is '', expected URI:"),
        ("[server]\nslots = ", "this is no TOML: Invalid value (at end of document)"),
        ("[server]\nslots = 1\nslots = 2", "this is no TOML: Cannot overwrite a value (at "),
        ("x = " + "[" * 10_000, "this is no TOML: "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(text, message):
    said = refused(text)
    assert said.startswith("stepstate.toml")
    assert message in said


@pytest.mark.parametrize(
    "line",
    [
        "store_password = 'hunter2'",
        "store_password = ['hunter2']",
        "store = 'redis://:hunter2@host'",
        "store = 'redis+sentinel://host/x?sentinel_password=hunter2'",
        "store = ['redis://:hunter2@host']",
        "stor = 'redis://:hunter2@host'",
        "server_name = 'redis://user:hunter2@host'",
        "[server.x]\nurl = 'redis://user:hunter2@host'",
    ],
)
def test_a_secret_is_refused_and_not_repeated(line):
    assert "hunter2" not in refused(f"[server]\n{line}")


@pytest.mark.parametrize("line", ["store_password = 'x'", "store = 'redis://:x@host'"])
def test_a_secret_is_refused_with_the_ways_out(line):
    said = refused(f"[server]\n{line}")
    name = line.split()[0]
    assert "line 2" in said
    assert "store_password_file" in said
    assert f"STEPSTATE_{name.upper()}" in said


@pytest.mark.parametrize("content", [b"\xff", b"\x00", b"[server]\nx = \xff", b"\xef\xbb\xbf\xff"])
def test_what_is_no_text_is_refused(content):
    with pytest.raises(ConfigError, match="this is no TOML"):
        parse("f", content)


def test_a_file_that_is_too_long_or_not_there_is_refused(tmp_path):
    path = tmp_path / "long.toml"
    path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    for where, problem in (
        (path, "more than 1048576 bytes"),
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        ("\0", "null byte"),
    ):
        with pytest.raises(ConfigError, match=problem):
            read_file(str(where))


def test_every_setting_has_a_type_that_a_file_can_have():
    assert {type(one.default) for one in fields(ServerConfig)} == {
        bool,
        int,
        float,
        str,
        type(Path()),
    }
