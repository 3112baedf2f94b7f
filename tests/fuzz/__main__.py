"""Fuzzes all that decodes bytes from outside, with atheris (libFuzzer).

`python -m tests.fuzz SECONDS` fuzzes all targets for so long in all, two at a time, and
`python -m tests.fuzz SECONDS TARGET` one. What fails is written to build/fuzz/TARGET/crash-…;
`python -m tests.fuzz 0 TARGET build/fuzz/TARGET/crash-…` repeats it. What a target has learned is
kept in build/fuzz/TARGET/corpus, and is where its next run begins.
"""

from __future__ import annotations

import importlib
import logging
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import atheris

FOLDER = Path("build/fuzz")
MODULES = {
    "tests.fuzz.connection": ("connection",),
    "tests.fuzz.calls": ("messages", "packed", "triton"),
    "tests.fuzz.credentials": ("bearer", "jwt", "jwks", "token-file", "certificate"),
    "tests.fuzz.files": (
        "snapshot",
        "signature",
        "record",
        "manifest",
        "weights",
        "configuration",
        "snapshot-keys",
    ),
}
NAMES = {name: module for module, names in MODULES.items() for name in names}
INSTRUMENTED = [
    f"stepstate.{package}"
    for package in (
        *("auth", "configuration", "h2grpc", "identity", "models"),
        *("sessions.snapshots", "stores.types", "transport"),
    )
]
"""Packages in which libFuzzer sees which lines an input reaches."""
AT_ONCE = 2
UNIT_SECONDS = 20
"""No input may take longer. One takes a millisecond."""
RSS_MIB = 3_000
"""Nor may all of them together take more memory: torch and the models take most of it."""
_DONE = re.compile(r"^Done (\d+) ", re.MULTILINE)


def fuzz(seconds: str, name: str, inputs: list[str]) -> None:
    """Ends the process, with an error at the first input that fails."""
    with atheris.instrument_imports(include=INSTRUMENTED):
        target = importlib.import_module(NAMES[name]).TARGETS[name]
    folder = FOLDER / name
    corpus, seeds = folder / "corpus", folder / "seeds"
    for one in (corpus, seeds):
        one.mkdir(parents=True, exist_ok=True)
    for place, seed in enumerate(target.seeds):
        (seeds / str(place)).write_bytes(seed)
    options = [f"-max_total_time={seconds}", "-max_len=4096", f"-artifact_prefix={folder}/"]
    options += [f"-timeout={UNIT_SECONDS}", f"-rss_limit_mb={RSS_MIB}"]
    logging.getLogger("stepstate").setLevel(logging.CRITICAL)  # a line for each input takes time
    arguments = [sys.argv[0], *options, *(inputs or [str(corpus), str(seeds)])]
    atheris.Setup(arguments, target.run)
    atheris.Fuzz()


def fuzz_all(seconds: float) -> int:
    """Fuzzes all targets, each in a process; returns how many failed."""
    share = max(1, round(AT_ONCE * seconds / len(NAMES)))

    def run(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.fuzz", str(share), name]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    failed = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for name, ended in zip(NAMES, pool.map(run, NAMES), strict=True):
            done = _DONE.search(ended.stderr)
            if ended.returncode or done is None:
                failed += 1
                print(f"{name}: FAILED\n{ended.stderr[-4000:]}", flush=True)
            else:
                print(f"{name}: {done[1]} inputs, nothing found", flush=True)
    return failed


def main(seconds: str, name: str = "", *inputs: str) -> int:
    """See above.

    Args:
        seconds: how long; 0 with inputs: until they are done.
        name: of a target; empty: all.
        inputs: files, and further options of libFuzzer.
    """
    if not name:
        return fuzz_all(float(seconds))
    fuzz(seconds, name, list(inputs))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
