"""The models of a server: every version that is in one folder, by name, and who may use them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stepstate.errors import InvalidField, ModelInvalid, ModelUnknown
from stepstate.models.files import load_model
from stepstate.models.manifest import MANIFEST
from stepstate.models.model import Model

_HOW = (
    "name the folder that holds <name>/<version>/ with --models, write your own there with "
    "stepstate.models.write_model, or a first one with `stepstate models example`"
)


@dataclass(frozen=True, slots=True)
class ModelAccess:
    """Which tenants may use which models."""

    tenants: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """By the name of a model; a model that is not in it is everyone's."""

    def allows(self, tenant: str, model: str) -> bool:
        """Whether a tenant may use the model of a name, in all its versions."""
        allowed = self.tenants.get(model)
        return allowed is None or tenant in allowed


EVERYONE = ModelAccess()
"""Every tenant may use every model."""


class Catalog:
    """Loaded models, by name and version.

    Args:
        models: those that are served.
        skipped: why others can't be.
        access: who may use them.
    """

    def __init__(
        self,
        models: Iterable[Model],
        skipped: Sequence[ModelInvalid] = (),
        access: ModelAccess = EVERYONE,
    ) -> None:
        self.skipped = tuple(skipped)
        self.access = access
        ordered = sorted(models, key=lambda m: (m.manifest.name, int(m.manifest.version)))
        self._models = {model.key: model for model in ordered}
        self._versions: dict[str, dict[str, Model]] = {}
        for model in ordered:
            self._versions.setdefault(model.manifest.name, {})[model.manifest.version] = model

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def of(self, tenant: str) -> Catalog:
        """The models that a tenant may use: for it there are no others."""
        if not self.access.tenants:
            return self
        allowed = self.access.allows
        return Catalog(model for model in self if allowed(tenant, model.manifest.name))

    def restrict(self, access: ModelAccess) -> None:
        """Changes who may use them. Sessions in memory go on until they are closed or spilled."""
        self.access = access

    def find(self, name: str, version: str = "") -> Model:
        """The model of this name: this version of it, or the newest.

        Raises:
            ModelUnknown: it is not loaded.
            InvalidField: no name, and several models are loaded.
        """
        names = self._versions
        if not name and len(names) != 1:
            raise InvalidField("model", f"is empty; name one of: {', '.join(sorted(names))}")
        wanted = name or next(iter(names))
        versions = names.get(wanted, {})
        newest = next(reversed(versions.values()), None)
        found = versions.get(version) if version else newest
        if found is None:
            raise ModelUnknown(wanted[:64], version[:64], ", ".join(self._models))
        return found


def load_catalog(
    root: Path, *, skip_invalid: bool = False, access: ModelAccess = EVERYONE
) -> Catalog:
    """Loads every <name>/<version>/manifest.json under a folder.

    Args:
        root: the folder.
        skip_invalid: leave out models that can't be served, if at least one can.
        access: who may use them.

    Raises:
        ModelInvalid: there is no model, or one that can't be served, or not one that only some
            tenants may use: its name may be misspelt, and the model open to all.
    """
    if not root.is_dir():
        raise ModelInvalid(str(root), f"is not a folder; {_HOW}")
    folders = sorted(path.parent for path in root.resolve().glob(f"*/*/{MANIFEST}"))
    if not folders:
        raise ModelInvalid(str(root), f"holds no <name>/<version>/{MANIFEST}; {_HOW}")
    check_access(root, access)
    loaded: list[Model] = []
    skipped: list[ModelInvalid] = []
    for folder in folders:
        try:
            loaded.append(load_model(folder))
        except ModelInvalid as error:
            if not skip_invalid:
                raise
            skipped.append(error)
    if not loaded:
        raise skipped[0]
    return Catalog(loaded, skipped, access)


def check_access(root: Path, access: ModelAccess) -> None:
    """Refuses to limit what is not there.

    Raises:
        ModelInvalid: the folder has no model of a name; it may be misspelt, and the model open to
            all.
    """
    names = {path.parent.parent.name for path in root.glob(f"*/*/{MANIFEST}")}
    for name in access.tenants:
        if name not in names:
            raise ModelInvalid(
                str(root),
                f"has no model {name!r}, which only some tenants may use; it has: "
                f"{', '.join(sorted(names))}",
            )
