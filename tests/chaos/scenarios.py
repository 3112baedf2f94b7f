"""What a campaign does to servers, stores and clients, while hundreds of sessions step."""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.chaos import journal, store_faults
from tests.chaos.checker import total
from tests.chaos.clients import by_call
from tests.chaos.competitors import Competitor, History
from tests.chaos.fleet import EVERY_KIND, THINK_SECONDS, Fleet, Kind, calling, fleet, impatient
from tests.chaos.ledger import Tally
from tests.chaos.library import library
from tests.chaos.restartable import (
    Program,
    RestartableServer,
    restartable_redis,
    restartable_server,
)
from tests.integration.wire import HANG, sample, scrape
from tests.networks import Network

INTERVAL_SECONDS = 0.2
LONGEST_WAIT = 0.6
"""Before a fault, in seconds, from when most sessions step again on."""


@dataclass(frozen=True, slots=True)
class Ground:
    """Where a scenario takes place."""

    folder: Path
    """Empty; for stores and logs."""
    models: Path
    network: Network
    sessions: int
    faults: int

    def serve(self, store: str, *options: str, prefix: Sequence[str] = ()):
        """A server of the models."""
        settings = ("--models", str(self.models), "--store", store)
        settings += ("--snapshot-interval", str(INTERVAL_SECONDS), *options)
        return restartable_server(self.folder, *settings, prefix=prefix)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a scenario came to."""

    faults: int
    tally: Tally

    def check(self) -> None:
        """Nothing was lost, and nothing was applied twice."""
        assert self.faults > 0
        assert self.tally.rows >= self.tally.sessions > 0
        assert (self.tally.lost, self.tally.twice, self.tally.wrong) == (0, 0, 0), self


@asynccontextmanager
async def store(ground: Ground, kind: str) -> AsyncIterator[str]:
    """The URL of a store of a kind."""
    if kind == "sqlite":
        yield f"sqlite:{ground.folder / 'sessions.db'}"
    else:
        async with restartable_redis(ground.folder) as redis:
            yield redis.url


async def a_moment(clients: Fleet) -> None:
    """Some moment under load."""
    await clients.progress(1, share=0.5)
    await clients.last(random.uniform(0, LONGEST_WAIT))


async def server_killed(
    ground: Ground,
    *,
    kind: str,
    durability: str,
    slots: int | None = None,
    kinds: Sequence[Kind] = EVERY_KIND,
) -> Outcome:
    """kill -9 of the server at random moments, every fourth time when it is only just back."""
    options = () if slots is None else ("--slots", str(slots))
    async with (
        store(ground, kind) as url,
        ground.serve(url, *options) as server,
        fleet(server.address) as clients,
    ):
        await clients.launch(ground.sessions, (durability,), kinds=kinds)
        for place in range(ground.faults):
            if place % 4 != 3:
                await a_moment(clients)
            server.kill()
            await server.start()
        await clients.progress(2)
        await clients.durable()
        return Outcome(ground.faults, await clients.finish(ground.network))


async def calls_cancelled(ground: Ground, *, kind: str, durability: str) -> Outcome:
    """A storm of cancels, of half of all calls, while the server is killed."""
    return await server_killed(ground, kind=kind, durability=durability, kinds=(impatient,))


async def server_terminated(ground: Ground, *, kind: str) -> Outcome:
    """SIGTERM under load: the drain saves all, of every durability."""
    async with (
        store(ground, kind) as url,
        ground.serve(url) as server,
        fleet(server.address) as clients,
    ):
        await clients.launch(ground.sessions, ("none", "async", "sync"))
        for _ in range(ground.faults):
            await a_moment(clients)
            await server.drained()
            await server.start()
        await clients.progress(2)
        tally = await clients.finish(ground.network)
    assert tally.rolled_back == 0, "a drain left rows unsaved"
    # grpc.aio drops the replies that a stream still has when it learns of its end by a write.
    repeated = sum(ledger.tally.repeated for ledger in clients.kinds[calling])
    assert repeated == 0, "a drain left accepted rows unanswered"
    return Outcome(ground.faults, tally)


async def redis_killed(ground: Ground, *, durability: str) -> Outcome:
    """kill -9 of Redis at random moments; it comes back from its append-only file."""
    async with (
        restartable_redis(ground.folder) as redis,
        ground.serve(redis.url) as server,
        fleet(server.address) as clients,
    ):
        await clients.launch(ground.sessions, (durability,))
        for _ in range(ground.faults):
            await a_moment(clients)
            redis.kill()
            await clients.last(random.uniform(0, LONGEST_WAIT))
            await redis.start()
        await clients.progress(2)
        server.kill()  # what Redis has now must be all
        await server.start()
        await clients.progress(2)
        return Outcome(ground.faults, await clients.finish(ground.network))


async def client_killed(ground: Ground, *, kind: str, durability: str) -> Outcome:
    """kill -9 of a client, which goes on from its journal; at times the server dies with it."""
    count = ground.sessions // 4
    ledgers = [journal.named(place, durability) for place in range(count)]
    journals = ground.folder / "journals"
    journals.mkdir()
    for place in range(count):
        (journals / f"{place}.journal").touch()
    async with (
        store(ground, kind) as url,
        ground.serve(url) as server,
        fleet(server.address) as clients,
    ):
        await asyncio.gather(*(clients.open(ledger) for ledger in ledgers))
        await clients.launch(ground.sessions - count, (durability,))
        command = [sys.executable, "-m", "tests.chaos.journal"]
        command += [server.address, str(journals), str(count), durability]
        victim = Program(command, ground.folder / "victim.log")
        for place in range(ground.faults):
            victim.run()
            try:
                await grows(journals)
                await a_moment(clients)
                assert victim.process.poll() is None, victim.log.read_text()
            finally:
                victim.kill_if_running()
            if place % 2:
                server.kill()
                await server.start()
        await clients.progress(2)
        tally = await clients.finish(ground.network)
        for place, ledger in enumerate(ledgers):
            journal.read(ledger, journals / f"{place}.journal")
        tally.add(await clients.check(ledgers, ground.network))
        return Outcome(ground.faults, tally)


async def library_resumes(ground: Ground, *, kind: str, durability: str) -> Outcome:
    """The project's own client gives each output once, in order, through kill -9 of the server."""
    async with (
        store(ground, kind) as url,
        ground.serve(url) as server,
        fleet(server.address) as checker,
        library(server.address, THINK_SECONDS) as clients,
    ):
        await clients.launch(ground.sessions, durability)
        for _ in range(ground.faults):
            await clients.progress(1)
            await asyncio.sleep(random.uniform(0, LONGEST_WAIT))
            server.kill()
            await server.start()
        await clients.progress(2)
        await clients.settle()
        return Outcome(ground.faults, await checker.check(clients.ledgers, ground.network))


