from __future__ import annotations

import asyncio
import sys
from array import array

import numpy as np
import pytest
import torch

from stepstate.engine import Engine, EngineSettings, RowColumns, WorkItem
from stepstate.engine.accelerator import DeviceForward
from stepstate.engine.engine import ROUNDS_TO_A_CHUNK, ROUNDS_TO_WAIT
from stepstate.engine.network import Network
from stepstate.engine.runtimes import OnnxStepper
from stepstate.models import build_timeline
from stepstate.sessions import Source
from tests.accelerators import ACCELERATORS, there
from tests.networks import make_network
from tests.unit.rig import HUGE, model_of, overflowing_network, rounds, rows_of

CLOSE = 1e-5


class Caller:
    """Waits for a request; a test may cancel it."""

    cancelled = False
    source = Source()


class Desk:
    """A sink and observer that keeps what it gets."""

    accelerator: str | None = None

    def __init__(self, network, **options: int) -> None:
        model = model_of(network)
        settings = {"capacity": 300, "batch_rows": 256, "chunk_rows": 128} | options
        settings["accelerator"] = self.accelerator
        self.engine = Engine(
            model, build_timeline(model), EngineSettings(**settings), sink=self, observer=self
        )
        self.width = model.manifest.input_width
        self.forwards: list[int] = []
        self.outcomes: dict[WorkItem, object] = {}
        self.order: list[WorkItem] = []
        self._ended: dict[WorkItem, asyncio.Future[None]] = {}

    def submit(self, slot: int, x: object, *, inspect: bool = False, last_only: bool = False):
        rows = np.asarray(x, np.float32).reshape(-1, self.width)
        work = WorkItem(rows.ravel(), len(rows), inspect, last_only, Caller())
        work.slot = slot
        self._ended[work] = asyncio.get_running_loop().create_future()
        self.engine.submit(work)
        return work

    async def wait(self, *works: WorkItem) -> list[object]:
        """The outcomes of works."""
        await asyncio.wait_for(asyncio.gather(*(self._ended[work] for work in works)), 10)
        return [self.outcomes[work] for work in works]

    async def step(self, slot: int, x: object, **options: bool) -> object:
        return (await self.wait(self.submit(slot, x, **options)))[0]

    def microbatch(self, queued_at, started, finished) -> None:
        assert all(queued <= started <= finished for queued in queued_at)
        self.forwards.append(len(queued_at))

    def stepped(self, works, x, y) -> None:
        for work, sent, row in zip(works, x, y, strict=True):
            assert (sent == work.x).all()
            self._end(work, row.copy())

    def finished(self, work, y, layers) -> None:
        self._end(work, y if layers is None else (y, layers))

    def dropped(self, work) -> None:
        self._end(work, "dropped")

    def overflowed(self, work) -> None:
        self._end(work, "overflowed")

    def failed(self, work, error) -> None:
        self._end(work, error)

    def _end(self, work: WorkItem, outcome: object) -> None:
        assert work not in self.outcomes
        self.outcomes[work] = outcome
        self.order.append(work)
        self._ended[work].set_result(None)


@pytest.fixture(params=ACCELERATORS, autouse=True)
def _everywhere(request, monkeypatch):
    monkeypatch.setattr(Desk, "accelerator", there(request.param))


@pytest.fixture
def desk(network) -> Desk:
    return Desk(network)


def close(actual: object, expected: np.ndarray) -> bool:
    return bool(np.abs(np.asarray(actual) - expected).max() <= CLOSE)


async def test_singles_that_are_queued_together_share_one_forward(desk, network):
    x = rows_of(network, 50)
    works = [desk.submit(desk.engine.claim(), row) for row in x]
    y = await desk.wait(*works)
    assert desk.forwards == [50]
    assert all(close(one, network.offline(row[None])[0]) for one, row in zip(y, x, strict=True))


async def test_a_forward_takes_no_more_than_the_batch_limit_and_none_is_left_out(network):
    desk = Desk(network, batch_rows=8)
    works = [desk.submit(desk.engine.claim(), row) for row in rows_of(network, 20)]
    await desk.wait(*works)
    assert desk.forwards == [8, 8, 4]
    assert desk.order == works


async def test_a_single_alone_is_stepped_in_the_next_round_of_the_loop(desk, network):
    work = desk.submit(desk.engine.claim(), rows_of(network, 1))
    await rounds(1)
    assert work in desk.outcomes


async def test_singles_that_keep_arriving_gather_but_not_beyond_the_limit(network):
    desk = Desk(network, batch_rows=4)
    x = rows_of(network, 12)
    for row in x:
        desk.submit(desk.engine.claim(), row)
        desk.submit(desk.engine.claim(), row)
        await rounds(1)
    await rounds(10)
    assert sum(desk.forwards) == 24
    assert max(desk.forwards) == 4


async def test_singles_that_trickle_in_hold_up_no_other(network):
    desk = Desk(network)
    first = desk.submit(desk.engine.claim(), rows_of(network, 1))
    for row in rows_of(network, ROUNDS_TO_WAIT + 1):
        desk.submit(desk.engine.claim(), row)
        await rounds(1)
    assert first in desk.outcomes


