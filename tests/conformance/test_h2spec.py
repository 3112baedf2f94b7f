"""h2spec, https://github.com/summerwind/h2spec: 146 cases of RFC 9113's and RFC 7541's rules.

A server of Stepstate itself, on the event loop of `stepstate serve`.
"""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from stepstate.config import ServerConfig
from stepstate.h2grpc import H2Server
from stepstate.loop import ServerLoop
from stepstate.server import running_server
from tests.certificates import Certificate
from tests.integration.wire import STEP

pytestmark = pytest.mark.long

CASES = 146
TIMEOUT = "10"
"""Seconds that it waits for what the server must do; no case that passes takes them."""


async def judge(h2spec: str, config: ServerConfig, report: Path, *options: str) -> None:
    """Lets h2spec try a server of this configuration."""
    async with running_server(config) as server:
        port = server.address.rpartition(":")[2]
        running = await asyncio.create_subprocess_exec(
            h2spec, "-p", port, "-P", STEP, "-o", TIMEOUT, "-j", str(report), *options,
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        said, _ = await running.communicate()
    cases = list(ET.parse(report).iter("testcase"))
    broken = [
        f"{case.get('package')}: {case.get('classname')}: {''.join(case.itertext()).strip()}"
        for case in cases
        if len(case)  # a failure, an error, or why it was skipped
    ]
    assert not broken, "\n".join(broken)
    assert len(cases) == CASES, said.decode()
    assert running.returncode == 0, said.decode()


def test_h2spec_on_plain_tcp(h2spec: str, config: ServerConfig, tmp_path: Path):
    with asyncio.Runner(loop_factory=ServerLoop) as runner:
        runner.run(judge(h2spec, config, tmp_path / "report.xml"))


def test_h2spec_on_tls(
    h2spec: str,
    config: ServerConfig,
    tmp_path: Path,
    certificate: Certificate,
    monkeypatch: pytest.MonkeyPatch,
):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.file, certificate.key)

    def add_port(server: H2Server, address: str) -> int:
        return server.add_secure_port(address, lambda: context)

    monkeypatch.setattr(H2Server, "add_insecure_port", add_port)
    with asyncio.Runner(loop_factory=ServerLoop) as runner:
        runner.run(judge(h2spec, config, tmp_path / "report.xml", "-t", "-k"))