async def grows(folder: Path) -> None:
    """Waits until every file of a folder has grown."""
    before = sizes(folder)
    async with asyncio.timeout(HANG):
        while any(size <= before[name] for name, size in sizes(folder).items()):
            await asyncio.sleep(0.02)


def sizes(folder: Path) -> dict[str, int]:
    """Of the files of a folder."""
    return {path.name: path.stat().st_size for path in folder.iterdir()}


HURTS = ("full disk", "file size limit", "locked database", "read-only database", "stopped Redis")


@asynccontextmanager
async def hurting(
    ground: Ground, how: str
) -> AsyncIterator[tuple[str, store_faults.Fault, Sequence[str]]]:
    """A store's URL, what hurts it, and what a server has to be started by for that."""
    folder = ground.folder / "disk"
    async with AsyncExitStack() as stack:
        if how == "stopped Redis":
            redis = await stack.enter_async_context(restartable_redis(ground.folder))
            yield redis.url, store_faults.stopped_redis(redis), ()
            return
        if how == "full disk":
            stack.enter_context(store_faults.small_disk(folder))
        else:
            folder.mkdir()
        faults = {
            "full disk": store_faults.full_disk(folder),
            "file size limit": store_faults.limited_files,
            "locked database": store_faults.locked_database(folder / "sessions.db"),
            "read-only database": store_faults.read_only_database(folder),
        }
        prefix = store_faults.subject_to_permissions() if how.startswith("read-only") else ()
        yield f"sqlite:{folder / 'sessions.db'}", faults[how], prefix


