"""Sends all commands that arrive meanwhile together, in one pipeline.

Rule 1: one pipeline is on its way at a time, so commands are done in order; all commands that
        arrive meanwhile go into the next pipeline.
Rule 2: every failure is a `StoreUnavailable`, within about 2 s: when Redis does not answer, the
        commands that wait for the next pipeline fail too.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from redis.exceptions import NoScriptError, ResponseError

from stepstate.errors import StoreUnavailable
from stepstate.stores.redis.commands import Command, Reply
from stepstate.stores.redis.connection import AWAY, RedisConnection, advice_on, cause_of, may_pass

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 2.0
"""For a pipeline: so that a Redis that is away is noticed before clients give up."""
BYTES_PER_SECOND = 4 * 2**20
"""A slow network: a large pipeline gets the additional time that it needs there."""
MAX_COMMANDS = 256
"""Of one pipeline: Redis finishes a pipeline before it reads from another connection."""
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
        connection: to Redis, or to its cluster.
    """

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._waiting: deque[_Pending] = deque()
        self._task: asyncio.Task[None] | None = None

    def ask(self, command: Command) -> asyncio.Future[Reply]:
        """The future reply to a command; it fails with nothing but `StoreUnavailable`."""
        pending = _Pending(command)
        self._waiting.append(pending)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return pending.reply

    async def close(self) -> None:
        """Waits for the commands that were asked for."""
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        try:
            while self._waiting:
                some = self._take()
                if some:
                    await self._send(some)
        finally:
            self._task = None

    def _take(self) -> list[_Pending]:
        some: list[_Pending] = []
        size = 0
        while self._waiting and len(some) < MAX_COMMANDS:
            pending = self._waiting[0]
            size += pending.command.size
            if some and size > MAX_BYTES:
                break
            self._waiting.popleft()
            if not pending.reply.done():  # its caller is still there
                some.append(pending)
        return some

    async def _send(self, some: Sequence[_Pending]) -> None:
        try:
            replies = await _send_safely(self._connection, [one.command for one in some])
        except AWAY as error:
            self._fail([*some, *self._waiting], error)
            self._waiting.clear()
        except Exception as error:
            log.exception("redis-py failed in an unexpected way")
            self._fail(some, error)
        else:
            for pending, reply in zip(some, replies, strict=True):
                if isinstance(reply, Exception):
                    self._fail([pending], reply)
                elif not pending.reply.done():
                    pending.reply.set_result(reply)

    def _fail(self, some: Sequence[_Pending], error: Exception) -> None:
        cause = cause_of(error)
        kind = "" if isinstance(error, ResponseError) else f"{type(error).__name__}: "
        advice = f" ({advice})" if (advice := advice_on(cause)) else ""
        problem = f"redis at {self._connection.place}: {kind}{error}{advice}"
        for pending in some:
            if not pending.reply.done():
                pending.reply.set_exception(StoreUnavailable(problem, cause=cause))


async def _send_safely(connection: RedisConnection, commands: Sequence[Command]) -> list[Reply]:
    """Sends commands; those that a new connection may help are sent once more on one.

    Scripts that Redis does not have are sent whole. Sending a script twice is safe. Errors that
    remain are among the replies; after one that may come from an old primary, its connection is
    dropped.

    Raises:
        one of AWAY.
    """
    replies = await _send_once(connection, commands, whole=False)
    reconnected = whole = False
    while True:
        if any(map(may_pass, replies)):
            await connection.reconnect()
            if reconnected:
                return replies
            reconnected = True
        elif not whole and any(map(_is_missing, replies)):
            whole = True
        else:
            return replies
        failed = [i for i, reply in enumerate(replies) if may_pass(reply) or _is_missing(reply)]
        again = await _send_once(connection, [commands[i] for i in failed], whole=whole)
        for i, reply in zip(failed, again, strict=True):
            replies[i] = reply


async def _send_once(
    connection: RedisConnection, commands: Sequence[Command], *, whole: bool
) -> list[Reply]:
    # redis-py's own timeout costs two turns of the event loop.
    seconds = TIMEOUT_SECONDS + sum(command.size for command in commands) / BYTES_PER_SECOND
    try:
        async with asyncio.timeout(seconds):
            return await connection.send(commands, whole=whole)
    except TimeoutError:
        raise TimeoutError(f"no answer for {seconds:.1f} s") from None
    except AWAY as error:
        if not may_pass(error):
            raise
        return [error] * len(commands)


def _is_missing(reply: object) -> bool:
    """Whether Redis does not have the script."""
    return isinstance(reply, NoScriptError)
