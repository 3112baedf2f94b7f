"""The forward by itself where states lie on a device, and what a CUDA graph needs of it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from benchmarks.bare import BareForward
from stepstate.engine.accelerator import DeviceArena, DeviceForward
from stepstate.engine.arena import Arena, Layout
from stepstate.engine.network import Network
from stepstate.models import build_timeline
from tests.accelerators import there
from tests.networks import make_network
from tests.unit.rig import HUGE, model_of, overflowing_network, rows_of, timed_network

CLOSE = 1e-5
LAYOUT = Layout(cell=3, history=2, inputs=2, tracked=2)
KINDS = ["lstm", "single", "projected", "gru", "tanh", "relu"]


class Replayed:
    """A fake graph: a replay computes into the tensors of the capture, from its inputs."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, run, device):
        forward = run.__self__
        run()
        run()
        y, after, x, places = forward.y, forward.after, forward.x, forward.places
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            assert forward.x is x
            assert forward.places is places
            run()
            y.copy_(forward.y)
            after.copy_(forward.after)
            forward.y, forward.after = y, after

        return replay


class Stand:
    """States on a device, and their forward; slot k of `capacity` starts as if of seed k."""

    def __init__(self, network, device: str, *, capacity: int = 6, capture=None) -> None:
        model = model_of(network)
        host = Network(model, build_timeline(model))
        layout = Layout(host.state_width, 1, model.manifest.input_width, 0)
        blank = layout.blank(np.zeros(0, np.float32))
        self.arena = DeviceArena(capacity, layout, blank, torch.device(device))
        self.every = np.arange(capacity)
        for slot in self.every:
            self.arena.claim()
            drawn = np.random.default_rng(slot).uniform(-0.5, 0.5, layout.width)
            self.arena.write(slot, drawn.astype(np.float32))
        self.forward = DeviceForward(
            host.on(torch.device(device)),
            self.arena.cells,
            inputs=model.manifest.input_width,
            capture=capture,
        )

    def step(self, slots: np.ndarray, x: np.ndarray):
        return self.forward.step(slots, x, np.zeros(len(slots), np.int64))

    @property
    def states(self) -> np.ndarray:
        return self.arena.read(self.every)


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    return str(there(request.param))


@pytest.fixture
def stand(network, device) -> Stand:
    return Stand(network, device)


def test_what_a_step_computes_changes_nothing_before_it_is_committed(stand, network):
    before = stand.states
    stand.step(np.array([1, 4, 2]), rows_of(network, 3))
    assert stand.states.tobytes() == before.tobytes()
    stand.forward.commit()
    assert (stand.states != before).any(axis=1).tolist() == [False, True, True, False, True, False]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_rows_that_fill_a_batch_up_change_no_slot_and_no_row(stand, network, count):
    """The first and the last slot are those that a wrong filling would hit."""
    x, before = rows_of(network, 6), stand.states
    slots = np.array([3, 1, 4, 2, 5, 0])
    whole, _ = stand.step(slots, x)
    y, finite = stand.step(slots[:count], x[:count])
    stand.forward.commit()
    assert finite is None
    assert y.shape == (count, 2)
    assert np.abs(y - whole[:count]).max() <= CLOSE
    others = slots[count:]
    assert stand.states[others].tobytes() == before[others].tobytes()


def test_rows_that_are_not_finite_are_reported_and_keep_their_state(device):
    stand = Stand(overflowing_network(), device)
    x = rows_of(make_network("as wide"), 5)
    clean, _ = stand.step(np.arange(5), x)
    x[[0, 3]] = HUGE
    before = stand.states
    y, finite = stand.step(np.arange(5), x)
    stand.forward.commit()
    assert finite.tolist() == [False, True, True, False, True]
    assert np.isnan(y[~finite]).all()
    assert np.array_equal(y[finite], clean[finite])
    changed = (stand.states != before).any(axis=1)
    assert changed.tolist() == [*finite, False]
    assert np.isfinite(stand.states).all()
    assert stand.step(np.arange(3), x[[1, 1, 1]])[1] is None  # the scratch row does no harm


def test_a_row_with_one_infinite_output_has_no_output(device):
    """The state and the other output would be finite."""
    network = make_network("steep", seed=1)
    with torch.no_grad():
        network.head.weight[1] = 0
        network.head.weight[1, 0] = 3e38
        network.head.bias[1] = 3.4e38  # y[1] overflows where h[0] > 0.001
    stand = Stand(network, device)
    before = stand.states
    y, finite = stand.step(stand.every, rows_of(network, 6) * 3)
    stand.forward.commit()
    assert 0 < finite.sum() < 6
    assert np.isfinite(y[finite]).all()
    assert np.isnan(y[~finite]).all()
    assert (stand.states != before).any(axis=1).tolist() == finite.tolist()


