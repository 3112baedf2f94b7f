"""A bucket's zset remembers sessions as "ID MODEL/VERSION"; and places in a listing.

A listing goes by buckets, and by ids in each: that order stands still while sessions come,
go and are saved, and the place of the last entry is all that the next page needs to know.
"""

from __future__ import annotations

import re

from stepstate.errors import InvalidField
from stepstate.stores.redis import keys

Place = tuple[int, str]
"""A bucket, and an id in it; of the empty id: before all others."""

_TOKEN = re.compile(r"(\d{1,3}):(.+)", re.DOTALL)


def id_of(member: str) -> str:
    """The id, which has no space."""
    return member.partition(" ")[0]


def model_of(member: str) -> str:
    """The model, "name/version"."""
    return member.partition(" ")[2]


def is_of(member: str, model: str) -> bool:
    """Whether it is of the model of this name; empty: of any."""
    return not model or model_of(member).partition("/")[0] == model


def place_of(member: str) -> Place:
    """Where a listing has it."""
    session_id = id_of(member)
    return keys.bucket(session_id), session_id


def token_of(place: Place) -> str:
    """A place as the token of the page that follows it."""
    return f"{place[0]}:{place[1]}"


def place_after(token: str) -> Place:
    """The place after which a page begins; the empty token: the first page.

    Raises:
        InvalidField: page_token is no such token.
    """
    if not token:
        return 0, ""
    match = _TOKEN.fullmatch(token)
    if match is None or int(match[1]) != keys.bucket(match[2]):
        raise InvalidField("page_token", "is not a token of an earlier page; begin with none")
    return int(match[1]), match[2]
