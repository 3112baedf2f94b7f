"""A server with every kind of secret, used and misused: none of them can be read anywhere after.

What is read: its log at DEBUG, its audit log, what it prints, its metrics, every reply and error,
the command lines of its processes, and what the commands print.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest

from stepstate.client import Client, Tls
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.certificates import Authority, Certificate
from tests.credentials import AUDIENCE, ISSUER, Provider, revoke, token
from tests.processes import SERVING
from tests.redis_process import RedisProcess, redis_process
from tests.secrets import Secret

ROOT = Path(__file__).parents[2]
PASSWORD = "r3dis-p4ss/w+rd:of@this=test"
SNAPSHOT_KEY = "k3y-of-snapshots-0123456789abcdef-of-this-test"
PASTED = "stepstate_pasted-where-it-does-not-belong-8d1f0a"
REREAD_SECONDS = 20.0
SIGNS = {
    "log": "refused",
    "audit": "credential refused",
    "errors": "STORE_UNAVAILABLE",
    "replies": "a-copy",
    "metrics": "stepstate_auth_failures_total",
    "commands": "lstm",
    "ps": " serve ",
    "standard output": "serving",
    "raw answers": "",
    "client": "Client(",
}
"""What is read, and a text that shows that it was there to be read."""


def test_a_leak_is_found_in_every_form():
    secret = Secret("password", PASSWORD)
    raw = PASSWORD.encode()
    forms = [
        *(f"x{PASSWORD}x", PASSWORD[:12], f"...{PASSWORD[-12:]}", raw.hex(), raw.hex().upper()),
        *(base64.b64encode(before + raw + b"!").decode() for before in (b"", b"a", b"user:")),
        base64.urlsafe_b64encode(b":" + raw).decode(),
        "redis://:r3dis-p4ss%2Fw%2Brd%3Aof%40this%3Dtest@127.0.0.1",
    ]
    for form in forms:
        assert secret.is_in(form), form
    assert not secret.is_in("redis://:***@127.0.0.1 r3dis")


@dataclass(slots=True)
class Scene:
    """A server, and what was read of it."""

    folder: Path
    authority: Authority
    certificate: Certificate
    provider: Provider
    redis: RedisProcess
    secrets: list[Secret] = field(default_factory=list)
    shown: dict[str, str] = field(default_factory=dict)
    address: str = ""
    metrics: str = ""

    def secret(self, name: str, text: str, private: str = "") -> str:
        """Notes a secret."""
        self.secrets.append(Secret(name, text, private))
        return text

    def token(self, identity: str, scopes: str = "step read") -> str:
        """A token that the server knows."""
        text = token(self.folder / "tokens.json", identity, tenant="acme", scopes=scopes)
        return self.secret(identity, text, text.removeprefix("stepstate_"))

    def jwt(self, name: str, **claims: object) -> str:
        """A JWT; its header is no secret."""
        text = self.provider.token(**claims)
        return self.secret(name, text, text.split(".", 1)[1])

    def show(self, what: str, text: object) -> None:
        """Notes something that can be read."""
        self.shown[what] = f"{self.shown.get(what, '')}\n{text}"


@pytest.fixture
def scene(authority: Authority, certificate: Certificate, tmp_path: Path) -> Iterator[Scene]:
    with redis_process(tmp_path / "redis") as redis:
        redis.command("CONFIG", "SET", "requirepass", PASSWORD)
        yield Scene(tmp_path, authority, certificate, Provider(), redis)


def start(scene: Scene, model_root: Path, transport: str) -> subprocess.Popen[str]:
    """A server whose secrets are in files and variables, logging all that it can."""
    folder, text = scene.folder, ["[server]"]
    (folder / "snapshot-keys").write_text(scene.secret("snapshot key", SNAPSHOT_KEY))
    (folder / "jwks.json").write_bytes(scene.provider.jwks())
    key = scene.certificate.key.read_text()
    (folder / "key.pem").write_text(scene.secret("TLS key", key, "".join(key.split("\n")[1:-2])))
    settings = {
        "models": str(model_root),
        "listen": "127.0.0.1:0",
        "metrics_listen": "127.0.0.1:0",
        "transport": transport,
        "store": f"redis://127.0.0.1:{scene.redis.port}/1",
        "tls_cert": str(scene.certificate.file),
        "tls_key": str(folder / "key.pem"),
        "tokens_file": str(folder / "tokens.json"),
        "jwt_issuer": ISSUER,
        "jwt_audience": AUDIENCE,
        "jwt_jwks": str(folder / "jwks.json"),
        "snapshot_key": str(folder / "snapshot-keys"),
        "audit_log": str(folder / "audit"),
        "log_level": "DEBUG",
    }
    if transport == "lean":  # grpcio can't ask for a certificate and do without
        settings |= {"tls_client_ca": str(scene.authority.file), "tls_client_auth": "optional"}
    for name in ("snapshot-keys", "key.pem"):
        (folder / name).chmod(0o600)
    text += [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    (folder / "stepstate.toml").write_text("\n".join(text))
    scene.secret("Redis password", PASSWORD)
    command = [sys.executable, "-m", "stepstate.cli", "serve", "--config"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, str(folder / "stepstate.toml")],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"STEPSTATE_STORE_PASSWORD": PASSWORD},
        )
    assert server.stdout is not None
    line = server.stdout.readline()
    found = SERVING.search(line)
    assert found, (folder / "log").read_text()
    scene.show("standard output", line)
    scene.address, scene.metrics = found["address"], found["metrics"]
    return server


def use(scene: Scene, text: str, name: str) -> None:
    """What a client does with a credential that is right."""
    tls = Tls(scene.authority.file)
    with Client(scene.address, tls=tls, token=text) as client:
        scene.show("client", repr(client))
        session = client.open("lstm", session_id=name)
        session.step(np.zeros(3, np.float32))
        snapshot = client.export(name)
        scene.show("replies", client.restore(snapshot, session_id=f"{name}-copy").session_id)
        scene.show("replies", client.models())
        scene.show("replies", list(client.sessions()))
        session.close()


def misuse(scene: Scene, *metadata: tuple[str, str | bytes]) -> None:
    """A call of every kind with metadata that are wrong."""
    credentials = grpc.ssl_channel_credentials(scene.authority.file.read_bytes())
    port = scene.address.rpartition(":")[2]
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        stub = StepstateServiceStub(channel)
        calls = (
            lambda: stub.OpenSession(pb.OpenSessionRequest(model="lstm"), metadata=metadata),
            lambda: list(stub.StreamSteps(iter([pb.StepRequest()]), metadata=metadata)),
            lambda: stub.ImportSession(pb.ImportSessionRequest(snapshot=b"x"), metadata=metadata),
        )
        for call in calls:
            with suppress(grpc.RpcError):
                try:
                    scene.show("replies", call())
                except grpc.RpcError as error:
                    scene.show("errors", f"{error!r} {error.trailing_metadata()}")
                    raise


def send_raw(scene: Scene, data: bytes, *, tls: bool) -> None:
    """Bytes that are no gRPC, to both ports."""
    for address in (scene.address, scene.metrics.removeprefix("https://").partition("/")[0]):
        host, _, port = address.rpartition(":")
        context = ssl.create_default_context(cafile=scene.authority.file)
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=5) as plain:
            connection = context.wrap_socket(plain, server_hostname="localhost") if tls else plain
            with connection:
                connection.sendall(data)
                scene.show("raw answers", connection.recv(65_536).decode("latin-1"))


def run_command(scene: Scene, *arguments: str, **variables: str) -> None:
    """A command of the CLI, as a process that `ps` can see."""
    command = [sys.executable, "-m", "stepstate.cli", *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | variables,
    ) as process:
        show_processes(scene)
        scene.show("commands", process.communicate(timeout=60)[0])


def show_processes(scene: Scene) -> None:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
            if b"stepstate" in line:
                scene.show("ps", line.decode())


def read_metrics(scene: Scene) -> None:
    context = ssl.create_default_context(cafile=scene.authority.file)
    for path in ("/metrics", "/healthz", f"/{PASTED}?token={PASTED}"):
        request = urllib.request.Request(
            f"https://{scene.metrics.removeprefix('https://').partition('/')[0]}{path}",
            headers={"Authorization": f"Bearer {PASTED}"},
        )
        with suppress(OSError), urllib.request.urlopen(request, context=context) as answer:
            scene.show("metrics", answer.read().decode())


def wait_for(scene: Scene, text: str) -> None:
    """Waits until the log says something."""
    until = time.monotonic() + REREAD_SECONDS
    log = scene.folder / "log"
    while text not in log.read_text():
        assert time.monotonic() < until, f"no {text!r} in\n{log.read_text()[-3000:]}"
        time.sleep(0.05)


def break_files(scene: Scene, server: subprocess.Popen[str]) -> None:
    """Each file with a secret is replaced by a broken one that has a secret in a wrong place."""
    files = ("tokens.json", "jwks.json", "key.pem", "stepstate.toml")
    good = {name: (scene.folder / name).read_bytes() for name in files}
    record = {"identity": PASTED, "tenant": PASTED, "scopes": [PASTED], PASTED: PASTED}
    broken = {
        "tokens.json": json.dumps({"version": 1, "tokens": [record]}).encode(),
        "jwks.json": json.dumps({"keys": [{"kty": PASTED, "kid": PASTED, "k": PASTED}]}).encode(),
        "key.pem": good["key.pem"].replace(b"A", b"B") + PASTED.encode(),
        "stepstate.toml": good["stepstate.toml"] + f"\nstore_password = {PASTED!r}".encode(),
    }
    for name, content in broken.items():
        (scene.folder / name).write_bytes(content)
    os.kill(server.pid, signal.SIGHUP)
    wait_for(scene, "the tokens that are known stay in use")
    for name, content in good.items():
        (scene.folder / name).write_bytes(content)


def misuse_all(scene: Scene, good: str) -> None:
    """Every credential that proves nothing, and every wrong place for one that does."""
    foreign = token(scene.folder / "other.json")
    scene.secret("another server's token", foreign, foreign.removeprefix("stepstate_"))
    gone = scene.token("gone")
    revoke(scene.folder / "tokens.json", gone)
    expired = scene.jwt("expired", exp=int(time.time()) - 1000)
    forged = scene.jwt("forged", sub="f")[:-4] + "AAAA"
    bad = (gone, foreign, expired, forged, good[:-1] + "!", PASTED, PASSWORD, good * 200)
    for text in bad:
        misuse(scene, ("authorization", f"Bearer {text}"))
    misuse(scene, ("authorization", f"Basic {good}"))
    misuse(scene, ("authorization", good), ("authorization", f"Bearer {good}"))
    misuse(scene, ("authorization-bin", good.encode()))
    for tenant in (PASTED, "other"):
        misuse(scene, ("authorization", f"Bearer {good}"), ("x-stepstate-tenant", tenant))
    headers = f"GET /metrics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {good}\r\n\r\n"
    for tls in (False, True):
        send_raw(scene, headers.encode(), tls=tls)


def run_commands(scene: Scene, good: str) -> None:
    file = scene.folder / "token"
    target = {"STEPSTATE_TARGET": f"grpcs://localhost:{scene.address.rpartition(':')[2]}"}
    ca = {"STEPSTATE_CA_FILE": str(scene.authority.file)}
    for text, variables in ((good, target | ca), (PASTED, target)):
        file.write_text(text)
        file.chmod(0o600)
        run_command(scene, "models", "--token-file", str(file), **variables)
    run_command(scene, "tokens", "list", "--tokens-file", str(scene.folder / "tokens.json"))
    toml = str(scene.folder / "stepstate.toml")
    run_command(scene, "config", "show", toml, STEPSTATE_STORE_PASSWORD=PASSWORD)


def lose_the_store(scene: Scene, good: str) -> None:
    """Redis takes the password no more, for a while."""
    with scene.redis.client() as client:
        client.auth(PASSWORD)
        client.config_set("requirepass", "another")
        client.client_kill_filter(_type="normal", skipme=True)
        misuse(scene, ("authorization", f"Bearer {good}"))
        client.config_set("requirepass", PASSWORD)


@pytest.mark.transports(long=True)
def test_no_secret_is_anywhere_after_it_was_used_and_misused(
    scene: Scene, model_root: Path, transport: str
):
    good = scene.token("good")
    scene.secret("pasted", PASTED, PASTED.removeprefix("stepstate_"))
    server = start(scene, model_root, transport)
    try:
        use(scene, good, "a")
        use(scene, scene.jwt("good JWT"), "b")
        misuse_all(scene, good)
        read_metrics(scene)
        run_commands(scene, good)
        break_files(scene, server)
        lose_the_store(scene, good)
        read_metrics(scene)
    finally:
        server.terminate()
        scene.show("standard output", server.communicate(timeout=60)[0])
    for name in ("log", "audit"):
        scene.show(name, (scene.folder / name).read_text())
    assert scene.shown.keys() >= SIGNS.keys()
    for what, sign in SIGNS.items():
        assert sign in scene.shown[what], what
    leaks = [
        (secret.name, what, text)
        for what, shown in scene.shown.items()
        for text in shown.splitlines()
        for secret in scene.secrets
        if secret.is_in(text)
    ]
    assert leaks == []
    print(f"{len(scene.secrets)} secrets, {sum(map(len, scene.shown.values()))} characters read")
