from __future__ import annotations

import pytest

from stepstate.models import Manifest
from stepstate.models.tensors import tensor_shapes
from tests.unit.rig import timed_network


@pytest.mark.parametrize("name", ["lstm", "single", "projected", "gru", "tanh", "relu"])
def test_names_and_shapes_are_those_of_torch(networks, name):
    network = networks[name]
    expected = {name: value.shape for name, value in network.tensors().items()}
    assert tensor_shapes(Manifest.model_validate(network.manifest)) == expected


def test_profiles_are_tensors_of_their_period():
    network, profiles = timed_network()
    shapes = tensor_shapes(Manifest.model_validate(network.manifest))
    tensors = {**network.tensors(), **profiles}
    assert shapes == {name: value.shape for name, value in tensors.items()}
