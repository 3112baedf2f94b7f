"""Servers that answer the contract's steps at once: on `grpc.aio`, or on the lean transport.

Each parses the request and makes a reply of the same size as a real one, and computes nothing: what
it costs is what the transport and the messages cost. `floor.cc` is the same in C++.

    python -m benchmarks.step_echo grpcio|lean
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, TypeAlias

import grpc
import uvloop

from stepstate.h2grpc import Call, H2Server
from stepstate.v1 import stepstate_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["StepstateService"].full_name
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


def _reply_to(data: bytes) -> bytes:
    request = pb.StepRequest.FromString(data)
    reply = pb.StepResponse(
        session_id=request.session_id, t=request.t + 1, durable_t=request.t, y=request.x[:1]
    )
    return reply.SerializeToString()


async def _step(data: bytes, _context: _Context) -> bytes:
    return _reply_to(data)


async def _stream_steps(_requests: object, context: _Context) -> None:
    while (data := await context.read()) is not grpc.aio.EOF:
        await context.write(_reply_to(data))


class _Echo:
    """A `MessageSink` that answers where a message is read, without a task."""

    def __init__(self, call: Call) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._call = call

    def received(self, payload: bytes) -> None:
        """See `MessageSink`."""
        if not self._call.send(_reply_to(payload)):
            self._call.pause()  # what its window allows still comes, 64 KiB

    def half_closed(self) -> None:
        """See `MessageSink`."""
        self.ended.set_result(None)

    def failed(self, error: Exception) -> None:
        """See `MessageSink`."""
        self.ended.set_exception(error)

    def writable(self) -> None:
        """See `MessageSink`."""
        self._call.resume()


async def _attached_steps(_requests: object, call: Call) -> None:
    echo = _Echo(call)
    call.attach(echo)
    await echo.ended


def _make_server(transport: str) -> Any:
    """A `grpc.aio.Server`, or an `H2Server`, which is used as one."""
    lean = transport == "lean"
    stream: Any = _attached_steps if lean else _stream_steps
    methods: dict[str, Any] = {
        "StreamSteps": grpc.stream_stream_rpc_method_handler(stream),
        "Step": grpc.unary_unary_rpc_method_handler(_step),
    }
    # Without so_reuseport, as the service: two servers never share a port.
    server = H2Server() if lean else grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, methods),))
    return server


async def _serve(transport: str) -> None:
    server = _make_server(transport)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"echo on 127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(sys.argv[1]))
