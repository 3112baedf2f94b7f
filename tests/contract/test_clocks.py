"""No event of a clock ends a session, on any store; idle time ends it, and it comes back whole.

`pytest -n0 -s tests/contract/test_clocks.py` prints the table of what was lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress

import numpy as np
import pytest

from stepstate.errors import SessionExpired, SessionUnknown
from stepstate.sessions import ResidentSession
from stepstate.stores import Durability, SessionStore, open_store
from stepstate.uptime import HEARTBEAT_SECONDS, UptimeClock
from tests.contract.conftest import KINDS as ALL_KINDS
from tests.networks import make_network
from tests.stores import Home
from tests.unit.rig import Clock, Rig, model_of, rows_of

KINDS = ALL_KINDS[:3]  # without the cluster
DAY = 86_400.0
IDLE = 700.0
GRACE = 3 * DAY
SESSIONS = 12
SLOTS = 8
"""So that some sessions are spilled, where the store lasts."""
NETWORK = make_network("lstm", hidden=8, seed=1)
MODEL = model_of(NETWORK)
ROWS = rows_of(NETWORK, 6)
TABLE: dict[tuple[str, str], str] = {}


class Machine:
    """A server with clocks of its own, on a store that others may share."""

    def __init__(
        self, store: SessionStore, clock: Clock, uptime: UptimeClock, unix_time: Clock
    ) -> None:
        self.clock, self.uptime, self.unix_time = clock, uptime, unix_time
        self.store = store
        durable = store.durable
        slots = SLOTS if durable else SESSIONS
        self.rig = Rig(
            MODEL,
            store=store,
            clock=uptime,
            unix_time=unix_time,
            max_sessions=slots,
            owner=f"server-{id(self)}",
            grace_seconds=GRACE,
        )

    async def heartbeat(self) -> None:
        self.uptime.heartbeat()
        await self.rig.sessions.heartbeat()
        await self.rig.sessions.sweep()
        await self.rig.sessions.writer.save_round()


class World:
    """Servers on one store, whose clocks a test sets."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.machines: list[Machine] = []
        self.unix_time = Clock()
        self.unix_time.now = 1.7e9

    async def start(self, wall_apart: float = 0.0) -> Machine:
        clock, unix_time = Clock(), Clock()
        unix_time.now = self.unix_time.now + wall_apart
        uptime = UptimeClock(clock)
        store = await open_store(self.home.url, clock=uptime, unix_time=unix_time)
        machine = Machine(store, clock, uptime, unix_time)
        await machine.rig.sessions.start()
        self.machines.append(machine)
        return machine

    async def kill(self, machine: Machine) -> None:
        """kill -9: nothing is saved or told."""
        self.machines.remove(machine)
        await machine.store.close()

    async def stop(self, machine: Machine) -> None:
        await machine.rig.sessions.drain()
        await self.kill(machine)

    async def up(self, seconds: float) -> None:
        """Time passes, and all servers do what they do in it."""
        passed = 0.0
        while passed < seconds:
            for machine in self.machines:
                machine.clock.advance(HEARTBEAT_SECONDS)
                machine.unix_time.advance(HEARTBEAT_SECONDS)
                await machine.heartbeat()
            self.unix_time.advance(HEARTBEAT_SECONDS)
            passed += HEARTBEAT_SECONDS

    def jump(self, seconds: float) -> None:
        """Sets the wall clocks of all machines, on or back."""
        self.unix_time.advance(seconds)
        for machine in self.machines:
            machine.unix_time.advance(seconds)

    async def close(self) -> None:
        for machine in self.machines:
            await machine.store.close()


@pytest.fixture
async def world(home: Home) -> AsyncIterator[World]:
    made = World(home)
    yield made
    await made.close()


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    print("\n| clock event | store | sessions lost |\n|---|---|---|")
    for (event, store), lost in TABLE.items():
        print(f"| {event} | {store} | {lost} |")


async def open_sessions(machine: Machine, first: int = 0, count: int = SESSIONS) -> list[str]:
    """Sessions that were stepped twice, of each durability that the store has."""
    durable = machine.store.durable
    kinds = [Durability.ASYNC, Durability.SYNC] if durable else [Durability.NONE]
    names = [f"s{i}" for i in range(first, first + count)]
    for i, name in enumerate(names):
        session = await machine.rig.open(name, idle=IDLE, durability=kinds[i % len(kinds)])
        for t in range(2):
            await machine.rig.step(session, ROWS[t], t)
    await machine.rig.sessions.writer.save_round()
    return names


async def lost(machine: Machine, names: list[str]) -> int:
    """How many sessions are not there any more as they were."""
    gone = 0
    for name in names:
        try:
            session = await machine.rig.sessions.get(name)
        except (SessionExpired, SessionUnknown):
            gone += 1
            continue
        assert machine.rig.sessions.t(session) == 2
        assert (await machine.rig.step(session, ROWS[1], 1)).replayed
    return gone


async def boots_in_the_past(world: World) -> tuple[Machine, list[str]]:
    world.jump(-21 * DAY)
    names = await open_sessions(machine := await world.start())
    await world.up(30)
    await world.stop(machine)
    world.jump(21 * DAY)
    return await world.start(), names


async def is_set_forward(world: World) -> tuple[Machine, list[str]]:
    names = await open_sessions(machine := await world.start())
    await world.up(30)
    world.jump(2 * DAY)
    return machine, names


