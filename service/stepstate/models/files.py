"""Reads and writes a model's folder: manifest.json and model.safetensors, never pickle.

Loading verifies everything that a server relies on: keys and values of the manifest, names, shapes
and finiteness of the tensors, and the fingerprint over both, so that truncated, swapped or edited
files are refused by name. Writing verifies the same first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from numpy.typing import ArrayLike
from safetensors import SafetensorError
from safetensors.numpy import load, save

from stepstate.errors import ModelInvalid
from stepstate.models.convert import TorchTensor, named_tensors, plain_document
from stepstate.models.manifest import MANIFEST, Manifest
from stepstate.models.model import Model, fingerprint, parse_manifest, validate_model
from stepstate.models.tensors import WEIGHTS, Tensors, tensor_shapes

MAX_MANIFEST_BYTES = 16 * 2**20
"""Thousands of columns with their horizons take 1 MiB."""
MAX_MANIFEST_VALUES = 500_000
"""Numbers, texts, lists and objects: more than the largest manifest has, and read at once."""
_SPARE_WEIGHT_BYTES = 16 * 2**20
"""For the header, and for unknown tensors, so that the error can name them."""


def write_model(
    folder: Path | str,
    manifest: Mapping[str, object],
    tensors: Mapping[str, ArrayLike | TorchTensor],
) -> str:
    """Writes a model's folder and returns its fingerprint.

    Args:
        folder: made if missing; it must end in <name>/<version>.
        manifest: the keys of `manifest.json` without the fingerprint; numbers may be NumPy's, the
            version may be a number.
        tensors: the weights, arrays or torch's tensors: the cell's named as in torch.nn with the
            prefix "cell.", "head.weight" [O, H], "head.bias" [O], "head.lags" [O, n] where
            the head takes n lagged inputs, and the profiles. They are written as float32. "module."
            and "_orig_mod." in names are left out; a cell without any biases, or a head without
            one, gets zeros.

    Raises:
        ModelInvalid: a server could not serve it.
    """
    folder = Path(folder)
    document = plain_document(folder, manifest)
    arrays = named_tensors(folder, parse_manifest(folder, document), tensors)
    validate_model(folder, document, arrays)
    document["fingerprint"] = fingerprint(document, arrays)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(save(arrays))
    (folder / MANIFEST).write_text(json.dumps(document, indent=2) + "\n")
    return str(document["fingerprint"])


def load_model(folder: Path | str) -> Model:
    """Loads and verifies a model's folder.

    Raises:
        ModelInvalid: names the wrong file, key or tensor.
    """
    folder = Path(folder)
    document = _read_manifest(folder)
    tensors = _read_tensors(folder, parse_manifest(folder, document))
    model = validate_model(folder, document, tensors)
    stated, actual = model.manifest.fingerprint, fingerprint(document, tensors)
    if not stated or stated not in (actual, model.former_fingerprint):
        raise ModelInvalid(
            str(folder),
            f"the manifest's fingerprint is {stated or 'missing'}, its files give "
            f"{actual}: {MANIFEST} or {WEIGHTS} was changed or swapped after they were written "
            "together; restore them, or write the model again with stepstate.models.write_model",
        )
    return model


def _read_manifest(folder: Path) -> dict[str, object]:
    path = folder / MANIFEST
    text = _read(path, MAX_MANIFEST_BYTES)
    values = sum(map(text.count, (b"[", b"{", b",")))
    if values > MAX_MANIFEST_VALUES:
        raise ModelInvalid(
            str(path), f"has about {values} values, expected at most {MAX_MANIFEST_VALUES}"
        )
    try:
        document = json.loads(text)
    except RecursionError as error:
        raise ModelInvalid(str(path), "is nested too deeply to be a manifest") from error
    except ValueError as error:
        raise ModelInvalid(str(path), f"is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ModelInvalid(str(path), "must hold one JSON object")
    return document


def _read_tensors(folder: Path, manifest: Manifest) -> Tensors:
    path = folder / WEIGHTS
    wanted = 4 * sum(math.prod(shape) for shape in tensor_shapes(manifest).values())
    data = _read(path, 2 * wanted + _SPARE_WEIGHT_BYTES)  # float64, so that the error can name it
    try:
        return load(data)
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelInvalid(
            str(path), f"is not a whole safetensors file ({error}): copy it again"
        ) from error


def _read(path: Path, max_bytes: int) -> bytes:
    """A file's bytes."""
    try:
        if path.exists() and not path.is_file():
            raise ModelInvalid(str(path), "is not a file")
        size = path.stat().st_size
        if size > max_bytes:
            raise ModelInvalid(str(path), f"has {size} bytes, expected at most {max_bytes}")
        return path.read_bytes()
    except OSError as error:
        raise ModelInvalid(str(path), f"can't be read: {error.strerror}") from error
