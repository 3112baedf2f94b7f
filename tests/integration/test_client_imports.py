"""The client works without the server's packages."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap

from stepstate.server import Server
from tests.integration.wire import (
    HANG,
)

BLOCKING = """
    import sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name == BLOCKED or name.startswith(BLOCKED):
                raise ModuleNotFoundError(f"{name} is blocked", name=name)

    sys.meta_path.insert(0, Blocked())
"""


def run_blocking(blocked: tuple[str, ...], script: str) -> str:
    code = f"BLOCKED = {blocked!r}\n{textwrap.dedent(BLOCKING)}\n{textwrap.dedent(script)}"
    code = code.replace("name == BLOCKED or ", "")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = ("torch", "click", "google.rpc", "uvloop", "structlog", "pydantic", "prometheus_client")


def test_the_client_needs_none_of_the_servers_packages():
    loaded = run_blocking(
        (*HEAVY, "safetensors", "grpc_health", "grpc_reflection", "grpc_status", "pandas"),
        """
        import stepstate.client, stepstate.errors
        print(*sorted(sys.modules))
        """,
    ).split()
    assert "stepstate.client" in loaded
    assert not [name for name in loaded if name.startswith(HEAVY)]
    assert "stepstate.server" not in loaded


async def test_errors_are_understood_without_googles_package(server: Server):
    script = f"""
        import asyncio
        from stepstate import errors
        from stepstate.client import AsyncClient, Client
        nan = [[0.0] * 3, [float("nan")] * 3]

        def told(run):
            try:
                run()
            except errors.StepstateError as error:
                print(type(error).__name__, error.fields().get("column", ""))

        with Client({server.address!r}) as client:
            session = client.open("lstm")
            print(len(session.step([0.0] * 3)))
            told(lambda: session.step(nan[1]))
            told(lambda: list(session.stream(nan)))

        async def stream():
            async with AsyncClient({server.address!r}) as client:
                session = await client.open("lstm")
                async for y in session.stream(nan):
                    print(len(y))

        told(lambda: asyncio.run(stream()))
    """
    told = await asyncio.to_thread(run_blocking, HEAVY, script)
    assert told.splitlines() == ["2", *["NonFiniteInput x0"] * 2, "2", "NonFiniteInput x0"]
