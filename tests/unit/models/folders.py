"""Model folders that a test changes, and how loading them is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load, save

from stepstate.errors import ModelInvalid
from stepstate.models import load_model, write_model
from stepstate.models.files import MANIFEST, WEIGHTS


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


def written(root: Path, network, tensors, **changes) -> Path:
    folder = root / "lstm" / "1"
    write_model(folder, network.manifest | changes, tensors)
    return folder


def put(*place: str | int, value: object):
    def change(document):
        for key in place[:-1]:
            document = document[key]
        document[place[-1]] = value

    return change
