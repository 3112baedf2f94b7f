"""Long requests: in which order they get rows of a chunk; see `tenants.fair` for single rows."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Hashable, Iterable
from itertools import islice
from typing import Generic

from stepstate.engine.chunked import ChunkedRequest
from stepstate.engine.work import W
from stepstate.tenants import Share, WorkSource


class RequestQueue(Generic[W]):
    """Long requests, by kind, share and sender: kinds take turns, and so do those of one kind.

    Each share gets rows in proportion to its weight, and has its senders take turns.
    """

    def __init__(self) -> None:
        self.kinds: dict[Hashable, dict[Share, _ShareRequests[W]]] = {}
        """Empty if nothing waits."""

    def put(self, request: ChunkedRequest[W]) -> None:
        """Queues a request behind those of its kind and sender."""
        sender = request.work.reply_to.source
        shares = self.kinds.setdefault(request.kind, {})
        waiting = shares.get(sender.share)
        if waiting is None:
            waiting = shares[sender.share] = _ShareRequests()
        waiting.put(sender, request)

    def take(self, most: int) -> list[ChunkedRequest[W]]:
        """Removes the next requests for one chunk: of one kind, and as many of each share.

        So shares with many requests get no more rows of the chunk than those with one.
        """
        kind = next(iter(self.kinds))
        shares = self.kinds.pop(kind)
        chosen = _drawn(islice(shares, most))
        each = min(most // len(chosen), *(shares[share].count for share in chosen))
        taken = []
        for share in chosen:
            waiting = shares.pop(share)
            taken += [waiting.take() for _ in range(each)]
            if waiting.count:
                shares[share] = waiting  # behind the others
        if shares:
            self.kinds[kind] = shares
        return taken


class _ShareRequests(Generic[W]):
    """The requests of one share, by sender."""

    def __init__(self) -> None:
        self.count = 0
        self._senders: dict[WorkSource, deque[ChunkedRequest[W]]] = {}

    def put(self, sender: WorkSource, request: ChunkedRequest[W]) -> None:
        self.count += 1
        self._senders.setdefault(sender, deque()).append(request)

    def take(self) -> ChunkedRequest[W]:
        self.count -= 1
        sender = next(iter(self._senders))
        requests = self._senders.pop(sender)
        request = requests.popleft()
        if requests:
            self._senders[sender] = requests  # behind the others
        return request


def _drawn(shares: Iterable[Share]) -> list[Share]:
    """Those whose turn it is: the heaviest always, others as often as their weights say.

    Drawn by lot (C. A. Waldspurger and W. E. Weihl, "Lottery scheduling", 1994), as a request
    may be in many chunks, and comes anew for each.
    """
    by_weight = [(share, share.weight) for share in shares]
    heaviest = max(weight for _, weight in by_weight)
    return [share for share, weight in by_weight if random.random() * heaviest < weight]  # noqa: S311 - a lot
