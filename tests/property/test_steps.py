"""What must not matter: batch-mates, order, batch size, interleaving, splitting, retries."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.accelerators import ACCELERATORS, there
from tests.networks import Network, make_network
from tests.reference import lstm
from tests.unit.rig import Rig, model_of, outputs, rows_of

CLOSE = 1e-5
NETWORKS = {
    "lstm": make_network("lstm", seed=1),
    "projected": make_network("projected", hidden=12, projection=5, seed=3),
    "gru": make_network("gru", "gru", seed=4),
    "tanh": make_network("tanh", "rnn_tanh", seed=5),
}
MODELS = {name: model_of(network) for name, network in NETWORKS.items()}

kinds = st.sampled_from(sorted(NETWORKS))
seeds = st.integers(0, 2**32 - 1)
sizes = st.lists(st.integers(1, 12), min_size=1, max_size=8)
chunks = st.sampled_from([1, 3, 128])


@pytest.fixture(params=ACCELERATORS, scope="module", autouse=True)
def _everywhere(request) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rig, "accelerator", there(request.param))
        yield


def run(story: Coroutine[Any, Any, None]) -> None:
    """Runs a story on a loop of its own; what raises on the loop fails it."""
    surprises: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, why: surprises.append(why))
        await story

    asyncio.run(watched())
    assert not surprises


def expected(network: Network, x: np.ndarray) -> np.ndarray:
    """y [T, O] of a session alone: by the float64 reference where there is one."""
    if network.name == "lstm":
        return lstm(network.tensors(), x, layers=2)
    return network.offline(x)


def assert_same(y: np.ndarray, truth: np.ndarray) -> None:
    assert y.shape == truth.shape
    assert np.abs(y - truth).max() <= CLOSE


@given(
    kind=kinds,
    seed=seeds,
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=20),
    batch_rows=st.sampled_from([1, 2, 3, 7, 256]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    order=st.randoms(use_true_random=False),
)
def test_batched_equals_alone(*, kind, seed, lengths, batch_rows, scale, order):
    network = NETWORKS[kind]
    xs = [rows_of(network, rows, seed + place) * scale for place, rows in enumerate(lengths)]

    async def story() -> None:
        rig = Rig(MODELS[kind], batch_rows=batch_rows, max_sessions=len(xs))
        sessions = [await rig.open(f"s{place}") for place in range(len(xs))]
        ys: list[list[np.ndarray]] = [[] for _ in xs]
        for t in range(max(lengths)):
            live = [place for place, rows in enumerate(lengths) if t < rows]
            order.shuffle(live)
            callers = [(place, rig.send(sessions[place], xs[place][t], t)) for place in live]
            for place, caller in callers:
                ys[place].append(outputs(await caller.outcome())[0])
        for x, y in zip(xs, ys, strict=True):
            assert_same(np.array(y), expected(network, x))

    run(story())


@given(kind=kinds, seed=seeds, turns=st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_interleaving_sessions_changes_nothing(kind, seed, turns):
    network = NETWORKS[kind]
    xs = [rows_of(network, len(turns), seed + place) for place in range(4)]

    async def story() -> None:
        rig = Rig(MODELS[kind])
        sessions = [await rig.open(f"s{place}") for place in range(4)]
        ys: list[list[np.ndarray]] = [[] for _ in xs]
        for place in turns:
            t = len(ys[place])
            ys[place].append((await rig.y(sessions[place], xs[place][t], t))[0])
        for x, y in zip(xs, ys, strict=True):
            if y:
                assert_same(np.array(y), expected(network, x[: len(y)]))

    run(story())


@given(kind=kinds, seed=seeds, sizes=sizes, chunk_rows=chunks, at_once=st.booleans())
def test_a_sequence_split_into_requests_equals_the_whole(kind, seed, sizes, chunk_rows, at_once):
    network = NETWORKS[kind]
    x = rows_of(network, sum(sizes), seed)
    parts = np.split(x, np.cumsum(sizes)[:-1])

    async def story() -> None:
        rig = Rig(MODELS[kind], chunk_rows=chunk_rows)
        session = await rig.open()
        t, callers = 0, []
        for place, part in enumerate(parts):
            callers.append(rig.send(session, part, t, inspect=place % 3 == 2))
            t += len(part)
            if not at_once:
                await callers[-1].outcome()
        y = np.concatenate([outputs(await caller.outcome()) for caller in callers])
        assert_same(y, expected(network, x))

    run(story())


@given(
    seed=seeds,
    requests=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 3), st.booleans(), st.booleans()),
        min_size=1,
        max_size=12,
    ),
)
def test_retries_change_nothing_and_give_the_same_outputs(seed, requests):
    network = NETWORKS["lstm"]
    x = rows_of(network, sum(rows for rows, *_ in requests), seed)

    async def story() -> None:
        rig = Rig(MODELS["lstm"], replay_rows=4, chunk_rows=2)
        session = await rig.open()
        t, ys = 0, []
        for rows, times, inspect, at_once in requests:
            part = x[t : t + rows]
            callers = []
            for _ in range(times):
                callers.append(rig.send(session, part, t, inspect=inspect))
                if not at_once:
                    await callers[-1].outcome()
            steps = [await caller.outcome() for caller in callers]
            assert [step.replayed for step in steps] == [False] + [True] * (times - 1)
            assert len({step.y for step in steps}) == 1
            t += rows
            assert {step.t_after for step in steps} == {t}
            ys.append(outputs(steps[0]))
        assert_same(np.concatenate(ys), expected(network, x))

    run(story())


@given(
    seed=seeds,
    fates=st.lists(st.sampled_from(["applied", "cancelled", "gap"]), min_size=1, max_size=25),
    rows=st.integers(1, 3),
)
def test_requests_that_come_to_nothing_leave_no_trace(seed, fates, rows):
    network = NETWORKS["lstm"]
    x = rows_of(network, rows * len(fates), seed)

    async def story() -> None:
        rig = Rig(MODELS["lstm"])
        session = await rig.open()
        ys, t = [], 0
        for fate in fates:
            caller = rig.send(session, x[t : t + rows], t + (fate == "gap"))
            caller.cancelled = fate == "cancelled"
            if fate == "gap":
                assert await caller.error() is not None
            elif fate == "applied":
                ys.append(outputs(await caller.outcome()))
                t += rows
        await caller.error()  # the last one: those before it are settled
        assert rig.sessions.queued_rows == 0
        assert rig.sessions.t(session) == t
        if ys:
            assert_same(np.concatenate(ys), expected(network, x[:t]))

    run(story())


@pytest.mark.parametrize("kind", sorted(NETWORKS))
def test_a_thousand_steps_do_not_drift(kind):
    network = NETWORKS[kind]
    x = rows_of(network, 1000, seed=11)

    async def story() -> None:
        rig = Rig(MODELS[kind])
        session, primed = await rig.open(), await rig.open("primed")
        y = [(await rig.y(session, row, t))[0] for t, row in enumerate(x)]
        assert_same(np.array(y), expected(network, x))
        assert_same(await rig.y(primed, x, 0), expected(network, x))

    run(story())
