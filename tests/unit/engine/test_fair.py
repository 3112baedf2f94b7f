"""What is more than a micro-batch or a chunk is taken from its sources in turn."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepstate.engine.fair import RequestQueue
from stepstate.errors import QueueFull
from stepstate.sessions import MAX_SOURCE_RUNNING, Source
from stepstate.tenants import LimitTable, Share, SourceQueue, TenantLimits, TenantTable
from tests.networks import make_network
from tests.unit.rig import Rig, model_of

ITEMS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20)), max_size=60)


def drain(queue: SourceQueue[tuple[int, int]]) -> list[tuple[int, int]]:
    taken = []
    while queue.turns:
        item, rows = queue.first()
        assert rows == item[1]
        queue.take()
        taken.append(item)
    return taken


@given(ITEMS)
def test_sources_that_wait_have_had_about_as_many_rows(items):
    """None is ahead of another that still waits by more than one item of each."""
    queue: SourceQueue[tuple[int, int]] = SourceQueue()
    for number, (source, rows) in enumerate(items):
        queue.put(source, (number, rows), rows)
    left = Counter(source for source, _ in items)
    largest = {source: max(rows for who, rows in items if who == source) for source in left}
    served: Counter[int] = Counter()
    taken = drain(queue)
    for number, rows in taken:
        source = items[number][0]
        served[source] += rows
        left[source] -= 1
        for other in left:
            if left[other] and left[source]:
                assert served[source] - served[other] <= largest[source] + largest[other]
    for source in left:  # each in its own order
        mine = [number for number, _ in taken if items[number][0] == source]
        assert mine == [number for number, (who, _) in enumerate(items) if who == source]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=30))
def test_one_row_of_a_source_that_had_nothing_waiting_is_next(greedy):
    queue: SourceQueue[str] = SourceQueue()
    for rows in greedy:
        queue.put("greedy", "greedy", rows)
    for _ in range(len(greedy) // 2):
        queue.take()
    queue.put("small", "small", 1)
    order = []
    while queue.turns:
        order.append(queue.first()[0])
        queue.take()
    assert order.index("small") <= 1


def rig_of(**options: int) -> Rig:
    return Rig(model_of(make_network("lstm", seed=1)), max_sessions=400, **options)


async def opened(rig: Rig, count: int, prefix: str) -> list:
    return [await rig.open(f"{prefix}{number}") for number in range(count)]


@pytest.mark.parametrize("packed", [False, True])
async def test_a_source_with_many_rows_delays_another_by_one_micro_batch(packed):
    rig = rig_of(batch_rows=16)
    many, (one,) = await opened(rig, 320, "many"), await opened(rig, 1, "one")
    greedy, x = Source(), np.zeros((16, 3), np.float32)
    if packed:
        sent = [rig.send_pack(many[n : n + 16], x, greedy) for n in range(0, 320, 16)]
    else:
        sent = [rig.send(session, x[0], source=greedy) for session in many]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    before = rig.results.get("applied", 0)
    await rig.send(one, x[0], source=Source()).outcome()
    assert rig.results["applied"] - before <= 2 * 16 + 1
    for caller in sent:
        await caller.outcome()
    assert rig.results["applied"] == 321


async def test_what_was_cancelled_is_dropped_a_batch_at_a_time_and_holds_up_none():
    rig = rig_of(batch_rows=16)
    many, (one,) = await opened(rig, 320, "many"), await opened(rig, 1, "one")
    greedy, x = Source(), np.zeros(3, np.float32)
    sent = [rig.send(session, x, source=greedy) for session in many]
    for caller in sent:
        caller.cancelled = True
    await rig.send(one, x, source=Source()).outcome()
    assert sum(caller.answered for caller in sent) <= 2 * 16
    for caller in sent:
        await caller.outcome()
    assert rig.results["applied"] == 1
    assert (greedy.share.queued_requests, greedy.share.queued_rows) == (0, 0)


async def test_a_long_request_is_not_behind_a_hundred_of_another_source():
    """Both sources get half of each chunk, whatever the number of their requests."""
    rig = rig_of(chunk_rows=32)
    many, (one,) = await opened(rig, 100, "many"), await opened(rig, 1, "one")
    greedy, x = Source(), np.zeros((100, 3), np.float32)
    sent = [rig.send(session, x, source=greedy) for session in many]
    await rig.send(one, x, source=Source()).outcome()
    assert sum(caller.answered for caller in sent) <= 2
    for caller in sent:
        await caller.outcome()


async def test_short_requests_do_not_keep_a_long_one_at_their_length():
    rig = rig_of(chunk_rows=32)
    short, (one,) = await opened(rig, 100, "short"), await opened(rig, 1, "one")
    greedy = Source()
    sent = [rig.send(session, np.zeros((2, 3)), source=greedy) for session in short]
    await rig.send(one, np.zeros((300, 3)), source=Source()).outcome()
    assert sum(caller.answered for caller in sent) <= 300 / (32 - 2 * 2) + 2
    for caller in sent:
        await caller.outcome()


async def test_requests_of_all_kinds_and_sources_end():
    rig = rig_of(chunk_rows=8, batch_rows=4)
    sessions = await opened(rig, 60, "s")
    sources = [Source() for _ in range(5)]
    sent = []
    for number, session in enumerate(sessions):
        rows = np.random.default_rng(number).standard_normal((1 + number % 7, 3))
        sent.append(rig.send(session, rows, inspect=number % 3 == 0, source=sources[number % 5]))
    for number, caller in enumerate(sent):
        assert (await caller.outcome()).t_after == 1 + number % 7
    assert not any(source.share.queued_rows or source.share.queued_requests for source in sources)


async def test_a_source_may_have_as_many_waiting_as_are_free():
    rig = rig_of(queued_requests=40)
    sessions = await opened(rig, 60, "s")
    greedy, x = Source(), np.zeros((50, 3), np.float32)

    def fill(source: Source) -> int:
        before = source.share.queued_requests
        for session in sessions:
            try:
                rig.send(session, x, source=source)
            except QueueFull:
                break
        return source.share.queued_requests - before

    assert fill(greedy) == 20
    assert fill(greedy) == 0
    assert 5 <= fill(Source()) <= 10
    last = rig.send(sessions[-1], x, source=Source())
    await last.outcome()


async def test_readers_of_a_source_wait_for_room_in_the_engine_and_are_woken_one_by_one():
    source = Source(running=MAX_SOURCE_RUNNING)
    readers = [asyncio.create_task(source.wait_for_room()) for _ in range(10)]
    await asyncio.sleep(0)
    readers[0].cancel()
    source.finished(3)
    readers[1].cancel()  # just after it was woken
    for round_number in range(8):
        assert sum(task.done() for task in readers) <= 2 + 2 * round_number  # not all at once
        await asyncio.sleep(0)
    await asyncio.wait_for(asyncio.gather(*readers[2:]), 5)


async def test_what_the_engine_has_of_a_source_is_counted_whatever_becomes_of_it():
    rig = rig_of(batch_rows=4, chunk_rows=4)
    sessions = await opened(rig, 12, "s")
    source, x = Source(), np.zeros((3, 3), np.float32)
    callers = [rig.send(session, x[0], source=source) for session in sessions[:6]]
    callers += [rig.send(session, x, source=source) for session in sessions[6:9]]
    pack = rig.send_pack(sessions[9:], x, source)
    assert source.running == 12
    callers[1].cancelled = callers[7].cancelled = True
    callers.append(rig.send(sessions[0], x[0], t=9, source=source))  # refused: never there
    for caller in callers:
        await caller.error()
    await pack.outcome()
    assert source.running == 0


@pytest.mark.parametrize(
    ("weights", "requests"),
    [
        ((1, 1), (100, 1)),
        ((1, 2), (150, 150)),
        ((1, 2), (1, 1)),
        ((1, 3), (5, 1)),
        ((2, 0.5), (1, 40)),
    ],
)
def test_tenants_have_rows_of_chunks_by_weight_however_many_requests_wait(weights, requests):
    names = ("a", "b")
    limits = {name: TenantLimits(weight=one) for name, one in zip(names, weights, strict=True)}
    table = TenantTable(LimitTable(tenants=limits))
    queue: RequestQueue = RequestQueue()
    for name, count in zip(names, requests, strict=True):
        share = Share(table.get(name))
        for _ in range(count):
            reply_to = SimpleNamespace(source=Source(share))
            queue.put(SimpleNamespace(kind=0, work=SimpleNamespace(reply_to=reply_to)))
    rows: Counter[str] = Counter()
    for _ in range(600):
        chunk = queue.take(32)
        for request in chunk:
            rows[request.work.reply_to.source.tenant.name] += 32 / len(chunk)
            queue.put(request)
    assert rows["b"] / rows["a"] == pytest.approx(weights[1] / weights[0], rel=0.05)
