"""What a server uses and counts: its process in Linux's /proc, and its metrics."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from benchmarks import BenchError

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")
PAGE_SECONDS = 0.2
"""Scrapes of a server within half of it get the same page."""


def check_proc() -> None:
    """Refuses a system without /proc.

    Raises:
        BenchError.
    """
    if not Path("/proc/self/stat").exists():
        raise BenchError("a server's CPU time is read from /proc, which is missing: use Linux")


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads: fields 14 and 15 of proc(5)'s stat.

    The name of the process, field 2, is in brackets and may hold anything.
    """
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = after_name[11:13]
    return (int(user) + int(system)) / _TICKS_PER_SECOND


def resident_bytes(pid: int) -> int:
    """Memory in use: field 2 of proc(5)'s statm."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES


def counters(url: str) -> Counter[str]:
    """Every counter of a server, summed over its labels, on a page that is made now."""
    time.sleep(PAGE_SECONDS)
    found: Counter[str] = Counter()
    for name, _, value in _samples(url):
        if name.endswith("_total"):
            found[name] += int(value)
    return found


def series(url: str, name: str, **labels: str) -> float:
    """The sum of the series of a name that have these labels."""
    return sum(
        value
        for found, held, value in _samples(url)
        if found == name and labels.items() <= held.items()
    )


def _samples(url: str) -> list[tuple[str, dict[str, str], float]]:
    with urlopen(url) as answer:  # noqa: S310 - our own server
        families = text_string_to_metric_families(answer.read().decode())
    return [
        (sample.name, sample.labels, sample.value)
        for family in families
        for sample in family.samples
    ]
