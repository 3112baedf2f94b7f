"""Which calls are accepted, and in which order long ones have their turn."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import chain

import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import given
from hypothesis import strategies as st

from stepstate.budget import MemoryBudget
from stepstate.errors import MemoryLimit, TenantLimitReached, TooManyCalls
from stepstate.metrics import Metrics
from stepstate.metrics.counters import CALL_KINDS
from stepstate.server import SERVICE
from stepstate.tenants import LimitTable, TenantLimits
from stepstate.transport import admission
from stepstate.transport.admission import MAX_RUNNING, CallAdmission
from stepstate.transport.methods import LONG, METHODS, SHORT, CallKind
from stepstate.transport.peers import PeerTable
from stepstate.transport.triton.service import SERVICE as TRITON
from stepstate.transport.triton.service import TritonService
from tests.unit.transport.contexts import CallContext, be_of_tenant


class Calls:
    """Calls of some peers on one admission."""

    def __init__(self, limit: int = 2**30) -> None:
        self.memory = MemoryBudget(limit)
        self.metrics = Metrics()
        self.peers = PeerTable(self.memory, MemoryBudget(limit))
        self.admission = CallAdmission(self.peers, self.metrics)
        self.order: list[str] = []
        self.running: Counter[str] = Counter()
        self.most_running = 0

    def open(self, peer: str, kind: CallKind = LONG) -> CallContext:
        context = CallContext(peer)
        try:
            self.admission.begin(context, kind, context.when_done)
        except (TooManyCalls, MemoryLimit, TenantLimitReached):
            context.end()
            raise
        return context

    def fill(self, peer: str, kind: CallKind) -> list[CallContext]:
        """Opens as many calls as a peer may have."""
        contexts = []
        while True:
            try:
                contexts.append(self.open(peer, kind))
            except (TooManyCalls, MemoryLimit):
                return contexts

    def start(self, peer: str, *, until: asyncio.Event | None = None) -> asyncio.Task[None]:
        """A long call, which works until an event is set."""

        async def work() -> None:
            async with self._called(peer), self.admission.turn():
                self.order.append(peer)
                self.running[peer] += 1
                self.most_running = max(self.most_running, self.running.total())
                try:
                    await (until.wait() if until else asyncio.sleep(0))
                finally:
                    self.running[peer] -= 1

        return asyncio.create_task(work())

    @asynccontextmanager
    async def _called(self, peer: str) -> AsyncIterator[None]:
        context = CallContext(peer)
        try:
            self.admission.begin(context, LONG, context.when_done)
            yield
        finally:
            context.end()

    def check_empty(self) -> None:
        assert not self.peers.count
        assert not self.memory.used
        assert not any(self.metrics.calls.values())
        assert not self.metrics.peers
        assert not self.admission.running


async def settle(rounds: int = 500) -> None:
    for _ in range(rounds):
        await asyncio.sleep(0)


def test_every_rpc_has_its_policy():
    services = [SERVICE, TRITON]
    services += health_pb2.DESCRIPTOR.services_by_name.values()
    services += reflection_pb2.DESCRIPTOR.services_by_name.values()
    offered = {
        method.name
        for service in services
        for method in service.methods
        if service is not TRITON or hasattr(TritonService, method.name)
    }
    assert offered == set(METHODS)
    assert list(CALL_KINDS) == list(CallKind)


def test_what_streams_is_a_stream():
    for method in SERVICE.methods:
        streams = method.client_streaming or method.server_streaming
        assert (METHODS[method.name].kind is CallKind.STREAM) == streams, method.name


@pytest.mark.parametrize("kind", CallKind)
@pytest.mark.parametrize("greedy", [1, 2, 5])
def test_greedy_peers_leave_room_for_others(monkeypatch, kind, greedy):
    monkeypatch.setitem(admission.MAX_OPEN, kind, 60)
    calls = Calls()
    opened = [calls.fill(f"greedy {number}", kind) for number in range(greedy)]
    assert len(opened[0]) == 30
    assert sum(map(len, opened)) < 60
    with pytest.raises(TooManyCalls, match=r"may have as many as are free, \d+ of 60"):
        calls.open("greedy 0", kind)
    small = calls.open("small", kind)
    others = calls.open("greedy 0", next(one for one in CallKind if one is not kind))
    for context in [small, others, *chain.from_iterable(opened)]:
        context.end()
    calls.check_empty()


def test_calls_count_against_memory():
    calls = Calls(limit=1000 * admission.CALL_BYTES)
    opened = calls.fill("greedy", SHORT)
    assert len(opened) == 375  # half of three quarters
    for context in opened:
        context.end()
    calls.check_empty()


async def test_peers_take_turns():
    """Of 100 calls that wait before it, a call of another lets one pass."""
    calls = Calls()
    tasks = [calls.start("greedy") for _ in range(100)]
    await settle(20)
    tasks.append(calls.start("small"))
    before = len(calls.order)
    await asyncio.gather(*tasks)
    assert calls.order.index("small") <= before + 2  # one already had its turn
    assert Counter(calls.order) == {"greedy": 100, "small": 1}
    calls.check_empty()


async def test_tenants_have_turns_by_weight_and_their_connections_in_turn():
    calls = Calls()
    calls.peers.set_limits(LimitTable(tenants={"heavy": TenantLimits(weight=2)}))
    tasks = []
    for tenant, connections in (("light", 5), ("heavy", 1)):
        be_of_tenant(tenant)
        tasks += [calls.start(f"{tenant} {n % connections}") for n in range(60)]
    await asyncio.gather(*tasks)
    early = Counter(calls.order[:61])  # the first had its turn before others had come
    assert 38 <= early["heavy 0"] <= 42
    light = [early[f"light {n}"] for n in range(5)]
    assert max(light) - min(light) <= 1
    calls.check_empty()


async def test_a_tenant_has_its_limits_of_calls_over_all_connections():
    calls = Calls()
    calls.peers.set_limits(LimitTable(tenants={"a": TenantLimits(streams=3, calls=2)}))
    be_of_tenant("a")
    opened = [calls.open(f"connection {n}", CallKind.STREAM) for n in range(3)]
    opened += [calls.open("connection", kind) for kind in (SHORT, LONG)]
    for kind in CallKind:
        with pytest.raises(TenantLimitReached, match=r"streams = 3|calls = 2"):
            calls.open("another", kind)
    be_of_tenant("b")
    opened.append(calls.open("connection 0", CallKind.STREAM))
    for context in opened:
        context.end()
    calls.check_empty()
    assert not any(calls.peers.tenants.get("a").held.values())


async def test_rounds_of_the_loop_pass_between_two_long_calls():
    calls, rounds, done = Calls(), [], False

    async def count() -> None:
        while not done:
            rounds.append(len(calls.order))
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await asyncio.gather(*[calls.start("a") for _ in range(20)])
    done = True
    await counting
    assert len(rounds) >= 19 * admission.ROUNDS_BETWEEN


async def test_slow_calls_of_one_peer_leave_turns_for_others():
    calls, end = Calls(), asyncio.Event()
    slow = [calls.start("slow", until=end) for _ in range(100)]
    await settle()
    assert calls.running["slow"] == MAX_RUNNING // 2
    assert calls.metrics.calls[LONG, "waiting"] == 100 - MAX_RUNNING // 2
    await asyncio.wait_for(calls.start("other"), 5)
    end.set()
    await asyncio.gather(*slow)
    assert calls.most_running <= MAX_RUNNING
    calls.check_empty()


async def test_who_is_gone_leaves_the_queue():
    calls, end = Calls(), asyncio.Event()
    slow = [calls.start("slow", until=end) for _ in range(50)]
    await settle()
    waiting = slow[MAX_RUNNING // 2 :]
    for task in waiting:
        task.cancel()
    await settle(3)
    assert not calls.metrics.calls[LONG, "waiting"]
    end.set()
    await asyncio.gather(*slow, return_exceptions=True)
    calls.check_empty()


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), max_size=60), st.integers())
def test_every_turn_comes_back_whenever_calls_are_cancelled(planned, seed):
    """Each call is cancelled after some rounds, or ends before that."""

    async def run() -> None:
        calls, chance = Calls(), random.Random(seed)
        tasks = []
        for peer, rounds in planned:
            task = calls.start(f"peer {peer}")
            tasks.append(task)
            delay = asyncio.create_task(settle(rounds))
            delay.add_done_callback(lambda _, task=task: task.cancel())
            await settle(chance.randrange(3))
        await asyncio.gather(*tasks, return_exceptions=True)
        await settle(50)
        assert calls.most_running <= MAX_RUNNING
        calls.check_empty()

    asyncio.run(run())