def test_a_replay_of_a_graph_finds_its_inputs_where_they_were(network, device):
    graphs = Replayed()
    stand, plain = Stand(network, device, capture=graphs), Stand(network, device)
    stand.forward.make_ready(3)
    assert graphs.captures == 3
    assert stand.states.tobytes() == plain.states.tobytes()
    x, random = rows_of(network, 6), np.random.default_rng(2)
    for count in (1, 6, 3, 2, 5, 4, 1):
        slots = random.permutation(6)[:count]
        y, _ = stand.step(slots, x[:count])
        stand.forward.commit()
        expected, _ = plain.step(slots, x[:count])
        plain.forward.commit()
        assert np.array_equal(y, expected)
        assert stand.states.tobytes() == plain.states.tobytes()
    assert (graphs.captures, graphs.replays) == (4, 7)  # 8 rows at first use


def test_outputs_stay_as_they_are_when_the_next_step_comes(network, device):
    stand, x = Stand(network, device, capture=Replayed()), rows_of(network, 2)
    y, _ = stand.step(np.array([0]), x[:1])
    kept = y.copy()
    stand.step(np.array([1]), x[1:])
    assert np.array_equal(y, kept)


def test_where_no_graph_can_be_captured_forwards_run_without_and_it_is_logged_once(
    network, device, caplog
):
    def refuses(run, device):
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    stand, plain = Stand(network, device, capture=refuses), Stand(network, device)
    with caplog.at_level(logging.WARNING):
        stand.forward.make_ready(8)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    x = rows_of(network, 5)
    y, _ = stand.step(np.arange(5), x)
    assert np.array_equal(y, plain.step(np.arange(5), x)[0])


@pytest.mark.parametrize("name", [*KINDS, "timed", "quantiles"])
def test_a_forward_looks_at_no_value_and_uses_tensors_of_its_device_alone(networks, name):
    """The device "meta" has shapes and no values: `item` raises there, and so does most mixing."""
    network, profiles = timed_network() if name == "timed" else (networks.get(name), {})
    if name == "quantiles":
        network = make_network("quantiles", outputs=3)
        network.manifest["outputs"] = [{"name": "y0", "quantiles": [0.1, 0.5, 0.9]}]
    model, meta = model_of(network, profiles), torch.device("meta")
    on_meta = Network(model, build_timeline(model)).on(meta)
    for rows in (1, 512):
        x = torch.empty(rows, model.manifest.input_width, device=meta)
        state = torch.empty(rows, on_meta.state_width, device=meta)
        with torch.inference_mode():
            y, after = on_meta.step(x, torch.zeros(rows, dtype=torch.int64, device=meta), state)
        assert y.shape == (rows, model.manifest.output_width)
        assert (after.shape, after.device) == (state.shape, meta)


def test_states_are_the_same_bytes_on_either_side(device):
    blank = LAYOUT.blank(np.array([0.1, 7.0], np.float32))
    host, other = Arena(3, LAYOUT, blank), DeviceArena(3, LAYOUT, blank, torch.device(device))
    kept = np.arange(LAYOUT.width, dtype=np.float32)
    kept.flags.writeable = False  # as one of a snapshot
    for arena in (host, other):
        assert [arena.claim(), arena.claim()] == [0, 1]
        arena.write(1, kept)
        arena.scatter(np.array([0]), np.ones((1, 3), np.float32))
        arena.append(np.array([0]), np.array([1]), np.ones((1, 2), np.float32))
        arena.write_tracked(np.array([0]), np.full((1, 2), 5.0, np.float32))
    both = np.array([1, 0])
    assert other.read(both).tobytes() == host.read(both).tobytes()
    assert other.gather(both).tobytes() == host.gather(both).tobytes()
    assert other.used_bytes == host.used_bytes
    for arena in (host, other):
        arena.release(1)
        assert arena.claim() == 1
    assert other.read(both).tobytes() == host.read(both).tobytes()


def test_a_device_without_memory_for_the_slots_raises_the_same_error_as_the_host(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(MemoryError, match="on cpu: tried to allocate"):
        DeviceArena(3, LAYOUT, LAYOUT.blank(np.zeros(2, np.float32)), torch.device("cpu"))


def test_the_bare_forward_steps_there_too(network, device):
    here = BareForward(model_of(network), 6)
    bare = BareForward(model_of(network), 6, accelerator=device)
    x = np.stack([rows_of(network, 20, seed) for seed in range(3)], axis=1)
    for t, row in enumerate(x):
        slots = np.array([4, 0, 5])
        assert np.abs(bare.step(slots, row, t) - here.step(slots, row, t)).max() <= CLOSE
