"""Which requests repeat one of their sequence, so that they are recognized by their bytes.

As `transport.expected_rows`, for Triton's streams; the same rule holds.
"""

from __future__ import annotations

from stepstate.sessions import ResidentSession, RowReplyTo, SessionRef, SingleRow
from stepstate.transport.expected_rows import Expectation, is_wide
from stepstate.transport.triton.call import InferCall
from stepstate.transport.triton.infer_codec import InferCodec, id_span


class ExpectedInfer(Expectation):
    """A request of one sequence that may come again, with another id and another row.

    Args:
        session: of the sequence.
        ref: a valid reference to it.
        codec: of its messages.
    """

    __slots__ = ("_codec",)

    def __init__(self, session: ResidentSession, ref: SessionRef, codec: InferCodec) -> None:
        super().__init__(session, ref)
        self._codec = codec

    @property
    def x_bytes(self) -> int:
        """Of the x of such a request."""
        return self._codec.x_bytes

    def take(self, request: bytes, reply_to: RowReplyTo) -> bool:
        """Hands the row of such a request over; False: it has to go the ordinary way."""
        codec, session = self._codec, self._session
        start, end = id_span(request)
        x, head = request[-codec.x_bytes :], codec.reply_head(request[start:end])
        row = SingleRow(reply_to, session, self._generation, None, x, request, head)
        return session.scheduler.add_row(row)


class ExpectedInfers:
    """What may come again of every sequence, on whatever stream.

    Args:
        most: sequences of which it is kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        # By the tenant and the names in a request: of the last one learned.
        self._x_bytes: dict[tuple[str, bytes], int] = {}
        # By the tenant, names and content.
        self._known: dict[tuple[str, bytes, bytes], ExpectedInfer] = {}

    def take(self, tenant: str, request: bytes, reply_to: RowReplyTo) -> bool:
        """Hands the row of an expected request over; False: it has to go the ordinary way."""
        known = self.find(tenant, request)
        return known is not None and known.take(request, reply_to)

    def find(self, tenant: str, request: bytes) -> ExpectedInfer | None:
        """What a request repeats."""
        try:
            start, end = id_span(request)
        except IndexError:
            return None
        names = request[:start]
        x_bytes = self._x_bytes.get((tenant, names))
        if x_bytes is None or not request[start:end].isascii():
            return None
        known = self._known.get((tenant, names, request[end:-x_bytes]))
        if known is None or known.x_bytes != x_bytes:  # these names have rows of several widths
            return None
        return known

    def expect(
        self, request: bytes, infer: InferCall, session: ResidentSession, ref: SessionRef | None
    ) -> None:
        """Expects an accepted request again; without a reference, or a fast path, does nothing.

        Args:
            request: as it came.
            infer: the same.
            session: that it steps.
            ref: to the session.
        """
        tenant = session.record.tenant
        known = self.find(tenant, request)
        if ref is None or (known is not None and known.is_of(session, ref)):
            return
        manifest, reply = session.model.manifest, infer.row_reply(session)
        if reply is None or is_wide(manifest):
            return
        x, y_bytes = infer.body.tensor.data, 4 * manifest.output_width
        codec = InferCodec.learn(request, x, reply, y_bytes)
        if codec is None:
            return
        if len(self._known) >= self._most:  # among them sequences that have ended
            self._known.clear()
            self._x_bytes.clear()
        self._x_bytes[tenant, codec.names] = codec.x_bytes
        self._known[tenant, codec.names, codec.content] = ExpectedInfer(session, ref, codec)
