from __future__ import annotations

import dataclasses

import pytest

from stepstate.config import MAY_BE_ZERO, WEIGHTS, ConfigError, ServerConfig, split_address
from stepstate.engine import Precision

TLS = {"tls_cert": "c", "tls_key": "k", "tls_client_ca": "a"}
NUMBERS = [
    field.name
    for field in dataclasses.fields(ServerConfig)
    if isinstance(field.default, int | float)
]


def test_the_defaults_are_valid():
    ServerConfig()


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), 2**41])
def test_a_number_out_of_range_is_refused_by_name(name, value):
    if value == 0 and name in MAY_BE_ZERO:
        ServerConfig(**{name: value})
        return
    with pytest.raises(ConfigError, match=rf"\b{name} is "):
        ServerConfig(**{name: value})


@pytest.mark.parametrize("name", ["listen", "metrics_listen"])
@pytest.mark.parametrize(
    "address", ["", "localhost", "localhost:", ":80", "localhost:65536", "a b:1", "::1:80", "h:-1"]
)
def test_what_is_no_address_is_refused_by_name(name, address):
    with pytest.raises(ConfigError, match=f"^{name} is "):
        ServerConfig(**{name: address})


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:50051", ("127.0.0.1", 50051)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_addresses_are_split_into_host_and_port(address, parts):
    ServerConfig(listen=address, metrics_listen=address)
    assert split_address(address) == parts


@pytest.mark.parametrize("name", ["durability", "weights", "device"])
def test_what_is_none_of_a_few_words_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"^{name} is 'other', expected "):
        ServerConfig(**{name: "other"})


def test_weights_are_those_that_the_engine_knows():
    assert [precision.value for precision in Precision] == list(WEIGHTS)


def test_weights_with_fewer_bits_are_for_the_cpu():
    with pytest.raises(ConfigError, match="is for the CPU"):
        ServerConfig(device="cuda:0", weights="int8")


def test_a_default_timeout_beyond_the_longest_is_refused():
    with pytest.raises(ConfigError, match="max_idle_timeout"):
        ServerConfig(idle_timeout=11, max_idle_timeout=10)
    ServerConfig(idle_timeout=10, max_idle_timeout=10)


def test_values_can_not_be_changed_later():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ServerConfig().listen = "other:1"


def test_every_setting_has_its_help_and_the_reason_for_its_default():
    for setting in dataclasses.fields(ServerConfig):
        assert setting.metadata["help"]
        assert setting.metadata["reason"]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"tls_cert": "c"}, "tls_cert is given without tls_key"),
        ({"tls_key": "k"}, "tls_key is given without tls_cert"),
        ({"tls_client_ca": "a"}, "tls_client_ca is given without tls_cert"),
        ({"tls_client_auth": "required"}, "required without tls_client_ca"),
        ({"tls_client_auth": "optional"}, "optional without tls_client_ca"),
        ({"tls_client_auth": "other"}, "expected none or optional or required"),
        (
            {**TLS, "tls_client_auth": "optional", "transport": "grpcio"},
            "optional, which the transport grpcio can't do",
        ),
        ({"store_ca_file": "a", "store": "redis://h"}, "store_ca_file is for a store with rediss"),
    ],
)
def test_tls_settings_that_do_not_fit_together_are_refused(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        ServerConfig(**settings)


def test_an_authority_of_clients_means_that_they_need_a_certificate():
    assert ServerConfig().client_auth == "none"
    assert ServerConfig(**TLS).client_auth == "required"
    assert ServerConfig(**TLS, tls_client_auth="none").client_auth == "none"


JWT = {"jwt_issuer": "i", "jwt_audience": "a", "jwt_jwks": "https://i/keys"}


@pytest.mark.parametrize("missing", JWT)
def test_jwts_need_an_issuer_an_audience_and_keys(missing):
    with pytest.raises(ConfigError, match=f"^without {missing}: JWTs need"):
        ServerConfig(**{**JWT, missing: ""})
    ServerConfig(**JWT, jwt_leeway=0.0)


@pytest.mark.parametrize("url", ["http://i/keys", "file:///keys", "https://a:b@i/keys"])
def test_keys_come_from_a_file_or_a_url_that_nobody_can_change_on_the_way(url):
    with pytest.raises(ConfigError, match="a file, or an https URL without a password"):
        ServerConfig(**{**JWT, "jwt_jwks": url})
