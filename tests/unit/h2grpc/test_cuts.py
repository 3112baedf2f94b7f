"""Bytes that arrive cut anywhere, in both directions, at windows of any size."""

from __future__ import annotations

from itertools import cycle

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.h2grpc.client import Client, message


class CutClient(Client):
    """A client between which and its server all bytes are cut.

    Args:
        cuts: the sizes of the pieces, again and again.
        window: of each of the client's streams.
    """

    def __init__(self, cuts: list[int], *, window: int) -> None:
        self._cuts = cycle(cuts)
        super().__init__(window=window)

    def _pieces(self, data: bytes) -> list[bytes]:
        found, place = [], 0
        while place < len(data):
            size = next(self._cuts)
            found.append(data[place : place + size])
            place += size
        return found

    def _to_server(self) -> bool:
        data = self.h2.data_to_send()
        for piece in self._pieces(data):
            self.server.receive(piece)
        return bool(data)

    def _to_client(self) -> bool:
        data = self.server.take_output()
        for piece in self._pieces(data):
            for event in self.h2.receive_data(piece):
                self._note(event)
        return bool(data)


def seen(client: Client, calls: list[list[bytes]]) -> list[tuple[list[bytes], bytes, str]]:
    """Makes calls whose messages mix; returns what both sides saw of each."""
    ids = [client.open() for _ in calls]
    for turn in range(max(map(len, calls))):
        for stream_id, payloads in zip(ids, calls, strict=True):
            if turn < len(payloads):
                client.h2.send_data(stream_id, message(payloads[turn]), pad_length=turn or None)
        if turn % 2:
            client.exchange()
    for stream_id in ids:
        client.h2.end_stream(stream_id)
    client.exchange()
    return [
        (client.host.calls[n].messages, client.data[n], client.trailers[n]["grpc-status"])
        for n in ids
    ]


@given(
    calls=st.lists(
        st.lists(st.binary(max_size=400), min_size=1, max_size=4), min_size=1, max_size=4
    ),
    cuts=st.lists(st.integers(1, 80), min_size=1),
    window=st.integers(1, 3000),
)
def test_what_both_sides_see_does_not_depend_on_the_cuts(
    calls: list[list[bytes]], cuts: list[int], window: int
) -> None:
    whole = seen(Client(window=window), calls)
    assert seen(CutClient(cuts, window=window), calls) == whole
    assert whole == [(sent, b"".join(map(message, sent)), "0") for sent in calls]
