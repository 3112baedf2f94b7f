"""What the store has as a whole: sessions open and expired, and those that can't be used here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping

from stepstate.errors import StoreUnavailable
from stepstate.identity import SessionKey
from stepstate.sessions.context import SessionContext
from stepstate.sessions.status import SessionSummaries
from stepstate.stores import EndReason, StoredSession, Tombstone, UnreadableSession

log = logging.getLogger(__name__)

COUNT_SECONDS = 5.0
"""How old the counts may be."""
SURVEY_SECONDS = 600.0
"""Between the end of a survey and the next: what other servers close is seen then."""
READ_AT_ONCE = 200
"""Some 2 ms of a store's time."""
IDLE_SHARE = 4
"""A survey rests this much longer than it reads: it takes at most a fifth of a store's time."""
MAX_UNREADABLE = 10_000
"""Damaged sessions whose ids are kept; more are not counted."""
_MODELS_LOGGED = 20


class SessionCounts:
    """Open sessions by model, resident or not.

    What happens here is counted at once; what other servers do, when the store is asked again.
    """

    def __init__(self, context: SessionContext) -> None:
        self._store = context.store
        self._clock = context.clock
        self._observer = context.observer
        self.expired = 0
        """Expired sessions that are kept."""
        self.by_tenant: Counter[str] = Counter()
        """Open sessions, as the store counted them last."""
        self._counts: Counter[str] = Counter()
        self._changes = 0
        self._due_at = self._tenants_due_at = context.clock()

    def __getitem__(self, model_key: str) -> int:
        return self._counts[model_key]

    @property
    def total(self) -> int:
        """Open sessions of all models."""
        return self._counts.total()

    @property
    def due(self) -> bool:
        """Whether the store should be asked again."""
        return self._clock() >= self._due_at or not self._store.up

    def opened(self, model_key: str) -> None:
        """A session was opened here."""
        self._counts[model_key] += 1
        self._changes += 1

    def ended(self, model_key: str, ending: Tombstone) -> None:
        """A session ended here."""
        self._counts[model_key] -= 1
        self._changes += 1
        self._observer.closed(ending.reason.value)

    def expired_here(self, model_keys: Iterable[str]) -> None:
        """Sessions of some models expired here, and are kept."""
        for model_key in model_keys:
            self._counts[model_key] -= 1
            self.expired += 1
            self._observer.closed(EndReason.EXPIRED.value)
        self._changes += 1

    def restored(self, model_key: str) -> None:
        """An expired session was restored here."""
        self._counts[model_key] += 1
        self.expired -= 1
        self._changes += 1
        self._observer.expired_restored()

    async def count(self) -> None:
        """Takes the store's count, unless sessions came or went here while it was counting.

        Raises:
            StoreUnavailable.
        """
        before = self._changes
        counts = await self._store.ask(self._store.backend.count())
        expired = await self._store.ask(self._store.backend.count_expired())
        if before == self._changes:
            self._counts = Counter()
            for (_, model_key), sessions in counts.items():
                self._counts[model_key] += sessions
            self._take_tenants(counts)
            self.expired = expired
        self._due_at = self._clock() + COUNT_SECONDS

    async def count_tenants(self) -> None:
        """Takes the count by tenant of a store that does not last.

        Raises:
            StoreUnavailable.
        """
        if self._clock() >= self._tenants_due_at:
            self._tenants_due_at = self._clock() + COUNT_SECONDS
            self._take_tenants(await self._store.ask(self._store.backend.count()))

    def _take_tenants(self, counts: Mapping[tuple[str, str], int]) -> None:
        self.by_tenant = Counter()
        for (tenant, _), sessions in counts.items():
            self.by_tenant[tenant] += sessions


class StoreSurvey:
    """Counts stored sessions that can't be used here: of models that are not loaded, or damaged.

    Nobody asks for them any more, or nobody can, so the whole store is read, slowly: after the
    start, since that is when models come and go, and now and then.
    """

    def __init__(self, context: SessionContext, summaries: SessionSummaries) -> None:
        self._store = context.store
        self._summaries = summaries
        self.orphaned: Counter[str] = Counter()
        """Sessions whose model is not loaded here, by model "name/version"."""
        self.unreadable: set[SessionKey] = set()
        """Keys of damaged sessions."""

    def met(self, unreadable: UnreadableSession) -> None:
        """Somebody came across a damaged session; it is logged the first time."""
        if unreadable.key in self.unreadable or len(self.unreadable) >= MAX_UNREADABLE:
            return
        self.unreadable.add(unreadable.key)
        log.warning(
            "a stored session can't be read; close it with: stepstate sessions close ID",
            extra={
                "tenant": unreadable.tenant,
                "session_id": unreadable.session_id,
                "problem": unreadable.problem,
            },
        )

    def loaded(self, key: SessionKey) -> None:
        """A session could be read."""
        self.unreadable.discard(key)

    def ended(self, found: StoredSession | UnreadableSession) -> None:
        """Such a session was closed, or expired."""
        self.unreadable.discard(found.key)
        if isinstance(found, UnreadableSession):
            return
        if self._summaries.orphaned(found) and self.orphaned[found.record.model_key]:
            self.orphaned[found.record.model_key] -= 1

    async def run(self) -> None:
        """Reads the whole store again and again."""
        while True:
            try:
                await self.look()
            except StoreUnavailable:
                pass  # noted where it was asked
            except Exception:
                log.exception("a survey of the store failed; it is tried again later")
            await asyncio.sleep(SURVEY_SECONDS)

    async def look(self) -> None:
        """Reads the whole store once.

        Raises:
            StoreUnavailable.
        """
        orphaned: Counter[str] = Counter()
        unreadable: set[SessionKey] = set()
        token, begun = "", False
        while token or not begun:
            began, begun = time.perf_counter(), True
            entries, token = await self._store.ask(self._store.backend.page(token, READ_AT_ONCE))
            for entry in entries:
                if isinstance(entry, UnreadableSession):
                    self.met(entry)
                if entry.key in self.unreadable:
                    unreadable.add(entry.key)
                elif isinstance(entry, StoredSession) and self._summaries.orphaned(entry):
                    orphaned[entry.record.model_key] += 1
            if token:
                await asyncio.sleep(IDLE_SHARE * (time.perf_counter() - began))
        if orphaned != self.orphaned and orphaned:
            self._log_orphaned(orphaned)
        self.orphaned, self.unreadable = orphaned, unreadable

    @staticmethod
    def _log_orphaned(orphaned: Counter[str]) -> None:
        models = [f"{model}: {count}" for model, count in orphaned.most_common(_MODELS_LOGGED)]
        log.warning(
            "the store has sessions of models that are not loaded here, or are others by now: "
            "serve those very versions, or close them (stepstate sessions list shows them)",
            extra={"sessions": orphaned.total(), "models": ", ".join(models)},
        )
