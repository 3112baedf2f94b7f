"""The floor: a bare `grpc.aio` server on uvloop that sends every message back.

It parses nothing and keeps nothing, so what it costs is what the transport costs. With `--tuned`
it gets gRPC's events as `stepstate serve` does, see `stepstate.loop`.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TypeAlias

import uvloop

from stepstate.loop import ServerLoop, set_up_grpc

TUNED = "--tuned"
if TUNED in sys.argv:
    set_up_grpc()

import grpc  # noqa: E402

SERVICE = "benchmarks.Echo"
STREAM = f"/{SERVICE}/Stream"
UNARY = f"/{SERVICE}/Unary"

_Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"
_Handler: TypeAlias = "grpc.RpcMethodHandler[object, object]"


async def _echo(_requests: object, context: _Context) -> None:
    while (message := await context.read()) is not grpc.aio.EOF:
        await context.write(message)


async def _echo_once(request: object, _context: _Context) -> object:
    return request


def add_echo(server: grpc.aio.Server) -> None:
    """Adds the two RPCs to a server."""
    stream: _Handler = grpc.stream_stream_rpc_method_handler(_echo)
    unary: _Handler = grpc.unary_unary_rpc_method_handler(_echo_once)
    methods = {"Stream": stream, "Unary": unary}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))


async def _serve() -> None:
    # Without so_reuseport, as the service: two servers never share a port.
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    add_echo(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"echo on 127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=ServerLoop if TUNED in sys.argv else uvloop.Loop) as runner:
        runner.run(_serve())
