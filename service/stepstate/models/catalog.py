"""The models of a server: every version found under one folder, by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from stepstate.errors import InvalidField, ModelInvalid, ModelUnknown
from stepstate.models.files import load_model
from stepstate.models.validate import MANIFEST, Model


class Catalog:
    """Loaded models, by name and version."""

    def __init__(self, models: Iterable[Model]) -> None:
        ordered = sorted(models, key=lambda m: (m.manifest.name, int(m.manifest.version)))
        self._models = {model.key: model for model in ordered}

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def find(self, name: str, version: str = "") -> Model:
        """The model of this name: this version of it, or the newest.

        Raises:
            ModelUnknown: nothing such is loaded.
            InvalidField: no name, where several models are loaded.
        """
        names = {model.manifest.name for model in self}
        if not name and len(names) != 1:
            raise InvalidField("model", f"is empty; name one of: {', '.join(sorted(names))}")
        wanted = name or next(iter(names))
        found = [
            model
            for model in self
            if model.manifest.name == wanted and version in ("", model.manifest.version)
        ]
        if not found:
            raise ModelUnknown(wanted[:64], version[:64], ", ".join(self._models))
        return found[-1]


def load_catalog(root: Path) -> Catalog:
    """Loads every <name>/<version>/manifest.json under a folder.

    Raises:
        ModelInvalid: the folder holds no model, or one that can't be served.
    """
    if not root.is_dir():
        raise ModelInvalid(str(root), "is not a folder; name the one that holds <name>/<version>/")
    folders = sorted(path.parent for path in root.resolve().glob(f"*/*/{MANIFEST}"))
    if not folders:
        raise ModelInvalid(str(root), f"holds no <name>/<version>/{MANIFEST}")
    return Catalog([load_model(folder) for folder in folders])
