"""A gRPC server for asyncio in Python, over HTTP/2 without I/O.

It takes what `grpc.aio.server()` takes: the same servicers, handlers and interceptors. It knows
nothing of Stepstate.

`frames`, `headers`, `blocks`, `limits`, `memory`, `stream`, `waiting`, `connection` and `lifetime`
are the protocol, tested without sockets; `call` serves one RPC, and `server` is the shell of
sockets, tasks and timers, to which `listening` and `tls` belong.
"""

from stepstate.h2grpc.call import Call, MessageSink
from stepstate.h2grpc.lifetime import ConnectionTimes
from stepstate.h2grpc.limits import Http2Limits
from stepstate.h2grpc.server import H2Server

__all__ = ["Call", "ConnectionTimes", "H2Server", "Http2Limits", "MessageSink"]
