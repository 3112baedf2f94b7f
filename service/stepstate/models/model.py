"""Whether a model can be served: the one check, which writing and loading a model share."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from stepstate.errors import ModelInvalid
from stepstate.models.layout import tensor_shapes
from stepstate.models.manifest import Manifest
from stepstate.models.resolution import resolutions

log = logging.getLogger(__name__)

Tensors = Mapping[str, NDArray[np.float32]]

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
MAX_NESTING = 16
"""A manifest needs four."""
_MAX_PROBLEMS = 10
_SHOWN = 300


@dataclass(frozen=True, slots=True)
class Model:
    """A verified model: its manifest and its tensors, float32, by name."""

    manifest: Manifest
    tensors: Tensors
    former_fingerprint: str = ""
    """What 0.1.0's first servers called the very same model: sessions may carry it."""

    @property
    def key(self) -> str:
        """Name and version, as one word: "electricity/1"."""
        return f"{self.manifest.name}/{self.manifest.version}"

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """All under which its sessions may be stored; new ones carry the first."""
        stated, former = self.manifest.fingerprint, self.former_fingerprint
        return (stated, former) if former else (stated,)


def parse_manifest(folder: Path, document: Mapping[str, object]) -> Manifest:
    """A manifest's document, checked by itself.

    Raises:
        ModelInvalid: it names every key that is wrong, and how.
    """
    path = str(folder / MANIFEST)
    if _too_deep(document):
        raise ModelInvalid(path, f"is nested more than {MAX_NESTING} deep; no key of it needs that")
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        problems = [_problem(tuple(one["loc"]), one["msg"]) for one in found[:_MAX_PROBLEMS]]
        if len(found) > _MAX_PROBLEMS:
            problems.append(f"and {len(found) - _MAX_PROBLEMS} more")
        raise ModelInvalid(path, "; ".join(problems)) from error
    if folder.absolute().parts[-2:] != (manifest.name, manifest.version):
        raise ModelInvalid(
            path,
            f"declares {manifest.name}/{manifest.version}, so it must lie in a folder that ends so",
        )
    return manifest


def validate_model(folder: Path, document: Mapping[str, object], tensors: Tensors) -> Model:
    """A model that can be served, but for its fingerprint.

    Raises:
        ModelInvalid: says which file, key or tensor is wrong, and how.
    """
    manifest = parse_manifest(folder, document)
    check_tensors(folder, manifest, tensors)
    check_resolution(folder, manifest, tensors)
    former = fingerprint(document, tensors, described=True) if manifest.description else ""
    return Model(manifest, tensors, former)


def check_tensors(folder: Path, manifest: Manifest, tensors: Tensors) -> None:
    """Names, shapes, types and values of the weights.

    Raises:
        ModelInvalid: it names the tensor.
    """
    path = str(folder / WEIGHTS)
    shapes = tensor_shapes(manifest)
    missing, extra = sorted(shapes.keys() - tensors), sorted(tensors.keys() - shapes)
    if missing or extra:
        raise ModelInvalid(
            path,
            f"tensors missing: {_listed(missing)}, unknown: {_listed(extra)}; the cell's are named "
            'as in torch.nn with "cell." before, the others head.weight, head.bias, head.lags and '
            "as the profiles",
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


def check_resolution(folder: Path, manifest: Manifest, tensors: Tensors) -> None:
    """Whether float32 can tell the values of every column apart; a coarse one is logged.

    Raises:
        ModelInvalid: it names the columns.
    """
    coarse = [one for one in resolutions(manifest, tensors) if one.coarse]
    lost = [one for one in coarse if one.lost]
    if lost:
        more = f"; and {len(lost) - _MAX_PROBLEMS} more" if len(lost) > _MAX_PROBLEMS else ""
        raise ModelInvalid(
            str(folder / MANIFEST),
            f"{'; '.join(map(str, lost[:_MAX_PROBLEMS]))}{more}: the digits that the network is to "
            "see are lost before the mean is taken off; train on the difference between two rows "
            "of a counter, or on its distance from a fixed number, and send that",
        )
    for one in coarse[:_MAX_PROBLEMS]:
        log.warning(
            "%s: %s: few digits are left; send the difference between two rows of a counter",
            folder / MANIFEST,
            one,
        )


def fingerprint(
    document: Mapping[str, object], tensors: Tensors, *, described: bool = False
) -> str:
    """A digest of all that changes what the model computes.

    Args:
        document: the manifest's; its description counts only if `described`, as it did at first.
        tensors: the weights.
        described: see there.
    """
    apart = {"fingerprint"} if described else {"fingerprint", "description"}
    counted = {key: value for key, value in document.items() if key not in apart}
    digest = hashlib.sha256(json.dumps(counted, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name}{list(tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensor, "<f4").tobytes())
    return f"sha256:{digest.hexdigest()}"


def _too_deep(value: object, depth: int = 0) -> bool:
    if depth > MAX_NESTING:
        return True
    if isinstance(value, Mapping):
        return any(_too_deep(one, depth + 1) for one in value.values())
    return isinstance(value, list | tuple) and any(_too_deep(one, depth + 1) for one in value)


def _problem(place: tuple[int | str, ...], message: str) -> str:
    message = message.removeprefix("Value error, ")
    text = f"{'.'.join(map(str, place))}: {message}" if place else message
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _listed(names: list[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _MAX_PROBLEMS} more" if len(names) > _MAX_PROBLEMS else ""
    return f"{names[:_MAX_PROBLEMS]}{more}"
