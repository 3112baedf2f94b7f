"""Models: load, verify, describe and write them. Needs no torch."""

from stepstate.models.catalog import Catalog, load_catalog
from stepstate.models.files import Model, load_model, write_model
from stepstate.models.manifest import CellKind, CellSpec, Manifest
from stepstate.models.timeline import Timeline, build_timeline

__all__ = [
    "Catalog",
    "CellKind",
    "CellSpec",
    "Manifest",
    "Model",
    "Timeline",
    "build_timeline",
    "load_catalog",
    "load_model",
    "write_model",
]
