"""Where a session is in Redis.

Each session is a hash of its own, in one of 256 buckets. A bucket's keys have one hash tag,
so they are on one node of a cluster, and a script may change them together:

    stepstate:{17}:session:ID   hash   the session, by the names in `scripts`
    stepstate:{17}:ending:ID    hash   how it ended, for an hour
    stepstate:{17}:due          zset   "ID MODEL/VERSION" of all its sessions, by expiry
    stepstate:{17}:counts       hash   sessions by "MODEL/VERSION"
    stepstate:{17}:probe        string for a minute; written to see whether that is possible
"""

from __future__ import annotations

import zlib

BUCKETS = 256
"""A few thousand sessions in each when there are a million: a page reads one or two whole."""


def bucket(session_id: str) -> int:
    """The bucket of a session. It must never change."""
    return zlib.crc32(session_id.encode()) % BUCKETS


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


def probe(number: int) -> str:
    """The key that shows whether a bucket's node can be written."""
    return f"stepstate:{{{number}}}:probe"
