"""Who is served when in the queue of a session."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from stepstate.errors import Internal, QueueFull, SessionUnknown, StepstateError
from stepstate.sessions import queues
from stepstate.sessions.queues import RequestQueues, WaitingCall
from tests.unit.rig import rounds


class Place:
    """A session that can be used when a test says so."""

    key = "a"

    def __init__(self) -> None:
        self.usable = False
        self.loads = 0
        self.served: list[str] = []
        self.error: Exception | None = None
        self.loaded = asyncio.Event()
        table = SimpleNamespace(get=lambda _: None, requested=set(), usable=self._usable)
        admission = SimpleNamespace(check_open=lambda: None)
        context = SimpleNamespace(table=table, clock=float)
        loader = SimpleNamespace(make_ready=self._make_ready)
        self.line = RequestQueues(context, loader, admission)

    def _usable(self, session_id: str, now: float) -> object | None:
        return self if self.usable else None

    async def _make_ready(self, session_id: str) -> None:
        self.loads += 1
        await self.loaded.wait()
        if self.error is not None:
            raise self.error
        self.usable = True

    def call(self, name: str, *, deadline: float = 0.0, start: bool = True) -> WaitingCall[None]:
        call: WaitingCall[None] = WaitingCall(lambda _: self.served.append(name), deadline)
        self.line.wait("a", call, start=start)
        return call

    async def hold(self, name: str, work: Callable[[], asyncio.Future[None]] | None = None) -> None:
        async with self.line.hold("a"):
            self.served.append(name)
            if work is not None:
                await work()


@pytest.fixture
async def place() -> Place:
    return Place()


async def test_all_are_served_in_the_turn_in_which_the_session_can_be_used(place):
    calls = [place.call(name) for name in "abc"]
    await rounds(2)
    place.loaded.set()
    await asyncio.wait([calls[0].result])
    assert place.served == ["a", "b", "c"]
    assert place.loads == 1
    assert "a" not in place.line


async def test_whoever_holds_the_line_is_alone_until_it_is_released(place):
    place.usable = True
    released = asyncio.get_running_loop().create_future()
    holding = asyncio.create_task(place.hold("open", lambda: released))
    await rounds(1)
    call = place.call("step")
    closing = asyncio.create_task(place.hold("close"))
    await rounds(3)
    assert place.served == ["open"]
    released.set_result(None)
    await asyncio.gather(holding, closing, call.result)
    assert place.served == ["open", "step", "close"]
    assert "a" not in place.line


async def test_an_error_is_told_to_all_before_the_next_hold_and_to_no_others(place):
    before = [place.call("a"), place.call("b")]
    opened = asyncio.get_running_loop().create_future()
    holding = asyncio.create_task(place.hold("open", lambda: opened))
    await rounds(2)
    after = place.call("c")
    place.error = SessionUnknown("a")
    place.loaded.set()
    await rounds(3)
    assert [call.result.exception() for call in before] == [place.error] * 2
    place.error = None
    opened.set_result(None)
    await asyncio.gather(holding, after.result)
    assert place.served == ["open", "c"]
    assert place.loads == 2


async def test_a_surprise_is_told_with_an_id(place):
    call = place.call("a")
    place.error = RuntimeError("no one expects it")
    place.loaded.set()
    with pytest.raises(Internal):
        await call.result


async def test_one_that_gives_up_leaves_its_place_to_the_next(place):
    first, second = place.call("a"), place.call("b")
    place.line.drop("a", first)
    place.line.drop("a", first)
    place.loaded.set()
    await second.result
    assert place.served == ["b"]


async def test_all_that_give_up_leave_no_line(place):
    call = place.call("a")
    await rounds(1)
    place.line.drop("a", call)
    place.loaded.set()
    await asyncio.wait_for(place.line.wait_served(), 10)
    assert place.usable


@pytest.mark.parametrize("granted", [False, True])
async def test_a_hold_whose_caller_gives_up_leaves_its_place_to_the_next(place, granted):
    place.usable = granted
    first = None if granted else place.call("a")
    holding = asyncio.create_task(place.hold("open", asyncio.get_running_loop().create_future))
    await rounds(2)
    last = place.call("b")
    holding.cancel()
    place.loaded.set()
    await last.result
    assert place.served == (["open", "b"] if first is None else ["a", "b"])
    assert "a" not in place.line


async def test_a_hold_that_is_cancelled_as_its_turn_comes_moves_the_line_on(place):
    holding = place.line.hold("a")
    waiting = asyncio.create_task(place.hold("never"))
    await rounds(1)
    last = place.call("b")
    place.usable = True
    holding.release()
    waiting.cancel()
    await last.result
    assert place.served == ["b"]
    assert "a" not in place.line


async def test_what_is_to_be_finished_keeps_the_line_though_its_caller_gave_up(place):
    place.usable = True
    done = asyncio.get_running_loop().create_future()

    async def work() -> None:
        await done
        place.served.append("closed")

    async def close() -> None:
        async with place.line.hold("a") as hold:
            await hold.finish(work())

    closing = asyncio.create_task(close())
    await rounds(2)
    call = place.call("step")
    closing.cancel()
    await rounds(2)
    assert place.served == []
    done.set_result(None)
    await call.result
    assert place.served == ["closed", "step"]


async def test_one_that_waits_for_room_keeps_its_place(place, monkeypatch):
    monkeypatch.setattr(queues, "RETRY_SECONDS", 0.001)
    place.usable, full = True, True

    def patient(_: object) -> None:
        if full:
            raise QueueFull("requests", 1)
        place.served.append("patient")

    call = WaitingCall(patient, asyncio.get_running_loop().time() + 60)
    place.line.wait("a", call)
    after = place.call("after")
    await asyncio.sleep(0.01)
    assert place.served == []
    full = False
    await asyncio.gather(call.result, after.result)
    assert place.served == ["patient", "after"]
    full = True
    late: WaitingCall[None] = WaitingCall(patient)
    place.line.wait("a", late)
    assert isinstance(late.result.exception(), QueueFull)
    assert "a" not in place.line


async def test_a_line_that_is_still_waits_for_its_start_or_for_others(place):
    place.loaded.set()
    forecast = place.call("forecast", start=False)
    await rounds(3)
    assert place.loads == 0
    step = place.call("step")
    await asyncio.gather(forecast.result, step.result)
    assert place.served == ["forecast", "step"]
    place.usable = False
    dropped = place.call("dropped", start=False)
    place.line.drop("a", dropped)
    assert "a" not in place.line
    alone = place.call("alone", start=False)
    place.line.load("a")
    place.line.load("a")
    await alone.result
    assert place.loads == 2


async def test_an_error_of_its_own_is_its_own(place):
    place.usable = True

    def refuse(_: object) -> None:
        raise SessionUnknown("mine")

    place.usable = False
    bad: WaitingCall[None] = WaitingCall(refuse)
    place.line.wait("a", bad)
    good = place.call("b")
    place.loaded.set()
    await good.result
    error = bad.result.exception()
    assert isinstance(error, StepstateError)
    assert str(error) == str(SessionUnknown("mine"))
