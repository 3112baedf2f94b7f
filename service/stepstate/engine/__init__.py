"""The engine: arena, cells and micro-batcher. The only package that imports torch and onnxruntime.

engine      queues work, takes micro-batches, gives the outcomes to a `CompletionSink`
work        work items, packs, the micro-batch
forward     one forward of single rows: network, tracking, then the arena
chunked     requests with many rows
arena       states in their slots, and the layout of a state
accelerator the same on a CUDA device
network     raw x to raw y: scaling, features, the cell, the head
features    calendar and lagged inputs
imputation  rows with missing values
cells       LSTM, GRU, RNN
runtimes    what computes single rows: ONNX Runtime or torch
graph       a model's step as an ONNX graph
linear      W v + b in float32, bfloat16, int8
forecast/   rollouts, and the quantiles of forecasts
tracking/   scores, interval widths and drift tests of a session's forecasts
"""

from stepstate.engine.accelerator import check_accelerator
from stepstate.engine.arena import Layout
from stepstate.engine.cells import TRACE_NAMES
from stepstate.engine.engine import Engine, EngineSettings, Observer, use_one_thread
from stepstate.engine.forecast.rollout import ForecastOrigins, HorizonForecast, Method, Plan
from stepstate.engine.linear import Precision, has_instructions
from stepstate.engine.network import QuantizationError, measure_loss
from stepstate.engine.runtimes import Runtime, check_runtime
from stepstate.engine.tracking.scores import HorizonAccuracy, ScoreSummary, ScoreTotals
from stepstate.engine.tracking.tracker import DriftStatus, ForecastQuality
from stepstate.engine.work import CompletionSink, Floats, Layers, PackedWork, RowColumns, WorkItem

__all__ = [
    "TRACE_NAMES",
    "CompletionSink",
    "DriftStatus",
    "Engine",
    "EngineSettings",
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
    "RowColumns",
    "Runtime",
    "ScoreSummary",
    "ScoreTotals",
    "WorkItem",
    "check_accelerator",
    "check_runtime",
    "has_instructions",
    "measure_loss",
    "use_one_thread",
]
