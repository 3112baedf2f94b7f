"""Models: load, verify, describe and write them. Needs no torch."""

from stepstate.models.catalog import Catalog, load_catalog
from stepstate.models.files import load_model, write_model
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
from stepstate.models.timeline import EPOCH, Timeline, build_timeline
from stepstate.models.validate import Model

__all__ = [
    "EPOCH",
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
