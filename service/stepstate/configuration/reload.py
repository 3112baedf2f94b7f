"""A running server gets a changed configuration: all of it that can be reloaded, or nothing."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import fields
from pathlib import Path
from typing import Protocol

from stepstate.config import ConfigError, ServerConfig
from stepstate.configuration.checks import problems_of_reload
from stepstate.configuration.effective import Configuration, Load
from stepstate.logging.audit import AuditEvent, AuditRecord, audit
from stepstate.watched_files import WatchedFiles

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Between two polls of the file: soon enough for whoever has written it."""
RETRY_SECONDS = 30.0
"""After a refusal: a file that the configuration names may be put right meanwhile."""


class ReloadObserver(Protocol):
    """Is told how reloads end."""

    def reloaded(self, result: str) -> None:
        """A reload was "applied" or "refused"."""
        ...


class ConfigurationReloader:
    """Reloads the configuration of a server when it is asked to, and when its file changes.

    What can't be changed while the server runs is named in the log, and waits for a restart.

    Args:
        file: the configuration file.
        load: makes the configuration.
        started: the configuration with which the server has started.
        apply: lets the server use one whose files were found to be usable.
        observer: is told how reloads end.
    """

    def __init__(
        self,
        file: Path,
        load: Load,
        started: Configuration,
        apply: Callable[[Configuration], Awaitable[None]],
        observer: ReloadObserver,
    ) -> None:
        self._file = file
        self._load = load
        self._started = started
        self._apply = apply
        self._observer = observer
        self._asked = asyncio.Event()
        self._watched = WatchedFiles(file)
        self._retry_at = math.inf

    def ask(self) -> None:
        """Lets it reload soon, whether the file has changed or not."""
        self._asked.set()

    async def run(self) -> None:
        """Reloads until it is cancelled."""
        while True:
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await self._asked.wait()
            except TimeoutError:
                if not await asyncio.to_thread(self._poll):
                    continue
            self._asked.clear()
            try:
                await self.reload()
            except Exception:
                log.exception("the configuration was not reloaded; the next change tries again")

    async def reload(self) -> bool:
        """Puts what the file says now into use, or nothing of it; the log says which and why.

        Returns:
            Whether it is in use.
        """
        self._watched.mark_read()
        try:
            found = await asyncio.to_thread(self._load)
            problems = await asyncio.to_thread(problems_of_reload, found)
        except ConfigError as error:
            problems = [str(error)]
        self._retry_at = time.monotonic() + RETRY_SECONDS if problems else math.inf
        if problems:
            self._observer.reloaded("refused")
            audit(AuditRecord(event=AuditEvent.CONFIGURATION_RELOADED, result="INVALID_ARGUMENT"))
            log.error(
                "the configuration is not reloaded: the one before stays in use",
                extra={"problems": "; ".join(problems)},
            )
            return False
        await self._apply(found)
        self._observer.reloaded("applied")
        audit(AuditRecord(event=AuditEvent.CONFIGURATION_RELOADED, detail=str(self._file)))
        log.info("the configuration is reloaded", extra={"file": str(self._file)})
        waiting = needs_restart(self._started, found)
        if waiting:
            log.warning(
                "settings have changed that need a restart", extra={"settings": ", ".join(waiting)}
            )
        return True

    def _poll(self) -> bool:
        """Whether the file has changed, or was refused and is to be tried again."""
        return self._watched.settled() or time.monotonic() >= self._retry_at


def needs_restart(before: Configuration, after: Configuration) -> list[str]:
    """The settings that are different and can't be reloaded."""
    names = [
        one.name
        for one in fields(ServerConfig)
        if not one.metadata["reloads"]
        and getattr(before.server, one.name) != getattr(after.server, one.name)
    ]
    if after.certificates and not before.identities:  # its callers are anonymous until then
        names.append("certificates")
    return names
