from __future__ import annotations

import socket
from dataclasses import replace

import pytest

from stepstate.config import ServerConfig
from stepstate.configuration import check_exposure
from stepstate.configuration.exposure import is_local
from stepstate.errors import InsecureAddress, ListenError

LOCAL = ["127.0.0.1:1", "127.8.9.1:0", "[::1]:1", "localhost:1", "[::ffff:127.0.0.1]:1"]
REACHED = [
    "0.0.0.0:1",
    "[::]:1",
    "192.0.2.1:1",
    "[2001:db8::1]:1",
    "[::ffff:192.0.2.1]:1",
]


@pytest.mark.parametrize("address", LOCAL)
def test_on_loopback_nothing_is_needed(address):
    check_exposure(ServerConfig(listen=address), identities=False)


def test_the_metrics_port_is_a_switch_of_its_own():
    check_exposure(ServerConfig(metrics_listen="0.0.0.0:1"), identities=False)


@pytest.mark.parametrize("address", REACHED)
@pytest.mark.parametrize(("tls", "identities"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_elsewhere_both_are_needed_or_the_risk_is_named(address, tls, identities):
    config = ServerConfig(listen=address, tls_cert="cert" * tls, tls_key="key" * tls)
    check_exposure(replace(config, insecure=True), identities=identities)
    if tls and identities:
        check_exposure(config, identities=identities)
        return
    with pytest.raises(InsecureAddress) as caught:
        check_exposure(config, identities=identities)
    said = str(caught.value)
    assert said.startswith(f"--listen {address}: ")
    assert ("no TLS" in said, "no identities" in said) == (not tls, not identities)
    for way in ("--tls-cert", "--tokens-file", "behind a proxy", "--insecure"):
        assert way in said


def test_a_name_is_local_if_all_its_addresses_are(monkeypatch):
    def resolved(*addresses: str) -> bool:
        found = [(socket.AF_INET, 0, 0, "", (one, 0)) for one in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        return is_local("name:1")

    assert resolved("127.0.0.1", "::1")
    assert not resolved("127.0.0.1", "192.0.2.1")
    assert not resolved("192.0.2.1")


@pytest.mark.parametrize("name", ["nowhere.invalid:1", "x" * 300 + ":1", "a..b:1"])
def test_a_name_without_an_address_can_not_be_listened_on(name):
    with pytest.raises(ListenError):
        is_local(name)
