"""How streams and connections fail (RFC 9113, section 5.4)."""

from __future__ import annotations

from stepstate.h2grpc.frames import ErrorCode


class ConnectionFailure(Exception):
    """The other side broke the protocol: the connection ends with GOAWAY.

    Args:
        code: why.
        debug: the same for a person; it is sent.
        stream_id: the stream whose call did it, and ends with the same code; 0: none.
    """

    def __init__(self, code: ErrorCode, debug: str = "", *, stream_id: int = 0) -> None:
        super().__init__(code, debug)
        self.code = code
        self.debug = debug
        self.stream_id = stream_id


class StreamFailure(Exception):
    """The other side broke the protocol on one stream: the stream ends with RST_STREAM."""

    def __init__(self, code: ErrorCode) -> None:
        super().__init__(code)
        self.code = code
