"""What sslyze, a scanner of TLS servers, finds on both ports.

It compares with Mozilla's "intermediate" configuration, which has versions, ciphers, curves and
certificates, and looks for the known faults: Heartbleed, ROBOT, CCS injection, compression,
renegotiation by the client, early data.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from stepstate.config import ServerConfig
from stepstate.server import running_server
from tests.certificates import Certificate

SSLYZE = Path(__file__).parents[2] / "build" / "tools" / "sslyze" / "bin" / "sslyze"
ACCEPTED = {
    # The test's own authority, which no browser knows.
    "certificate_path_validation: Certificate path validation failed for CN=server.",
    # As strong as the others, and OpenSSL's defaults, which Python's `ssl` can't change.
    "tls_curves: TLS curves {'X448', 'secp521r1'} are supported, but should be rejected.",
}


@pytest.mark.long
@pytest.mark.transports
async def test_nothing_weak_is_found_on_either_port(
    config: ServerConfig, certificate: Certificate, transport: str
):
    if not SSLYZE.exists():
        pytest.skip("MISSING PROGRAM: sslyze; .ci/run installs it")
    files = {"tls_cert": str(certificate.file), "tls_key": str(certificate.key)}
    async with running_server(replace(config, **files)) as server:
        scan = await asyncio.create_subprocess_exec(
            SSLYZE,
            server.address,
            server.metrics_address,
            stdout=subprocess.PIPE,
        )
        report = (await scan.communicate())[0].decode()
    _, _, compliance = report.partition("COMPLIANCE AGAINST TLS CONFIGURATION")
    for address in (server.address, server.metrics_address):
        assert re.search(rf"{address}: (OK - Compliant|FAILED - Not compliant)", compliance), report
    found = {normal(line) for line in re.findall(r"^ +\* (.+)$", compliance, re.MULTILINE)}
    assert found <= ACCEPTED
    assert "VULNERABLE" not in report.upper().replace("NOT VULNERABLE", "")


def normal(finding: str) -> str:
    """A finding with the names of its set in order."""
    return re.sub(
        r"\{(.+?)\}", lambda match: "{" + ", ".join(sorted(match[1].split(", "))) + "}", finding
    )
