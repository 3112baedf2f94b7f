"""The tracked part as snapshots of version 2 have it, and what of it goes on.

[ level | for each target: widths, naive error, Page-Hinkley test, alarms |
  for each of its horizons: offset, scale, counts and means, pending forecasts ]
"""

from __future__ import annotations

from stepstate.engine.tracking.drift import DriftTest, PageHinkley
from stepstate.engine.tracking.scores import LAST, LIFE, OFFSET, SCALE, SCALE_N, SCORES, USUAL_KNOWN
from stepstate.engine.work import Floats

HEAD = 1
NAIVE, TARGET, HORIZON = 3, 10, 8
_LOW_WIDTH, _HIGH_WIDTH, _NAIVE_N = range(3)
_ALARMS, _SINCE = 8, 9
_OFFSET, _SCALE, _SCORED, _ERROR, _SCALED_N, _SCALED, _COVERED_N, _COVERED = range(HORIZON)


def width(targets: int, horizons: list[int]) -> int:
    """How long it is, with so many targets, and these horizons of all of them."""
    return HEAD + TARGET * targets + sum(HORIZON + 3 * horizon for horizon in horizons)


def take_target(part: Floats, test: DriftTest, old: Floats) -> None:
    """Fills a target's widths, alarms and test [W] in; old ones from `old` on.

    Numbers of another test than Page-Hinkley's were never there: it begins to learn.
    """
    part[:2] = old[[_LOW_WIDTH, _HIGH_WIDTH]]
    part[2:4] = old[[_ALARMS, _SINCE]]
    if isinstance(test, PageHinkley):
        part[4 : 4 + test.width] = old[_NAIVE_N:_ALARMS]


def take_horizon(part: Floats, old: Floats, naive: float) -> None:
    """Fills the scores and pending forecasts of a horizon in.

    Its means become those of a whole life: the last rows were not kept apart.
    """
    scored, scaled, covered = old[[_SCORED, _SCALED_N, _COVERED_N]]
    part[[OFFSET, SCALE]] = old[[_OFFSET, _SCALE]]
    part[SCALE_N] = min(scored, USUAL_KNOWN)
    part[LIFE:LAST] = (
        *(scored, old[_ERROR]),
        *(scaled, old[_SCALED] * naive, naive),
        *(covered, old[_COVERED]),
    )
    part[SCORES : SCORES + len(old) - HORIZON] = old[HORIZON:]
