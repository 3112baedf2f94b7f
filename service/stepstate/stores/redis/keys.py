"""Where a session is in Redis, and where it is in a listing.

Each session is a hash of its own, in one of 256 buckets. A bucket's keys have one hash tag,
so they are on one node of a cluster, and a script may change them together:

    stepstate:{17}:session:ID   hash   the session, by the names in `scripts`
    stepstate:{17}:ending:ID    hash   its tombstone, kept for an hour
    stepstate:{17}:due          zset   "ID MODEL/VERSION" of its open sessions, by expiry
    stepstate:{17}:counts       hash   open sessions by "MODEL/VERSION"
    stepstate:{17}:expired      zset   "ID MODEL/VERSION" of expired ones, by time to delete
    stepstate:{17}:endings      zset   ID of those with a tombstone, by time to delete it
    stepstate:clock             text   microseconds of the store's own clock: see `base`
    stepstate:{17}:probe        text   written to see whether that is possible

No key has a time to live: Redis measures it by its machine's wall clock, which may be set.

A listing goes through the buckets in order, and through the ids of each in order. That order does
not change while sessions come, go and are saved, so the next page needs only the last place.
"""

from __future__ import annotations

import re
import zlib
from typing import NamedTuple

from stepstate.errors import InvalidField
from stepstate.identity import SessionKey

BUCKETS = 256
"""A few thousand sessions in each when there are a million: a page reads one or two whole."""
ALL_BUCKETS = range(BUCKETS)
CLOCK = "stepstate:clock"

Place = tuple[int, str]
"""A bucket, and an id in it; the empty id is before all others."""

_TOKEN = re.compile(r"(\d{1,3}):(.+)", re.DOTALL)


class SessionKeys(NamedTuple):
    """The keys that the scripts for one session use."""

    session: str
    tombstone: str
    due: str
    counts: str
    expired: str
    tombstones: str


def of(session_id: str) -> SessionKeys:
    """The keys of a session."""
    number = bucket(session_id)
    return SessionKeys(
        f"stepstate:{{{number}}}:session:{session_id}",
        f"stepstate:{{{number}}}:ending:{session_id}",
        due(number),
        counts(number),
        expired(number),
        tombstones(number),
    )


def bucket(session_id: str) -> int:
    """The bucket of a session. It must never change."""
    return zlib.crc32(session_id.encode()) % BUCKETS


def session(session_id: str) -> str:
    """The key of a session."""
    return of(session_id).session


def due(number: int) -> str:
    """The key of a bucket's open sessions by expiry."""
    return f"stepstate:{{{number}}}:due"


def counts(number: int) -> str:
    """The key of a bucket's counts of open sessions by model."""
    return f"stepstate:{{{number}}}:counts"


def expired(number: int) -> str:
    """The key of a bucket's expired sessions by the time when they may be deleted."""
    return f"stepstate:{{{number}}}:expired"


def tombstones(number: int) -> str:
    """The key of a bucket's tombstones by the time when they are deleted."""
    return f"stepstate:{{{number}}}:endings"


def probe(number: int) -> str:
    """The key that shows whether a bucket's node can be written."""
    return f"stepstate:{{{number}}}:probe"


def id_of(member: str) -> SessionKey:
    """The id in "ID MODEL/VERSION"; it has no space."""
    return SessionKey(member.partition(" ")[0])


def model_of(member: str) -> str:
    """The model "name/version" in "ID MODEL/VERSION"."""
    return member.partition(" ")[2]


def place_of(member: str) -> Place:
    """Where "ID MODEL/VERSION" is in a listing."""
    session_id = id_of(member)
    return bucket(session_id), session_id


def token_of(place: Place) -> str:
    """The token of the page that follows a place."""
    return f"{place[0]}:{place[1]}"


def place_after(token: str) -> Place:
    """The place after which a page begins; the empty token: the first page.

    Raises:
        InvalidField: page_token is not such a token.
    """
    if not token:
        return 0, ""
    match = _TOKEN.fullmatch(token)
    if match is None or int(match[1]) != bucket(match[2]):
        raise InvalidField("page_token", "is not a token of an earlier page; begin with none")
    return int(match[1]), match[2]
