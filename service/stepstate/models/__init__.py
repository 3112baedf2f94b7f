"""Models: load, verify, describe and write them. Needs no torch."""

from stepstate.models.catalog import Catalog, load_catalog
from stepstate.models.files import load_model, write_model
from stepstate.models.manifest import (
    LEAST_LEVEL,
    MOST_LEVEL,
    CellKind,
    CellSpec,
    DriftSpec,
    Lag,
    LaggedInput,
    Manifest,
    Output,
    Rolling,
    Tracking,
)
from stepstate.models.timeline import EPOCH, Timeline, build_timeline
from stepstate.models.validate import Model

__all__ = [
    "EPOCH",
    "LEAST_LEVEL",
    "MOST_LEVEL",
    "Catalog",
    "CellKind",
    "CellSpec",
    "DriftSpec",
    "Lag",
    "LaggedInput",
    "Manifest",
    "Model",
    "Output",
    "Rolling",
    "Timeline",
    "Tracking",
    "build_timeline",
    "load_catalog",
    "load_model",
    "write_model",
]
