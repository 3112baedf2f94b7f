"""The benchmarks: what a step costs, what open sessions cost, and how fast a server comes back.

`python -m benchmarks --help` lists them. The folder is no part of the package or its wheel: run it
from the root of the repository, with the development tools installed.
"""

from __future__ import annotations


class BenchError(Exception):
    """The benchmark can't be run, or what it measured would mean nothing."""
