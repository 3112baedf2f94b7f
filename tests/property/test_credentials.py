"""Whatever is sent as a credential is refused in one way, and tokens survive their file."""

from __future__ import annotations

import asyncio
import base64
import secrets
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stepstate.auth import (
    CertificateMapping,
    CertificateRule,
    Credentials,
    JwtSettings,
    KeyFile,
    KeyRing,
    TokenFile,
    TokenRecord,
    WebTokens,
    change_tokens,
    digest_of,
    is_token,
    read_tokens,
)
from stepstate.auth.signing_keys import parse_keys
from stepstate.errors import CredentialsInvalid, Unauthenticated
from stepstate.identity import Scope, is_tenant
from tests.credentials import AUDIENCE, ISSUER, Provider, token
from tests.hypothesis_profiles import examples

PROVIDER = Provider("first")
WHOLE = PROVIDER.token()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("credentials")


@pytest.fixture(scope="module")
def credentials(folder: Path) -> Credentials:
    """Of all kinds."""
    (folder / "jwks.json").write_bytes(PROVIDER.jwks())
    token(folder / "tokens.json")
    keys = KeyRing(KeyFile(str(folder / "jwks.json")))
    asyncio.run(keys.read_now())
    return Credentials(
        tokens=TokenFile(str(folder / "tokens.json")),
        jwts=WebTokens(JwtSettings(ISSUER, AUDIENCE), keys),
        certificates=CertificateMapping([CertificateRule("CN:*", "a", frozenset(Scope))]),
    )


parts = st.binary(max_size=60).map(lambda data: base64.urlsafe_b64encode(data).rstrip(b"="))
json_parts = st.from_regex(r'\{"alg":"[A-Z0-9]{0,5}","kid":"\w{0,5}"\}', fullmatch=True).map(
    lambda text: base64.urlsafe_b64encode(text.encode()).rstrip(b"=")
)
values = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200),
    st.binary(max_size=200).map(lambda data: b"Bearer " + data),
    st.text(max_size=200).map("Bearer stepstate_{}".format),
    st.lists(parts, max_size=5).map(lambda some: b"Bearer " + b".".join(some)),
    st.tuples(json_parts, parts, parts).map(lambda some: b"Bearer " + b".".join(some)),
    st.tuples(st.integers(0, len(WHOLE) - 1), st.characters(max_codepoint=127)).map(
        lambda change: f"Bearer {WHOLE[: change[0]]}{change[1]}{WHOLE[change[0] + 1 :]}"
    ),
)


@examples(400)
@given(st.lists(values, max_size=2), st.binary(max_size=100))
@example([b"Bearer " + b"\x00" * 9000], b"")
@example(["Bearer \ud800"], b"")
@example(["Bearer " + "[" * 8000], b"")
def test_whatever_is_sent_is_unauthenticated_and_not_echoed(credentials, given_values, pem):
    if given_values == [f"Bearer {WHOLE}"]:
        return
    context = {"x509_pem_cert": [pem]} if pem else {}
    assert credentials.known(given_values, context) is None
    with pytest.raises(Unauthenticated) as refused:
        asyncio.run(credentials.verify(given_values, context, secrets.token_hex()))
    text = f"{refused.value} {refused.value!r}"
    for value in given_values:
        secret = value if isinstance(value, str) else value.decode("latin-1")
        secret = secret.partition(" ")[2]
        assert len(secret) < 12 or secret not in text


@given(st.text())
@example("stepstate_" + "0" * 49)  # the CRC of nothing but zeros is not 0
def test_other_texts_are_no_tokens(text):
    assert not is_token(text)


names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)
records = st.builds(
    TokenRecord,
    identity=names,
    tenant=st.just("acme"),
    scopes=st.lists(st.sampled_from(list(Scope)), min_size=1, unique=True).map(tuple),
    created=st.datetimes(timezones=st.just(UTC)),
    expires=st.none() | st.datetimes(datetime(2027, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
    revoked=st.none(),
    sha256=st.binary(min_size=1).map(lambda data: digest_of(data.hex())),
)


@given(st.lists(records, max_size=5, unique_by=lambda record: record.id))
def test_records_survive_their_file(folder, tokens):
    file = str(folder / "written.json")
    change_tokens(file, lambda _: tuple(tokens))
    assert read_tokens(file) == tuple(tokens)


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_a_file_with_anything_in_it_is_refused_in_words(folder, data):
    file = folder / "broken.json"
    file.write_bytes(data)
    with pytest.raises(CredentialsInvalid):
        read_tokens(str(file))
    with pytest.raises(ValueError, match="JWK set"):
        parse_keys(data)


@given(st.text(max_size=70))
def test_a_tenant_fits_everywhere(name):
    if is_tenant(name):
        assert name.isascii()
        assert name == name.lower()
        assert 0 < len(name) < 64
        assert not set(name) & set("/:*?{}[] \\\n")
