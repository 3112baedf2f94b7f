"""The budget of what clients make a server hold."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepstate.budget import MIN_LIMIT, MemoryAccount, MemoryBudget, MemoryUse, limit_bytes
from stepstate.config import ConfigError, ServerConfig
from stepstate.errors import MemoryLimit

LIMIT = 1000


def fill(account: MemoryAccount) -> int:
    """Takes all that an account can get; returns how much it holds then."""
    while account.fits(1):
        account.reserve(MemoryUse.REPLIES, 1)
    return account.held


@pytest.mark.parametrize("greedy", [1, 2, 4, 9])
def test_greedy_peers_share_and_leave_as_much_as_each_has(greedy: int) -> None:
    budget = MemoryBudget(LIMIT)
    held = [fill(MemoryAccount(budget)) for _ in range(greedy)]
    assert budget.used == sum(held) < LIMIT
    first = MemoryAccount(MemoryBudget(LIMIT))
    assert fill(first) == budget.shared // 2


def test_peers_that_hold_little_find_room_however_many_greedy_ones_came_before() -> None:
    budget = MemoryBudget(1_000_000)
    for _ in range(60):
        fill(MemoryAccount(budget))
    others = [MemoryAccount(budget) for _ in range(50)]
    for other in others:
        other.reserve(MemoryUse.REQUESTS, budget.little)
        assert not other.fits(1)
    assert budget.used <= budget.limit


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(MemoryUse), st.integers(0, 400))))
def test_the_limit_holds_and_everything_comes_back(
    wanted: list[tuple[int, MemoryUse, int]],
) -> None:
    budget = MemoryBudget(LIMIT)
    accounts = [MemoryAccount(budget) for _ in range(5)]
    taken = []
    for number, use, size in wanted:
        before = (budget.used, accounts[number].held, dict(budget.by_use))
        try:
            accounts[number].reserve(use, size)
        except MemoryLimit:
            assert (budget.used, accounts[number].held, budget.by_use) == before
        else:
            taken.append((number, use, size))
        assert budget.used == sum(budget.by_use.values()) <= LIMIT
    for number, use, size in taken:
        accounts[number].release(use, size)
    assert not budget.used
    assert not any(budget.by_use.values())
    assert not any(account.held for account in accounts)


async def test_whoever_waits_goes_on_when_there_is_room() -> None:
    budget = MemoryBudget(LIMIT)
    greedy, other = MemoryAccount(budget), MemoryAccount(budget)
    fill(greedy)
    waiting = asyncio.create_task(other.wait_for(600))
    await asyncio.sleep(0)
    greedy.release(MemoryUse.REPLIES, 50)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    greedy.release(MemoryUse.REPLIES, 350)
    await asyncio.wait_for(waiting, 5)


def test_a_limit_is_a_size_or_a_share() -> None:
    assert limit_bytes("2GiB") == 2 * 2**30
    assert limit_bytes("500MB") == 500_000_000
    assert limit_bytes("50%") == pytest.approx(2 * limit_bytes("25%"), rel=1e-6)
    assert limit_bytes("0.0001%") == MIN_LIMIT
    for wrong in ("", "2 GiB", "-1", "0%", "101%", "nan%", "1e9", "2GiBs"):
        with pytest.raises(ConfigError, match="memory_limit"):
            ServerConfig(memory_limit=wrong)
