"""`write_model` takes tensors and numbers as people have them, where their meaning is plain."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from stepstate.errors import ModelInvalid
from stepstate.models import load_model, write_model
from tests.unit.models.folders import edit, written


def test_a_module_instead_of_its_tensors_is_told(network, tmp_path):
    with pytest.raises(ModelInvalid, match=r"is a LSTM, expected tensors .*state_dict"):
        write_model(tmp_path / "lstm/1", network.manifest, torch.nn.LSTM(1, 1))
    with pytest.raises(ModelInvalid, match="is a str, expected a dict"):
        write_model(tmp_path / "m/1", "manifest.json", {})


def test_the_folder_may_be_text(network, tmp_path):
    write_model(str(tmp_path / "lstm" / "1"), network.manifest, network.tensors())
    assert load_model(str(tmp_path / "lstm" / "1")).key == "lstm/1"


def test_tensors_may_be_torchs_as_they_come_from_training(network, tmp_path):
    tensors = {f"cell.{name}": value for name, value in network.module.named_parameters()}
    tensors |= {f"head.{name}": value for name, value in network.head.named_parameters()}
    assert all(value.requires_grad for value in tensors.values())
    model = load_model(written(tmp_path, network, tensors))
    for name, tensor in network.tensors().items():
        assert model.tensors[name].tobytes() == tensor.tobytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_written_as_float32(network, tmp_path, dtype):
    tensors = {name: torch.tensor(value).to(dtype) for name, value in network.tensors().items()}
    model = load_model(written(tmp_path, network, tensors))
    for name, tensor in tensors.items():
        assert np.array_equal(model.tensors[name], tensor.float().numpy())


@pytest.mark.parametrize(
    "prefixed",
    ["_orig_mod.{}", "module.{}", "_orig_mod.module.{}", "{part}._orig_mod.{rest}"],
)
def test_the_prefixes_of_wrappers_are_left_out_of_names(network, tmp_path, prefixed):
    tensors = {}
    for name, value in network.tensors().items():
        part, _, rest = name.partition(".")
        tensors[prefixed.format(name, part=part, rest=rest)] = value
    model = load_model(written(tmp_path, network, tensors))
    assert model.tensors.keys() == network.tensors().keys()


def test_a_compiled_cell_and_a_parallel_head_are_written(network, tmp_path):
    cell = torch.compile(network.module, backend="eager")
    head = torch.nn.DataParallel(network.head)
    tensors = {f"cell.{name}": value for name, value in cell.state_dict().items()}
    tensors |= {f"head.{name}": value for name, value in head.state_dict().items()}
    assert "cell._orig_mod.weight_ih_l0" in tensors
    assert "head.module.weight" in tensors
    assert load_model(written(tmp_path, network, tensors)).tensors.keys() == set(network.tensors())


def test_a_tensor_that_is_given_under_two_names_is_refused(network, tmp_path):
    tensors = network.tensors()
    tensors["module.head.bias"] = tensors["head.bias"]
    with pytest.raises(ModelInvalid, match=r"head\.bias is given twice, as 'module\.head\.bias'"):
        written(tmp_path, network, tensors)


@pytest.mark.parametrize("part", ["cell.bias", "head.bias"])
def test_without_biases_they_are_zeros(network, tmp_path, part):
    tensors = {name: value for name, value in network.tensors().items() if part not in name}
    model = load_model(written(tmp_path, network, tensors))
    for name, tensor in network.tensors().items():
        want = np.zeros_like(tensor) if part in name else tensor
        assert np.array_equal(model.tensors[name], want)


def test_some_of_the_biases_are_no_plain_meaning(network, tmp_path):
    tensors = network.tensors()
    del tensors["cell.bias_hh_l1"]
    with pytest.raises(ModelInvalid, match=r"missing: \['cell\.bias_hh_l1'\]"):
        written(tmp_path, network, tensors)


def test_names_without_a_part_are_refused_with_how_they_are_named(network, tmp_path):
    tensors = {n.replace("cell.", "lstm."): value for n, value in network.tensors().items()}
    with pytest.raises(ModelInvalid, match=r'as in torch\.nn with "cell\." before'):
        written(tmp_path, network, tensors)


@pytest.mark.parametrize("value", ["text", None, [[1.0], [2.0, 3.0]], 1j, {"a": 1}, object()])
def test_what_is_no_array_of_numbers_is_refused_by_name(network, tmp_path, value):
    with pytest.raises(ModelInvalid, match=r"head\.bias"):
        written(tmp_path, network, network.tensors() | {"head.bias": value})


def test_numbers_may_be_numpys_and_torchs_and_the_version_a_number(network, tmp_path):
    inputs = [
        {"name": "x0", "mean": np.float32(0.5), "scale": np.float64(2.0)},
        {"name": "x1", "mean": torch.tensor(0.25), "scale": np.array(3.0)},
        {"name": "x2"},
    ]
    cell = network.manifest["cell"] | {"hidden_size": np.int64(16)}
    outputs = [{"name": "y0", "horizons": np.arange(1, 2)}, {"name": "y1", "horizons": (3,)}]
    folder = written(
        tmp_path,
        network,
        network.tensors(),
        version=1,
        inputs=inputs,
        cell=cell,
        outputs=outputs,
        description=np.str_("sized"),
    )
    manifest = load_model(folder).manifest
    assert [(column.mean, column.scale) for column in manifest.inputs] == [
        (0.5, 2.0),
        (0.25, 3.0),
        (0.0, 1.0),
    ]
    assert (manifest.version, manifest.outputs[0].horizons) == ("1", (1,))


def test_a_profile_may_begin_at_a_datetime(network, tmp_path):
    start = datetime(2026, 1, 2, tzinfo=UTC)
    for number, origin in enumerate((start, np.datetime64("2026-01-02T00:00:00"))):
        folder = written(
            tmp_path / str(number),
            network,
            network.tensors() | {"day": np.zeros(24)},
            step_interval_seconds=np.float32(3600),
            profiles={"day": {"period_steps": 24, "origin": origin}},
        )
        assert load_model(folder).manifest.profiles["day"].origin == start


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", 1j])
def test_a_value_that_json_can_not_hold_is_named(network, tmp_path, value):
    inputs = [{"name": "x0", "mean": value}, {"name": "x1"}, {"name": "x2"}]
    with pytest.raises(ModelInvalid, match=r"inputs\.0\.mean: is a"):
        written(tmp_path, network, network.tensors(), inputs=inputs)


def test_a_folder_that_could_not_be_served_is_not_written(network, tmp_path):
    with pytest.raises(ModelInvalid, match="must lie in a folder that ends so"):
        write_model(tmp_path / "elsewhere", network.manifest, network.tensors())
    assert list(tmp_path.iterdir()) == []


# The fingerprint.


def test_the_description_may_change_and_the_model_stays_the_same(folder):
    edit(folder, lambda document: document.update(description="told better"))
    before = load_model(folder)
    edit(folder, lambda document: document.update(description="and better"))
    after = load_model(folder)
    assert before.manifest.fingerprint == after.manifest.fingerprint
    edit(folder, lambda document: document.pop("description"))
    assert load_model(folder).manifest.fingerprint == before.manifest.fingerprint


def described(network, root: Path, fingerprint: str | None = None) -> Path:
    folder = written(root, network, network.tensors(), description="as before")
    if fingerprint is not None:
        edit(folder, lambda document: document.update(fingerprint=fingerprint))
    return folder


def test_a_model_from_before_that_is_served_under_the_fingerprint_it_has(network, tmp_path):
    """It was over the description too; sessions are stored with it."""
    now = load_model(described(network, tmp_path / "now"))
    former = now.former_fingerprint
    assert former not in ("", now.manifest.fingerprint)
    before = load_model(described(network, tmp_path / "before", former))
    assert before.manifest.fingerprint == before.fingerprints[0] == former


def test_sessions_from_before_that_belong_to_a_model_that_is_written_again(network, tmp_path):
    model = load_model(described(network, tmp_path))
    assert model.fingerprints == (model.manifest.fingerprint, model.former_fingerprint)


@pytest.mark.parametrize(
    ("version", "before"),
    [
        ("1", "sha256:68ea6d10f856b45d6a139abba1586bc60518ece495597447b543372b262e2312"),
        ("2", "sha256:0c6788c87949102c95166d01c9e7ebd39f86e216ae84ba9f961f90cc31d67946"),
    ],
)
def test_the_shipped_models_take_the_sessions_that_they_had(version, before):
    model = load_model(Path(__file__).parents[3] / "models" / "electricity" / version)
    assert before in model.fingerprints
    assert model.manifest.fingerprint != before
