"""Whether a snapshot can be a session's of a model here: the one check of what comes from outside.

`format` has checked that its parts are whole, and what holds for every model. What is here is what
a server keeps to whenever it writes a snapshot. So it is asked of each snapshot, of an import as
of a stored session: nothing that a server wrote is refused.

D inputs, O outputs, N past rows in a state.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np

from stepstate.engine import TRACE_NAMES, Layers, Layout
from stepstate.errors import SnapshotCorrupt
from stepstate.models import MAX_LEVEL, MIN_LEVEL, Manifest
from stepstate.sessions.replay import SNAPSHOT_BYTES, CachedReply
from stepstate.sessions.scheduler import StepScheduler
from stepstate.sessions.snapshots.format import Snapshot, extended
from stepstate.stores import SessionRecord

MAX_IMPORTED_T = 2**52
"""A session that comes from outside has as many rows to go until t can't be counted any more."""


def adapt(snapshot: Snapshot, scheduler: StepScheduler) -> Snapshot | None:
    """A snapshot whose state has the layout of a model; None if it is of another model.

    Raises:
        SnapshotCorrupt: no session can have what is in it.
    """
    engine, manifest = scheduler.engine, scheduler.model.manifest
    layout, state = engine.layout, engine.upgraded(snapshot.state)
    if snapshot.window.ring.shape[1] != manifest.input_width + manifest.output_width:
        return None
    if len(state) not in (layout.cell, layout.width):
        return None
    if not np.isfinite(state[: layout.cell]).all():
        raise SnapshotCorrupt("its state is not finite")
    _check_record(snapshot.record, manifest)
    _check_window(snapshot, manifest)
    snapshot = replace(snapshot, state=state)
    if len(state) < layout.width:  # of version 1
        blank = engine.blank(snapshot.record.interval_level)
        snapshot = extended(snapshot, layout, blank)
    _check_past_rows(snapshot, layout)
    if not engine.is_valid(snapshot.state, snapshot.t):
        raise SnapshotCorrupt("what it tracks of forecasts can't be a session's")
    return snapshot


def check_import(snapshot: Snapshot) -> None:
    """Refuses a snapshot that can't be the beginning of a session.

    Raises:
        SnapshotCorrupt.
    """
    if snapshot.t >= MAX_IMPORTED_T:
        raise SnapshotCorrupt(f"it has t={snapshot.t}, more rows than anybody applies")


def _check_record(record: SessionRecord, manifest: Manifest) -> None:
    level = record.interval_level
    if manifest.needs_time and record.start_time is None:
        raise SnapshotCorrupt("it has no start_time, which its model needs")
    if level is not None and (manifest.tracking is None or not MIN_LEVEL <= level <= MAX_LEVEL):
        raise SnapshotCorrupt(f"its interval_level is {level:g}, which its model does not take")


def _check_past_rows(snapshot: Snapshot, layout: Layout) -> None:
    rows = layout.rings(snapshot.state[None])[0]
    if not np.isnan(rows[snapshot.t :]).all():
        raise SnapshotCorrupt(f"it has past rows that t={snapshot.t} does not reach")


def _check_window(snapshot: Snapshot, manifest: Manifest) -> None:
    ring, replies = snapshot.window.ring, snapshot.window.replies
    if np.isinf(ring).any() or np.isnan(ring[:, manifest.input_width :]).any():
        raise SnapshotCorrupt("the rows that it remembers are not finite")
    if sum(reply.nbytes for reply in replies) > SNAPSHOT_BYTES:
        raise SnapshotCorrupt(f"it remembers replies of more than {SNAPSHOT_BYTES} bytes")
    ends = [0, *(reply.t + reply.rows for reply in replies), snapshot.t]
    if any(before > after for before, after in pairwise(ends)):
        raise SnapshotCorrupt("it remembers replies to rows that it can't have applied")
    for reply in replies:
        if not _is_reply(reply, manifest):
            raise SnapshotCorrupt(f"the reply that it remembers for t={reply.t} is not its model's")


def _is_reply(reply: CachedReply, manifest: Manifest) -> bool:
    """Whether a model can have given a reply: y [T, O], and with it each layer's trace [T, H]."""
    given, rest = divmod(len(reply.y), 4 * manifest.output_width)
    if rest or given not in (1, reply.rows) or not reply.rows:
        return False
    if not np.isfinite(np.frombuffer(reply.y, "<f4")).all():
        return False
    return reply.layers is None or _is_trace(reply.layers, given, manifest)


def _is_trace(layers: Layers, rows: int, manifest: Manifest) -> bool:
    cell = manifest.cell
    shapes = {(rows, cell.hidden_size), (rows, cell.output_size)}
    return len(layers) == cell.num_layers and all(
        layer.keys() == TRACE_NAMES[cell.kind] and {part.shape for part in layer.values()} <= shapes
        for layer in layers
    )
