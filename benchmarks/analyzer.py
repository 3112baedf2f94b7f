"""NVIDIA's perf_analyzer as a client: sequences of the bench model through the API for Triton."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import BenchError
from benchmarks.models import NAME
from benchmarks.procstat import counters, cpu_seconds
from benchmarks.results import Measurement
from benchmarks.servers import ROOT, ServerProcess

START = ROOT / "build" / "perf_analyzer" / "start"
"""How it is started; `.ci/perf_analyzer` puts it there."""
LIMIT_SECONDS = 300.0
_SEQUENCE_ROWS = 200
_STEPS = "stepstate_steps_total"


def measure_sequences(server: ServerProcess, sequences: int, seconds: float) -> Measurement:
    """Streams sequences in closed loop; the rate is the mean of three windows, as it reports it.

    Args:
        server: with the bench model.
        sequences: that are stepped at once.
        seconds: of a window.

    Raises:
        BenchError: perf_analyzer failed.
    """
    steps, used = counters(server.metrics_url)[_STEPS], cpu_seconds(server.pid)
    row = _run(server.address, sequences, seconds)
    steps, used = counters(server.metrics_url)[_STEPS] - steps, cpu_seconds(server.pid) - used
    return Measurement(
        steps=steps,
        steps_per_second=float(row["Inferences/Second"]),
        latency_ms={name: float(row[f"p{name} latency"]) / 1e3 for name in ("50", "90", "99")},
        cpu_us_per_step=used / steps * 1e6,
    )


def _run(address: str, sequences: int, seconds: float) -> dict[str, str]:
    """The line that it writes about its windows."""
    with TemporaryDirectory() as folder:
        table = Path(folder) / "table.csv"
        command = [
            *(str(START), "-m", NAME, "-u", address, "-i", "grpc", "--streaming", "--async"),
            *("--sequence-length", str(_SEQUENCE_ROWS), "--concurrency-range", str(sequences)),
            # It ends after three windows in a row, content with any spread: the rounds show it.
            *("-p", str(round(1e3 * seconds)), "-r", "10", "-s", "1000", "-f", str(table)),
        ]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=LIMIT_SECONDS
        )
        if done.returncode or not table.exists():
            raise BenchError(f"perf_analyzer failed:\n{done.stdout}{done.stderr}")
        (row,) = csv.DictReader(table.read_text().splitlines())
        return row
