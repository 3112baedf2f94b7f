"""The engine: arena, cells and micro-batcher. The only part that imports torch."""

from stepstate.engine.accelerator import NoAccelerator, check_accelerator
from stepstate.engine.bare import BareForward
from stepstate.engine.batch import Pack
from stepstate.engine.engine import Engine, Observer, use_one_thread
from stepstate.engine.forecasts import Method, Origins, Outlook, Plan
from stepstate.engine.layout import Layout
from stepstate.engine.loss import Loss, measure_loss
from stepstate.engine.precision import Precision, has_instructions
from stepstate.engine.scores import Accuracy, Figures, Tally
from stepstate.engine.tracking import Drift, Quality
from stepstate.engine.work import Floats, Layers, Owner, Work

__all__ = [
    "Accuracy",
    "BareForward",
    "Drift",
    "Engine",
    "Figures",
    "Floats",
    "Layers",
    "Layout",
    "Loss",
    "Method",
    "NoAccelerator",
    "Observer",
    "Origins",
    "Outlook",
    "Owner",
    "Pack",
    "Plan",
    "Precision",
    "Quality",
    "Tally",
    "Work",
    "check_accelerator",
    "has_instructions",
    "measure_loss",
    "use_one_thread",
]
