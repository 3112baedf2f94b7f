"""From raw x to raw y: scaling, calendar and lagged inputs, the cell, the linear head.

B rows of different sessions, T rows in a row, D inputs, O outputs, N past rows,
Rc the width of the cell's state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stepstate.engine.cells import Trace, build_cell
from stepstate.engine.features import Calendar, LaggedInputs, TimeIndex, fill_unknown
from stepstate.engine.linear import Precision
from stepstate.engine.work import Floats
from stepstate.models import Manifest, Model, Timeline, build_timeline

_LOSS_SEQUENCES, _LOSS_ROWS, _LOSS_SEED = 8, 400, 1


@dataclass(frozen=True, slots=True)
class RowHistory:
    """The rows before a step: past rows [B, N, D], raw, the oldest first, and their t [B]."""

    rows: Tensor
    at: Tensor


@dataclass(frozen=True, slots=True)
class Scaling:
    """How the network sees raw x [B, D]: (x - level) / scale."""

    levels: Floats
    """[1, D]; of a model that depends on time, those of one time."""
    inverse_scale: Floats
    """[D]."""
    identity: bool
    """Every level is 0 and every scale 1, always."""
    largest: float
    """A row with a larger value, scaled, is not applied."""


@dataclass(frozen=True, slots=True)
class SideInputs:
    """What a step takes beside rows and states; None: the model has none."""

    levels: Tensor | None
    """That are subtracted from x [B, D], raw units."""
    bases: Tensor | None
    """That are added to y [B, O], raw units."""
    columns: Tensor | None
    """Inputs of the cell after those of x: calendar, then lagged inputs."""
    features: Tensor | None
    """Lagged inputs of the head."""


class Network:
    """A model as a pure function: (x, phase, state, past rows) -> (y, state').

    Methods that take a `past` need it where `lagged` is true; else it may be None.

    Args:
        model: the verified model.
        timeline: what depends on the time of its rows.
        precision: what the weights are kept as.
        device: None: the host. On another device only `step` is supported, and no lagged inputs;
            no branch there depends on a computed value, so that a CUDA graph can be captured.
    """

    def __init__(
        self,
        model: Model,
        timeline: Timeline,
        precision: Precision = Precision.FLOAT32,
        device: torch.device | None = None,
    ) -> None:
        self._made_of = model, timeline, precision
        manifest = model.manifest
        self._branches = device is None
        place = torch.device("cpu") if device is None else device
        tensors = {name: torch.from_numpy(array).to(place) for name, array in model.tensors.items()}
        prefix = "cell."
        cell = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        self._cell = build_cell(manifest.cell, manifest.network_width, cell, precision)
        self._calendar = Calendar(timeline, place)
        self.timed = manifest.needs_time
        """Whether it depends on time."""
        self.has_quantiles = any(output.quantiles for output in manifest.outputs)
        """Whether y has quantiles, which have to be in order."""
        self._has_calendar = bool(manifest.calendar)
        any_time = self._calendar.place(torch.zeros(1, dtype=torch.int64, device=place))
        self._levels = self._calendar.levels(any_time)  # where it is not timed
        self._inverse_scale = 1 / torch.tensor([i.scale for i in manifest.inputs], device=place)
        self._plain = not self.timed and all(i.scale == 1 and i.mean == 0 for i in manifest.inputs)
        # Beyond it W x may overflow in one order of additions and not in another, so that whether a
        # row can be applied would depend on its batch. Such rows become NaN, and are refused.
        weights = np.abs(model.tensors["cell.weight_ih_l0"]).sum(axis=1, dtype=np.float64)
        self._largest = 1e38 / max(1.0, float(weights.max()))
        self._into_cell = LaggedInputs(manifest, "cell")
        self._into_head = LaggedInputs(manifest, "head")
        self.lagged = bool(self._into_cell or self._into_head)
        """Whether it has lagged inputs."""
        self._from_first = manifest.fallback == "first"
        constant = None if self.timed else self._calendar.bases(any_time)[0]
        self._head = _Head(manifest, tensors, constant, branches=self._branches)

    def on(self, device: torch.device) -> Network:
        """The same model on a device."""
        return Network(*self._made_of, device)

    @property
    def state_width(self) -> int:
        """Rc."""
        return self._cell.state_width

    @property
    def scaling(self) -> Scaling:
        """How it sees raw x; on the host."""
        levels, inverse_scale = self._levels.numpy(), self._inverse_scale.numpy()
        return Scaling(levels, inverse_scale, self._plain, self._largest)

    @property
    def linear_head(self) -> tuple[Floats, Floats]:
        """The head's weight [O, P + n] and bias [O], with y's scaling; on the host."""
        return self._head.weight.t().numpy(), self._head.bias.numpy()

    def step(
        self,
        x: Tensor,
        phase: Tensor,
        state: Tensor,
        past: RowHistory | None = None,
        trace: Trace | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Applies one raw row to each of B states.

        Args:
            x: [B, D], raw units.
            phase: [B], the steps of the rows in the model's timeline.
            state: [B, Rc].
            past: the rows before.
            trace: if given, filled with what every layer computed.

        Returns:
            y [B, O] in raw units, and the new states [B, Rc].
        """
        place = self.place(phase)
        seen = self.scaled(x, place)
        window = None
        if past is not None and self.lagged:
            window = self.window(past, phase, seen[:, None])
        return self.step_seen(seen, place, state, window, trace)

    def step_seen(
        self,
        seen: Tensor,
        place: TimeIndex | None,
        state: Tensor,
        window: Tensor | None,
        trace: Trace | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`step` of rows that are `scaled` already [B, D].

        Args:
            seen: the rows as the network sees them [B, D].
            place: their places in time.
            state: [B, Rc].
            window: [B, N + 1, D], ends with the rows; None: the model has no lagged inputs.
            trace: as in `step`.
        """
        inputs = self._with_calendar(seen, place)
        features = None
        if window is not None:
            inputs, features = self._with_lags(inputs[:, None], window)
            inputs, features = inputs[:, 0], None if features is None else features[:, 0]
        h, state = self._cell.step(inputs, state, trace)
        return self._outputs(h, place, features), state

    def sequence(
        self, x: Tensor, phase: Tensor, state: Tensor, past: RowHistory | None = None
    ) -> tuple[Tensor, Tensor]:
        """Applies T raw rows to each of B states.

        Args:
            x: [B, T, D], raw units.
            phase: [B, T].
            state: [B, Rc].
            past: the rows before.

        Returns:
            y [B, T, O] in raw units, and the new states [B, Rc].
        """
        batch, rows, width = x.shape
        place = self.place(phase.flatten())
        seen = self.scaled(x.reshape(batch * rows, width), place).view(x.shape)
        window = None
        if past is not None and self.lagged:
            window = self.window(past, phase[:, 0], seen)
        return self.sequence_seen(seen, place, state, window)

    def sequence_seen(
        self, seen: Tensor, place: TimeIndex | None, state: Tensor, window: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`sequence` of rows that are `scaled` already [B, T, D], at places [B T].

        A window [B, N + T, D] ends with the rows; None: the model has no lagged inputs.
        """
        batch, rows, width = seen.shape
        inputs = self._with_calendar(seen.reshape(batch * rows, width), place)
        inputs, features = inputs.view(batch, rows, -1), None
        if window is not None:
            inputs, features = self._with_lags(inputs, window)
        h, state = self._cell.sequence(inputs, state)
        if features is not None:
            features = features.reshape(batch * rows, -1)
        y = self._outputs(h.reshape(batch * rows, -1), place, features)
        return y.view(batch, rows, -1), state

    def side_inputs(self, x: Tensor, phase: Tensor, past: RowHistory | None) -> SideInputs:
        """What `step` takes of the time of rows x [B, D] and of the rows before them."""
        place = self.place(phase)
        lags = features = None
        if past is not None and self.lagged:
            window = self.window(past, phase, self.scaled(x, place)[:, None])
            lags = self._into_cell.of(window, 1)[:, 0] if self._into_cell else None
            features = self._into_head.of(window, 1)[:, 0] if self._into_head else None
        if place is None:
            return SideInputs(None, None, lags, features)
        calendar, columns = self._calendar, lags
        if self._has_calendar:
            columns = calendar.inputs(place)
            columns = columns if lags is None else torch.cat((columns, lags), dim=1)
        return SideInputs(calendar.levels(place), calendar.bases(place), columns, features)

    def order_quantiles(self, y: Floats) -> None:
        """Sorts the quantiles of each horizon in y [B, O], in place."""
        self._head.order_quantiles(torch.from_numpy(y))

    def read(self, phase: Tensor, state: Tensor, past: RowHistory | None = None) -> Tensor:
        """The outputs [B, O] of the last row of B states, computed again from the state.

        Args:
            phase: [B], the steps of the rows to come.
            state: [B, Rc].
            past: the rows before.
        """
        features = None
        if past is not None and self._into_head:
            features = self._into_head.of(self.window(past, phase), 1)[:, 0]
        return self._outputs(state[:, self._cell.output], self.place(phase - 1), features)

    def place(self, phase: Tensor) -> TimeIndex | None:
        """The places in time of rows at these steps; None: nothing in the model depends on time."""
        return self._calendar.place(phase) if self.timed else None

    def _outputs(self, h: Tensor, place: TimeIndex | None, features: Tensor | None) -> Tensor:
        """y [B, O] of the top layer's h [B, P] and the head's lagged inputs [B, n]."""
        if features is not None:
            h = torch.cat((h, features), dim=1)
        return self._head(h, None if place is None else self._calendar.bases(place))

    def _with_calendar(self, seen: Tensor, place: TimeIndex | None) -> Tensor:
        if place is None:
            return seen
        return torch.cat((seen, self._calendar.inputs(place)), dim=1)

    def _with_lags(self, inputs: Tensor, window: Tensor) -> tuple[Tensor, Tensor | None]:
        """The cell's inputs [B, T, F] and the head's features [B, T, n]."""
        rows = inputs.shape[1]
        if self._into_cell:
            inputs = torch.cat((inputs, self._into_cell.of(window, rows)), dim=2)
        return inputs, self._into_head.of(window, rows) if self._into_head else None

    def window(self, past: RowHistory, phase: Tensor, seen: Tensor | None = None) -> Tensor:
        """Past rows and the rows being applied [B, N + T, D], scaled, with gaps filled.

        Args:
            past: the rows before.
            phase: [B], of the row after them.
            seen: the rows being applied [B, T, D], scaled; None: T is 0.
        """
        window = self._seen_past(past, phase)
        if seen is not None:
            window = torch.cat((window, seen), dim=1)
        first = past.rows.shape[1] - past.at if self._from_first else None
        return fill_unknown(window, first)

    def _seen_past(self, past: RowHistory, phase: Tensor) -> Tensor:
        batch, length, width = past.rows.shape
        phases = phase[:, None] + torch.arange(-length, 0)
        seen = self._level_free(
            past.rows.reshape(batch * length, width), self.place(phases.flatten())
        )
        return seen.view(batch, length, width)

    def scaled(self, x: Tensor, place: TimeIndex | None) -> Tensor:
        """Scales raw rows [B, D]; NaN where they are too large to be applied."""
        x = self._level_free(x, place)
        if not self._branches or x.abs().max().item() > self._largest:
            x = x.masked_fill(x.abs() > self._largest, math.nan)
        return x

    def _level_free(self, x: Tensor, place: TimeIndex | None) -> Tensor:
        if self._plain:
            return x
        return (x - self.levels(place)) * self._inverse_scale

    def levels(self, place: TimeIndex | None) -> Tensor:
        """The levels that are subtracted from x: [B or 1, D], raw; also used where x is unknown."""
        return self._levels if place is None else self._calendar.levels(place)


class _Head:
    """The linear head, with y's scaling folded in, and the quantiles of y in order.

    Args:
        manifest: of the model.
        tensors: its weights, on one device.
        base: the level [O] of y where it is constant; None: it is given with each call.
        branches: whether a branch may depend on a computed value.
    """

    def __init__(
        self, manifest: Manifest, tensors: dict[str, Tensor], base: Tensor | None, *, branches: bool
    ) -> None:
        bias, weight = tensors["head.bias"], tensors["head.weight"]
        if "head.lags" in tensors:  # h and the lagged inputs side by side
            weight = torch.cat((weight, tensors["head.lags"]), dim=1)
        scale = _output_scale(manifest).to(bias.device)
        self.weight = (weight * scale[:, None]).t().contiguous()  # [P + n, O]
        self.bias = bias * scale if base is None else bias * scale + base
        self._branches = branches
        self._quantiles = list(_quantiles(manifest))
        self._within = np.zeros(manifest.output_width - 1, np.bool_)
        """Where the next column of y is another quantile of the same horizon."""
        for columns, levels in self._quantiles:
            inner = np.arange(columns.stop - columns.start - 1) % levels != levels - 1
            self._within[columns.start : columns.stop - 1] = inner

    def __call__(self, h: Tensor, base: Tensor | None) -> Tensor:
        """y [B, O] of h and features [B, P + n], with the levels `base` [B, O]."""
        y = torch.addmm(self.bias, h, self.weight)
        if base is not None:
            y += base
        self.order_quantiles(y)
        return y

    def order_quantiles(self, y: Tensor) -> None:
        """Sorts the quantiles of each horizon in y [B, O]; those of a network may cross.

        Sorting never raises their loss (Chernozhukov, Fernandez-Val and Galichon, "Quantile and
        probability curves without crossing", 2010).
        """
        if not self._quantiles:
            return
        if self._branches:
            values = y.numpy()  # its comparison of few values takes half of torch's time
            falls = values[:, 1:] < values[:, :-1]
            falls &= self._within
            if not falls.any():
                return
        for columns, levels in self._quantiles:
            part = y[:, columns].unflatten(1, (-1, levels))
            part.copy_(part.sort(dim=2).values)


def _output_scale(manifest: Manifest) -> Tensor:
    scales = [output.scale for output in manifest.outputs for _ in range(output.width)]
    return torch.tensor(scales, dtype=torch.float32)


def _quantiles(manifest: Manifest) -> Iterator[tuple[slice, int]]:
    """The columns of y of each output that has quantiles, and how many levels it has."""
    for output, first, _ in manifest.placed_outputs():
        if output.quantiles:
            yield slice(first, first + output.width), len(output.quantiles)


@dataclass(frozen=True, slots=True)
class QuantizationError:
    """|dy| against float32, in units of the outputs' `scale` in the manifest."""

    largest: float
    mean: float


def measure_loss(model: Model, precision: Precision) -> QuantizationError:
    """Steps 8 sequences of 400 rows in float32 and in a precision, and compares the outputs.

    The rows are the same each time: the model's level and normal noise, from zero state.
    """
    networks = [
        Network(model, build_timeline(model), each) for each in (Precision.FLOAT32, precision)
    ]
    scales = [column.scale for column in model.manifest.inputs]
    shape = (_LOSS_ROWS, _LOSS_SEQUENCES, len(scales))
    noise = np.random.default_rng(_LOSS_SEED).normal(size=shape) * scales
    levels = networks[0].levels(networks[0].place(torch.arange(_LOSS_ROWS))).numpy()
    x = torch.from_numpy((levels[:, None] + noise).astype(np.float32))
    y, rounded = (_stepped(network, x, model.manifest.history_rows) for network in networks)
    difference = ((rounded - y) / _output_scale(model.manifest).abs()).abs()
    return QuantizationError(float(difference.max()), float(difference.double().mean()))


def _stepped(network: Network, x: Tensor, history: int) -> Tensor:
    """y [T, B, O] of rows x [T, B, D] in B sessions."""
    _, batch, width = x.shape
    rows = torch.cat((torch.full((history, batch, width), math.nan), x)).transpose(0, 1)
    state = torch.zeros(batch, network.state_width)
    found = []
    with torch.inference_mode():
        for t, row in enumerate(x):
            at = torch.full((batch,), t)
            past = RowHistory(rows[:, t : t + history], at)
            y, state = network.step(row, at, state, past)
            found.append(y)
    return torch.stack(found)
