"""Where a benchmark ran."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("stepstate", "torch", "grpcio", "uvloop")


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine and what is installed on it."""

    cpu: str
    cores: int
    load_average: float
    """Over the minute before the benchmark: what else was running."""
    python: str
    packages: dict[str, str]

    def __str__(self) -> str:
        packages = ", ".join(f"{name} {number}" for name, number in self.packages.items())
        return (
            f"{self.cpu}, {self.cores} cores, load average {self.load_average} before; "
            f"Python {self.python}, {packages}"
        )


def this_machine() -> Machine:
    """Describes this machine; call it before the load starts."""
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        load_average=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        packages={name: version(name) for name in _PACKAGES},
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
