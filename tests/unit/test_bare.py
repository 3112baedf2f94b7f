"""The forward by itself steps sessions as the engine does."""

from __future__ import annotations

import numpy as np
import pytest

from stepstate.bench.forward import bare_forward
from stepstate.engine import BareForward
from tests.conftest import ELECTRICITY
from tests.unit.rig import model_of, rows_of


def test_sessions_stepped_by_slot_give_the_offline_numbers(networks):
    network = networks["lstm"]
    forward = BareForward(model_of(network), 6)
    x = np.stack([rows_of(network, 20, seed) for seed in range(3)], axis=1)
    slots = np.array([4, 0, 5])
    y = [forward.step(slots, row, t) for t, row in enumerate(x)]
    for place in range(3):
        expected = network.offline(x[:, place])
        assert np.abs(np.array(y)[:, place] - expected).max() <= 1e-5


@pytest.mark.parametrize("version", ["1", "2"])
def test_its_rate_is_told_of_a_model_with_calendar_and_lags(version):
    found = bare_forward(ELECTRICITY / "electricity" / version, 3, 0.05)
    assert found.rows == 3
    assert found.steps_per_second > 0
    assert found.cpu_us_per_step > 0
