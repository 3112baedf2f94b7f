"""A gRPC server for asyncio in Python, over HTTP/2 without I/O.

It takes what `grpc.aio.server()` takes: the same servicers, handlers and interceptors. It knows
nothing of Stepstate. In a program, `H2Server(interceptors)` takes the place of
`grpc.aio.server(interceptors=interceptors)`, and a function that gives an `ssl.SSLContext` that of
credentials:

    server = H2Server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await server.wait_for_termination()

A method whose messages are many and short is served without a task for each: it gives its context,
which is a `Call`, a `MessageSink` by `attach`, waits for what ends the call, and answers by `send`.

`frames`, `headers`, `blocks`, `limits`, `memory`, `stream`, `waiting`, `connection` and `lifetime`
are the protocol, tested without sockets; `call` serves one RPC, and `server` is the shell of
sockets, tasks and timers, to which `listening` and `tls` belong.
"""

from stepstate.h2grpc.call import Call, MessageSink
from stepstate.h2grpc.lifetime import ConnectionTimes
from stepstate.h2grpc.limits import Http2Limits
from stepstate.h2grpc.server import H2Server

__all__ = ["Call", "ConnectionTimes", "H2Server", "Http2Limits", "MessageSink"]
