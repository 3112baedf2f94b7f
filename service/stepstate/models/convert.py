"""Converts what `write_model` is given to what a model's folder holds.

NumPy's numbers become Python's; torch's tensors become arrays, without importing torch; the
prefixes that torch's wrappers add to names are removed; missing biases become zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime
from enum import Enum
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepstate.errors import ModelInvalid
from stepstate.models.manifest import MANIFEST, Manifest
from stepstate.models.model import MAX_NESTING
from stepstate.models.tensors import WEIGHTS, tensor_shapes

_WRAPPERS = frozenset({"_orig_mod", "module"})
"""What torch.compile and DataParallel add to names."""


@runtime_checkable
class TorchTensor(Protocol):
    """What is used of a `torch.Tensor`."""

    def detach(self) -> TorchTensor:
        """The same without gradients."""
        ...

    def cpu(self) -> TorchTensor:
        """The same in the host's memory."""
        ...

    def float(self) -> TorchTensor:
        """The same as float32."""
        ...

    def numpy(self) -> NDArray[np.float32]:
        """The same as an array."""
        ...

    def tolist(self) -> object:
        """The same as a number, or lists of them."""
        ...


def plain_document(folder: Path, manifest: Mapping[str, object]) -> dict[str, object]:
    """A manifest as JSON can hold it.

    Raises:
        ModelInvalid: names the key whose value JSON can't hold.
    """
    if not isinstance(manifest, Mapping):
        problem = f"is a {type(manifest).__name__}, expected a dict with the keys of manifest.json"
        raise ModelInvalid(str(folder / MANIFEST), problem)
    document = {
        str(key): _plain(folder, value, (str(key),))
        for key, value in manifest.items()
        if key != "fingerprint"
    }
    version = document.get("version")
    if isinstance(version, int) and not isinstance(version, bool):
        document["version"] = str(version)
    return document


def _plain(folder: Path, value: object, key: tuple[str, ...]) -> object:
    if len(key) > MAX_NESTING:
        raise ModelInvalid(str(folder / MANIFEST), f"{'.'.join(key[:3])}…: is nested too deeply")
    if isinstance(value, Mapping):
        return {str(name): _plain(folder, one, (*key, str(name))) for name, one in value.items()}
    if isinstance(value, np.ndarray | np.generic | TorchTensor):
        value = value.tolist()  # a plain number where it has no dimension
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return [_plain(folder, one, (*key, str(index))) for index, one in enumerate(value)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ModelInvalid(
        str(folder / MANIFEST),
        f"{'.'.join(key)}: is a {type(value).__name__}, expected a number, text, list or mapping",
    )


def named_tensors(
    folder: Path, manifest: Manifest, tensors: Mapping[str, ArrayLike | TorchTensor]
) -> dict[str, NDArray[np.float32]]:
    """The weights as float32 arrays, under the names of a model's folder.

    Raises:
        ModelInvalid: names the tensor.
    """
    if not isinstance(tensors, Mapping):
        problem = f"is a {type(tensors).__name__}, expected tensors by name: give its state_dict()"
        raise ModelInvalid(str(folder / WEIGHTS), problem)
    shapes = tensor_shapes(manifest)
    named: dict[str, NDArray[np.float32]] = {}
    for original, value in tensors.items():
        name = original if original in shapes else _unwrapped(original)
        if name in named:
            raise ModelInvalid(
                str(folder / WEIGHTS), f"{name} is given twice, as {original!r} too: give it once"
            )
        named[name] = _array(folder, original, value)
    return named | _zero_biases(shapes, named)


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _zero_biases(
    shapes: Mapping[str, tuple[int, ...]], named: Mapping[str, object]
) -> dict[str, NDArray[np.float32]]:
    """The biases of a cell that has none at all (bias=False), and of a head that has none."""
    found: dict[str, NDArray[np.float32]] = {}
    for part in ("cell.bias_", "head.bias"):
        biases = [name for name in shapes if name.startswith(part)]
        if not any(name.startswith(part) for name in named):
            found |= {name: np.zeros(shapes[name], np.float32) for name in biases}
    return found


def _array(folder: Path, name: str, value: ArrayLike | TorchTensor) -> NDArray[np.float32]:
    try:
        if isinstance(value, TorchTensor):
            value = value.detach().cpu().float().numpy()
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelInvalid(str(folder / WEIGHTS), f"{name} is no array: {error}") from error
    if array.dtype.kind not in "fiu":
        raise ModelInvalid(
            str(folder / WEIGHTS), f"{name} holds {array.dtype}, expected real numbers"
        )
    with np.errstate(over="ignore"):  # becomes infinity, which is refused by name
        return np.array(array, np.float32, order="C")
