from __future__ import annotations

import numpy as np
import pytest

from stepstate.budget import MemoryAccount, MemoryBudget, MemoryUse
from stepstate.client._protocol.steps import WINDOW
from stepstate.engine import WorkItem
from stepstate.sessions.replay import RING_BYTES, ReplayWindow
from stepstate.tenants import LimitTable, TenantLimits, TenantTable

D, OUT, W = 3, 2, 4
SLOTS = 5


class Caller:
    cancelled = False
    source = None


def work(x: object, slot: int = 0, *, inspect: bool = False, last_only: bool = False) -> WorkItem:
    rows = np.atleast_2d(np.asarray(x, np.float32))
    made = WorkItem(rows.ravel(), len(rows), inspect, last_only, Caller())
    made.slot = slot
    return made


def window(
    long_bytes: int = 10_000,
    *,
    capacity: int = SLOTS,
    width: int = D,
    rows: int = W,
    memory: MemoryBudget | None = None,
    tenants: TenantTable | None = None,
) -> ReplayWindow:
    return ReplayWindow(
        capacity,
        input_width=width,
        output_width=OUT,
        rows=rows,
        long_bytes=long_bytes,
        memory=MemoryAccount(memory or MemoryBudget(2**30)),
        tenants=tenants,
    )


def x_at(t: int) -> np.ndarray:
    return np.array([t, t + 0.5, -t], np.float32)


def y_at(t: int) -> np.ndarray:
    return np.array([10 * t, 0.1 * t], np.float32)


def remember(kept: ReplayWindow, t: int, slot: int = 0) -> None:
    kept.add_rows(np.array([slot]), np.array([t]), x_at(t)[None], y_at(t)[None])


def add_long(kept: ReplayWindow, t: int, rows: int, slot: int = 0) -> bytes:
    reply = np.full((rows, OUT), t, np.float32).tobytes()
    kept.add_long(work(np.full((rows, D), t), slot), t, reply, None)
    return reply


def long_request(t: int, rows: int, slot: int = 0) -> WorkItem:
    return work(np.full((rows, D), t), slot)


def one_bit_off(x: np.ndarray) -> np.ndarray:
    bits = np.array(x, np.float32).view(np.uint32)
    bits[-1] ^= 1
    return bits.view(np.float32)


def test_a_remembered_row_gives_its_reply_again_to_the_bit():
    kept = window()
    remember(kept, 7)
    found = kept.find(work(x_at(7)), 7)
    assert (found.t, found.rows, found.y) == (7, 1, y_at(7).tobytes())


def test_an_empty_window_finds_and_covers_nothing():
    kept = window()
    assert kept.find(work(np.zeros(D)), 0) is None
    assert not kept.covers(0, 0)


@pytest.mark.parametrize(
    ("applied", "sent"),
    [
        (x_at(1), one_bit_off(x_at(1))),
        (np.array([0.0, 1.0, 2.0]), np.array([-0.0, 1.0, 2.0])),
    ],
    ids=["one bit", "sign of zero"],
)
def test_a_row_that_differs_in_one_bit_is_covered_but_not_found(applied, sent):
    kept = window()
    kept.add_rows(
        np.array([0]), np.array([1]), np.float32(applied)[None], np.zeros((1, OUT), np.float32)
    )
    assert kept.find(work(applied), 1) is not None
    assert kept.find(work(sent), 1) is None
    assert kept.covers(0, 1)


def test_the_ring_holds_the_last_rows_and_wraps_around():
    kept = window()
    for t in range(11):
        remember(kept, t)
    assert [t for t in range(12) if kept.covers(0, t)] == [7, 8, 9, 10]
    assert [t for t in range(12) if kept.find(work(x_at(t)), t)] == [7, 8, 9, 10]


def test_a_micro_batch_is_remembered_slot_by_slot():
    kept = window()
    times = np.array([3, 8, 0])
    x, y = np.stack([x_at(t) for t in times]), np.stack([y_at(t) for t in times])
    kept.add_rows(np.array([4, 0, 2]), times, x, y)
    assert kept.find(work(x_at(8), slot=0), 8).y == y_at(8).tobytes()
    assert kept.find(work(x_at(3), slot=4), 3).y == y_at(3).tobytes()
    assert kept.find(work(x_at(3), slot=2), 3) is None
    assert not kept.covers(1, 0)


def test_a_long_reply_is_found_by_the_same_rows_and_options_only():
    kept = window()
    x = np.arange(6, dtype=np.float32).reshape(2, D)
    kept.add_long(work(x, last_only=True), 5, b"abcd", None)
    assert kept.find(work(x, last_only=True), 5).y == b"abcd"
    assert kept.find(work(x), 5) is None
    assert kept.find(work(x, inspect=True, last_only=True), 5) is None
    assert kept.find(work(one_bit_off(x.ravel()).reshape(2, D), last_only=True), 5) is None
    assert kept.find(work(x, last_only=True), 6) is None
    assert kept.find(work(x, slot=1, last_only=True), 5) is None


def test_a_long_reply_covers_each_of_its_rows():
    kept = window()
    add_long(kept, 5, 3)
    assert [t for t in range(10) if kept.covers(0, t)] == [5, 6, 7]
    assert kept.find(work(np.full(D, 5)), 5) is None


def test_one_inspected_row_is_remembered_with_its_layers():
    kept = window()
    layers = [{"h": np.ones((1, 16), np.float32)}]
    kept.add_long(work(x_at(2), inspect=True), 2, b"y", layers)
    assert kept.find(work(x_at(2), inspect=True), 2).layers is layers
    assert kept.find(work(x_at(2)), 2) is None
    assert kept.long_bytes == 1 + 64


