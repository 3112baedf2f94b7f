"""What gRPC says of a call, without gRPC."""

from __future__ import annotations

from collections.abc import Callable


class CallContext:
    """A call of a peer; it ends when a test says so."""

    def __init__(self, peer: str, *, forwarded_for: str | None = None) -> None:
        self._peer = peer
        self._metadata = () if forwarded_for is None else (("x-forwarded-for", forwarded_for),)
        self._callbacks: list[Callable[[object], None]] = []

    def peer(self) -> str:
        return self._peer

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def add_done_callback(self, callback: Callable[[object], None]) -> None:
        self._callbacks.append(callback)

    def end(self) -> None:
        for callback in self._callbacks:
            callback(self)
