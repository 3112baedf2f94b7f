"""What clients need to get into a server that protects itself, made anew for each run.

An authority, certificates of a server and of a client, a token and a JWT, in files of a folder.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from stepstate.auth import TokenRecord, change_tokens, digest_of, make_token
from stepstate.identity import DEFAULT_TENANT, Scope

Metadata = tuple[tuple[str, str], ...]
ISSUER, AUDIENCE = "https://issuer.example", "stepstate"
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")


@dataclass(frozen=True, slots=True)
class Access:
    """How a client gets in: files in PEM, and a credential. Empty: without."""

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    credential: str = ""
    """What `authorization` has behind "Bearer"."""

    def channel(
        self, target: str, options: Sequence[tuple[str, Any]] | None = None
    ) -> grpc.aio.Channel:
        """A channel to a server; every call needs `metadata` of its own."""
        if not self.ca_file:
            return grpc.aio.insecure_channel(target, options=options)
        files = (self.ca_file, self.key_file, self.cert_file)
        contents = (Path(file).read_bytes() if file else None for file in files)
        return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(*contents), options)

    @property
    def metadata(self) -> Metadata:
        """Of each call."""
        return (("authorization", f"Bearer {self.credential}"),) if self.credential else ()

    def variables(self) -> Mapping[str, str]:
        """The same for the program in C++."""
        return {
            "LOAD_CA_FILE": self.ca_file,
            "LOAD_CERT_FILE": self.cert_file,
            "LOAD_KEY_FILE": self.key_file,
            "LOAD_CREDENTIAL": self.credential,
        }


OPEN = Access()
"""To a server that lets everybody in."""


@dataclass(frozen=True, slots=True)
class Protection:
    """The options of a server, and how a client gets in."""

    options: tuple[str, ...]
    access: Access


def with_tls(folder: Path, *, mutual: bool) -> Protection:
    """TLS; mutual: the client has a certificate, too."""
    ca, server, client = folder / "ca", folder / "server", folder / "client"
    if not ca.exists():
        _certify("authority", ca)
        authority = ("-CA", f"{ca}", "-CAkey", f"{ca}.key", "-addext", "basicConstraints=CA:FALSE")
        _certify("server", server, *authority, "-addext", "subjectAltName=IP:127.0.0.1")
        _certify("client", client, *authority)
    options = ("--tls-cert", f"{server}", "--tls-key", f"{server}.key")
    if not mutual:
        return Protection(options, Access(f"{ca}"))
    own = Access(f"{ca}", f"{client}", f"{client}.key")
    return Protection((*options, "--tls-client-ca", f"{ca}"), own)


def _certify(name: str, file: Path, *options: str) -> None:
    command = ["openssl", "req", "-x509", *_KEY, "-subj", f"/CN={name}", *options]
    files = ["-out", str(file), "-keyout", f"{file}.key"]
    subprocess.run([*command, *files], check=True, capture_output=True)


def with_token(folder: Path) -> Protection:
    """A bearer token of a tenant with limits that the load does not reach."""
    text, file, config = make_token(), folder / "tokens.json", folder / "limits.toml"
    record = TokenRecord(
        identity="bench",
        tenant=DEFAULT_TENANT,
        scopes=tuple(Scope),
        created=datetime.now(UTC),
        sha256=digest_of(text),
    )
    change_tokens(str(file), lambda tokens: (*tokens, record))
    config.write_text(
        "[limits]\nopen_sessions = 1_000_000\nstreams = 100_000\ncalls = 100_000\n"
        "rows_per_second = 1_000_000_000\nforecasts_per_second = 1_000_000\n"
    )
    return Protection(
        ("--tokens-file", str(file), "--config", str(config)), Access(credential=text)
    )


def with_jwt(folder: Path) -> Protection:
    """A JWT, signed with ES256."""
    key, file = ec.generate_private_key(ec.SECP256R1()), folder / "jwks.json"
    public = json.loads(ECAlgorithm.to_jwk(key.public_key()))
    file.write_text(json.dumps({"keys": [{**public, "kid": "1", "alg": "ES256", "use": "sig"}]}))
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "bench",
        "tenant": DEFAULT_TENANT,
        "scope": "step read admin",
        "exp": int(time.time()) + 86_400,
    }
    text = jwt.encode(claims, key, "ES256", {"kid": "1"})
    options = ("--jwt-issuer", ISSUER, "--jwt-audience", AUDIENCE, "--jwt-jwks", str(file))
    return Protection(options, Access(credential=text))
