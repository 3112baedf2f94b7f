"""Columns whose digits float32 can't hold are refused, or told of, at writing and loading."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from stepstate.errors import ModelInvalid
from stepstate.models import load_model, write_model
from stepstate.models.manifest import MANIFEST
from stepstate.models.model import fingerprint
from tests.networks import Network, make_network

COUNTER = 16_777_216.0
"""2**24: from here on float32 knows every other whole number."""


def network_of(which: str, **column: object) -> Network:
    network = make_network("meter", seed=1)
    network.manifest[which][0] |= column
    return network


@pytest.mark.parametrize("which", ["inputs", "outputs"])
@pytest.mark.parametrize(
    ("mean", "scale"),
    [(COUNTER, 1.0), (-COUNTER, -1.0), (1e12, 5e4), (1e30, 1e20), (1.0, 1e-9)],
)
def test_a_column_that_float32_can_not_tell_apart_is_refused_in_words(tmp_path, which, mean, scale):
    network = network_of(which, mean=mean, scale=scale)
    name = network.manifest[which][0]["name"]
    with pytest.raises(ModelInvalid, match=rf"{which}\.0 \({name}\): .*apart in float32.*counter"):
        network.write(tmp_path)


def test_it_is_refused_at_load_too(tmp_path):
    network = make_network("meter", seed=1)
    folder = network.write(tmp_path)
    document = json.loads((folder / MANIFEST).read_text())
    document["inputs"][0]["mean"] = COUNTER
    document["fingerprint"] = fingerprint(document, network.tensors())
    (folder / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(ModelInvalid, match=r"values about 16777216 are 2 apart"):
        load_model(folder)


def test_a_profile_counts_with_the_mean(tmp_path):
    network = network_of("inputs", mean=1.0, scale=1.0, profile="day")
    network.manifest.update(
        step_interval_seconds=60,
        profiles={"day": {"period_steps": 2, "origin": "2026-01-01T00:00:00Z"}},
    )
    network.extra["day"] = np.array([0.0, -COUNTER], np.float32)
    with pytest.raises(ModelInvalid, match=r"values about 16777215"):
        network.write(tmp_path)


@pytest.mark.parametrize(
    ("mean", "scale", "told"),
    [(COUNTER, 1000.0, False), (1e6, 1.0, True), (1e5, 1.0, False), (0.0, 1e-30, False)],
)
def test_few_digits_are_told_of_and_enough_are_not(tmp_path, caplog, mean, scale, told):
    network = network_of("inputs", mean=mean, scale=scale)
    with caplog.at_level(logging.WARNING):
        folder = network.write(tmp_path)
        caplog.clear()
        load_model(folder)
    assert ["few digits" in record.getMessage() for record in caplog.records] == [True] * told


def test_many_columns_are_cut(tmp_path):
    network = make_network("wide", inputs=40, seed=1)
    for column in network.manifest["inputs"]:
        column["mean"] = COUNTER
    with pytest.raises(ModelInvalid, match="and 30 more"):
        write_model(tmp_path / "wide" / "1", network.manifest, network.tensors())
