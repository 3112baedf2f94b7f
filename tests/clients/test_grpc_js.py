"""@grpc/grpc-js, gRPC's own implementation in JavaScript on Node's HTTP/2, as a client."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import TOOLS
from tests.integration.wire import TOLERANCE, draw, largest_difference
from tests.networks import Network
from tests.processes import ServerProcess

SCRIPT = Path(__file__).with_name("client.cjs")
PROTOS = Path(__file__).parents[2] / "protos"
PACKAGES = TOOLS / "node_modules"
ROWS = draw(100)

Node = Callable[..., Any]


@pytest.fixture
def node(
    tool: Callable[[str, str], str], run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> Node:
    """Runs a case of the script against a server, and returns what it printed."""
    program = tool("node", "apt-get install nodejs")
    packages = os.environ.get("NODE_PATH", str(PACKAGES))
    if not (Path(packages) / "@grpc" / "grpc-js").exists():
        pytest.skip(f"MISSING PROGRAM: @grpc/grpc-js is not in {packages}; .ci/run installs it")
    monkeypatch.setenv("NODE_PATH", packages)

    def case(server: ServerProcess, name: str, *rows: str) -> Any:
        return json.loads(run(program, SCRIPT, PROTOS, server.address, name, *rows))

    return case


@pytest.mark.parametrize("name", ["unary", "stream"])
def test_it_steps_a_session(
    served: ServerProcess, node: Node, networks: dict[str, Network], name: str
):
    """One call a row, and all rows in flight on one stream."""
    y = node(served, name, json.dumps(ROWS.tolist()))
    assert largest_difference(y, networks["lstm"].offline(ROWS)) < TOLERANCE


@pytest.mark.parametrize("name", ["errors", "cancel", "deadline", "metadata", "snapshot"])
def test_it_sees_what_it_should(served: ServerProcess, node: Node, name: str):
    """What that is, is asserted in the script."""
    node(served, name)


def test_it_may_compress_where_the_server_allows_it(
    served: ServerProcess, inflating: ServerProcess, node: Node
):
    assert node(inflating, "compressed")["code"] == 0
    refused = node(served, "compressed")
    assert refused["code"] == 12  # UNIMPLEMENTED
    assert "'gzip' is disabled" in refused["details"]
