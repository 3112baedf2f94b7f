"""Lists in pages that a client with gRPC's default limit can read."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import TypeVar

from stepstate.errors import InvalidField
from stepstate.models import Model
from stepstate.sessions import SessionService, SessionSummary
from stepstate.stores import UnreadableSession
from stepstate.transport.convert import REPLY_BYTES, encode_model, encode_session
from stepstate.v1 import stepstate_pb2 as pb

PAGE_SIZE, MAX_PAGE_SIZE = 100, 1000
ENCODED_AT_ONCE = 16_384
"""Bytes: about as many take a millisecond or two."""
_ITEM_BYTES = 8
"""The tag and the length of an item, at most."""
_TOKEN_BYTES = 512

_DIGITS = re.compile(r"[0-9]{1,9}")

M = TypeVar("M", pb.Session, pb.Model)


class Page(list[M]):
    """Messages of one reply, as long as they fit."""

    def __init__(self) -> None:
        super().__init__()
        self.size = _TOKEN_BYTES

    def take(self, message: M) -> bool:
        """Adds a message if there is room; there always is for the first."""
        size = message.ByteSize() + _ITEM_BYTES
        if self and self.size + size > REPLY_BYTES:
            return False
        self.append(message)
        self.size += size
        return True


async def list_sessions(
    sessions: SessionService, request: pb.ListSessionsRequest
) -> pb.ListSessionsResponse:
    """A page of the sessions.

    Raises:
        InvalidField, StoreUnavailable.
    """
    size = request.page_size or PAGE_SIZE
    if size > MAX_PAGE_SIZE:
        raise InvalidField("page_size", f"is {size}, expected at most {MAX_PAGE_SIZE}")
    while True:
        found, following = await sessions.page(
            request.page_token, size, request.model, expired=request.show_expired
        )
        page = await _encoded(found)
        if len(page) == len(found):
            return pb.ListSessionsResponse(sessions=page, next_page_token=following)
        size = len(page)  # the store is asked anew: only it knows where the page after begins


async def _encoded(found: Sequence[SessionSummary | UnreadableSession]) -> Page[pb.Session]:
    """As many as fit; made in pieces, others take turns in between."""
    page, made = Page[pb.Session](), 0
    for one in found:
        if not page.take(encode_session(one)):
            break
        if page.size - made >= ENCODED_AT_ONCE:
            made = page.size
            await asyncio.sleep(0)
    return page


def list_models(models: Sequence[Model], request: pb.ListModelsRequest) -> pb.ListModelsResponse:
    """A page of the models; the token is the number of models before it.

    Raises:
        InvalidField: page_token.
    """
    token = request.page_token or "0"
    if not _DIGITS.fullmatch(token) or int(token) > len(models):
        raise InvalidField("page_token", "is not a token of an earlier page; begin with none")
    first = int(token)
    rest = models[first : first + request.page_size] if request.page_size else models[first:]
    page = Page[pb.Model]()
    for model in rest:
        if not page.take(encode_model(model)):
            break
    after = first + len(page)
    return pb.ListModelsResponse(
        models=page, next_page_token=str(after) if after < len(models) else ""
    )
