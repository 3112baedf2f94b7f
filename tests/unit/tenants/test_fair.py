"""Whoever waits is served in proportion to its weight, and within a tenant in turn."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from stepstate.tenants import FairQueue, LimitTable, Share, TenantLimits, TenantTable


@dataclass(frozen=True, eq=False)
class From:
    """One client of a tenant."""

    share: Share


def shares(*weights: float) -> list[Share]:
    limits = {str(n): TenantLimits(weight=weight) for n, weight in enumerate(weights)}
    table = TenantTable(LimitTable(tenants=limits))
    return [Share(table.get(str(number))) for number in range(len(weights))]


def served(queue: FairQueue[From], rows: int) -> Counter[From]:
    """Rows of each client, of about the first so many."""
    found: Counter[From] = Counter()
    while queue.turns and found.total() < rows:
        client, some = queue.first()
        queue.take()
        found[client] += some
    return found


WEIGHTS = st.lists(st.floats(0.1, 10), min_size=2, max_size=5)
CLIENTS = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 64)), min_size=2, max_size=8)


@given(WEIGHTS, CLIENTS, st.integers(500, 4000))
def test_tenants_that_all_wait_have_rows_by_their_weights(weights, clients, rows):
    """However many clients each has, and however many rows these send at once."""
    tenants = shares(*weights)
    queue: FairQueue[From] = FairQueue()
    senders = [(From(tenants[place % len(tenants)]), size) for place, size in clients]
    for client, size in senders:
        for _ in range(rows // size + 2):  # none runs dry
            queue.put(client, client, size)
    found = served(queue, rows)
    by_share: Counter[Share] = Counter()
    for client, some in found.items():
        by_share[client.share] += some
    present = {client.share for client, _ in senders}
    each = {share: by_share[share] / share.weight for share in present}
    slack = max(2 * size / client.share.weight for client, size in senders)
    assert max(each.values()) - min(each.values()) <= 2 * slack
    for client, size in senders:  # and the clients of one tenant have as many as each other
        for other, other_size in senders:
            if other.share is client.share:
                assert found[client] - found[other] <= 2 * (size + other_size)


def test_twice_the_weight_is_twice_the_rows():
    light, heavy = (From(share) for share in shares(1, 2))
    queue: FairQueue[From] = FairQueue()
    for _ in range(1000):
        queue.put(light, light, 1)
        queue.put(heavy, heavy, 1)
    found = served(queue, 900)
    assert (found[light], found[heavy]) == (300, 600)


def test_many_connections_get_a_tenant_no_more():
    many, one = shares(1, 1)
    queue: FairQueue[From] = FairQueue()
    flood = [From(many) for _ in range(100)]
    for client in flood:
        for _ in range(10):
            queue.put(client, client, 1)
    alone = From(one)
    for _ in range(10):
        queue.put(alone, alone, 1)
    found = served(queue, 20)
    assert found[alone] >= 9


def test_one_row_of_a_tenant_that_had_nothing_waiting_is_next():
    greedy, small = (From(share) for share in shares(1, 1))
    queue: FairQueue[From] = FairQueue()
    for _ in range(50):
        queue.put(greedy, greedy, 200)
    served(queue, 2000)
    queue.put(small, small, 1)
    assert small in served(queue, 201)


def test_an_idle_time_saves_up_nothing():
    a, b = (From(share) for share in shares(1, 1))
    queue: FairQueue[From] = FairQueue()
    for _ in range(1000):
        queue.put(a, a, 1)
    served(queue, 900)
    for _ in range(1000):
        queue.put(b, b, 1)
    found = served(queue, 100)
    assert abs(found[a] - found[b]) <= 2


def test_a_client_that_comes_before_another_of_its_tenant_costs_the_tenant_nothing():
    """The turn of the tenant was reckoned for 256 rows, and then a client with one row had it."""
    a, b = shares(1, 1)
    queue: FairQueue[From] = FairQueue()
    packs, single, other = From(a), From(a), From(b)
    for _ in range(40):
        queue.put(packs, packs, 256)
    for _ in range(20 * 256):
        queue.put(other, other, 1)
    found: Counter[From] = Counter()
    while found.total() < 8000:
        if not found.total() % 16:
            queue.put(single, single, 1)
        client, some = queue.first()
        queue.take()
        found[client] += some
    assert abs(found[packs] + found[single] - found[other]) <= 600
