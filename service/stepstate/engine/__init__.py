"""The engine: arena, cells and micro-batcher. The only part that imports torch."""

from stepstate.engine.accelerator import DeviceUnavailable, check_accelerator
from stepstate.engine.bare import BareForward
from stepstate.engine.batch import PackedWork
from stepstate.engine.engine import Engine, Observer, use_one_thread
from stepstate.engine.forecast.rollout import ForecastOrigins, HorizonForecast, Method, Plan
from stepstate.engine.layout import Layout
from stepstate.engine.precision import Precision, has_instructions
from stepstate.engine.quantization import QuantizationError, measure_loss
from stepstate.engine.tracking.scores import HorizonAccuracy, ScoreSummary, ScoreTotals
from stepstate.engine.tracking.tracker import DriftStatus, ForecastQuality
from stepstate.engine.work import CompletionSink, Floats, Layers, WorkItem

__all__ = [
    "BareForward",
    "CompletionSink",
    "DeviceUnavailable",
    "DriftStatus",
    "Engine",
    "Floats",
    "ForecastOrigins",
    "ForecastQuality",
    "HorizonAccuracy",
    "HorizonForecast",
    "Layers",
    "Layout",
    "Method",
    "Observer",
    "PackedWork",
    "Plan",
    "Precision",
    "QuantizationError",
    "ScoreSummary",
    "ScoreTotals",
    "WorkItem",
    "check_accelerator",
    "has_instructions",
    "measure_loss",
    "use_one_thread",
]
