from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from safetensors.torch import save as save_torch

from stepstate.errors import ModelInvalid
from stepstate.models import load_model, write_model
from stepstate.models.files import MANIFEST, WEIGHTS
from tests.networks import make_network


@pytest.fixture
def folder(network, tmp_path) -> Path:
    return network.write(tmp_path)


def refused(folder: Path, *words: str) -> None:
    """Loading fails and names each of the words."""
    with pytest.raises(ModelInvalid) as error:
        load_model(folder)
    for word in words:
        assert word in str(error.value)


def edit(folder: Path, change) -> None:
    """Changes manifest.json by a function on its document."""
    path = folder / MANIFEST
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_tensors(folder: Path, change) -> None:
    path = folder / WEIGHTS
    tensors = dict(load(path.read_bytes()))
    change(tensors)
    path.write_bytes(save(tensors))


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


# What is given, where its meaning is plain.


def written(root: Path, network, tensors, **changes) -> Path:
    folder = root / "lstm" / "1"
    write_model(folder, network.manifest | changes, tensors)
    return folder


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


# Bounds: refused in words, and at once.


def put(*place: str | int, value: object):
    def change(document):
        for key in place[:-1]:
            document = document[key]
        document[place[-1]] = value

    return change


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("cell", "num_layers"), 10**9),
        (("cell", "num_layers"), 5_000_000),
        (("cell", "hidden_size"), 10**9),
        (("cell", "hidden_size"), 10**400),
        (("inputs",), [{"name": f"x{place}"} for place in range(5_000)]),
        (("outputs",), [{"name": f"y{place}"} for place in range(5_000)]),
        (("outputs", 0, "horizons"), list(range(70_000))),
        (("outputs", 0, "horizons"), [10**30]),
        (("calendar",), [{"kind": "fourier", "period_seconds": 60, "harmonics": 10**12}]),
        (("calendar",), [{"kind": "day_of_week"}] * 5_000),
        (("calendar",), [{"kind": "fourier", "period_seconds": 1e300, "harmonics": 1}]),
        (("calendar",), [{"kind": "fourier", "period_seconds": 1e-300, "harmonics": 1}]),
        (("lags",), [{"kind": "lag", "input": "x0", "steps": [1]}] * 5_000),
        (("profiles",), {"p": {"period_steps": 10**18, "origin": "2026-01-01"}}),
        (("step_interval_seconds",), 10**18),
        (("step_interval_seconds",), 1e-7),
        (("inputs", 0, "mean"), 1e300),
        (("inputs", 0, "scale"), 1e-300),
        (("description",), "x" * 1_000_000),
        (("cell",), {"kind": "lstm", "hidden_size": 65_536, "num_layers": 256}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_beyond_all_measure_is_refused_in_words(folder, place, value):
    edit(folder, lambda document: document.update(step_interval_seconds=60))
    edit(folder, put(*place, value=value))
    with pytest.raises(ModelInvalid) as error:
        load_model(folder)
    assert MANIFEST in str(error.value)
    assert len(str(error.value)) < 5_000


@pytest.mark.parametrize("depth", [20, 500, 100_000])
@pytest.mark.parametrize(("opens", "closes"), [("[", "]"), ('{"a":', "}")])
def test_a_manifest_that_is_nested_without_end_is_refused_in_words(folder, depth, opens, closes):
    inner = opens * depth + "1" + closes * depth
    text = (folder / MANIFEST).read_text().replace('"name": "lstm"', f'"name": {inner}')
    (folder / MANIFEST).write_text(text)
    refused(folder, MANIFEST, "nested")


def test_what_is_given_to_be_written_is_bounded_too(network, tmp_path):
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for change in ({"name": deep}, {"cell": network.manifest["cell"] | {"num_layers": 10**9}}):
        with pytest.raises(ModelInvalid):
            written(tmp_path, network, network.tensors(), **change)


def test_a_huge_manifest_and_huge_weights_are_not_read(folder):
    for name in (MANIFEST, WEIGHTS):
        with (folder / name).open("r+b") as file:
            file.truncate(50 * 2**30)
        refused(folder, name, "expected at most")
        with (folder / name).open("r+b") as file:
            file.truncate(0)
        (folder / MANIFEST).write_text(json.dumps(make_network("lstm").manifest))


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_what_is_no_file_is_not_read(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, name, "is not a file")


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def lying(**changes: object) -> bytes:
    """One tensor whose header says something else than there is."""
    return safetensors(
        {"head.bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}, b"x" * 8
    )


@pytest.mark.parametrize(
    "data",
    [
        lying(shape=[2**40]),
        lying(shape=[2**62, 2**62]),
        lying(shape=[-2]),
        lying(shape=[0]),
        lying(shape=[[2]]),
        lying(shape="two"),
        lying(shape=[1] * 100, data_offsets=[0, 4]),
        lying(dtype="F99"),
        lying(dtype="BF16"),
        lying(dtype=3),
        lying(data_offsets=[0, 2**60]),
        lying(data_offsets=[8, 0]),
        lying(data_offsets=[4, 12]),
        lying(data_offsets=[0]),
        safetensors({"__metadata__": {"a": 1}}),
        safetensors({"a": None}),
        safetensors([]),
        safetensors(b"{" * 100_000),
        safetensors(b'{"a":' + b"[" * 100_000),
        safetensors(b"\xff\xfe"),
        (2**63).to_bytes(8, "little") + b"{}",
        (2**40).to_bytes(8, "little") + b"{}",
        (10).to_bytes(8, "little") + b"{}",
        b"\x00" * 8,
        b"",
    ],
    ids=range(25),
)
def test_weights_whose_header_lies_are_refused_in_words(folder, data):
    (folder / WEIGHTS).write_bytes(data)
    refused(folder, WEIGHTS)
