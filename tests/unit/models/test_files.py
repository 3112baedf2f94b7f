"""Model folders: what is written is loaded; what is wrong with one is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_torch

from stepstate.errors import ModelInvalid
from stepstate.models import load_model, write_model
from stepstate.models.files import MANIFEST, WEIGHTS
from tests.networks import make_network
from tests.unit.models.folders import edit, edit_tensors, refused


def test_what_was_written_is_loaded_to_the_bit(folder, network):
    model = load_model(folder)
    assert model.key == "lstm/1"
    assert model.tensors.keys() == network.tensors().keys()
    for name, tensor in network.tensors().items():
        assert model.tensors[name].tobytes() == tensor.tobytes()


def test_the_fingerprint_is_that_which_writing_told_and_writing_again_tells_the_same(
    network, tmp_path
):
    told = [
        write_model(tmp_path / place / "lstm" / "1", network.manifest, network.tensors())
        for place in "ab"
    ]
    assert told[0] == told[1] == load_model(tmp_path / "a" / "lstm" / "1").manifest.fingerprint


@pytest.mark.parametrize("key", ["format", "name", "version", "cell", "inputs", "outputs"])
def test_a_missing_key_is_named(folder, key):
    edit(folder, lambda document: document.pop(key))
    refused(folder, MANIFEST, key)


@pytest.mark.parametrize(
    ("place", "named"),
    [((), "colour"), (("cell",), "cell.colour"), (("inputs", 1), "inputs.1.colour")],
)
def test_an_unknown_key_is_named_with_its_place(folder, place, named):
    def add(document):
        for key in place:
            document = document[key]
        document["colour"] = "red"

    edit(folder, add)
    refused(folder, MANIFEST, named)


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("cell", "hidden_size"), "many", "cell.hidden_size"),
        (("cell", "hidden_size"), 0, "cell.hidden_size"),
        (("cell", "kind"), "transformer", "cell.kind"),
        (("cell", "proj_size"), 16, "proj_size"),
        (("inputs",), [], "inputs"),
        (("inputs", 0), "x0", "inputs.0"),
        (("inputs", 0, "scale"), 0, "inputs.0.scale"),
        (("inputs", 0, "scale"), float("nan"), "inputs.0.scale"),
        (("inputs", 0, "profile"), "day", "x0.profile"),
        (("outputs", 1, "horizons"), [1, 1], "outputs.1.horizons"),
        (("outputs", 1, "horizons"), [-1], "outputs.1.horizons"),
        (("version",), "01", "version"),
        (("name",), "../x", "name"),
        (("format",), "stepstate.model/9", "format"),
        (("calendar",), [{"kind": "moon"}], "calendar.0"),
        (("calendar",), [{"kind": "day_of_week"}], "step_interval_seconds"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(folder, place, value, named):
    def put(document):
        for key in place[:-1]:
            document = document[key]
        document[place[-1]] = value

    edit(folder, put)
    refused(folder, MANIFEST, named)


@pytest.mark.parametrize(
    ("content", "problem"),
    [("{", "not JSON"), ("[1]", "one JSON object"), ("", "not JSON"), ("\xff", "not JSON")],
)
def test_a_manifest_that_is_no_document_is_refused(folder, content, problem):
    (folder / MANIFEST).write_bytes(content.encode("latin-1"))
    refused(folder, MANIFEST, problem)


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    refused(folder, name, "can't be read")


@pytest.mark.parametrize("keep", [0, 7, 200, 0.5, 0.999])
def test_truncated_weights_are_refused_by_name(folder, keep):
    path = folder / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    refused(folder, WEIGHTS, "safetensors")


def test_the_weights_of_another_model_of_the_same_shape_are_refused(folder, tmp_path):
    other = make_network("lstm", seed=99).write(tmp_path / "other")
    (folder / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes())
    refused(folder, str(folder), "fingerprint", "changed or swapped")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(folder, value):
    def spoil(tensors):
        tensors["cell.weight_hh_l1"] = tensors["cell.weight_hh_l1"].copy()
        tensors["cell.weight_hh_l1"][3, 2] = value

    edit_tensors(folder, spoil)
    refused(folder, WEIGHTS, "cell.weight_hh_l1", "NaN or infinity")


def test_a_wrong_shape_is_named_with_both(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"head.bias": np.zeros(3, np.float32)}))
    refused(folder, WEIGHTS, "head.bias", "[3]", "[2]")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32])
def test_a_wrong_type_of_weights_is_refused(folder, network, dtype):
    tensors = {name: torch.tensor(value) for name, value in network.tensors().items()}
    tensors["head.bias"] = tensors["head.bias"].to(dtype)
    (folder / WEIGHTS).write_bytes(save_torch(tensors))
    refused(folder, WEIGHTS)


def test_missing_and_unknown_tensors_are_named(folder):
    edit_tensors(folder, lambda tensors: tensors.update(extra=tensors.pop("head.bias")))
    refused(folder, WEIGHTS, "missing: ['head.bias']", "unknown: ['extra']")


def test_a_changed_byte_of_the_manifest_is_refused(folder):
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"name": "x0"', '"name": "x9"', 1))
    refused(folder, str(folder), "fingerprint")


def test_a_manifest_that_is_only_set_out_otherwise_is_the_same(folder):
    edit(folder, lambda document: None)
    assert load_model(folder).key == "lstm/1"


def test_a_manifest_without_a_fingerprint_is_refused(folder):
    edit(folder, lambda document: document.pop("fingerprint"))
    refused(folder, "fingerprint is missing")


def test_a_model_in_the_folder_of_another_is_refused(folder, tmp_path):
    moved = tmp_path / "lstm" / "2"
    folder.rename(moved)
    refused(moved, MANIFEST, "declares lstm/1")


def test_what_would_not_load_is_not_written(network, tmp_path):
    tensors = network.tensors() | {"head.bias": np.full(2, np.nan, np.float32)}
    with pytest.raises(ModelInvalid, match=r"head\.bias"):
        write_model(tmp_path / "lstm" / "1", network.manifest, tensors)
    with pytest.raises(ModelInvalid, match="cell"):
        write_model(tmp_path / "lstm" / "1", {**network.manifest, "cell": {}}, network.tensors())
    assert list(tmp_path.iterdir()) == []
