"""What the arguments of a client and its environment mean: TLS, and where its token may go."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import pytest

from stepstate.client import Client, Tls
from stepstate.client.security import TokenFileReader, endpoint_of
from stepstate.errors import InvalidField
from tests.certificates import Authority, Certificate

TOKEN = "stepstate_of-this-test"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's own."""
    for name in ("TARGET", "TOKEN_FILE", "CA_FILE", "CERT_FILE", "KEY_FILE"):
        monkeypatch.delenv(f"STEPSTATE_{name}", raising=False)


@pytest.fixture
def tls(authority: Authority, certificate: Certificate) -> Tls:
    return Tls(authority.file, certificate.file, certificate.key)


@pytest.mark.parametrize(
    ("target", "tls", "found", "is_tls"),
    [
        ("h:1", None, "h:1", False),
        ("h:1", True, "h:1", True),
        ("h:1", False, "h:1", False),
        ("grpcs://h:1", None, "h:1", True),
        ("grpcs://h:1/", True, "h:1", True),
        ("grpc://h:1", None, "h:1", False),
        ("grpc://h:1", False, "h:1", False),
        ("dns:///h:1", Tls(), "dns:///h:1", True),
    ],
)
def test_the_target_or_the_argument_says_whether_there_is_tls(target, tls, found, is_tls):
    endpoint = endpoint_of(target, tls=tls)
    assert endpoint.target == found
    assert (endpoint.credentials is not None) == (endpoint.tls is not None) == is_tls


@pytest.mark.parametrize(
    ("target", "tls"), [("grpc://h:1", True), ("grpc://h:1", Tls()), ("grpcs://h:1", False)]
)
def test_what_contradicts_itself_is_refused(target, tls):
    with pytest.raises(InvalidField, match=f"tls.*contradicts the target, {target}"):
        endpoint_of(target, tls=tls)


def test_credentials_of_grpc_take_the_place_of_tls():
    own = grpc.ssl_channel_credentials()
    assert endpoint_of("grpcs://h:1", credentials=own).credentials is own
    with pytest.raises(InvalidField, match="give one of them"):
        endpoint_of("h:1", tls=True, credentials=own)


@pytest.mark.parametrize(
    ("target", "address"),
    [
        ("h:1", ("h", 1)),
        ("grpcs://h", ("h", 443)),
        ("[::1]:5", ("::1", 5)),
        ("dns:///h:1", ("h", 1)),
        ("ipv4:10.0.0.1:7", ("10.0.0.1", 7)),
        ("unix:/tmp/s", None),
        ("xds:///service", None),
    ],
)
def test_the_address_of_a_target_is_found_if_it_has_one(target, address):
    assert endpoint_of(target).address == address


# Tokens.


@pytest.mark.parametrize("target", ["10.0.0.1:1", "h:1", "dns:///h:1", "xds:///h", "[fd00::1]:1"])
def test_a_token_is_not_sent_where_others_may_read_it_unless_asked_for(target):
    with pytest.raises(InvalidField, match="in plain text, where others may read it") as refused:
        endpoint_of(target, token=TOKEN)
    assert TOKEN not in str(refused.value)
    assert endpoint_of(target, token=TOKEN, tls=False).token() == TOKEN
    assert endpoint_of(target, token=TOKEN, tls=True).token() == TOKEN
    assert endpoint_of(f"grpc://{target}", token=TOKEN).token() == TOKEN
    assert endpoint_of(f"grpcs://{target}", token=TOKEN).token() == TOKEN


