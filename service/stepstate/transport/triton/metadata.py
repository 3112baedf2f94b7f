"""A model in Triton's words: metadata, configuration and statistics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

from tritonclient.grpc import model_config_pb2 as config_pb
from tritonclient.grpc import service_pb2 as pb

from stepstate import __version__
from stepstate.metrics import Histogram, ModelMetrics
from stepstate.models import Catalog, Manifest, Model
from stepstate.transport.triton.tensors import INPUT, OUTPUT

NAME = "stepstate"
EXTENSIONS = ("sequence", "sequence(string_id)", "model_configuration", "statistics")
_NANO = 1e9


def server_metadata() -> pb.ServerMetadataResponse:
    """The server, and the extensions of the protocol that it has."""
    return pb.ServerMetadataResponse(name=NAME, version=__version__, extensions=EXTENSIONS)


class Descriptions:
    """What does not change while a server runs: made once, however often it is asked for.

    Args:
        catalog: the models.
        idle_timeout: the default of a model, in seconds.
    """

    def __init__(self, catalog: Catalog, idle_timeout: Callable[[Manifest], float]) -> None:
        versions: dict[str, list[str]] = defaultdict(list)
        for model in catalog:
            versions[model.manifest.name].append(model.manifest.version)
        self.metadata: Mapping[str, pb.ModelMetadataResponse] = {
            model.key: _metadata(model, versions[model.manifest.name]) for model in catalog
        }
        """By the key of the model."""
        self.configs: Mapping[str, pb.ModelConfigResponse] = {
            model.key: _config(model, idle_timeout(model.manifest)) for model in catalog
        }
        """By the key of the model."""


def index(catalog: Catalog) -> pb.RepositoryIndexResponse:
    """The models and their versions."""
    found = pb.RepositoryIndexResponse()
    for model in catalog:
        found.models.add(name=model.manifest.name, version=model.manifest.version, state="READY")
    return found


def _metadata(model: Model, versions: list[str]) -> pb.ModelMetadataResponse:
    """Shapes begin with a dimension for rows: a request has one, or T of them in order."""
    manifest = model.manifest
    response = pb.ModelMetadataResponse(name=manifest.name, versions=versions, platform=NAME)
    response.inputs.add(name=INPUT, datatype="FP32", shape=(-1, manifest.input_width))
    response.outputs.add(name=OUTPUT, datatype="FP32", shape=(-1, manifest.output_width))
    return response


def _config(model: Model, idle_timeout_seconds: float) -> pb.ModelConfigResponse:
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


def model_statistics(model: Model, metrics: ModelMetrics) -> pb.ModelStatistics:
    """Counts and times since the start, of steps of one row through every API.

    `compute_infer` is the time of the forward that a step shared, with the gather before it and the
    scatter after it. So `compute_input` and `compute_output` have counts, and no time.
    """
    key = model.manifest
    statistics = pb.ModelStatistics(
        name=key.name,
        version=key.version,
        last_inference=round(metrics.last_applied_at * 1000),
        inference_count=metrics.steps["applied"],
        execution_count=metrics.rows.count,
    )
    queue, compute, total = (metrics.seconds[stage] for stage in ("queue", "compute", "total"))
    stats = statistics.inference_stats
    _put(stats.success, total)
    _put(stats.queue, queue)
    _put(stats.compute_infer, compute)
    stats.fail.count = metrics.steps["refused"] + metrics.steps["failed"]
    stats.compute_input.count = stats.compute_output.count = compute.count
    return statistics


def _put(duration: pb.StatisticDuration, seconds: Histogram) -> None:
    duration.count, duration.ns = seconds.count, round(seconds.total * _NANO)
