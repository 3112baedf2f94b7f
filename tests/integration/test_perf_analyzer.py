"""Triton's own C++ load generator, unmodified, against a real server."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path

import pytest

from benchmarks.models import write_bench_model
from tests.processes import server_process

pytestmark = pytest.mark.long  # a load generator at work

START = Path(__file__).parents[2] / "build" / "perf_analyzer" / "start"


@pytest.fixture
def analyzer() -> str:
    """How to start it."""
    if not START.exists():
        pytest.skip(f"NO perf_analyzer: {START} is missing; .ci/perf_analyzer puts it there")
    return str(START)


@pytest.mark.parametrize("protocol", [("--streaming", "--async"), ()], ids=["stream", "unary"])
@pytest.mark.parametrize("sessions", [1, 16, 64])
def test_streams_sequences_without_an_error(
    analyzer: str, tmp_path: Path, sessions: int, protocol: tuple[str, ...]
):
    write_bench_model(tmp_path / "models")
    table = tmp_path / "table.csv"
    with server_process("--models", str(tmp_path / "models")) as server:
        found = subprocess.run(
            [
                *(analyzer, "-m", "bench", "-u", server.address, "-i", "grpc", *protocol),
                *("--sequence-length", "50", "--concurrency-range", str(sessions)),
                # Short, and content with any spread: that it ends well is what is tested.
                *("-p", "300", "-r", "10", "-s", "1000", "-f", str(table)),
            ],
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )
    told = found.stdout + found.stderr
    assert found.returncode == 0, told
    (row,) = csv.DictReader(table.read_text().splitlines())
    assert int(row["Concurrency"]) == sessions
    assert float(row["Inferences/Second"]) > 0
    assert float(row["Server Compute Infer"]) > 0
    assert "error" not in told.lower()


def test_streams_the_shipped_model(analyzer: str, tmp_path: Path, electricity_root: Path):
    with server_process("--models", str(electricity_root)) as server:
        found = subprocess.run(
            [
                *(analyzer, "-m", "electricity", "-u", server.address, "-i", "grpc"),
                *("--streaming", "--async", "--sequence-length", "200"),
                *("--concurrency-range", "64", "-p", "300", "-r", "10", "-s", "1000"),
            ],
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "Throughput" in found.stdout
