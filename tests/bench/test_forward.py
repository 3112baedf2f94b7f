"""The forward by itself steps sessions as the engine does."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import engines, forward
from benchmarks.bare import BareForward
from benchmarks.engines import EngineCosts, EnginesPlan, engine_costs
from benchmarks.forward import ForwardRate, bare_forward, main
from stepstate.models import load_model
from tests.conftest import ELECTRICITY
from tests.unit.rig import model_of, rows_of


def test_sessions_stepped_by_slot_give_the_offline_numbers(networks):
    network = networks["lstm"]
    bare = BareForward(model_of(network), 6)
    x = np.stack([rows_of(network, 20, seed) for seed in range(3)], axis=1)
    slots = np.array([4, 0, 5])
    y = [bare.step(slots, row, t) for t, row in enumerate(x)]
    for place in range(3):
        expected = network.offline(x[:, place])
        assert np.abs(np.array(y)[:, place] - expected).max() <= 1e-5


@pytest.mark.parametrize("version", ["1", "2"])
def test_its_rate_is_measured_for_a_model_with_calendar_and_lags(version):
    found = bare_forward(ELECTRICITY / "electricity" / version, 3, 0.05)
    assert found.rows == 3
    assert found.steps_per_second > 0
    assert found.cpu_us_per_step > 0
    assert 0 < found.p99_seconds < 60
    assert bare_forward(ELECTRICITY / "electricity" / version, 3, 0.01, "cpu").rows == 3


def test_it_is_printed_by_batch_size(capsys, monkeypatch):
    monkeypatch.setattr(
        forward, "bare_forward", lambda _, rows, *__: ForwardRate(rows, 2e6, 0.5, 0.0015)
    )
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-5:]] == ["1", "4", "16", "64", "256"]
    assert lines[-1].split()[1:] == ["2,000,000", "0.50", "1.50"]


def test_a_device_that_is_not_there_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["--device", "cuda:99"])
    assert "--device cuda:99: " in capsys.readouterr().err


@pytest.mark.parametrize("version", ["1", "2"])
def test_engines_are_measured_beside_their_products(version):
    found = engine_costs(load_model(ELECTRICITY / "electricity" / version), 3, rounds=2)
    assert list(found.rounds) == ["products", "torch", "onnxruntime", "forward"]
    assert all(len(costs) == 2 and 0 < min(costs) < 1e6 for costs in found.rounds.values())


def test_engines_are_compared_with_their_products_round_by_round(monkeypatch):
    costs = {"products": [100.0, 200.0], "torch": [200.0, 500.0], "onnxruntime": [110.0, 230.0]}
    monkeypatch.setattr(engines, "engine_costs", lambda _, rows, __: EngineCosts(rows, costs))
    report = engines.engines(EnginesPlan(rows=(16, 256), rounds=2, model=None), print)
    ratios = ["2.25 (2.00–2.50)", "1.12 (1.10–1.15)"]
    assert report.rows == [[rows, "150", "350", "170", *ratios] for rows in ("16", "256")]
