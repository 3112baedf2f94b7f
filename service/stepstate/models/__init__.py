"""Models: load, verify, describe and write them. Needs no torch."""

from stepstate.models.catalog import Catalog, load_catalog
from stepstate.models.files import Model, load_model, write_model
from stepstate.models.manifest import (
    LEAST_LEVEL,
    MOST_LEVEL,
    CellKind,
    CellSpec,
    CusumSpec,
    DriftSpec,
    Lag,
    LaggedInput,
    Manifest,
    Output,
    PageHinkleySpec,
    Rolling,
    Tracking,
)
from stepstate.models.timeline import Timeline, build_timeline

__all__ = [
    "LEAST_LEVEL",
    "MOST_LEVEL",
    "Catalog",
    "CellKind",
    "CellSpec",
    "CusumSpec",
    "DriftSpec",
    "Lag",
    "LaggedInput",
    "Manifest",
    "Model",
    "Output",
    "PageHinkleySpec",
    "Rolling",
    "Timeline",
    "Tracking",
    "build_timeline",
    "load_catalog",
    "load_model",
    "write_model",
]
