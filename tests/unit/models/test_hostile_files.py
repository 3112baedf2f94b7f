"""Hostile model folders are refused in words, at once."""

from __future__ import annotations

import json
import os

import pytest

from stepstate.errors import ModelInvalid
from stepstate.models import load_model
from stepstate.models.files import MANIFEST, WEIGHTS
from tests.networks import make_network
from tests.unit.models.folders import edit, put, refused, written


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


@pytest.mark.parametrize("many", ["[]", "{}", "1", '""'])
def test_a_manifest_of_millions_of_values_is_not_parsed(folder, monkeypatch, many):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(f'{text.rstrip()[:-1]}, "x": [{",".join([many] * 1_000_000)}]}}')
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("it was parsed"))
    refused(folder, MANIFEST, "values")


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
