"""How values are printed."""

from __future__ import annotations

import math
from typing import Any


def without_nan(value: Any) -> Any:
    """A value for JSON, which knows no NaN: null stands for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return value


def short(value: float) -> str:
    """A value of float32, in as many digits as it has; nothing for NaN."""
    return "" if math.isnan(value) else f"{value:.7g}"
