"""Which one-row request comes next for each session, so that it is recognized by its bytes.

Rule 1: an expectation decides nothing. It says how to read a message; whether its row is applied is
        decided by the sessions, and what they do not take at once is parsed by protobuf.
"""

from __future__ import annotations

from stepstate.models import Manifest
from stepstate.sessions import ResidentSession, RowReplyTo, SessionRef, SingleRow
from stepstate.transport.row_codec import RowCodec
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.floats import packed_header

LARGEST_WIDTH = 1024
"""Values of x or y: what more takes is reserved in memory before it is used."""
LONGEST_NAME = 127
"""Bytes of an id whose length is one byte of the message."""


def is_wide(manifest: Manifest) -> bool:
    """Whether rows of a model are too wide for the fast path."""
    return max(manifest.input_width, manifest.output_width) > LARGEST_WIDTH


class Expectation:
    """What is known of the requests of one session.

    Args:
        session: the session.
        ref: a valid reference to it.
    """

    __slots__ = ("_generation", "_session")

    def __init__(self, session: ResidentSession, ref: SessionRef) -> None:
        self._session = session
        self._generation = ref.generation

    def is_of(self, session: ResidentSession, ref: SessionRef) -> bool:
        """Whether it is about this session, and the reference still the valid one."""
        return self._session is session and self._generation == ref.generation


class ExpectedRow(Expectation):
    """The next row of one session.

    Args:
        session: the session.
        ref: a valid reference to it.
        codec: of its messages.
        t: rows applied before the next one.
    """

    __slots__ = ("_codec", "_prefix", "_t", "_x_bytes")

    def __init__(self, session: ResidentSession, ref: SessionRef, codec: RowCodec, t: int) -> None:
        super().__init__(session, ref)
        self._codec = codec
        self._x_bytes = codec.x_bytes
        self.expect(t)

    def expect(self, t: int) -> None:
        """The next row is this one."""
        self._t = t
        _, self._prefix = self._codec.heads(t)

    def take(self, request: bytes, reply_to: RowReplyTo) -> bool:
        """Hands the row of a request over; False: it has to go the ordinary way."""
        if request[: -self._x_bytes] != self._prefix:
            return False
        t, session = self._t, self._session
        reply_head, prefix = self._codec.heads(t + 1)
        x = request[-self._x_bytes :]
        row = SingleRow(reply_to, session, self._generation, t, x, request, reply_head)
        if not session.scheduler.add_row(row):
            return False
        self._t, self._prefix = t + 1, prefix
        return True


class ExpectedRows:
    """The next row of every session that steps row by row, on whatever stream.

    Args:
        most: sessions of which one is kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        # By the tenant and the first bytes of a request, which are the id.
        self._by_name: dict[tuple[str, bytes], ExpectedRow] = {}

    def of(self, tenant: str) -> StreamRows:
        """Those of a stream of a tenant."""
        return StreamRows(self, tenant)

    def find(self, tenant: str, request: bytes) -> ExpectedRow | None:
        """The next row of the session that a request names first."""
        if len(request) < 2:
            return None
        return self._by_name.get((tenant, request[: 2 + request[1]]))

    def expect(self, session: ResidentSession, ref: SessionRef | None, t: int) -> None:
        """Expects row t of a session next; without a reference, or a fast path, it does nothing."""
        manifest, name = session.model.manifest, session.session_id.encode()
        lacks_lags = t < manifest.lag_rows  # which a reply would have to say
        if ref is None or lacks_lags or is_wide(manifest) or len(name) > LONGEST_NAME:
            return
        head = packed_header(pb.StepRequest.SESSION_ID_FIELD_NUMBER, len(name)) + name
        key = (session.record.tenant, head)
        known = self._by_name.get(key)
        if known is not None and known.is_of(session, ref):
            known.expect(t)
            return
        if len(self._by_name) >= self._most:  # among them sessions that are gone
            self._by_name.clear()
        codec = RowCodec(session.session_id, manifest.input_width, manifest.output_width)
        self._by_name[key] = ExpectedRow(session, ref, codec, t)


class StreamRows:
    """The next rows of the sessions that one stream may name.

    Most streams are of one session: a request is compared with the row after the last one first.

    Args:
        rows: of all streams.
        tenant: whose stream it is.
    """

    __slots__ = ("_last", "_rows", "_tenant", "expect")

    def __init__(self, rows: ExpectedRows, tenant: str) -> None:
        self._rows = rows
        self._tenant = tenant
        self._last: ExpectedRow | None = None
        self.expect = rows.expect
        """See `ExpectedRows.expect`."""

    def take(self, request: bytes, reply_to: RowReplyTo) -> bool:
        """Hands over the row of a request that was expected; False: it goes the ordinary way."""
        last = self._last
        if last is not None and last.take(request, reply_to):
            return True
        self._last = expected = self._rows.find(self._tenant, request)
        return expected is not None and expected is not last and expected.take(request, reply_to)
