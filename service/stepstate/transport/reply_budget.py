"""How many bytes are on their way: a client that does not read must not fill memory."""

from __future__ import annotations

from stepstate.errors import QueueFull

MAX_BYTES = 256 * 2**20
"""Some sixty of the longest replies, or a million short ones."""


class ReplyBudget:
    """Bytes of replies accepted and not yet handed to gRPC, all calls together.

    Args:
        what: the bytes that are counted, for a person.
    """

    def __init__(self, what: str = "bytes of unread replies on this server") -> None:
        self._what = what
        self._bytes = 0

    def reserve(self, count: int) -> None:
        """Makes room for a reply.

        Raises:
            QueueFull: too much is on its way already.
        """
        if self._bytes and self._bytes + count > MAX_BYTES:
            raise QueueFull(self._what, MAX_BYTES)
        self._bytes += count

    def release(self, count: int) -> None:
        """Gives back the room of a reply that was sent, or never will be."""
        self._bytes -= count
