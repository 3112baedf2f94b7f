"""Memory that one connection makes the server keep, beside the calls themselves.

What is counted: messages that have not come whole, messages that came while their receiver had
paused the stream, and what waits in the socket's buffer for a client that does not read. A message
that comes whole in one frame and is taken at once is not counted.

Rule 1: a message is received beyond the window of its stream only when there is memory for all of
        it. Until then it waits; those of one connection go on in the order in which they began.
Rule 2: what comes within the window and does not fit ends its stream: it can't be held back.
Rule 3: a message that comes slowly keeps its memory only as long as nobody waits for memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

PATIENCE_SECONDS = 2.0
SLOW_BYTES = 2**18
"""A second, on average: a message that comes more slowly gives way after `PATIENCE_SECONDS`."""


class ConnectionMemory(Protocol):
    """What one connection may keep."""

    @property
    def contended(self) -> bool:
        """Whether the rest of a message waits for memory, on any connection."""
        ...

    def reserve(self, size: int) -> bool:
        """Reserves bytes that a window allowed; False: no room, and nothing was reserved."""
        ...

    def reserve_rest(self, size: int) -> bool:
        """Reserves bytes of a message beyond its window; False: no room."""
        ...

    def release(self, size: int, rest: int = 0) -> None:
        """Releases bytes, and those of the rests of messages."""
        ...

    def wait_for(self, size: int, then: Callable[[], None]) -> None:
        """Calls a function, later, when so many bytes of a rest fit; one at a time."""
        ...

    def refusal(self, size: int) -> Exception:
        """The error of a call for which so many bytes could not be reserved."""
        ...

    def close(self) -> None:
        """The connection is gone: nothing waits any more."""
        ...


class UncountedMemory:
    """A `ConnectionMemory` without a limit."""

    contended = False

    def reserve(self, _size: int) -> bool:
        """See `ConnectionMemory`."""
        return True

    def reserve_rest(self, _size: int) -> bool:
        """See `ConnectionMemory`."""
        return True

    def release(self, _size: int, _rest: int = 0) -> None:
        """See `ConnectionMemory`."""

    def wait_for(self, _size: int, then: Callable[[], None]) -> None:
        """See `ConnectionMemory`."""
        raise NotImplementedError("there is always room")

    def refusal(self, size: int) -> Exception:
        """See `ConnectionMemory`."""
        raise NotImplementedError("there is always room")

    def close(self) -> None:
        """See `ConnectionMemory`."""


class PartialMessage(Protocol):
    """A message that has not come whole: its stream."""

    @property
    def received_bytes(self) -> int:
        """So much of it is here."""
        ...

    @property
    def missing_bytes(self) -> int:
        """So much memory it still has to get."""
        ...

    def receive_rest(self) -> None:
        """The memory that was missing is reserved: the client may send all of it."""
        ...

    def refuse(self) -> None:
        """It gets no memory: its stream ends."""
        ...


class PartialMessages:
    """The messages of one connection that have not come whole.

    Args:
        memory: of the connection.
        clock: seconds.
    """

    __slots__ = ("_asked", "_clock", "_memory", "_since", "_waiting")

    def __init__(self, memory: ConnectionMemory, clock: Callable[[], float]) -> None:
        self._memory = memory
        self._clock = clock
        self._since: dict[PartialMessage, float] = {}
        self._waiting: OrderedDict[PartialMessage, None] = OrderedDict()
        self._asked = False  # the memory will call back

    def begin(self, message: PartialMessage, size: int) -> bool:
        """Reserves what may come of a message within its window; False: there is no room."""
        if not self._memory.reserve(size):
            return False
        self._since[message] = self._clock()
        return True

    def want_rest(self, message: PartialMessage) -> None:
        """Has the rest of a message received: now, or when there is memory."""
        if message in self._waiting:
            return
        if self._memory.contended or not self._reserve_rest(message):
            self._waiting[message] = None
            self._wait()

    def end(self, message: PartialMessage) -> None:
        """It has come, or never will."""
        self._since.pop(message, None)
        self._waiting.pop(message, None)

    def end_slow(self) -> None:
        """Ends the streams of messages that come slowly, if others wait for memory."""
        if not self._memory.contended:
            return
        now = self._clock()
        for message, since in list(self._since.items()):
            age = now - since
            slow = age >= PATIENCE_SECONDS and message.received_bytes < age * SLOW_BYTES
            if slow and message not in self._waiting:
                message.refuse()

    def _wait(self) -> None:
        if self._asked:
            return
        self._asked = True
        self._memory.wait_for(next(iter(self._waiting)).missing_bytes, self._go_on)

    def _go_on(self) -> None:
        self._asked = False
        while self._waiting:
            message = next(iter(self._waiting))
            if not self._reserve_rest(message):
                self._wait()
                return
            del self._waiting[message]

    def _reserve_rest(self, message: PartialMessage) -> bool:
        if not self._memory.reserve_rest(message.missing_bytes):
            return False
        self._since[message] = self._clock()
        message.receive_rest()
        return True
