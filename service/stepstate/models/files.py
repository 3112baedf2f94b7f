"""Reads and writes a model's folder: manifest.json and model.safetensors, never pickle.

Loading verifies everything that a server relies on: keys and values of the
manifest, names, shapes and finiteness of the tensors, and the fingerprint over
both, so that truncated, swapped or edited files are refused by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from stepstate.errors import ModelInvalid
from stepstate.models.layout import tensor_shapes
from stepstate.models.manifest import Manifest

Tensors = Mapping[str, NDArray[np.float32]]

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Model:
    """A verified model: its manifest and its tensors, float32, by name."""

    manifest: Manifest
    tensors: Tensors

    @property
    def key(self) -> str:
        """Name and version, as one word: "electricity/1"."""
        return f"{self.manifest.name}/{self.manifest.version}"


def write_model(folder: Path, manifest: Mapping[str, object], tensors: Tensors) -> str:
    """Writes a model's folder and returns its fingerprint.

    Args:
        folder: made if missing; must end in <name>/<version> to be served.
        manifest: the keys of `manifest.json` without the fingerprint.
        tensors: float32, the cell's named as in torch.nn with the prefix
            "cell.", "head.weight" [O, H], "head.bias" [O], "head.lags" [O, n] where
            the head takes n lagged inputs, and the profiles.

    Raises:
        ModelInvalid: the manifest or a tensor would not load.
    """
    checked = _parse(folder, dict(manifest))
    arrays = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
    _check_tensors(folder, checked, arrays)
    fingerprint = _fingerprint(manifest, arrays)
    document = {**manifest, "fingerprint": fingerprint}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(save(arrays))
    (folder / MANIFEST).write_text(json.dumps(document, indent=2) + "\n")
    return fingerprint


def load_model(folder: Path) -> Model:
    """Loads and verifies a model's folder.

    Raises:
        ModelInvalid: says which file, key or tensor is wrong, and how.
    """
    document = _read_manifest(folder)
    manifest = _parse(folder, document)
    if folder.parts[-2:] != (manifest.name, manifest.version):
        raise ModelInvalid(
            str(folder / MANIFEST),
            f"declares {manifest.name}/{manifest.version}, so it must lie in a folder that ends so",
        )
    tensors = _read_tensors(folder)
    _check_tensors(folder, manifest, tensors)
    actual = _fingerprint(document, tensors)
    if manifest.fingerprint != actual:
        raise ModelInvalid(
            str(folder),
            f"the manifest's fingerprint is {manifest.fingerprint or 'missing'}, its files give "
            f"{actual}: {MANIFEST} or {WEIGHTS} was changed or swapped after they were written "
            "together; restore them, or write the model again with stepstate.models.write_model",
        )
    return Model(manifest, tensors)


def _read_manifest(folder: Path) -> dict[str, object]:
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise ModelInvalid(str(path), f"can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelInvalid(str(path), f"is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ModelInvalid(str(path), "must hold one JSON object")
    return document


def _parse(folder: Path, document: Mapping[str, object]) -> Manifest:
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        problems = [_problem(tuple(found["loc"]), found["msg"]) for found in error.errors()]
        raise ModelInvalid(str(folder / MANIFEST), "; ".join(problems)) from error


def _problem(place: tuple[int | str, ...], message: str) -> str:
    message = message.removeprefix("Value error, ")
    return f"{'.'.join(map(str, place))}: {message}" if place else message


def _read_tensors(folder: Path) -> dict[str, NDArray[np.float32]]:
    path = folder / WEIGHTS
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise ModelInvalid(str(path), f"can't be read: {error.strerror}") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelInvalid(
            str(path), f"is not a whole safetensors file ({error}): copy it again"
        ) from error


def _check_tensors(folder: Path, manifest: Manifest, tensors: Tensors) -> None:
    path = str(folder / WEIGHTS)
    shapes = tensor_shapes(manifest)
    missing, extra = sorted(shapes.keys() - tensors), sorted(tensors.keys() - shapes)
    if missing or extra:
        raise ModelInvalid(
            path, f"tensors missing: {missing or 'none'}, unknown: {extra or 'none'}"
        )
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise ModelInvalid(
                path, f"{name} has shape {list(tensor.shape)}, the manifest asks for {list(shape)}"
            )
        if tensor.dtype != np.float32:
            raise ModelInvalid(path, f"{name} is {tensor.dtype}, expected float32")
        if not np.isfinite(tensor).all():
            raise ModelInvalid(path, f"{name} holds NaN or infinity")


def _fingerprint(document: Mapping[str, object], tensors: Tensors) -> str:
    told = {key: value for key, value in document.items() if key != "fingerprint"}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name}{list(tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensor, "<f4").tobytes())
    return f"sha256:{digest.hexdigest()}"
