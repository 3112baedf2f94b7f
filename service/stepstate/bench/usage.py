"""What a process uses, as Linux tells in /proc."""

from __future__ import annotations

import os
from pathlib import Path

from stepstate.bench.errors import BenchError

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")


def check_proc() -> None:
    """Refuses a system without it.

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
