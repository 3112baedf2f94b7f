"""Credentials for tests.

`token` adds a token to a file, `bearer` is the metadata that carry it. A `Provider` issues JWTs,
and a `JwksServer` publishes its keys.
"""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from stepstate.auth import TokenRecord, change_tokens, digest_of, make_token
from stepstate.identity import DEFAULT_TENANT, Scope
from tests.certificates import Certificate


def token(
    file: Path,
    identity: str = "tester",
    *,
    tenant: str = DEFAULT_TENANT,
    scopes: str = "step read",
    expires: datetime | None = None,
) -> str:
    """Makes a token, and adds it to the file of a server's `tokens_file`.

    >>> server = running_server(replace(config, tokens_file=str(file)))
    >>> client = AsyncClient(server.address, metadata=bearer(token(file)))
    """
    text = make_token()
    record = TokenRecord(
        identity=identity,
        tenant=tenant,
        scopes=tuple(Scope(scope) for scope in scopes.split()),
        created=datetime.now(UTC),
        expires=expires,
        sha256=digest_of(text),
    )
    change_tokens(str(file), lambda tokens: (*tokens, record))
    return text


def revoke(file: Path, text: str) -> None:
    """Revokes a token of a file."""
    change_tokens(
        str(file),
        lambda tokens: tuple(
            token.model_copy(update={"revoked": datetime.now(UTC)})
            if token.sha256 == digest_of(text)
            else token
            for token in tokens
        ),
    )


def bearer(text: str) -> tuple[tuple[str, str], ...]:
    """The metadata that carry a credential."""
    return (("authorization", f"Bearer {text}"),)


ISSUER, AUDIENCE = "https://issuer.test", "stepstate"


class Provider:
    """An identity provider: it has keys, publishes them, and issues JWTs."""

    def __init__(self, *key_ids: str) -> None:
        self.keys: dict[str, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey] = {}
        for key_id in key_ids or ("first",):
            self.add(key_id)

    def add(self, key_id: str, kind: str = "EC") -> None:
        """Makes a key."""
        self.keys[key_id] = (
            ec.generate_private_key(ec.SECP256R1())
            if kind == "EC"
            else rsa.generate_private_key(public_exponent=65537, key_size=2048)
        )

    def jwks(self) -> bytes:
        """The public keys, as a JWK set."""
        keys = [
            self._algorithm(key)[1].to_jwk(key.public_key(), as_dict=True)
            | {"kid": key_id, "use": "sig"}
            for key_id, key in self.keys.items()
        ]
        return json.dumps({"keys": keys}).encode()

    def token(
        self, key_id: str = "first", headers: dict[str, Any] | None = None, **claims: Any
    ) -> str:
        """A JWT for an hour; None leaves a claim out."""
        now = int(time.time())
        content = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": "meter-1",
            "exp": now + 3600,
            "tenant": "acme",
            "scope": "openid step read",
        } | claims
        content = {name: value for name, value in content.items() if value is not None}
        key = self.keys[key_id]
        return jwt.encode(
            content, key, self._algorithm(key)[0], headers={"kid": key_id} | (headers or {})
        )

    def _algorithm(self, key: object) -> tuple[str, Any]:
        if isinstance(key, rsa.RSAPrivateKey):
            return "RS256", RSAAlgorithm
        return "ES256", ECAlgorithm


class JwksServer:
    """Serves a JWK set over https, and counts who asks for it."""

    def __init__(self, provider: Provider, certificate: Certificate) -> None:
        self.asked = 0
        self.answers = threading.Event()
        """Cleared, it lets them wait."""
        self.answers.set()
        self.body: Callable[[], bytes] = provider.jwks
        self.status = 200
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked += 1
                server.answers.wait(30)
                body = server.body()
                self.send_response(200 if self.path == "/elsewhere" else server.status)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with suppress(OSError):
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.file, certificate.key)
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self._http.server_port}/keys"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.05,)).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.answers.set()
        self._http.shutdown()
        self._http.server_close()
