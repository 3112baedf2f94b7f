"""The project's own client under the same checker: it resumes by itself, each output comes once."""

from __future__ import annotations

import asyncio
import itertools
import operator
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np

from stepstate.client import AsyncClient, AsyncSession
from tests.chaos.ledger import Ledger
from tests.integration.wire import HANG


class Follower:
    """A session of the client, and the truth about it."""

    def __init__(self, session: AsyncSession, ledger: Ledger, think_seconds: float) -> None:
        self.session = session
        self.ledger = ledger
        self._think_seconds = think_seconds
        self.sent = 0
        self.stopped = False

    def row(self) -> np.ndarray:
        """The next row."""
        self.ledger.wanted_at[self.sent] = time.monotonic()
        row = self.ledger.rows(self.sent, 1)[0]
        self.sent += 1
        return row

    def given(self, y: np.ndarray) -> None:
        """The next output: a repeated or missing one makes all later ones wrong."""
        wanted_at = self.ledger.wanted_at.pop(self.ledger.t)
        self.ledger.given.append(np.asarray(y, "<f4").tobytes())
        tally = self.ledger.tally
        tally.pause = max(tally.pause, time.monotonic() - wanted_at)

    async def think(self) -> None:
        """Between two rows."""
        await asyncio.sleep(random.uniform(0, 2 * self._think_seconds))


class Library:
    """Sessions that are stepped by calls, by streams, by one stream for many and by a pack.

    When they stop, each is stepped once more, so that a server that was rolled back last is sent
    all that it lacks, and is at the t that the checker expects.

    Args:
        client: the client.
        think_seconds: between two rows of a session, about.
    """

    def __init__(self, client: AsyncClient, think_seconds: float) -> None:
        self.followers: list[Follower] = []
        self.stopping = False
        self._client = client
        self._think_seconds = think_seconds
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def ledgers(self) -> list[Ledger]:
        """Of all sessions."""
        return [follower.ledger for follower in self.followers]

    async def launch(self, count: int, durability: str) -> None:
        """Opens sessions, and steps them."""
        self.followers = await asyncio.gather(*(self._open(i, durability) for i in range(count)))
        ways = (self._call, self._stream)
        share = count // 4
        crowd, pack = self.followers[:share], self.followers[share : 2 * share]
        rest = zip(self.followers[2 * share :], itertools.cycle(ways))
        self._tasks = [asyncio.create_task(way(one)) for one, way in rest]
        if share:
            self._tasks.append(asyncio.create_task(self._together(crowd)))
            self._tasks.append(asyncio.create_task(self._packed(pack)))

    async def progress(self, rows: int) -> None:
        """Waits until half of the sessions were given so many more outputs."""
        goals = [ledger.t + rows for ledger in self.ledgers]
        async with asyncio.timeout(2 * HANG):
            while 2 * sum(map(operator.ge, [o.t for o in self.ledgers], goals)) < len(goals):
                for task in self._tasks:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.01)

    async def settle(self) -> None:
        """Stops, and waits for the outputs of all that was sent."""
        self.stopping = True
        async with asyncio.timeout(2 * HANG):
            await asyncio.gather(*self._tasks)
        for follower in self.followers:
            assert follower.session.t == follower.ledger.t == follower.sent

    async def end(self) -> None:
        """Gives everything up."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _open(self, place: int, durability: str) -> Follower:
        session_id = f"library-{place}"
        session = await self._client.open("lstm", session_id=session_id, durability=durability)
        ledger = Ledger(session_id, 20_000 + place, durability)
        return Follower(session, ledger, self._think_seconds)

    async def _call(self, follower: Follower) -> None:
        while not follower.stopped:
            follower.stopped = self.stopping
            follower.given(await follower.session.step(follower.row()))
            await follower.think()

    async def _stream(self, follower: Follower) -> None:
        async def rows() -> AsyncIterator[np.ndarray]:
            while not follower.stopped:
                follower.stopped = self.stopping
                yield follower.row()
                await follower.think()

        async for y in follower.session.stream(rows()):
            follower.given(y)

    async def _packed(self, crowd: Sequence[Follower]) -> None:
        """Now these, now those, some of them several times in a call."""
        everyone = list(range(len(crowd)))
        which: list[int] = []
        async with self._client.packed([follower.session for follower in crowd]) as pack:
            while which != everyone:
                which = everyone if self.stopping else random.choices(everyone, k=len(crowd))
                reply = await pack.step([crowd[place].row() for place in which], which=which)
                assert not reply.errors, reply.errors
                for place, y in zip(which, reply.y, strict=True):
                    crowd[place].given(y)
                await asyncio.sleep(self._think_seconds)

    async def _together(self, crowd: Sequence[Follower]) -> None:
        of = {follower.session.session_id: follower for follower in crowd}

        async def items() -> AsyncIterator[tuple[AsyncSession, np.ndarray]]:
            while not self.stopping:
                follower = random.choice(crowd)
                yield follower.session, follower.row()
                await asyncio.sleep(self._think_seconds / len(crowd))
            for follower in crowd:
                yield follower.session, follower.row()

        async for result in self._client.stream(items()):
            of[result.session.session_id].given(result.y)


@asynccontextmanager
async def library(address: str, think_seconds: float) -> AsyncIterator[Library]:
    """The project's client, with the patience that a campaign on a busy machine needs."""
    async with AsyncClient(address, timeout=HANG) as client:
        made = Library(client, think_seconds)
        try:
            yield made
        finally:
            await made.end()
