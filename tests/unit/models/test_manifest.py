from __future__ import annotations

from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from stepstate.models import CellKind, Manifest
from tests.unit.rig import timed_network


@pytest.fixture
def timed() -> dict[str, object]:
    return timed_network()[0].manifest


def test_widths_count_columns_calendar_and_horizons(timed):
    manifest = Manifest.model_validate(timed)
    assert (manifest.input_width, manifest.network_width, manifest.output_width) == (2, 13, 3)
    assert manifest.needs_time


def test_a_model_without_calendar_and_profiles_needs_no_time(network):
    manifest = Manifest.model_validate(network.manifest)
    assert not manifest.needs_time
    assert (manifest.input_width, manifest.network_width, manifest.output_width) == (3, 3, 2)
    assert manifest.cell.kind is CellKind.LSTM


def test_an_origin_without_a_zone_is_in_utc(timed):
    timed["profiles"]["day"]["origin"] = "2024-03-01T05:00:00"
    origin = Manifest.model_validate(timed).profiles["day"].origin
    assert origin == datetime(2024, 3, 1, 5, tzinfo=UTC)


def test_only_an_lstm_has_a_projection(network):
    cell = {"kind": "gru", "hidden_size": 4, "num_layers": 1, "proj_size": 2}
    with pytest.raises(ValidationError, match="only an lstm"):
        Manifest.model_validate({**network.manifest, "cell": cell})


@pytest.mark.parametrize("column", ["inputs", "outputs"])
def test_a_column_can_only_use_a_profile_that_is_declared(timed, column):
    timed[column][0]["profile"] = "night"
    with pytest.raises(ValidationError, match=r"load.profile: 'night'"):
        Manifest.model_validate(timed)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"cell": {"kind": "lstm", "hidden_size": "16", "num_layers": 1}}, "cell.hidden_size"),
        ({"step_interval_seconds": 0.1234567}, "step_interval_seconds"),
        ({"profiles": {"head.weight": {"period_steps": 2, "origin": "2000-01-03"}}}, "head.weight"),
    ],
)
def test_a_value_is_what_it_says_it_is(change, named):
    document = {
        "format": "stepstate.model/1",
        "name": "a",
        "version": "1",
        "cell": {"kind": "lstm", "hidden_size": 16, "num_layers": 1},
        "step_interval_seconds": 1800,
        "inputs": [{"name": "x"}],
        "outputs": [{"name": "y"}],
    }
    Manifest.model_validate(document)
    with pytest.raises(ValidationError, match=named):
        Manifest.model_validate(document | change)


def test_units_and_tracked_horizons_are_bounded_so_that_replies_are(network):
    manifest = network.manifest
    column = manifest["inputs"][0]
    many = [{**column, "name": f"x{number}", "unit": "x" * 1_000} for number in range(2_000)]
    with pytest.raises(ValidationError, match="names and units take"):
        Manifest.model_validate({**manifest, "inputs": many})
    ahead = list(range(1, 10_002))
    far = {
        "inputs": [{**column, "name": "y"}],
        "outputs": [{"name": "y", "horizons": ahead}],
        "tracking": {"horizons": ahead},
    }
    with pytest.raises(ValidationError, match="10001 horizons of all outputs"):
        Manifest.model_validate({**manifest, **far})
