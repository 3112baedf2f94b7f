"""Runs attacks at full size and prints the table of SECURITY.md: `python -m tests.attacks`.

`python -m tests.attacks NAME ...` runs those whose names contain one of the words.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.attacks.attack import Attack
from tests.attacks.catalog import ATTACKS, HONEST_LOAD
from tests.attacks.harness import MIB, Ground, Report, under_attack

UNNOTICED_SECONDS = 0.1
"""Too little to tell from noise."""
COLUMNS = (
    "attack",
    "peak over the start, MiB",
    "10 s after, MiB",
    "p99 ÷ alone",
    "p99 ÷ beside honest load",
    "honest errors",
    "lost or broken",
    "served again after, s",
)


def main(arguments: Sequence[str]) -> int:
    """Returns the number of attacks that harmed somebody."""
    parser = argparse.ArgumentParser(prog="python -m tests.attacks", description=__doc__)
    parser.add_argument("words", nargs="*", help="parts of names; none: all attacks")
    parser.add_argument("--short", action="store_true", help="at the size of `make test-all`")
    parser.add_argument("--transport", choices=["lean", "grpcio"], default="lean")
    chosen = parser.parse_args(arguments)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    reference = run(HONEST_LOAD, chosen.transport, short=chosen.short)
    print(row(reference, reference), flush=True)
    harmful = 0
    for attack in selected(chosen.words):
        report = run(attack, chosen.transport, short=chosen.short)
        print(row(report, reference), flush=True)
        problems = [*report.problems(), *slower(report, reference)]
        for problem in problems:
            print(f"{report.attack}: {problem}", file=sys.stderr, flush=True)
        harmful += bool(problems)
    return harmful


def slower(report: Report, reference: Report) -> list[str]:
    """Whether the honest client waited for longer than twice what honest load costs it."""
    bound = max(2 * reference.p99, UNNOTICED_SECONDS)
    if report.p99 <= bound:
        return []
    return [f"honest p99: {report.p99:.2f} s, beside honest load {reference.p99:.2f} s"]


def selected(words: Sequence[str]) -> Iterator[Attack]:
    """The attacks whose names contain one of the words."""
    for attack in ATTACKS:
        if not words or any(word in attack.name for word in words):
            yield attack


def run(attack: Attack, transport: str, *, short: bool) -> Report:
    """Runs an attack in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="stepstate-attack-") as name:
        count = attack.short if short and attack.short is not None else attack.count
        ground = Ground.of(Path(name))
        return asyncio.run(under_attack(attack, count, ground, short=short, transport=transport))


def row(report: Report, reference: Report) -> str:
    """A report as a row of the table."""
    lost = len(report.lost) + len(report.broken)
    figures = (
        report.attack.replace("_", " "),
        f"{report.peak / MIB:.0f}",
        f"{report.rest / MIB:.0f}",
        f"{report.p99 / report.alone_p99:.1f}",
        f"{report.p99 / reference.p99:.1f}",
        str(len(report.errors)),
        str(lost),
        f"{report.served_again:.1f}",
    )
    return f"| {' | '.join(figures)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
