"""Sends what was asked for together in one pipeline.

Rule 1: one pipeline of a lane is on its way at a time, so commands arrive in order; all that
        came meanwhile goes into the next.
Rule 2: whatever goes wrong is `StoreUnavailable`, after 2 s at the latest: when Redis does not
        answer, those who wait behind are not made to wait again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from redis.exceptions import ResponseError

from stepstate.errors import StoreUnavailable
from stepstate.stores.redis.causes import advice_on, cause_of
from stepstate.stores.redis.connection import AWAY, Command, RedisConnection, Reply, ask

log = logging.getLogger(__name__)

MAX_COMMANDS = 256
"""Of one pipeline: Redis runs a pipeline through before it reads from another connection."""
MAX_BYTES = 8 * 2**20
"""Of one pipeline: on a slow network it takes two seconds."""


@dataclass(slots=True, eq=False)
class _Pending:
    command: Command
    reply: asyncio.Future[Reply] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class CommandPipeline:
    """The commands for one node.

    Args:
        link: the way to it.
    """

    def __init__(self, link: RedisConnection) -> None:
        self._link = link
        self._waiting: deque[_Pending] = deque()
        self._task: asyncio.Task[None] | None = None

    def ask(self, command: Command) -> asyncio.Future[Reply]:
        """The reply to a command, as it will be; its only exception is `StoreUnavailable`."""
        asked = _Pending(command)
        self._waiting.append(asked)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return asked.reply

    async def close(self) -> None:
        """Waits for what is on its way."""
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        try:
            while self._waiting:
                some = self._take()
                if some:
                    await self._ask(some)
        finally:
            self._task = None

    def _take(self) -> list[_Pending]:
        some: list[_Pending] = []
        size = 0
        while self._waiting and len(some) < MAX_COMMANDS:
            asked = self._waiting[0]
            size += asked.command.size
            if some and size > MAX_BYTES:
                break
            self._waiting.popleft()
            if not asked.reply.done():  # its caller is still there
                some.append(asked)
        return some

    async def _ask(self, some: Sequence[_Pending]) -> None:
        try:
            replies = await ask(self._link, [asked.command for asked in some])
        except AWAY as error:
            self._fail([*some, *self._waiting], error)
            self._waiting.clear()
        except Exception as error:
            log.exception("redis-py failed in a way of its own")
            self._fail(some, error)
        else:
            for asked, reply in zip(some, replies, strict=True):
                self._answer(asked, reply)

    def _answer(self, asked: _Pending, reply: Reply) -> None:
        if isinstance(reply, Exception):
            self._fail([asked], reply)
        elif not asked.reply.done():
            asked.reply.set_result(reply)

    def _fail(self, some: Sequence[_Pending], error: Exception) -> None:
        cause = cause_of(error)
        kind = "" if isinstance(error, ResponseError) else f"{type(error).__name__}: "
        advice = f" ({advice})" if (advice := advice_on(cause)) else ""
        problem = f"redis at {self._link.place}: {kind}{error}{advice}"
        for asked in some:
            if not asked.reply.done():
                asked.reply.set_exception(StoreUnavailable(problem, cause=cause))
