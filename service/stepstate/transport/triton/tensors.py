"""Between Triton's tensors and rows: x in; y, parts of it, gates and states out.

T rows, D inputs, O outputs, K horizons of an output, Q quantiles, L layers, H hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from struct import unpack

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from stepstate.errors import InvalidField
from stepstate.models import CellKind, Manifest
from stepstate.sessions import Step

INPUT, OUTPUT = "x", "y"
ONLY_Y: Sequence[str] = (OUTPUT,)
"""The outputs of a request that names none, or just this one."""
QUANTILES = "quantiles"
FP32 = np.dtype("<f4")
_DTYPES: dict[str, np.dtype] = {
    "FP32": FP32,
    "FP64": np.dtype("<f8"),
    "FP16": np.dtype("<f2"),
}
_TYPED = {"FP32": "fp32_contents", "FP64": "fp64_contents"}
_TRACED: Mapping[CellKind, frozenset[str]] = {
    CellKind.LSTM: frozenset("ifgocmh"),
    CellKind.GRU: frozenset("rznh"),
    CellKind.RNN_TANH: frozenset("h"),
    CellKind.RNN_RELU: frozenset("h"),
}

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Names of outputs and their shapes."""


@dataclass(slots=True, eq=False)
class InputTensor:
    """The one tensor of a request, as it came."""

    model: str
    """The name in the request, for errors."""
    dtype: np.dtype
    shape: Sequence[int]
    raw: bool
    """Its values came as bytes; else one by one."""
    data: bytes
    """Its values, little-endian."""


@dataclass(slots=True, eq=False)
class InputRows:
    """x of a request."""

    x: Sequence[float] | np.ndarray
    """Row-major [T, D]."""
    count: int
    """T."""
    finite: bool
    flat: bool
    """Its shape is [D]: the outputs have no dimension for rows either."""


def read_tensor(request: pb.ModelInferRequest) -> InputTensor:
    """The tensor x of a request.

    Raises:
        InvalidField: there is another one, or none.
    """
    inputs, model = request.inputs, request.model_name  # each access to a field makes an object
    if len(inputs) != 1:
        raise InvalidField(
            "inputs", f"expected 1 inputs but got {len(inputs)} inputs for model {model!r}"
        )
    tensor = inputs[0]
    if tensor.name != INPUT:
        raise InvalidField(
            "inputs",
            f"unexpected inference input {tensor.name[:64]!r} for model {model!r}, "
            f"expected {INPUT!r}",
        )
    dtype = _DTYPES.get(tensor.datatype)
    if dtype is None:
        raise InvalidField(
            "inputs",
            f"inference input {INPUT!r} data-type is {tensor.datatype[:64]!r}, but model "
            f"{model!r} expects 'FP32' ('FP64' and 'FP16' are converted)",
        )
    raw, data = _data(request, tensor, dtype)
    return InputTensor(model, dtype, tensor.shape[:], raw, data)


def decode_rows(tensor: InputTensor, manifest: Manifest) -> InputRows:
    """x of a request, as float32.

    Raises:
        InvalidField: it is not whole rows of the model.
    """
    dtype, data = tensor.dtype, tensor.data
    count, flat = _count(tensor.shape, manifest), len(tensor.shape) == 1
    if len(data) != count * manifest.input_width * dtype.itemsize:
        raise _wrong_size(tensor, count * manifest.input_width)
    if count == 1 and dtype is FP32:
        row = unpack(f"<{len(data) // 4}f", data)  # a seventh of what an array takes
        return InputRows(row, 1, math.isfinite(sum(row)), flat)
    values = np.frombuffer(data, dtype)
    if dtype is not FP32:
        with np.errstate(over="ignore"):  # beyond float32 it is infinite, and refused as that
            values = values.astype(np.float32)
    return InputRows(values, count, bool(np.isfinite(values).all()), flat)


def _count(shape: Sequence[int], manifest: Manifest) -> int:
    """T of a shape [D] or [T, D]."""
    width = manifest.input_width
    count = shape[0] if len(shape) == 2 else 1
    if len(shape) not in (1, 2) or shape[-1] != width or count < 1:
        given = ",".join(map(str, shape[:8]))
        raise InvalidField(
            "inputs",
            f"unexpected shape for input {INPUT!r} for model {manifest.name!r}. Expected "
            f"[{width}] or [-1,{width}], got [{given}]",
        )
    return count


def _wrong_size(tensor: InputTensor, count: int) -> InvalidField:
    """Why a tensor is refused whose shape has `count` values, and which has others."""
    size = len(tensor.data)
    if tensor.raw:
        return InvalidField(
            "raw_input_contents",
            f"unexpected total byte size {size} for input {INPUT!r}, expecting "
            f"{count * tensor.dtype.itemsize}",
        )
    return InvalidField(
        "inputs",
        f"unexpected number of values {size // tensor.dtype.itemsize} for input {INPUT!r}, "
        f"expecting {count} (FP16 comes in raw_input_contents only)",
    )


