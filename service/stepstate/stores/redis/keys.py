"""Where a session is in Redis.

Each session is a hash of its own, in one of 256 buckets. A bucket's keys have one hash tag,
so they are on one node of a cluster, and a script may change them together:

    stepstate:{17}:session:ID   hash   the session, by the names in `scripts`
    stepstate:{17}:ending:ID    hash   how it ended, for an hour
    stepstate:{17}:due          zset   "ID MODEL/VERSION" of its open sessions, by expiry
    stepstate:{17}:counts       hash   open sessions by "MODEL/VERSION"
    stepstate:{17}:expired      zset   "ID MODEL/VERSION" of expired ones, by time to delete
    stepstate:{17}:endings      zset   ID of those that ended, by time to forget
    stepstate:clock             text   microseconds of the store's own clock: see `base`
    stepstate:{17}:probe        text   written to see whether that is possible

No key has a time to live: that goes by the wall clock of Redis' machine, which may be set.
"""

from __future__ import annotations

import zlib

BUCKETS = 256
"""A few thousand sessions in each when there are a million: a page reads one or two whole."""


def bucket(session_id: str) -> int:
    """The bucket of a session. It must never change."""
    return zlib.crc32(session_id.encode()) % BUCKETS


CLOCK = "stepstate:clock"


def session(session_id: str) -> str:
    """The key of a session."""
    return f"stepstate:{{{bucket(session_id)}}}:session:{session_id}"


def ending(session_id: str) -> str:
    """The key of how it ended."""
    return f"stepstate:{{{bucket(session_id)}}}:ending:{session_id}"


def due(number: int) -> str:
    """The key of a bucket's sessions by expiry."""
    return f"stepstate:{{{number}}}:due"


def counts(number: int) -> str:
    """The key of a bucket's sessions by model."""
    return f"stepstate:{{{number}}}:counts"


def expired(number: int) -> str:
    """The key of a bucket's expired sessions by the time when they may be deleted."""
    return f"stepstate:{{{number}}}:expired"


def endings(number: int) -> str:
    """The key of a bucket's endings by the time when they are forgotten."""
    return f"stepstate:{{{number}}}:endings"


def probe(number: int) -> str:
    """The key that shows whether a bucket's node can be written."""
    return f"stepstate:{{{number}}}:probe"
