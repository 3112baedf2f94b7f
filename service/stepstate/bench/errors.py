"""What a benchmark can fail with."""

from __future__ import annotations


class BenchError(Exception):
    """The benchmark can't be run, or what it measured would mean nothing."""