def _data(
    request: pb.ModelInferRequest, tensor: pb.ModelInferRequest.InferInputTensor, dtype: np.dtype
) -> tuple[bool, bytes]:
    """Whether the values of the one tensor came as bytes, and these."""
    if len(tensor.parameters) and "shared_memory_region" in tensor.parameters:
        raise InvalidField("inputs", "shared memory is not supported: send the tensor's contents")
    raw = request.raw_input_contents
    if not raw:
        return False, np.array(_typed(tensor), dtype).tobytes()
    if tensor.HasField("contents"):
        raise InvalidField(
            "inputs",
            "contents field must not be specified when using raw_input_contents for "
            f"{INPUT!r} for model {request.model_name!r}",
        )
    if len(raw) != 1:
        raise InvalidField(
            "raw_input_contents",
            f"unexpected total byte size {sum(map(len, raw))} in {len(raw)} buffers for input "
            f"{INPUT!r}, expecting 1",
        )
    return True, raw[0]


def _typed(tensor: pb.ModelInferRequest.InferInputTensor) -> Sequence[float]:
    name = _TYPED.get(tensor.datatype)
    values: Sequence[float] = () if name is None else getattr(tensor.contents, name)
    others = {field.name for field, _ in tensor.contents.ListFields()} - {name}
    if others:
        raise InvalidField(
            "inputs", f"input {INPUT!r} of {tensor.datatype} has {', '.join(sorted(others))} too"
        )
    return values


def wanted(request: pb.ModelInferRequest) -> Sequence[str]:
    """The names of the outputs that a request wants."""
    outputs = request.outputs
    if not outputs or (len(outputs) == 1 and outputs[0].name == OUTPUT):
        return ONLY_Y
    return tuple(output.name for output in outputs)


def traced(names: Sequence[str], manifest: Manifest) -> bool:
    """Whether some of these outputs are gates or states.

    Raises:
        InvalidField: the model has no output of a name.
    """
    if names is ONLY_Y:
        return False
    gates = _TRACED[manifest.cell.kind] - {output.name for output in manifest.outputs}
    known = {OUTPUT, *(output.name for output in manifest.outputs), *gates}
    if any(output.quantiles for output in manifest.outputs):
        known.add(QUANTILES)
    for name in names:
        if name not in known:
            raise InvalidField(
                "outputs",
                f"unexpected inference output {name[:64]!r} for model {manifest.name!r}; it has "
                f"{', '.join(sorted(known))}",
            )
    return not gates.isdisjoint(names)


def reply_width(names: Sequence[str], manifest: Manifest) -> int:
    """How many values of the named outputs there are for a row."""
    cell = manifest.cell
    widths = dict.fromkeys(_TRACED[cell.kind], cell.num_layers * cell.hidden_size)
    widths["h"] = cell.num_layers * cell.output_size
    for output in reversed(manifest.outputs):
        if output.quantiles:
            widths[QUANTILES] = output.width
    widths |= {output.name: len(output.horizons) for output in manifest.outputs}
    widths[OUTPUT] = manifest.output_width
    return sum(widths[name] for name in names)


def y_shapes(width: int, rows: int, *, flat: bool) -> Shapes:
    """Of y alone, [T, O], or [O] where x is [D]."""
    return ((OUTPUT, (width,) if flat else (rows, width)),)


def outputs_of(step: Step, names: Sequence[str], *, flat: bool) -> tuple[Shapes, Sequence[bytes]]:
    """The named outputs of a step, [T, ...], or [...] where x is [D]: shapes and values."""
    if names is ONLY_Y:
        return y_shapes(len(step.y) // 4 // step.rows, step.rows, flat=flat), (step.y,)
    rows = () if flat else (step.rows,)
    parts = [_part(step, name) for name in names]
    shapes = tuple(
        (name, (*rows, *part.shape[1:])) for name, part in zip(names, parts, strict=True)
    )
    return shapes, [part.tobytes() for part in parts]


def _part(step: Step, name: str) -> np.ndarray:
    """y [T, O], an output [T, K], the first's quantiles [T, K, Q], a gate or state [T, L, H]."""
    manifest = step.session.model.manifest
    y = np.frombuffer(step.y, "<f4").reshape(step.rows, -1)
    if name == OUTPUT:
        return y
    quantiles = []
    for output, first, _ in manifest.placed_outputs():
        part = y[:, first : first + output.width].reshape(step.rows, -1, output.columns)
        if output.name == name:
            return part[:, :, output.median]
        if output.quantiles:
            quantiles.append(part)
    if name == QUANTILES:
        return quantiles[0]
    return np.stack([layer[name] for layer in step.layers or ()], axis=1).astype("<f4", copy=False)
