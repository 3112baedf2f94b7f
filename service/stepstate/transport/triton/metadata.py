"""A model in Triton's words: metadata, configuration and statistics."""

from __future__ import annotations

from stepstate import __version__
from stepstate.metrics import Histogram, ModelMetrics
from stepstate.models import Model
from stepstate.transport.triton.messages import config_pb, pb
from stepstate.transport.triton.tensors import INPUT, OUTPUT

NAME = "stepstate"
EXTENSIONS = ("sequence", "sequence(string_id)", "model_configuration", "statistics")
_NANO = 1e9


def server_metadata() -> pb.ServerMetadataResponse:
    """The server, and which extensions of the protocol it has."""
    return pb.ServerMetadataResponse(name=NAME, version=__version__, extensions=EXTENSIONS)


def metadata(model: Model, versions: list[str]) -> pb.ModelMetadataResponse:
    """Shapes begin with a dimension for rows: a request has one, or T of them in order."""
    manifest = model.manifest
    response = pb.ModelMetadataResponse(name=manifest.name, versions=versions, platform=NAME)
    response.inputs.add(name=INPUT, datatype="FP32", shape=(-1, manifest.input_width))
    response.outputs.add(name=OUTPUT, datatype="FP32", shape=(-1, manifest.output_width))
    return response


def config(model: Model, idle_timeout_seconds: float) -> pb.ModelConfigResponse:
    """The configuration that Triton would have for it: a sequence model."""
    manifest = model.manifest
    found = config_pb.ModelConfig(name=manifest.name, platform=NAME, backend=NAME, max_batch_size=1)
    found.version_policy.specific.versions.extend(_number(manifest.version))
    found.input.add(name=INPUT, data_type=config_pb.TYPE_FP32, dims=(manifest.input_width,))
    found.output.add(name=OUTPUT, data_type=config_pb.TYPE_FP32, dims=(manifest.output_width,))
    found.sequence_batching.max_sequence_idle_microseconds = round(idle_timeout_seconds * 1e6)
    found.model_transaction_policy.decoupled = False
    return pb.ModelConfigResponse(config=found)


def _number(version: str) -> list[int]:
    return [int(version)] if version.isdecimal() and len(version) < 19 else []


def statistics(model: Model, metrics: ModelMetrics) -> pb.ModelStatistics:
    """Counts and times since the start: of steps of one row, through every door.

    `compute_infer` is the time of the forward that a step shared, with the gather before and the
    scatter behind it: no time of their own is told as `compute_input` and `compute_output`.
    """
    key = model.manifest
    told = pb.ModelStatistics(
        name=key.name,
        version=key.version,
        last_inference=round(metrics.last_applied_at * 1000),
        inference_count=metrics.steps["applied"],
        execution_count=metrics.rows.count,
    )
    queue, compute, total = (metrics.seconds[stage] for stage in ("queue", "compute", "total"))
    stats = told.inference_stats
    _put(stats.success, total)
    _put(stats.queue, queue)
    _put(stats.compute_infer, compute)
    stats.fail.count = metrics.steps["refused"] + metrics.steps["failed"]
    stats.compute_input.count = stats.compute_output.count = compute.count
    return told


def _put(part: pb.StatisticDuration, of: Histogram) -> None:
    part.count, part.ns = of.count, round(of.total * _NANO)
