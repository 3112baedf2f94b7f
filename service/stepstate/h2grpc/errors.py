"""How streams and connections fail (RFC 9113, section 5.4)."""

from __future__ import annotations

from stepstate.h2grpc.frames import ErrorCode


class ConnectionFailure(Exception):
    """The other side broke the protocol: the connection ends with GOAWAY.

    Args:
        code: why.
        debug: the same for a person; it is sent.
    """

    def __init__(self, code: ErrorCode, debug: str = "") -> None:
        super().__init__(code, debug)
        self.code = code
        self.debug = debug


class HeadersTooLong(ConnectionFailure):
    """The headers of a call are so long that they are not decoded: the connection ends with it.

    Args:
        stream_id: of the call.
    """

    def __init__(self, stream_id: int) -> None:
        super().__init__(ErrorCode.ENHANCE_YOUR_CALM, "headers are too long")
        self.stream_id = stream_id


class StreamFailure(Exception):
    """The other side broke the protocol on one stream: the stream ends with RST_STREAM."""

    def __init__(self, code: ErrorCode) -> None:
        super().__init__(code)
        self.code = code