@pytest.mark.parametrize("chunk_rows", [1, 7, 128])
async def test_a_long_request_equals_the_offline_network_whatever_its_chunks(network, chunk_rows):
    desk = Desk(network, chunk_rows=chunk_rows)
    x = rows_of(network, 40)
    slot = desk.engine.claim()
    assert close(await desk.step(slot, x[:30]), network.offline(x)[:30])
    assert close(await desk.step(slot, x[30]), network.offline(x)[30])
    last = await desk.step(slot, x[31:], last_only=True)
    assert last.shape == (1, 2)
    assert close(last, network.offline(x)[-1:])


async def test_a_long_request_does_not_hold_up_the_singles_of_others(network):
    desk = Desk(network, chunk_rows=4)
    long = desk.submit(desk.engine.claim(), rows_of(network, 400))
    slot = desk.engine.claim()
    for row in rows_of(network, 20):
        single = desk.submit(slot, row)
        await rounds(2)
        assert single in desk.outcomes
    assert long not in desk.outcomes
    assert close((await desk.wait(long))[0], network.offline(rows_of(network, 400)))


async def test_singles_do_not_hold_up_a_long_request(network):
    desk = Desk(network, chunk_rows=4)
    slot = desk.engine.claim()
    long = desk.submit(desk.engine.claim(), rows_of(network, 40))
    for row in rows_of(network, 11 * ROUNDS_TO_A_CHUNK):
        desk.submit(slot, row)
        await rounds(1)
    assert long in desk.outcomes


async def test_long_requests_of_different_lengths_run_together_and_end_at_their_own(network):
    desk = Desk(network, chunk_rows=8)
    lengths = (2, 17, 5, 40, 1, 9)
    x = {rows: rows_of(network, rows, seed=rows) for rows in lengths}
    works = [desk.submit(desk.engine.claim(), x[rows], inspect=rows == 1) for rows in lengths]
    outcomes = await desk.wait(*works)
    for rows, outcome in zip(lengths, outcomes, strict=True):
        y = outcome[0] if rows == 1 else outcome
        assert y.shape == (rows, 2)
        assert close(y, network.offline(x[rows]))
    assert desk.order[-1] is works[3]


async def test_more_long_requests_than_a_chunk_has_rows_all_end(network):
    desk = Desk(network, chunk_rows=2)
    x = rows_of(network, 3)
    works = [desk.submit(desk.engine.claim(), x) for _ in range(7)]
    assert all(close(y, network.offline(x)) for y in await desk.wait(*works))


@pytest.mark.parametrize("last_only", [False, True])
async def test_inspect_gives_every_row_of_every_layer_and_advances_alike(desk, network, last_only):
    x = rows_of(network, 6)
    slot = desk.engine.claim()
    y, layers = await desk.step(slot, x[:5], inspect=True, last_only=last_only)
    rows = 1 if last_only else 5
    assert close(y, network.offline(x)[5 - rows : 5])
    assert [sorted(layer) for layer in layers] == [sorted("ifgocmh")] * 2
    assert all(part.shape == (rows, 16) for layer in layers for part in layer.values())
    weights = network.tensors()
    assert close(layers[1]["h"] @ weights["head.weight"].T + weights["head.bias"], y)
    assert close(await desk.step(slot, x[5]), network.offline(x)[5])


async def test_an_inspected_request_keeps_no_object_for_each_row(desk, network, monkeypatch):
    """Arrays for each row and gate take ten times the memory of the reply, in small pieces."""
    blocks, step = array("q"), Network.step  # its numbers are no blocks

    def counted(*arguments):
        blocks.append(sys.getallocatedblocks())
        return step(*arguments)

    monkeypatch.setattr(Network, "step", counted)
    rows = 600
    await desk.step(desk.engine.claim(), rows_of(network, rows), inspect=True)
    assert len(blocks) == rows
    assert max(blocks[-100:]) - max(blocks[:100]) < rows / 4


async def test_work_that_was_cancelled_is_dropped_and_its_state_is_as_before(desk, network):
    x = rows_of(network, 3)
    slots = [desk.engine.claim() for _ in range(2)]
    works = [desk.submit(slots[0], x[0]), desk.submit(slots[1], x[:2])]
    for work in works:
        work.reply_to.cancelled = True
    assert await desk.wait(*works) == ["dropped", "dropped"]
    assert desk.forwards == []
    for slot in slots:
        assert close(await desk.step(slot, x[0]), network.offline(x)[0])


