"""Target: a connection, on which any frames come in any order; see `program`."""

from __future__ import annotations

import random

from tests.fuzz.program import Program
from tests.fuzz.target import Target

SEEDS = 50
SEED_BYTES = 3000


def run_connection(data: bytes) -> None:
    Program(data).run()


# Long programs: from nothing, it takes hours to come to them.
PROGRAMS = tuple(random.Random(seed).randbytes(SEED_BYTES) for seed in range(SEEDS))
TARGETS = {"connection": Target(run_connection, PROGRAMS)}
