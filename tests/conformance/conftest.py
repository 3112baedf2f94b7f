"""Fixtures: the programs of the suites. Tests run on the event loop of `stepstate serve`."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Mapping

import pytest
import uvloop


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


def find(name: str, variable: str) -> str:
    """A suite's program, named by a variable or on PATH; its tests are skipped without it."""
    path = shutil.which(os.environ.get(variable) or name)
    if path is None:
        pytest.skip(f"MISSING PROGRAM: {name}; {variable} says where it is (see tests/README.md)")
    return path


@pytest.fixture(scope="session")
def h2spec() -> str:
    """The path of https://github.com/summerwind/h2spec."""
    return find("h2spec", "H2SPEC")


@pytest.fixture(scope="session")
def interop_client() -> str:
    """The path of grpc-go's interop/client."""
    return find("grpc-go-interop-client", "GRPC_INTEROP_CLIENT")