@pytest.mark.parametrize("target", ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/tmp/s"])
def test_a_token_may_go_to_this_machine(target):
    assert endpoint_of(target, token=TOKEN).token() == TOKEN


def test_a_token_may_be_renewed_by_a_function():
    assert endpoint_of("localhost:1", token=lambda: TOKEN).token() == TOKEN


@pytest.mark.parametrize("text", ["", "two words", "line\nbreak", "é"])
def test_what_can_be_no_token_is_refused_and_not_shown(text: str, tmp_path: Path):
    with pytest.raises(InvalidField, match="empty, or has characters") as refused:
        endpoint_of("localhost:1", token=text)
    file = tmp_path / "token"
    file.write_text(text)
    with pytest.raises(InvalidField, match=f"in {file} is empty, or has characters") as refused:
        endpoint_of("localhost:1", token=file)
    assert not text or text not in str(refused.value)


@pytest.mark.parametrize("text", ["", "two words", "line\nbreak", "é"])
def test_a_function_that_gives_no_token_is_told_at_the_call(text: str):
    token = endpoint_of("localhost:1", token=lambda: text).token
    with pytest.raises(InvalidField, match="empty, or has characters") as refused:
        token()
    assert not text or text not in str(refused.value)


def test_white_space_around_what_a_function_gives_is_no_part_of_the_token():
    """As it is around the token of a file that a function may have read."""
    assert endpoint_of("localhost:1", token=lambda: f" {TOKEN}\n").token() == TOKEN


def test_a_file_of_a_token_is_read_again_when_it_changes(tmp_path: Path):
    file = tmp_path / "token"
    with pytest.raises(InvalidField, match=f"can't be read from {file}: No such file"):
        TokenFileReader(file)
    file.write_text(f"{TOKEN}\n")
    token = TokenFileReader(file)
    assert token() == TOKEN
    new = tmp_path / "new"
    new.write_text("renewed")
    new.rename(file)
    assert token() == "renewed"
    for spoil in (lambda: file.write_text(""), file.unlink):
        spoil()
        assert token() == "renewed"  # the last one that there was


def test_a_call_that_was_begun_before_its_token_was_renewed_is_known():
    tokens = ["first"]
    source = endpoint_of("localhost:1", token=lambda: tokens[-1]).token
    began = time.monotonic()
    assert source() == "first"
    assert not source.renewed_since(began)
    began = time.monotonic()
    assert not source.renewed_since(began)
    tokens.append("second")
    assert source.renewed_since(began)
    assert not source.renewed_since(time.monotonic())


# The environment.


def test_without_a_target_the_environment_says_where_and_how(
    monkeypatch: pytest.MonkeyPatch, tls: Tls, tmp_path: Path
):
    assert endpoint_of(None).target == "127.0.0.1:50051"
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setenv("STEPSTATE_TARGET", "grpcs://h:1")
    monkeypatch.setenv("STEPSTATE_TOKEN_FILE", str(tmp_path / "token"))
    for name in ("ca_file", "cert_file", "key_file"):
        monkeypatch.setenv(f"STEPSTATE_{name.upper()}", str(getattr(tls, name)))
    found = endpoint_of(None)
    assert found.target == "h:1"
    assert found.tls == Tls(*map(str, (tls.ca_file, tls.cert_file, tls.key_file)))
    assert found.token() == TOKEN


def test_a_target_of_ones_own_gets_nothing_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Its token might be for another server."""
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setenv("STEPSTATE_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("STEPSTATE_CA_FILE", str(tmp_path / "none"))
    assert endpoint_of("h:1") == endpoint_of("h:1", tls=False)


# Files.


def test_files_that_cannot_be_used_are_named(tls: Tls, tmp_path: Path):
    with pytest.raises(InvalidField, match=r"tls\.ca_file: can't be read: .*none: No such file"):
        Tls(tmp_path / "none").credentials()
    (tmp_path / "text").write_text("text")
    with pytest.raises(InvalidField, match=r"tls\.key_file: is not PEM: .*text"):
        Tls(tls.ca_file, tls.cert_file, tmp_path / "text").credentials()
    with pytest.raises(InvalidField, match="a certificate or a key alone"):
        Tls(tls.ca_file, tls.cert_file).credentials()


def test_nothing_shows_the_token():
    with Client("localhost:1", token=TOKEN) as client:
        assert TOKEN not in repr(client) + repr(endpoint_of("localhost:1", token=TOKEN))
