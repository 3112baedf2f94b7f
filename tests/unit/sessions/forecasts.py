"""Rows of a model that forecasts, and what is asked of its sessions."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import numpy as np

from stepstate.sessions import ForecastRequest
from stepstate.sessions.snapshots.format import decode, encode

CLOSE = 2e-5  # of values around 5

BOUNDS = "stepstate.sessions.forecasting.limits"

PATH = np.zeros(2, np.float32)


async def stepped(rig, session, x):
    return np.concatenate([await rig.y(session, row) for row in x])


async def told(rig, session_id="a", horizon=0, quantiles=(), scenarios=()):
    wish = ForecastRequest(horizon, tuple(quantiles), tuple(scenarios))
    found = (await rig.sessions.forecast([session_id], wish))[0]
    if isinstance(found, Exception):
        raise found
    return found


def as_version_1(data: bytes, cell: int) -> bytes:
    """A snapshot as the first version wrote it: with the cell's state only."""
    snapshot = decode(data)
    old = bytearray(encode(replace(snapshot, state=snapshot.state[:cell])))
    old[8:10] = struct.pack("<H", 1)
    return bytes(old[:-4]) + struct.pack("<I", zlib.crc32(bytes(old[:-4])))
