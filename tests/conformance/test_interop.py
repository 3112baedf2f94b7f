"""The client of gRPC's interoperability tests that grpc-go has, against the lean transport."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

SERVER = Path(__file__).with_name("interop_server.py")
CASES = (
    "empty_unary",
    "large_unary",
    "client_streaming",
    "server_streaming",
    "ping_pong",
    "empty_stream",
    "timeout_on_sleeping_server",
    "cancel_after_begin",
    "cancel_after_first_response",
    "status_code_and_message",
    "special_status_message",
    "custom_metadata",
    "unimplemented_method",
    "unimplemented_service",
)


@pytest.fixture(scope="module", params=["plain TCP", "TLS"])
def options(interop_client: str, request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """A server's address, as options of the client."""
    tls = request.param == "TLS"
    command = [sys.executable, str(SERVER), *(["--tls"] if tls else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        port, *certificate = server.stdout.readline().split()
        found = ["-server_host", "127.0.0.1", "-server_port", port]
        if tls:
            found += ["-use_tls", "-use_test_ca", "-ca_file", *certificate]
            found += ["-server_host_override", "localhost"]
        yield found
        server.terminate()


@pytest.mark.parametrize("case", CASES)
def test_interop(interop_client: str, options: list[str], case: str):
    done = subprocess.run(
        [interop_client, *options, "-test_case", case],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