async def is_set_back(world: World) -> tuple[Machine, list[str]]:
    names = await open_sessions(machine := await world.start())
    await world.up(30)
    world.jump(-100 * DAY)
    return machine, names


async def is_set_forward_and_restarted(world: World) -> tuple[Machine, list[str]]:
    machine, names = await is_set_forward(world)
    await world.up(30)
    await world.stop(machine)
    world.jump(-2 * DAY)
    return await world.start(), names


async def an_outage(world: World) -> tuple[Machine, list[str]]:
    names = await open_sessions(machine := await world.start())
    await world.up(30)
    await world.kill(machine)
    world.jump(30 * DAY)
    return await world.start(), names


async def restarts_every_minute(world: World) -> tuple[Machine, list[str]]:
    names = await open_sessions(machine := await world.start())
    for jump in (DAY, -3 * DAY, 40 * DAY, -DAY, 0.0, 7 * DAY, 100.0):
        await world.up(60)
        await world.kill(machine)
        world.jump(jump)
        machine = await world.start()
    return machine, names


async def clocks_apart(world: World) -> tuple[Machine, list[str]]:
    names: list[str] = []
    for apart in (0.0, 21 * DAY, -100 * DAY):
        names += await open_sessions(await world.start(apart), len(names), 4)
    await world.up(120)
    return world.machines[0], names


async def a_pause(world: World) -> tuple[Machine, list[str]]:
    names = await open_sessions(machine := await world.start())
    await world.up(30)
    machine.clock.advance(3 * DAY)
    world.jump(3 * DAY)
    return machine, names


Event = Callable[[World], Awaitable[tuple[Machine, list[str]]]]
WITHOUT_RESTART: dict[str, Event] = {
    "set forward 2 days while running": is_set_forward,
    "set back 100 days while running": is_set_back,
    "process or machine paused for 3 days": a_pause,
}
EVENTS: dict[str, Event] = {
    "boot 21 days in the past, then right": boots_in_the_past,
    "set forward 2 days, then right again": is_set_forward_and_restarted,
    "outage of 30 days": an_outage,
    "restarted every minute, any clock": restarts_every_minute,
    "3 servers, clocks 121 days apart": clocks_apart,
    **WITHOUT_RESTART,
}
CASES = [
    pytest.param(event, kind, id=f"{event}-{kind}")
    for event in EVENTS
    for kind in KINDS
    if kind != "memory" or event in WITHOUT_RESTART
]


@pytest.mark.parametrize(("event", "home"), CASES, indirect=["home"])
async def test_no_session_is_lost(world, event, request):
    machine, names = await EVENTS[event](world)
    await world.up(120)
    gone = await lost(machine, names)
    kind = request.node.callspec.id.rpartition("-")[2]
    TABLE[event, kind] = f"{gone} of {len(names)}"
    assert gone == 0


@pytest.mark.parametrize("home", KINDS, indirect=True)
async def test_idle_time_ends_sessions_and_they_come_back_bit_for_bit(world):
    names = await open_sessions(machine := await world.start())
    before = {name: await whole(machine, name) for name in names}
    await world.up(IDLE + 100)
    rig = machine.rig
    assert await lost(machine, names) == len(names)
    assert rig.sessions.expired == len(names)
    assert len(rig.sessions) == 0
    world.jump(-50 * DAY)
    for name in names:
        await rig.sessions.restore_expired(name)
    assert {name: await whole(machine, name) for name in names} == before
    assert await lost(machine, names) == 0
    for name in names:
        session = await rig.sessions.get(name)
        assert (await rig.step(session, ROWS[2], 2)).t_after == 3
    await world.up(IDLE - 100)
    assert rig.sessions.expired == 0


async def whole(machine: Machine, name: str) -> tuple[int, bytes, list[bytes]]:
    """A session's t, its state and what it remembers of its replies."""
    session: ResidentSession = await machine.rig.sessions.get(name)
    state = machine.rig.scheduler.engine.read_states(np.array([session.slot]))[0]
    window = session.scheduler.window.read(session.slot)
    remembered = [window.stamps.tobytes(), window.ring.tobytes()]
    return machine.rig.sessions.t(session), state.tobytes(), remembered


@pytest.mark.parametrize("home", KINDS[1:], indirect=True)
async def test_two_servers_count_idle_time_once(world):
    names = await open_sessions(await world.start())
    machine = await world.start(17 * DAY)
    await world.up(IDLE - 100)
    assert await lost(machine, names) == 0


async def test_a_store_that_was_away_is_no_idle_time(tmp_path, monkeypatch):
    """Sessions that nobody could load, as their store was away, have not been idle."""
    world = World(Home(f"sqlite:{tmp_path}/sessions.db"))
    names = await open_sessions(machine := await world.start())
    with monkeypatch.context() as patch:
        patch.setattr(machine.store, "heartbeat", lambda: asyncio.sleep(0))
        for _ in range(int(2 * IDLE / HEARTBEAT_SECONDS)):
            machine.clock.advance(HEARTBEAT_SECONDS)
            machine.uptime.heartbeat()
    spilled = [n for n in names if machine.rig.table.get(n) is None]
    assert spilled
    with suppress(SessionExpired):
        await machine.heartbeat()
    assert await lost(machine, spilled) == 0
    await world.close()
