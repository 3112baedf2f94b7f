"""The last replies of ended sequences, for clients that send their last request again.

Rule 1: an ended sequence keeps its reply and a digest of its request, and neither of the messages.
Rule 2: all of them together are bounded in number and in bytes. Beyond that the oldest of the
        tenant that has most of them goes first (of the client, where nobody is known), so that
        nobody's flood of endings evicts the one reply that another waits for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from stepstate.budget import MemoryAccount, MemoryUse
from stepstate.identity import SessionKey
from stepstate.transport.peers import Key

MAX_ENDED = 1024
MAX_ENDED_BYTES = 8 * 2**20
"""Of all; several times what as many replies with some hundred values take."""
MAX_REPLY_BYTES = 16_384
"""A longer reply is not kept."""
_ENTRY_BYTES = 600
"""Of an entry beside its reply, with its id."""


@dataclass(frozen=True, slots=True)
class EndedSequence:
    """What a retry of the last request of a sequence is compared with, and answered."""

    group: Key
    """Of peers, or the one peer, whose connection ended it."""
    t: int
    """The parameter step_t of its last request."""
    digest: bytes
    """Of that request."""
    reply: bytes
    """A ModelInferResponse without the id of the request."""

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return len(self.reply) + _ENTRY_BYTES


class EndedSequences:
    """Ended sequences by key, in the order of their ends.

    Args:
        memory: what they all hold is counted there.
    """

    def __init__(self, memory: MemoryAccount) -> None:
        self._memory = memory
        self._by_key: dict[SessionKey, EndedSequence] = {}
        self._counts: Counter[Key] = Counter()  # by group of peers
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, key: SessionKey) -> EndedSequence | None:
        """The sequence that had this key last, if it is remembered."""
        return self._by_key.get(key)

    def add(self, key: SessionKey, ended: EndedSequence) -> None:
        """Remembers a sequence, if its reply is not too long and there is memory."""
        self.discard(key)
        size = ended.size
        if len(ended.reply) > MAX_REPLY_BYTES:
            return
        while self._by_key and not self._has_room(size):
            self.discard(self._oldest_of(max(self._counts, key=self._counts.__getitem__)))
        if self._has_room(size):
            self._memory.reserve(MemoryUse.ENDED, size)
            self._bytes += size
            self._by_key[key] = ended
            self._counts[ended.group] += 1

    def discard(self, key: SessionKey) -> None:
        """Forgets a sequence."""
        ended = self._by_key.pop(key, None)
        if ended is None:
            return
        self._memory.release(MemoryUse.ENDED, ended.size)
        self._bytes -= ended.size
        self._counts[ended.group] -= 1
        if not self._counts[ended.group]:
            del self._counts[ended.group]

    def _has_room(self, size: int) -> bool:
        return (
            len(self._by_key) < MAX_ENDED
            and self._bytes + size <= MAX_ENDED_BYTES
            and self._memory.fits(size)
        )

    def _oldest_of(self, group: Key) -> SessionKey:
        return next(one for one, ended in self._by_key.items() if ended.group == group)
