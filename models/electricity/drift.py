"""When forecasts become worse for good: the Page-Hinkley test, as the server runs it. Numpy only.

Page, "Continuous inspection schemes", Biometrika 41 (1954), in the form of
river's `PageHinkley` for a rising mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from series import STEPS_PER_WEEK, Floats, Rows


@dataclass(frozen=True, slots=True)
class DriftTest:
    """An alarm comes when the errors have risen by more than `threshold` in all."""

    delta: float
    threshold: float
    min_rows: int
    forget: float

    def alarms(self, errors: Floats) -> Rows:
        """The places in errors [T] at which it raises an alarm; then it begins anew."""
        found = []
        count, mean, total, least = 0, 0.0, 0.0, np.inf
        for place, error in enumerate(errors):
            count += 1
            mean += (error - mean) / count
            total = self.forget * total + error - mean - self.delta
            least = min(least, total)
            if count >= self.min_rows and total - least > self.threshold:
                found.append(place)
                count, mean, total, least = 0, 0.0, 0.0, np.inf
        return np.array(found, np.int64)


def scaled_errors(medians: Floats, demand: Floats) -> Floats:
    """Errors [T - 1] of the medians [T] one step ahead, by the mean weekly naive one so far.

    Until there is a week before, nothing is scaled: those rows are NaN.
    """
    errors = np.abs(demand[1:] - medians[:-1])
    weekly = np.abs(demand[STEPS_PER_WEEK:] - demand[:-STEPS_PER_WEEK])
    scale = np.full(len(errors), np.nan)
    scale[STEPS_PER_WEEK - 1 :] = np.cumsum(weekly) / np.arange(1, len(weekly) + 1)
    found: Floats = errors / scale
    return found
