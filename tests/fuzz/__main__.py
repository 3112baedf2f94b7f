"""Fuzzes the HTTP/2 of the gRPC server with atheris (libFuzzer): `python -m tests.fuzz SECONDS`.

What fails is written to build/fuzz/crash-…; `python -m tests.fuzz 0 build/fuzz/crash-…` repeats it.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["stepstate.h2grpc"]):
    from tests.fuzz.program import Program

FOLDER = Path("build/fuzz")
SEEDS = 50
SEED_BYTES = 3000


def main(seconds: str, *more: str) -> None:
    """Ends with an error at the first input that fails.

    Args:
        seconds: how long; 0: for ever, or until the inputs in `more` are done.
        more: libFuzzer's options and inputs.
    """
    seeds = FOLDER / "seeds"
    seeds.mkdir(parents=True, exist_ok=True)
    for seed in range(SEEDS):  # long programs: from nothing, it takes hours to come to them
        (seeds / str(seed)).write_bytes(random.Random(seed).randbytes(SEED_BYTES))
    options = [f"-max_total_time={seconds}", "-max_len=4096", f"-artifact_prefix={FOLDER}/"]
    atheris.Setup(
        [sys.argv[0], *options, *(more or [str(seeds)])], lambda data: Program(data).run()
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
