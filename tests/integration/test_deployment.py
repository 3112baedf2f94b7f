"""docs/deployment.md, followed by somebody who has two machines: two hosts of a network of its own.

The hosts are network namespaces, joined by a pair of veth devices; the test makes and removes them.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.markdown import ROOT
from tests.processes import SERVING

GUIDE = ROOT / "docs" / "deployment.md"
SERVER_ADDRESS, CLIENT_ADDRESS = "10.77.0.1/24", "10.77.0.2/24"
SERVE = "stepstate serve --config stepstate.toml\n"
REREAD_SECONDS = 20.0
_SECTION = re.compile(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(r"^```(sh|python|ini)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def sections() -> dict[str, list[tuple[str, str]]]:
    """The blocks of the guide, by section: language and text."""
    return {name: _BLOCK.findall(text) for name, text in _SECTION.findall(GUIDE.read_text())}


class Host:
    """A machine with a shell that somebody types into.

    Args:
        name: of its network namespace.
        folder: where the shell begins.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._name = name
        self.folder = folder
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = os.environ | {"PATH": path}
        self._shell = self.start("bash", "-eo", "pipefail")

    def start(self, *command: str, folder: Path | None = None) -> subprocess.Popen[str]:
        """A process on this machine."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self._name, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder or self.folder,
            env=self._environment,
        )

    def type(self, language: str, block: str) -> str:
        """What a block prints, which succeeds."""
        if language == "python":
            block = f"python - <<'EOP'\n{block}EOP\n"
        shell = self._shell
        assert shell.stdin is not None
        assert shell.stdout is not None
        shell.stdin.write(f"{block}echo :: $?\n")
        shell.stdin.flush()
        printed = []
        for line in shell.stdout:
            if line.startswith(":: "):
                assert line == ":: 0\n", f"{block}{''.join(printed)}"
                return "".join(printed)
            printed.append(line)
        pytest.fail(f"the shell ended at\n{block}{''.join(printed)}")

    def close(self) -> None:
        """Closes the shell."""
        self._shell.communicate(timeout=20)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def network() -> Iterator[tuple[str, str]]:
    """Two hosts that reach each other and nothing else; their names."""
    number = os.getpid()
    names = f"stepstate-{number}-server", f"stepstate-{number}-client"
    ends = f"ss{number}", f"sc{number}"
    addresses = SERVER_ADDRESS, CLIENT_ADDRESS
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, addresses, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-netns", name, "address", "add", address, "dev", end)
            ip("-netns", name, "link", "set", end, "up")
            ip("-netns", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        _remove(names)
        if "Operation not permitted" in error.stderr:
            pytest.skip("NO PERMISSION to make network namespaces: run it as root")
        raise
    try:
        yield names
    finally:
        _remove(names)


def _remove(names: tuple[str, str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.fixture
def hosts(program: Callable[[str], str], tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """The server's machine and the client's."""
    for name in ("ip", "openssl", "promtool", "curl"):
        program(name)
    with network() as names:
        folders = [tmp_path / "server", tmp_path / "client"]
        for folder in folders:
            folder.mkdir()
        server, client = map(Host, names, folders)
        yield server, client
        server.close()
        client.close()


@contextmanager
def served(host: Host) -> Iterator[None]:
    """The server of the guide runs in another shell of its machine."""
    process = host.start("bash", "-c", f"exec {SERVE}", folder=host.folder / "stepstate")
    assert process.stdout is not None
    printed = []
    try:
        for line in process.stdout:
            printed.append(line)
            if SERVING.search(line):
                break
        else:
            pytest.fail("".join(printed))
        yield
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.long
def test_the_guide_leads_from_nothing_to_a_remote_step(hosts: tuple[Host, Host]):
    server, client = hosts
    guide = sections()
    began = time.monotonic()
    *before, serve = guide["On the server"]
    for language, block in before:
        server.type(language, block)
    assert serve == ("sh", SERVE)
    with served(server):
        for name in ("ca.pem", "ci.token"):  # the guide's `scp`
            shutil.copy(server.folder / "stepstate" / name, client.folder)
        printed = []
        for language, block in guide["On the client"]:
            printed.append(client.type(language, block))
            if language == "python":
                print(f"the first remote step came after {time.monotonic() - began:.1f} s")
        told, models, first, more, refused = printed[0], printed[0], *printed[1:]
        assert "SERVING" in told.upper()
        assert "electricity" in models
        assert first.startswith("t=3, in half an hour ")
        assert "meter-1" in more
        assert "authorization: Bearer TOKEN" in refused
        for language, block in guide["Prometheus"]:
            assert client.type(language, block)
        for language, block in guide["On record"]:
            assert '"acme"' in server.type(language, block) or "refused" in block
        before_renewal = serial(client)
        for language, block in guide["What changes later"]:
            server.type(language, block)
        wait_for(lambda: serial(client) != before_renewal)
        wait_for(lambda: "revoked" in client.type("sh", "stepstate models 2>&1 || true\n"))


def serial(client: Host) -> str:
    """Of the certificate that the server shows."""
    command = "openssl s_client -connect 10.77.0.1:50051 -alpn h2 </dev/null 2>/dev/null"
    return client.type("sh", f"{command} | openssl x509 -noout -serial\n")


def wait_for(true: Callable[[], bool]) -> None:
    until = time.monotonic() + REREAD_SECONDS
    while not true():
        assert time.monotonic() < until, "the server did not take what was replaced"
        time.sleep(0.5)


def test_the_unit_of_systemd_starts_what_the_guide_starts():
    ((language, text),) = sections()["systemd"]
    unit = configparser.ConfigParser(strict=True)
    unit.optionxform = str
    unit.read_string(text)
    assert language == "ini"
    assert unit["Service"]["ExecStart"].endswith(SERVE.strip())
    assert unit["Service"]["Environment"].count("STEPSTATE_") == 2
