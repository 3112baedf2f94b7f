"""Which stored sessions can't be used here: those of models that are not loaded, and damaged ones.

Nobody asks for them any more, or nobody can, so the whole store is looked through, slowly: once
after the start, since that is when models come and go, and now and then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter

from stepstate.errors import StoreUnavailable
from stepstate.sessions.monitored_store import MonitoredStore
from stepstate.sessions.status import SessionSummaries
from stepstate.stores import StoredSession, UnreadableSession

log = logging.getLogger(__name__)

SURVEY_SECONDS = 600.0
"""Between the end of a survey and the next: what other servers close is seen then."""
READ_AT_ONCE = 200
"""Some 2 ms of a store's time."""
IDLE_SHARE = 4
"""It rests this much longer than it reads: at most a fifth of a store's time is taken."""
MAX_UNREADABLE = 10_000
"""Damaged sessions that are told apart; more are not counted."""
_MODELS_TOLD = 20


class Survey:
    """Counts the stored sessions that can't be used here.

    Args:
        link: the store.
        standings: tell what its entries mean.
    """

    def __init__(self, link: MonitoredStore, standings: SessionSummaries) -> None:
        self._link = link
        self._standings = standings
        self.orphaned: Counter[str] = Counter()
        """Sessions whose very model is not loaded here, by model "name/version"."""
        self.unreadable: set[str] = set()
        """Ids of damaged sessions."""

    def met(self, unreadable: UnreadableSession) -> None:
        """Somebody came across a damaged session; it is logged the first time."""
        if unreadable.session_id in self.unreadable or len(self.unreadable) >= MAX_UNREADABLE:
            return
        self.unreadable.add(unreadable.session_id)
        log.warning(
            "a stored session can't be read; close it with: stepstate sessions close ID",
            extra={"session_id": unreadable.session_id, "problem": unreadable.problem},
        )

    def loaded(self, session_id: str) -> None:
        """A session could be read."""
        self.unreadable.discard(session_id)

    def ended(self, found: StoredSession | UnreadableSession) -> None:
        """Such a session was closed, or expired."""
        self.unreadable.discard(found.session_id)
        if isinstance(found, UnreadableSession):
            return
        if self._standings.orphaned(found) and self.orphaned[found.record.model_key]:
            self.orphaned[found.record.model_key] -= 1

    async def run(self) -> None:
        """Looks through the store, for ever."""
        while True:
            try:
                await self.look()
            except StoreUnavailable:
                pass  # the link has noted it
            except Exception:
                log.exception("looking through the store failed; it is tried again later")
            await asyncio.sleep(SURVEY_SECONDS)

    async def look(self) -> None:
        """Looks through the whole store once.

        Raises:
            StoreUnavailable.
        """
        orphaned: Counter[str] = Counter()
        unreadable: set[str] = set()
        token, begun = "", False
        while token or not begun:
            began, begun = time.perf_counter(), True
            entries, token = await self._link.ask(self._link.store.page(token, READ_AT_ONCE))
            for entry in entries:
                if isinstance(entry, UnreadableSession):
                    self.met(entry)
                if entry.session_id in self.unreadable:
                    unreadable.add(entry.session_id)
                elif isinstance(entry, StoredSession) and self._standings.orphaned(entry):
                    orphaned[entry.record.model_key] += 1
            if token:
                await asyncio.sleep(IDLE_SHARE * (time.perf_counter() - began))
        if orphaned != self.orphaned and orphaned:
            self._tell_orphaned(orphaned)
        self.orphaned, self.unreadable = orphaned, unreadable

    @staticmethod
    def _tell_orphaned(orphaned: Counter[str]) -> None:
        models = [f"{model}: {count}" for model, count in orphaned.most_common(_MODELS_TOLD)]
        log.warning(
            "the store has sessions of models that are not loaded here, or are others by now: "
            "serve those very versions, or close them (stepstate sessions list shows them)",
            extra={"sessions": orphaned.total(), "models": ", ".join(models)},
        )