async def store_hurt(ground: Ground, *, how: str) -> Outcome:
    """For a while nothing can be written: sync steps wait, and nobody else notices."""
    async with (
        hurting(ground, how) as (url, fault, prefix),
        ground.serve(url, prefix=prefix) as server,
        fleet(server.address) as clients,
    ):
        await clients.launch(ground.sessions, ("none", "async", "sync"))
        for _ in range(ground.faults):
            await a_moment(clients)
            async with fault(server):
                before = await clients.rows_at_standstill("sync")
                await clients.progress(3, of="async")
                await clients.progress(3, of="none")
                assert clients.rows("sync") == before, "a sync step was answered, unsaved"
            await clients.progress(2)
        await server.drained()
        await server.start()
        tally = await clients.finish(ground.network)
        assert tally.rolled_back == 0
        return Outcome(ground.faults, tally)


async def servers_swapped(ground: Ground, *, durability: str) -> Outcome:
    """Every call goes to one of two servers on one Redis, at random; at times one is killed."""
    async with (
        restartable_redis(ground.folder) as redis,
        ground.serve(redis.url, "--server-name", "one") as one,
        ground.serve(redis.url, "--server-name", "two") as two,
        fleet(one.address, two.address) as clients,
    ):
        await clients.launch(ground.sessions, (durability,), kinds=(calling,))
        for place in range(ground.faults):
            await a_moment(clients)
            victim = (one, two)[place % 2]
            victim.kill()
            await victim.start()
        await clients.progress(2)
        await clients.settle()
        await one.drained()
        await two.drained()
        await two.start()
        clients.keep_to(1)
        return Outcome(ground.faults, await clients.check(clients.ledgers, ground.network))


async def servers_fought(ground: Ground) -> Outcome:
    """Two clients append rows of their own to each session, each by a server of its own.

    A fault is a takeover.
    """
    async with (
        restartable_redis(ground.folder) as redis,
        ground.serve(redis.url, "--server-name", "one") as one,
        ground.serve(redis.url, "--server-name", "two") as two,
        fleet(one.address, two.address) as clients,
    ):
        histories = [History(f"fought-{place}") for place in range(ground.sessions)]
        await asyncio.gather(*(clients.open(history) for history in histories))
        asks = [by_call(stub) for stub in clients.any_connection()]
        competitors = [
            Competitor(history, ask, seed)
            for seed, (history, ask) in enumerate(itertools.product(histories, asks))
        ]
        async with asyncio.timeout(2 * HANG), asyncio.TaskGroup() as group:
            for competitor in competitors:
                group.create_task(competitor.run())
            while min(len(history.rows) for history in histories) < 2 * ground.faults:
                await asyncio.sleep(0.02)
            for competitor in competitors:
                competitor.stopping = True
        takeovers = sum([await taken_over(server) for server in (one, two)])
        await one.drained()
        await two.drained()
        await two.start()
        clients.keep_to(1)
        ts = await asyncio.gather(*(clients.where(history.session_id) for history in histories))
        tallies = (h.check(ground.network, t) for h, t in zip(histories, ts, strict=True))
        return Outcome(takeovers, total(tallies))


async def taken_over(server: RestartableServer) -> int:
    """Sessions that a server took from another one."""
    text = await scrape(server.metrics_address)
    return int(sample(text, "stepstate_session_takeovers_total"))
