from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepstate.budget import MemoryBudget
from stepstate.tenants import LimitTable, TenantLimits, TenantTable
from stepstate.transport.peers import Peer, PeerTable
from stepstate.transport.shares import COST_BYTES, ROUND_COST, LoopShares, cost_of
from tests.unit.transport.contexts import CallContext, be_of_tenant


def joined(count: int) -> tuple[LoopShares, list[Peer]]:
    table = PeerTable(MemoryBudget(2**30), MemoryBudget(2**30))
    return LoopShares(table), [table.join(CallContext(f"peer {n}")) for n in range(count)]


async def handled(shares: LoopShares, peer: Peer, costs: list[int], rounds: list[int]) -> None:
    """Takes messages that have all come; notes the round of the loop in which each is handled."""
    for cost in costs:
        turn = shares.take(peer, cost)
        if turn is not None:
            await turn
        rounds.append(len(ROUNDS))


ROUNDS: list[None] = []


async def counting_rounds() -> None:
    while True:
        ROUNDS.append(None)
        await asyncio.sleep(0)


async def in_rounds(costs: list[list[int]]) -> list[list[int]]:
    """In which rounds the messages of each peer are handled."""
    ROUNDS.clear()
    shares, peers = joined(len(costs))
    counter = asyncio.create_task(counting_rounds())
    rounds: list[list[int]] = [[] for _ in costs]
    works = zip(peers, costs, rounds, strict=True)
    await asyncio.gather(*(handled(shares, *work) for work in works))
    counter.cancel()
    return rounds


async def test_a_peer_alone_pays_nothing() -> None:
    (rounds,) = await in_rounds([[1] * 10_000])
    assert len(set(rounds)) == 1


@pytest.mark.parametrize("others", [1, 3, 40])
async def test_a_flood_leaves_each_round_to_the_others(others: int) -> None:
    flood, *rest = await in_rounds([[1] * 1000, *([1] * 5 for _ in range(others))])
    share = max(1, ROUND_COST // (1 + others))
    assert max(Counter(flood).values()) <= share
    assert max(map(max, rest)) <= 8  # while the flood takes a thousand rounds, or its share of it
    assert max(flood) >= 1000 // share


async def test_tenants_share_each_round_by_weight_however_many_connections_they_have() -> None:
    limits = LimitTable(tenants={"light": TenantLimits(), "heavy": TenantLimits(weight=3)})
    budget = MemoryBudget(2**30)
    table = PeerTable(budget, budget, tenants=TenantTable(limits))
    peers = []
    for tenant, count in (("light", 10), ("heavy", 1)):
        be_of_tenant(tenant)
        peers += [table.join(CallContext(f"{tenant} {n}")) for n in range(count)]
    shares, left = LoopShares(table), Counter[str]()

    async def flood(peer: Peer) -> None:
        while left.total() < 4000:
            turn = shares.take(peer, 1)
            if turn is not None:
                await turn
            left[peer.name] += left.total() < 4000

    await asyncio.gather(*(flood(peer) for peer in peers for _ in range(50)))
    light = [left[f"light {n}"] for n in range(10)]
    assert 2.5 <= left["heavy 0"] / sum(light) <= 3.5
    assert max(light) - min(light) <= 60  # and connections of one tenant share in turn


async def test_a_long_message_is_handled_at_once_and_paid_back() -> None:
    cost = cost_of(bytes(16 * 2**20))
    assert cost == 1 + 16 * 2**20 // COST_BYTES
    long, short = await in_rounds([[cost, 1], [1, 1]])
    assert long[0] <= 1
    assert long[1] - long[0] >= cost // (ROUND_COST // 2)
    assert max(short) <= 4


async def test_what_a_message_has_cost_more_is_paid_back_by_its_peer_alone() -> None:
    shares, (costly, cheap) = joined(2)
    assert shares.take(costly, 1) is shares.take(cheap, 1) is None
    shares.charge(costly, 10 * ROUND_COST)
    rounds: dict[Peer, list[int]] = {costly: [], cheap: []}
    ROUNDS.clear()
    counter = asyncio.create_task(counting_rounds())
    await asyncio.gather(*(handled(shares, peer, [1], its) for peer, its in rounds.items()))
    counter.cancel()
    assert rounds[cheap][0] <= 1
    assert rounds[costly][0] >= 10 * ROUND_COST // (ROUND_COST // 2) - 1


async def test_a_peer_alone_is_charged_nothing() -> None:
    shares, (peer,) = joined(1)
    shares.charge(peer, 1000)
    assert peer.group.credit > 0


@given(
    st.lists(st.lists(st.integers(1, 3000), max_size=8), min_size=2, max_size=5),
    st.sets(st.tuples(st.integers(0, 4), st.integers(0, 7))),
)
def test_every_message_has_its_turn_whatever_is_cancelled(
    costs: list[list[int]], cancelled: set[tuple[int, int]]
) -> None:
    async def run() -> None:
        shares, peers = joined(len(costs))
        tasks = {}
        for place, (peer, all_costs) in enumerate(zip(peers, costs, strict=True)):
            for number, cost in enumerate(all_costs):
                work = handled(shares, peer, [cost], [])
                tasks[place, number] = asyncio.create_task(work)
        await asyncio.sleep(0)
        for key in cancelled & tasks.keys():
            tasks[key].cancel()
        done = await asyncio.wait_for(asyncio.gather(*tasks.values(), return_exceptions=True), 20)
        kept = [outcome for key, outcome in zip(tasks, done, strict=True) if key not in cancelled]
        assert not any(kept)
        async with asyncio.timeout(20):
            while any(
                peer.group.turns and peer.group.turns.turns for peer in peers
            ):  # those that were cancelled
                await asyncio.sleep(0)

    asyncio.run(run())
