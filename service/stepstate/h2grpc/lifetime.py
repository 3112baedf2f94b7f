"""What time does to a connection: it is asked whether it is alive, grows old, and is ended.

Everything here is looked at about once a second. What a client's *work* may cost is in `limits`.
"""

from __future__ import annotations

from dataclasses import dataclass

from stepstate.h2grpc.connection import Http2Connection

AGE_JITTER = 0.1
"""A connection's maximal age differs from another's by up to this part of it, in both directions,
so that connections that began together don't end together (gRPC's proposal A9)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionTimes:
    """Seconds after which something is done to a connection."""

    handshake: float = 20.0
    """For TLS, and until a client shows that it speaks HTTP/2."""
    keepalive: float = 60.0
    """After so long without a frame the client is asked whether it is there."""
    keepalive_answer: float = 20.0
    """For its answer."""
    stalled: float = 60.0
    """A stream whose replies wait for a window so long without progress is ended, and so is a
    connection whose client reads nothing."""
    drain_answer: float = 5.0
    """For the answer to the ping between the two GOAWAYs of a graceful end."""
    last_output: float = 5.0
    """For a client to take the last output, such as the GOAWAY that says what it did wrong."""
    age: float = 0.0
    """A connection so old ends gracefully, so that its client connects again, perhaps to another
    server. 0: never. gRPC calls it MAX_CONNECTION_AGE."""
    age_grace: float = 60.0
    """For the calls of a connection that has reached its age; then they are cut."""


class Lifetime:
    """The time of one connection.

    Args:
        http2: its state.
        times: when something is done to it.
        now: seconds; it begins.
        jitter: of its age, from -1 to 1.
    """

    __slots__ = (
        "_asked",
        "_draining_since",
        "_ended_since",
        "_frames",
        "_http2",
        "_old_at",
        "_quiet_since",
        "_times",
        "_unread",
        "_unread_since",
    )

    def __init__(
        self, http2: Http2Connection, times: ConnectionTimes, now: float, *, jitter: float
    ) -> None:
        self._http2 = http2
        self._times = times
        self._frames = 0
        self._quiet_since = now
        self._asked = False
        self._unread = 0
        self._unread_since = now
        self._draining_since: float | None = None
        self._ended_since: float | None = None
        self._old_at = now + times.age * (1 + AGE_JITTER * jitter) if times.age else float("inf")

    def grow_old_at(self, moment: float) -> None:
        """Lets the connection reach its maximal age at this moment, if it would not have before."""
        self._old_at = min(self._old_at, moment)

    def look(self, now: float, unread: int = 0) -> bool:
        """Does what is due.

        Args:
            now: seconds.
            unread: bytes that the client leaves in the server's buffer; meanwhile it is not read.

        Returns:
            Whether the connection is kept. If not, it is to be aborted.
        """
        if self._http2.ended:
            if self._ended_since is None:
                self._ended_since = now
            return now - self._ended_since <= self._times.last_output
        self._grow_old(now)
        self._go_on_draining(now)
        self._http2.end_stalled(now, self._times.stalled)
        self._http2.partial.end_slow()
        if unread:
            return self._reads(now, unread)
        self._unread = 0
        return self._is_alive(now)

    def _reads(self, now: float, unread: int) -> bool:
        """Whether the client reads. That it sends nothing is no wonder meanwhile."""
        if not self._unread or unread < self._unread:
            self._unread, self._unread_since = unread, now
        self._quiet_since, self._asked = now, False
        return now - self._unread_since <= self._times.stalled

    def _is_alive(self, now: float) -> bool:
        """Whether the client may still be there; asks it after a time without a frame."""
        times, http2 = self._times, self._http2
        if http2.received_frames != self._frames:
            self._frames, self._quiet_since, self._asked = http2.received_frames, now, False
        quiet = now - self._quiet_since
        if not http2.begun:
            return quiet <= times.handshake
        if self._asked:
            return quiet <= times.keepalive_answer
        if quiet > times.keepalive:
            self._asked, self._quiet_since = True, now
            http2.check_alive()
        return True

    def _grow_old(self, now: float) -> None:
        if now >= self._old_at + self._times.age_grace:
            self._http2.end()
        elif now >= self._old_at:
            self._http2.drain()

    def _go_on_draining(self, now: float) -> None:
        """Sends the second GOAWAY if the client does not answer."""
        if not self._http2.draining:
            return
        if self._draining_since is None:
            self._draining_since = now
        if now - self._draining_since > self._times.drain_answer:
            self._http2.refuse_more()