@pytest.mark.parametrize("rows", [1, 3])
async def test_a_forward_that_raises_once_is_tried_again_in_halves(network, monkeypatch, rows):
    """What is only a matter of the moment, or of the batch's size, is nobody's failure."""
    desk = Desk(network)
    x = rows_of(network, rows)
    slots = [desk.engine.claim() for _ in range(4)]
    name = "step" if rows == 1 else "sequence"
    stepping = DeviceForward if desk.accelerator else OnnxStepper
    forward = stepping if rows == 1 else Network
    real, sizes = getattr(forward, name), []

    def raises_for_many(steps, *arguments):
        sizes.append(len(arguments[0]))
        if sizes[-1] > 2:
            raise MemoryError
        return real(steps, *arguments)

    monkeypatch.setattr(forward, name, raises_for_many)
    outcomes = await desk.wait(*(desk.submit(slot, x) for slot in slots))
    assert sizes == [4, 2, 2]
    assert all(close(y, network.offline(x)) for y in outcomes)


async def test_a_non_finite_result_touches_its_own_row_only():
    network = overflowing_network()
    desk = Desk(network)
    x = rows_of(network, 10)
    slots = [desk.engine.claim() for _ in range(10)]
    sent = [HUGE if place in (0, 4) else x[place] for place in range(10)]
    outcomes = await desk.wait(*map(desk.submit, slots, sent))
    assert desk.forwards == [10]
    for place, outcome in enumerate(outcomes):
        if place in (0, 4):
            assert outcome == "overflowed"
            outcome = await desk.step(slots[place], x[place])  # noqa: PLW2901 - as if never sent
        expected = network_alone(network, x[place])
        assert np.abs(outcome - expected).max() <= CLOSE * np.abs(expected).max()


async def test_a_long_request_that_overflows_ends_alone_and_leaves_its_state():
    network = overflowing_network()
    desk = Desk(network, chunk_rows=4)
    x = rows_of(network, 20)
    bad_slot, slot = desk.engine.claim(), desk.engine.claim()
    bad_x = np.array([*x[:5], HUGE, *x[5:]], np.float32)
    bad, good = desk.submit(bad_slot, bad_x), desk.submit(slot, x)
    outcomes = await desk.wait(bad, good)
    assert outcomes[0] == "overflowed"
    twin = await desk.step(bad_slot, x)
    assert np.abs(twin - outcomes[1]).max() <= CLOSE * np.abs(twin).max()


def network_alone(network, row: np.ndarray) -> np.ndarray:
    """y of one row from zero state; its first input is scaled by 1000."""
    return network.offline(np.float32(row * [1000, 1, 1])[None])[0]


async def test_results_whose_sum_overflows_are_still_finite_results():
    network = make_network("large", seed=1)
    with torch.no_grad():
        network.head.bias.fill_(3e38)
    desk = Desk(network)
    slots = [desk.engine.claim() for _ in range(8)]
    outcomes = await desk.wait(*(desk.submit(slot, np.zeros(3)) for slot in slots))
    assert all(np.isfinite(y).all() for y in outcomes)


async def test_slots_and_bytes_are_counted(desk):
    assert (desk.engine.used_slots, desk.engine.state_bytes) == (0, 0)
    slots = [desk.engine.claim() for _ in range(3)]
    assert len(set(slots)) == 3
    assert (desk.engine.used_slots, desk.engine.state_bytes) == (3, 3 * 4 * (64 + 3))
    desk.engine.release(slots[1])
    assert desk.engine.used_slots == 2


async def test_an_engine_with_nothing_to_do_takes_no_turns(desk, network, monkeypatch):
    await desk.step(desk.engine.claim(), rows_of(network, 3))
    turns = []
    monkeypatch.setattr(desk.engine, "_turn", lambda: turns.append(1))
    await rounds(5)
    assert turns == []


async def test_the_loop_goes_round_several_times_between_chunks(network, monkeypatch):
    """A step on a stream takes many rounds to its reply: it must not wait a chunk in each."""
    desk = Desk(network, chunk_rows=8)
    chunks_at, now = [], 0
    sequence = Network.sequence

    def noted(*arguments):
        chunks_at.append(now)
        return sequence(*arguments)

    monkeypatch.setattr(Network, "sequence", noted)
    work = desk.submit(desk.engine.claim(), rows_of(network, 80))
    for now in range(200):  # noqa: B007 - the chunks look at it
        await asyncio.sleep(0)
    assert work in desk.outcomes
    assert len(chunks_at) == 10
    assert set(np.diff(chunks_at).tolist()) == {ROUNDS_TO_A_CHUNK}


async def test_rows_that_are_stepped_at_once_end_as_queued_ones_do(network):
    queued, at_once = Desk(network), Desk(network)
    x = rows_of(network, 6).reshape(2, 3, -1)
    slots = np.array([queued.engine.claim() for _ in range(3)])
    assert [at_once.engine.claim() for _ in range(3)] == slots.tolist()
    for t, rows in enumerate(x):
        works = [queued.submit(slot, row) for slot, row in zip(slots, rows, strict=True)]
        at = np.full(3, t)
        result = at_once.engine.step_rows(RowColumns(rows, slots, at, at, None))
        np.testing.assert_array_equal(result.y, await queued.wait(*works))
    states = [desk.engine.read_states(slots) for desk in (queued, at_once)]
    np.testing.assert_array_equal(*states)
