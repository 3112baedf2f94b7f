"""Models: load, verify, describe and write them. Needs no torch."""

from stepstate.models.catalog import EVERYONE, Catalog, ModelAccess, check_access, load_catalog
from stepstate.models.files import load_model, write_model
from stepstate.models.manifest import (
    MAX_LEVEL,
    MIN_LEVEL,
    CellKind,
    CellSpec,
    CusumSpec,
    DriftSpec,
    Lag,
    LaggedInput,
    Manifest,
    OutputSpec,
    PageHinkleySpec,
    Rolling,
    Tracking,
)
from stepstate.models.model import Model
from stepstate.models.timeline import EPOCH, Timeline, build_timeline

__all__ = [
    "EPOCH",
    "EVERYONE",
    "MAX_LEVEL",
    "MIN_LEVEL",
    "Catalog",
    "CellKind",
    "CellSpec",
    "CusumSpec",
    "DriftSpec",
    "Lag",
    "LaggedInput",
    "Manifest",
    "Model",
    "ModelAccess",
    "OutputSpec",
    "PageHinkleySpec",
    "Rolling",
    "Timeline",
    "Tracking",
    "build_timeline",
    "check_access",
    "load_catalog",
    "load_model",
    "write_model",
]
