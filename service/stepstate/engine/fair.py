"""Fair queues: what waits is taken from its sources in turn, so that none waits for all of another.

A source is whoever sends work: any hashable object, see `engine.work.Caller`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from heapq import heappop, heappush, heapreplace
from itertools import count, islice
from typing import Generic, TypeVar

from stepstate.engine.chunked import ChunkedRequest
from stepstate.engine.work import W

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items with some rows each, in an order in which all sources get the same number of rows.

    Self-clocked fair queueing (S. J. Golestani, "A self-clocked fair queueing scheme for broadband
    applications", 1994): an item of n rows has its turn when each other source that waits has had
    about n rows since the item became the first of its own. A single row of a source that had
    nothing waiting comes before the second row of any other.
    """

    def __init__(self) -> None:
        self._items: dict[Hashable, deque[tuple[T, int]]] = {}
        self.turns: list[tuple[int, int, Hashable]] = []
        """A heap, empty if nothing waits: when the first item of a source is due, in rows; a number
        to break ties; the source."""
        self._now = 0
        self._numbers = count()

    def put(self, source: Hashable, item: T, rows: int) -> None:
        """Queues an item behind those of its source."""
        items = self._items.get(source)
        if items is None:
            items = self._items[source] = deque()
            heappush(self.turns, (self._now + rows, next(self._numbers), source))
        items.append((item, rows))

    def first(self) -> tuple[T, int]:
        """The item whose turn it is, and its rows."""
        return self._items[self.turns[0][2]][0]

    def take(self) -> None:
        """Removes the item whose turn it is."""
        self._now, _, source = self.turns[0]
        items = self._items[source]
        items.popleft()
        if items:
            heapreplace(self.turns, (self._now + items[0][1], next(self._numbers), source))
        else:
            heappop(self.turns)
            del self._items[source]


class RequestQueue(Generic[W]):
    """Long requests, by kind and source: kinds take turns, and so do the sources of one kind."""

    def __init__(self) -> None:
        self.kinds: dict[Hashable, dict[Hashable, deque[ChunkedRequest[W]]]] = {}
        """Empty if nothing waits."""

    def put(self, request: ChunkedRequest[W]) -> None:
        """Queues a request behind those of its kind and source."""
        sources = self.kinds.setdefault(request.kind, {})
        sources.setdefault(request.work.reply_to.source, deque()).append(request)

    def take(self, most: int) -> list[ChunkedRequest[W]]:
        """Removes the next requests for one chunk: of one kind, and as many of each source.

        So sources with many requests get no more rows of the chunk than those with one.
        """
        kind = next(iter(self.kinds))
        sources = self.kinds.pop(kind)
        chosen = list(islice(sources, most))
        each = min(most // len(chosen), *(len(sources[source]) for source in chosen))
        taken = []
        for source in chosen:
            waiting = sources.pop(source)
            taken += [waiting.popleft() for _ in range(each)]
            if waiting:
                sources[source] = waiting  # behind the others
        if sources:
            self.kinds[kind] = sources
        return taken
