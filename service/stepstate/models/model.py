"""A model, and the check that it can be served, which writing and loading share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from stepstate.errors import ModelInvalid
from stepstate.models.manifest import MANIFEST, Manifest
from stepstate.models.tensors import Tensors, check_resolution, check_tensors

MAX_NESTING = 16
"""A manifest needs four levels."""
_MAX_PROBLEMS = 10
_SHOWN = 300


@dataclass(frozen=True, slots=True)
class Model:
    """A verified model: its manifest and its tensors, float32, by name."""

    manifest: Manifest
    tensors: Tensors
    former_fingerprint: str = ""
    """The fingerprint by the first servers of 0.1.0: stored sessions may have it."""

    @property
    def key(self) -> str:
        """Name and version: "electricity/1"."""
        return f"{self.manifest.name}/{self.manifest.version}"

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """All that its stored sessions may have; new ones have the first."""
        stated, former = self.manifest.fingerprint, self.former_fingerprint
        return (stated, former) if former else (stated,)


def parse_manifest(folder: Path, document: Mapping[str, object]) -> Manifest:
    """Parses and checks a manifest by itself.

    Raises:
        ModelInvalid: names every wrong key.
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
    """Checks all of a model but its fingerprint.

    Raises:
        ModelInvalid: says which file, key or tensor is wrong, and how.
    """
    manifest = parse_manifest(folder, document)
    check_tensors(folder, manifest, tensors)
    check_resolution(folder, manifest, tensors)
    former = fingerprint(document, tensors, described=True) if manifest.description else ""
    return Model(manifest, tensors, former)


def fingerprint(
    document: Mapping[str, object], tensors: Tensors, *, described: bool = False
) -> str:
    """A digest of everything that affects what the model computes.

    Args:
        document: the manifest.
        tensors: the weights.
        described: whether the description counts, as it did for the first servers.
    """
    ignored = {"fingerprint"} if described else {"fingerprint", "description"}
    content = {key: value for key, value in document.items() if key not in ignored}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
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


def _problem(key: tuple[int | str, ...], message: str) -> str:
    message = message.removeprefix("Value error, ")
    text = f"{'.'.join(map(str, key))}: {message}" if key else message
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
