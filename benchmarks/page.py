"""Measures what docs/benchmarks.md shows, and writes its tables and pictures, and README's table.

    python -m benchmarks.page measure          # all of it but the million, in some 30 minutes
    python -m benchmarks.page measure scale    # some of it
    python -m benchmarks.page render           # tables and pictures from what was measured

Every figure comes from the JSON files in docs/benchmarks/, which `python -m benchmarks --json`
writes.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import tables
from benchmarks.pictures import draw

README = Path(__file__).parents[1] / "README.md"
PAGE = tables.DOCS / "benchmarks.md"

RUNS = {
    "transports": "transports --rounds 5",
    "security": "security --rounds 9",
    "profile": "profile",
    "engines": "engines",
    "stream": "steps --path stream --sessions 1,16,64,256,1000,10000 --processes 2 --seconds 2",
    "unary": "steps --path unary --sessions 1,64 --processes 2 --seconds 2",
    "packed": "steps --path packed --sessions 1 --rows 16,64,256 --seconds 2",
    "rates": "steps --path stream --sessions 64 --rate 500,2000,4000,8000 --seconds 2",
    "scale": "scale --sessions 1000,10000,100000 --seconds 2",
    "stored": "scale --sessions 1000,10000 --store sqlite --seconds 2",
    "sweeps": "sweeps --sessions 20000 --seconds 20",
    "priming": "priming --rounds 5",
    "million": "scale --sessions 1000000 --seconds 2",
}
BY_HAND = ("million",)
"""It takes longer than all others together, and 8 GiB."""

_FIGURES = re.compile(r"(<!-- figures -->\n).*?(<!-- end -->)", re.DOTALL)
_SUMMARY = re.compile(r"(<!-- summary -->\n).*?(<!-- end -->)", re.DOTALL)
_TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def measure(names: Sequence[str]) -> None:
    """Runs benchmarks, one after the other."""
    tables.MEASURED.mkdir(exist_ok=True)
    for name in names:
        out = str(tables.MEASURED / f"{name}.json")
        command = [sys.executable, "-m", "benchmarks", *RUNS[name].split()]
        subprocess.run([*command, "--json", out], check=True)


def rendered(page: str) -> str:
    """The page with its tables as they were measured last."""
    page = _SUMMARY.sub(lambda found: found[1] + tables.summary() + found[2], page)
    return _TABLE.sub(lambda found: found[1] + tables.section(found[2]) + found[3], page)


def with_figures(readme: str) -> str:
    """README with its table as it was measured last."""
    return _FIGURES.sub(lambda found: found[1] + tables.readme_figures() + found[2], readme)


def main(arguments: Sequence[str]) -> None:
    """Measures if asked to, and renders."""
    if arguments[:1] == ["measure"]:
        measure(arguments[1:] or [name for name in RUNS if name not in BY_HAND])
    elif list(arguments) != ["render"]:
        raise SystemExit(__doc__)
    draw()
    PAGE.write_text(rendered(PAGE.read_text()))
    README.write_text(with_figures(README.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
