"""Snapshots on the wire: whole where a message can hold them, else in parts.

What `ExportSession` gives any client can read, `ImportSession` takes; and what `StreamExport`
gives `StreamImport` takes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from stepstate.errors import InvalidField, SnapshotTooLarge
from stepstate.sessions import ResidentSession, SessionService
from stepstate.transport.convert import REPLY_BYTES, decode_import, encode_session
from stepstate.transport.reply_budget import ReplyBudget
from stepstate.v1 import stepstate_pb2 as pb

if TYPE_CHECKING:
    from stepstate.transport.interceptor import Context

PART_BYTES = 2**20
MAX_SNAPSHOT_BYTES = 256 * 2**20
"""As many bytes as the replay windows of all sessions have by default."""


async def export_whole(
    sessions: SessionService, request: pb.ExportSessionRequest
) -> pb.ExportSessionResponse:
    """A snapshot in one reply.

    Raises:
        SnapshotTooLarge; and as `SessionService.export`.
    """
    snapshot, standing = await sessions.export(request.session_id)
    reply = pb.ExportSessionResponse(snapshot=snapshot, session=encode_session(standing))
    if reply.ByteSize() > REPLY_BYTES:
        raise SnapshotTooLarge(request.session_id, len(snapshot), REPLY_BYTES)
    return reply


async def export_parts(
    sessions: SessionService, moving: ReplyBudget, request: pb.StreamExportRequest, context: Context
) -> None:
    """Sends a snapshot in parts.

    Raises:
        SnapshotTooLarge, QueueFull; and as `SessionService.export`.
    """
    snapshot, standing = await sessions.export(request.session_id)
    size = len(snapshot)
    if size > MAX_SNAPSHOT_BYTES:
        raise SnapshotTooLarge(request.session_id, size, MAX_SNAPSHOT_BYTES)
    moving.reserve(size)
    try:
        reply = pb.StreamExportResponse(session=encode_session(standing), size=size)
        for first in range(0, size, PART_BYTES):
            reply.data = snapshot[first : first + PART_BYTES]
            await context.write(reply)
            reply = pb.StreamExportResponse()
    finally:
        moving.release(size)


async def import_parts(
    sessions: SessionService, moving: ReplyBudget, requests: AsyncIterator[pb.StreamImportRequest]
) -> ResidentSession:
    """Opens a session from a snapshot that comes in parts.

    Raises:
        InvalidField: the parts are not those of a snapshot of the size that the first one tells.
        QueueFull; and as `SessionService.restore`.
    """
    first = await anext(requests, None)
    if first is None:
        raise InvalidField("data", "is missing: send the parts of a snapshot")
    size = first.size
    if not 0 < size <= MAX_SNAPSHOT_BYTES:
        raise InvalidField(
            "size", f"is {size}, expected the bytes of the snapshot, at most {MAX_SNAPSHOT_BYTES}"
        )
    copying = decode_import(first)
    data, part = bytearray(), first.data
    try:
        while len(data) <= size:
            moving.reserve(len(part))  # what has come, not what is announced
            data += part
            following = await anext(requests, None)
            if following is None:
                break
            part = following.data
        if len(data) != size:
            raise InvalidField("data", f"has {len(data)} bytes in all, and size is {size}")
        return await sessions.restore(bytes(data), copying)
    finally:
        moving.release(len(data))