def test_long_replies_beyond_the_bytes_push_out_the_oldest_that_is_not_the_last_of_its_slot():
    size = 2 * OUT * 4
    kept = window(long_bytes=4 * size)
    for t, slot in ((10, 0), (12, 1), (14, 1), (16, 0), (18, 2), (20, 3)):
        add_long(kept, t, 2, slot)
        assert kept.long_bytes <= 4 * size
    assert [t for t in range(10, 22, 2) if any(kept.covers(s, t) for s in range(4))] == [
        *(14, 16, 18, 20)
    ]
    assert kept.find(long_request(10, 2, 0), 10) is None
    assert kept.find(long_request(16, 2, 0), 16) is not None


def test_when_only_last_replies_are_left_the_oldest_of_the_largest_goes():
    size = 2 * OUT * 4
    kept = window(long_bytes=5 * size)
    for slot, rows in enumerate((1, 4, 4, 2)):
        add_long(kept, 0, rows, slot)
    assert [kept.covers(slot, 0) for slot in range(4)] == [True, False, True, True]


def test_forged_large_replies_cost_no_other_session_its_last_one():
    kept = window(long_bytes=256, capacity=40)
    add_long(kept, 0, 2, 0)
    for slot in range(1, 40):
        for t in range(0, 120, 4):
            add_long(kept, t, 3 + t % 7, slot)
    assert kept.find(long_request(0, 2, 0), 0) is not None
    assert kept.long_bytes <= 256


def test_replies_are_counted_in_the_memory_of_the_server_and_kept_as_long_as_there_is_some():
    memory = MemoryBudget(1_000)
    others = MemoryAccount(memory)
    kept = window(memory=memory)
    for slot in range(4):
        add_long(kept, 0, 10, slot)
        assert memory.by_use[MemoryUse.REPLAY] == memory.used == kept.long_bytes == 80 * (slot + 1)
    others.reserve(MemoryUse.REQUESTS, 300)
    add_long(kept, 10, 10, 3)  # half of what is left
    assert kept.long_bytes == 320
    assert [kept.covers(3, t) for t in (0, 10)] == [False, True]
    for slot in range(4):
        kept.clear(slot)
    assert (kept.long_bytes, memory.by_use[MemoryUse.REPLAY]) == (0, 0)


def test_a_long_reply_larger_than_the_bound_is_not_kept():
    kept = window(long_bytes=15)
    add_long(kept, 0, 2)
    assert kept.long_bytes == 0
    assert not kept.covers(0, 0)


def test_a_slot_remembers_as_many_long_replies_as_single_ones():
    kept = window()
    for t in range(0, 2 * (W + 2), 2):
        add_long(kept, t, 2)
    assert [t for t in range(0, 2 * (W + 2), 2) if kept.covers(0, t)] == [4, 6, 8, 10]
    assert kept.long_bytes == W * 2 * OUT * 4


def test_clear_forgets_one_slot_wholly_and_no_other():
    kept = window()
    for slot in (1, 2):
        remember(kept, 0, slot)
        add_long(kept, 1, 3, slot)
    kept.clear(1)
    assert not any(kept.covers(1, t) for t in range(5))
    assert kept.find(work(x_at(0), slot=1), 0) is None
    assert kept.find(long_request(1, 3, 1), 1) is None
    assert kept.find(work(x_at(0), slot=2), 0) is not None
    assert kept.find(long_request(1, 3, 2), 1) is not None
    assert kept.long_bytes == 3 * OUT * 4


@pytest.mark.parametrize(
    ("width", "asked", "rows"), [(10, 32, 32), (510, 64, 32), (1022, 32, 16), (1, 1, 1)]
)
def test_a_ring_stays_within_its_bytes_however_wide_its_rows(width, asked, rows):
    kept = window(width=width, rows=asked)
    assert kept.rows == rows
    assert rows * (width + OUT) * 4 <= RING_BYTES


def test_a_ring_holds_what_a_client_has_in_flight_however_wide_its_rows():
    kept = window(width=9_999, rows=32)
    assert kept.rows == WINDOW


def test_a_tenant_over_its_bytes_forgets_its_own_oldest_replies_in_all_windows():
    limits = LimitTable(tenants={"a": TenantLimits(replay_bytes=100)})
    tenants = TenantTable(limits)
    one, two = (window(capacity=8, tenants=tenants) for _ in range(2))
    x = np.zeros((5, D), np.float32)

    def add(kept: ReplayWindow, slot: int, tenant: str) -> None:
        kept.add_long(work(x, slot), 0, bytes(40), None, tenant=tenant)

    add(one, 0, "b")
    for slot in (1, 2, 3):
        add(one, slot, "a")
    assert [one.find(work(x, slot), 0) is not None for slot in range(4)] == [
        True,
        False,
        True,
        True,
    ]
    add(two, 0, "a")  # no room is left by those of the other model
    assert two.find(work(x, 0), 0) is None
    assert tenants.get("a").held["replay_bytes"] == 80
    one.clear(2)
    add(two, 0, "a")
    assert two.find(work(x, 0), 0) is not None
    tenants.set(LimitTable(tenants={"a": TenantLimits(replay_bytes=10)}))
    add(one, 4, "a")  # larger than all it may have: not kept
    for slot in range(8):
        one.clear(slot)
        two.clear(slot)
    assert not any(tenants.get(name).held["replay_bytes"] for name in "ab")
    assert not one.long_bytes + two.long_bytes
