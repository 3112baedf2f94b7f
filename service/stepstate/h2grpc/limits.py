"""What one connection may cost: bounds, and a meter of work that no call pays for.

A client can make a server work without making a call: by PING, SETTINGS, PRIORITY and empty frames,
by streams that it opens and resets, or by resets that it makes the server send. Each has a cost
(`Cost`), and a connection has credit for it. Replies and finished calls bring credit back; what
the client sends does not, as 5 bytes are a message. So a client that is busy with calls is never
ended for its control frames, however fast it is, nor for deadlines that pass, and one that only
sends control frames is ended after a fixed amount of work, however slowly the machine runs:
nothing here depends on time.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from stepstate.h2grpc.errors import ConnectionFailure
from stepstate.h2grpc.frames import DEFAULT_WINDOW, ErrorCode

TOO_MUCH_WORK = "too much work without calls"
CREDIT = 10_000
"""Of a new connection, and the most that it can have."""


class Cost(IntEnum):
    """What a connection pays for events that no call pays for."""

    FRAME = 1
    """A frame that does nothing: PING, SETTINGS, PRIORITY, empty DATA, an unknown type, a
    WINDOW_UPDATE or RST_STREAM of a stream that has ended; or the end of a stream that had an
    answer."""
    PIECE = 2
    """A DATA frame that this side had to cut short, as the window was tiny."""
    RESET = 10
    """A stream that the client reset before the answer began, or that this side had to end for
    its faults."""
    LONG_HEADERS = 250
    """A call that is refused as its headers are too long."""
    ABRUPT_RESET = 50
    """A stream that the client reset in the same read that opened it: no client waits so short."""


class Earning(IntEnum):
    """What brings credit back."""

    MESSAGE = 4
    """A reply, or a large piece of one."""
    CALL = 30
    """A call that ended with a status."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Http2Limits:
    """The bounds of a connection."""

    concurrent_streams: int = 1024
    message_bytes: int = 16 * 2**20
    """The longest message, as it is sent and when it is inflated."""
    stream_window: int = DEFAULT_WINDOW
    """What a client may send on a stream before the server takes it. A message that is longer gets
    the rest as soon as its length is known and there is memory for it."""
    connection_window: int = 16 * 2**20
    """The same of all streams. It is given back for every byte that comes, whatever the stream."""
    header_list_bytes: int = 16_384
    """Of a call, as SETTINGS_MAX_HEADER_LIST_SIZE counts them. A call with more is refused."""
    header_block_bytes: int = 65_536
    """Of a call, both in all its frames and decompressed. More ends the connection."""
    header_frames: int = 8
    """HEADERS and CONTINUATION of a call."""
    ping_interval_seconds: float = 5.0
    """A client may ping so often without replies in between. gRPC's clients ping every 10 s or
    less often; the network may move two pings together."""
    ping_strikes: int = 2
    """Pings in a row that come sooner; one more ends the connection."""


class WorkMeter:
    """The credit of one connection."""

    __slots__ = ("credit",)

    def __init__(self) -> None:
        self.credit: int = CREDIT

    def charge(self, cost: int) -> None:
        """Takes credit for what has come.

        Raises:
            ConnectionFailure: there is not so much left.
        """
        self.credit -= cost
        if self.credit < 0:
            raise ConnectionFailure(ErrorCode.ENHANCE_YOUR_CALM, TOO_MUCH_WORK)

    def spend(self, cost: int) -> None:
        """Takes credit for what is sent, and raises nothing: its sender is not to blame.

        Without credit the connection ends when its output is taken.
        """
        self.credit -= cost

    def earn(self, earning: int) -> None:
        """Brings credit back."""
        self.credit = min(CREDIT, self.credit + earning)


class PingMeter:
    """Finds clients that ping too often, as gRPC's servers do (its proposal A8).

    Between two replies a client may ping as often as it likes: that is how it measures how much
    is on its way (the bandwidth-delay product). Without replies it may ping now and then.

    Args:
        limits: how often.
    """

    __slots__ = ("_interval", "_last", "_sent", "_strikes", "_strikes_allowed")

    def __init__(self, limits: Http2Limits) -> None:
        self._interval = limits.ping_interval_seconds
        self._strikes_allowed = limits.ping_strikes
        self._strikes = 0
        self._last = float("-inf")
        self._sent = 0

    def count(self, now: float, sent: int) -> None:
        """Counts a ping.

        Args:
            now: seconds.
            sent: frames of replies that the client was sent so far.

        Raises:
            ConnectionFailure: it is one too many; gRPC's clients know the words, and ping half as
                often from then on.
        """
        early = sent == self._sent and now - self._last < self._interval
        self._strikes = self._strikes + 1 if early else 0
        self._last, self._sent = now, sent
        if self._strikes > self._strikes_allowed:
            raise ConnectionFailure(ErrorCode.ENHANCE_YOUR_CALM, "too_many_pings")
