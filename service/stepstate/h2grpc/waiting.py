"""The streams of a connection whose messages wait for a window: who is next, who waits too long.

A client decides how fast it takes what it asked for. It may stop (its windows stay shut), or take
one byte at a time ("data dribble", CVE-2019-9511). So the streams send one frame each in turn, a
tiny frame costs the client credit (`Cost.PIECE`), and a stream without progress is found.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from stepstate.h2grpc.stream import PROGRESS_BYTES, Http2Stream, Sender


@dataclass(frozen=True, slots=True)
class _Mark:
    """What a stream, and its connection, had sent when it last made progress."""

    time: float
    stream: int
    connection: int


class WaitingStreams:
    """The streams of one connection whose messages wait for a window."""

    __slots__ = ("_marks", "_progress", "_pumping", "_ready")

    def __init__(self) -> None:
        self._marks: dict[Http2Stream, _Mark | None] = {}  # None: not looked at yet
        self._ready: OrderedDict[Http2Stream, None] = OrderedDict()  # wait for the connection only
        self._progress = 0
        self._pumping = False

    @property
    def ready(self) -> bool:
        """Whether any waits only for the connection."""
        return bool(self._ready)

    def add(self, stream: Http2Stream, sender: Sender) -> None:
        """A stream of this connection has something to send, or may send more."""
        self._marks.setdefault(stream)
        if stream.send_window > 0:
            self._ready[stream] = None
            self.pump(sender)

    def remove(self, stream: Http2Stream) -> None:
        """A stream has ended."""
        self._marks.pop(stream, None)
        self._ready.pop(stream, None)

    def pump(self, sender: Sender) -> None:
        """Sends one frame of each stream in turn, as far as the windows allow."""
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._ready and sender.send_window > 0:
                stream, _ = self._ready.popitem(last=False)
                before = stream.progress
                if stream.send_piece():
                    self._ready[stream] = None
                self._progress += stream.progress - before
        finally:
            self._pumping = False

    def stalled(self, now: float, seconds: float) -> list[Http2Stream]:
        """The streams that made no progress in so long; to be called now and then.

        Progress is PROGRESS_BYTES, or all that waited, if it was less. A stream that waits only
        for the connection's window shares the progress of all.
        """
        found = []
        for stream, mark in list(self._marks.items()):
            if not stream.queued_bytes:
                del self._marks[stream]
            elif mark is None or self._moved(stream, mark):
                self._marks[stream] = _Mark(now, stream.progress, self._progress)
            elif now - mark.time > seconds:
                found.append(stream)
        return found

    def _moved(self, stream: Http2Stream, mark: _Mark) -> bool:
        return stream.progress - mark.stream >= PROGRESS_BYTES or (
            stream.send_window > 0 and self._progress - mark.connection >= PROGRESS_BYTES
        )
