"""Where a session is in Redis, and where it is in a listing.

Each session is a hash of its own, in one of 256 buckets. A bucket's keys have one hash tag,
so they are on one node of a cluster, and a script may change them together:

    stepstate:{17}:session:KEY      hash   the session, by the names in `scripts`
    stepstate:{17}:ending:KEY       hash   its tombstone, kept for an hour
    stepstate:{17}:due              zset   "KEY MODEL/VERSION" of its open sessions, by expiry
    stepstate:{17}:counts           hash   open sessions by "MODEL/VERSION"
    stepstate:{17}:expired          zset   "KEY MODEL/VERSION" of expired ones, by time to delete
    stepstate:{17}:endings          zset   KEY of those with a tombstone, by time to delete it
    stepstate:{17}:probe            text   written to see whether that is possible
    stepstate:clock                 text   microseconds of the store's own clock: see `base`

KEY is a `SessionKey`: the id of a session of the tenant `default`, and "TENANT/ID" of any other.
The sessions of `default` are where those of versions without tenants are, which so can go on
beside this one. What a bucket has of all other tenants is apart, where those don't see it:

    stepstate:{17}:tenants:due      zset   as above
    stepstate:{17}:tenants:expired  zset   as above
    stepstate:{17}:tenants:endings  zset   as above
    stepstate:{17}:tenant:TENANT    zset   "KEY MODEL/VERSION" of a tenant: 0 open, 1 expired
    stepstate:tenants               hash   open sessions by "TENANT" and by "TENANT/MODEL/VERSION";
                                           a cluster has one in each bucket, stepstate:{17}:tenants
    stepstate:opening:TENANT        zset   on a cluster: who opens a session of a limited tenant

No key has a time to live: Redis measures it by its machine's wall clock, which may be set.

A listing goes through the buckets in order, and through the keys of each in order. That order does
not change while sessions come, go and are saved, so the next page needs only the last place.
"""

from __future__ import annotations

import re
import zlib
from typing import NamedTuple

from stepstate.errors import InvalidField
from stepstate.identity import SessionKey, split_key

BUCKETS = 256
"""A few thousand sessions in each when there are a million: a page reads one or two whole."""
ALL_BUCKETS = range(BUCKETS)
CLOCK = "stepstate:clock"
OTHERS = "tenants:"
FAMILIES = ("", OTHERS)
"""In the names of sets: those of the tenant `default`, and those of all others."""

Place = tuple[int, str]
"""A bucket, and a key in it; the empty key is before all others."""

_TOKEN = re.compile(r"(\d{1,3}):(.+)", re.DOTALL)


class SessionKeys(NamedTuple):
    """The keys that the scripts for one session use."""

    session: str
    tombstone: str
    due: str
    counts: str
    expired: str
    listing: str
    tombstones: str


def of(key: SessionKey, *, cluster: bool) -> SessionKeys:
    """The keys of a session."""
    number = bucket(key)
    family = family_of(key)
    return SessionKeys(
        *of_save(key)[:2],
        due(number, family),
        tenant_counts(number, cluster=cluster) if family else counts(number),
        expired(number, family),
        listing(number, split_key(key)[0]),
        tombstones(number, family),
    )


def of_save(key: SessionKey) -> tuple[str, str, str]:
    """The first three keys of a session: all that a save uses."""
    number = bucket(key)
    return (
        f"stepstate:{{{number}}}:session:{key}",
        f"stepstate:{{{number}}}:ending:{key}",
        due(number, family_of(key)),
    )


def bucket(key: SessionKey) -> int:
    """The bucket of a session. It must never change."""
    return zlib.crc32(key.encode()) % BUCKETS


def family_of(key: SessionKey) -> str:
    """In which of the `FAMILIES` a session is."""
    return OTHERS if "/" in key else ""


def session(key: SessionKey) -> str:
    """The key of a session."""
    return of_save(key)[0]


def due(number: int, family: str = "") -> str:
    """The key of a bucket's open sessions by expiry."""
    return f"stepstate:{{{number}}}:{family}due"


def counts(number: int) -> str:
    """The key of a bucket's counts of open sessions of the tenant `default` by model."""
    return f"stepstate:{{{number}}}:counts"


def tenant_counts(number: int, *, cluster: bool) -> str:
    """The key of the counts of all other tenants."""
    return f"stepstate:{{{number}}}:tenants" if cluster else "stepstate:tenants"


def expired(number: int, family: str = "") -> str:
    """The key of a bucket's expired sessions by the time when they may be deleted."""
    return f"stepstate:{{{number}}}:{family}expired"


def listing(number: int, tenant: str) -> str:
    """The key of a bucket's sessions of a tenant; not used for the tenant `default`."""
    return f"stepstate:{{{number}}}:tenant:{tenant}"


def queue(tenant: str) -> str:
    """The key of those who open sessions of a tenant whose number is limited, on a cluster."""
    return f"stepstate:opening:{tenant}"


def tombstones(number: int, family: str = "") -> str:
    """The key of a bucket's tombstones by the time when they are deleted."""
    return f"stepstate:{{{number}}}:{family}endings"


def probe(number: int) -> str:
    """The key that shows whether a bucket's node can be written."""
    return f"stepstate:{{{number}}}:probe"


def key_of(member: str) -> SessionKey:
    """The key in "KEY MODEL/VERSION"; it has no space."""
    return SessionKey(member.partition(" ")[0])


def model_of(member: str) -> str:
    """The model "name/version" in "KEY MODEL/VERSION"."""
    return member.partition(" ")[2]


def place_of(member: str) -> Place:
    """Where "KEY MODEL/VERSION" is in a listing."""
    key = key_of(member)
    return bucket(key), key


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
    if match is None or int(match[1]) != bucket(SessionKey(match[2])):
        raise InvalidField("page_token", "is not a token of an earlier page; begin with none")
    return int(match[1]), match[2]
