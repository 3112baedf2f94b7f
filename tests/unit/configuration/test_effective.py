from __future__ import annotations

import pytest

from stepstate.config import ConfigError
from stepstate.configuration import GivenValue, SettingOrigin, as_toml, resolve
from stepstate.configuration.file import parse

FILE = parse("f.toml", b"[server]\nslots = 3\nreplay_rows = 4\nidle_timeout = 9")
OPTION = GivenValue(5, SettingOrigin.OPTION)


def test_an_option_wins_over_the_file_and_that_over_the_default():
    made = resolve({"slots": OPTION}, FILE)
    assert (made.server.slots, made.server.replay_rows, made.server.chunk_rows) == (5, 4, 96)
    found = [made.origins[name] for name in ("slots", "replay_rows", "chunk_rows")]
    assert found == [SettingOrigin.OPTION, SettingOrigin.FILE, SettingOrigin.DEFAULT]


def test_a_bad_value_of_the_file_is_refused_with_its_line_and_another_without():
    with pytest.raises(ConfigError, match=r"^f\.toml, line 2: slots is 0, expected more than 0"):
        resolve({}, parse("f.toml", b"[server]\nslots = 0"))
    with pytest.raises(ConfigError, match=r"^slots is 0, expected more than 0"):
        resolve({"slots": GivenValue(0, SettingOrigin.OPTION)}, FILE)


def test_secrets_are_not_shown():
    given = {
        "store": GivenValue("redis://user:hunter2@host", SettingOrigin.VARIABLE),
        "server_name": GivenValue("a", SettingOrigin.OPTION),
    }
    text = as_toml(resolve(given, FILE))
    assert "hunter2" not in text
    assert "# store: contains a password, from STEPSTATE_STORE\n" in text
    alone = {
        "store": GivenValue("redis://h", SettingOrigin.FILE),
        "store_password": GivenValue("hunter2", SettingOrigin.VARIABLE),
    }
    text = as_toml(resolve(alone, FILE))
    assert "hunter2" not in text
    assert "# store_password: a secret, from STEPSTATE_STORE_PASSWORD\n" in text
    assert 'store = "redis://h"  # file\n' in text


def test_certificates_need_an_authority_and_are_shown_as_they_were_written():
    rule = "[[certificates]]\nmatch = 'CN:a'\ntenant = 'acme'\nscopes = ['read', 'step']\n"
    with pytest.raises(ConfigError, match=r"^f, line 1: \[\[certificates\]\] are for clients"):
        resolve({}, parse("f", rule.encode()))
    server = "[server]\ntls_cert = 'c'\ntls_key = 'k'\ntls_client_ca = 'a'\n"
    made = resolve({}, parse("f", (server + rule).encode()))
    assert len(made.certificates) == 1
    again = resolve({}, parse("f", as_toml(made).encode()))
    assert again.certificates == made.certificates
