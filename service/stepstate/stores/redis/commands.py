"""What is sent to Redis, and how its replies are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stepstate.identity import SessionKey
from stepstate.stores.redis import keys, scripts
from stepstate.stores.redis.scripts import Script
from stepstate.stores.types import (
    MICROS,
    SaveRequest,
    StoredSession,
    Tombstone,
    UnreadableSession,
    decode_session,
    decode_tombstone,
)

Argument = str | bytes | int
Mark = tuple[int, str]
"""Identifies an operation: its number, which rises, and the store that does it."""
Reply = Any
"""The result of a script: bytes, int, lists of them, or an exception."""


@dataclass(frozen=True, slots=True)
class Command:
    """A script with its keys, which are in one slot on a cluster, and its arguments."""

    script: Script
    keys: Sequence[str]
    arguments: Sequence[Argument]

    @property
    def size(self) -> int:
        """Its approximate bytes."""
        return sum(len(a) for a in self.arguments if not isinstance(a, int))

    def words(self, *, whole: bool) -> tuple[Argument, ...]:
        """The words to send: the script by its name, or its whole text."""
        how = ("EVAL", self.script.text) if whole else ("EVALSHA", self.script.sha)
        return (*how, len(self.keys), *self.keys, *self.arguments)


def save(saves: Sequence[SaveRequest], mark: Mark) -> Command:
    """Saves sessions of one slot."""
    where: list[str] = []
    arguments: list[Argument] = []
    for one in saves:
        where += keys.of_save(one.key)
        numbers = f"{one.epoch} {mark[0]} {one.t} {micros(one.expires_at)}"
        arguments += _words(one, numbers)
    return Command(scripts.SAVE, where, arguments)


def expire(saves: Sequence[SaveRequest], delete_at: float, mark: Mark, *, cluster: bool) -> Command:
    """Saves sessions of one slot, and marks them as expired."""
    where: list[str] = []
    arguments: list[Argument] = [micros(delete_at), mark[1]]
    for one in saves:
        where += keys.of(one.key, cluster=cluster)[:6]
        arguments += _words(one, f"{one.epoch} {mark[0]} {one.t}")
    return Command(scripts.EXPIRE, where, arguments)


def _words(one: SaveRequest, numbers: str) -> tuple[str, bytes]:
    has_snapshot = int(one.snapshot is not None)
    return f"{numbers} {has_snapshot} {one.owner}", one.snapshot or b""


def postpone(member: str, score: int) -> Command:
    """Moves the next check of a session."""
    of = keys.of(keys.key_of(member), cluster=True)
    return Command(scripts.POSTPONE, (of.due, of.expired), (score, member))


def tidy(member: str, *, cluster: bool) -> Command:
    """Removes a session that is gone from the sets of its bucket."""
    of = keys.of(keys.key_of(member), cluster=cluster)
    where = (of.session, of.due, of.counts, of.expired, of.listing)
    return Command(scripts.TIDY, where, (member, keys.model_of(member)))


def delete_tombstone(key: SessionKey, now: int) -> Command:
    """Deletes a tombstone that is too old."""
    of = keys.of(key, cluster=True)
    return Command(scripts.FORGET, (of.tombstone, of.tombstones), (key, now))


def read_session(key: SessionKey, reply: Reply) -> StoredSession | UnreadableSession:
    """A session, from [record, t, expiry, epoch, owner, when to delete it, model]."""
    record, t, expires, epoch, owner, delete, model = reply
    return decode_session(
        key,
        text_of(model),
        record=record,
        t=t,
        expires=expires,
        epoch=epoch,
        owner=owner,
        delete=delete or None,
    )


def read_tombstone(reply: Reply, now: float) -> Tombstone | None:
    """A tombstone, from [reason, t, idle timeout, when to delete it]; None: there is none."""
    reason, t, idle, delete = reply
    if not delete.isdigit() or int(delete) / MICROS <= now:
        return None
    return decode_tombstone(reason, t, idle)


def text_of(reply: bytes) -> str:
    """A text; bytes of a damaged one that are not UTF-8 are escaped."""
    return reply.decode(errors="backslashreplace")


def micros(seconds: float) -> int:
    """A time as Redis has it."""
    return round(seconds * MICROS)
