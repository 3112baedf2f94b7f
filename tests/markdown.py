"""Documents whose blocks are run: what is in them, and how a block is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEFAULT_ADDRESS = "127.0.0.1:50051"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"""(?:\]\(|(?:src|href)=")([^)#"\s]+)""")
_REPOSITORY = re.compile(
    r"https://(?:raw\.githubusercontent\.com/stepstate/stepstate|"
    r"github\.com/stepstate/stepstate/(?:blob|tree))/main/"
)


def blocks_of(document: Path) -> list[tuple[str, str]]:
    """The code blocks of a document: language and text."""
    return _BLOCK.findall(document.read_text())


def dead_links(document: Path) -> list[str]:
    """Links to files that do not exist: relative ones, and those to the repository's address."""
    dead = []
    for link in _LINK.findall(document.read_text()):
        inside = _REPOSITORY.match(link)
        path = ROOT / link[inside.end() :] if inside else document.parent / link
        if (inside or "://" not in link) and not path.exists():
            dead.append(link)
    return dead


def run_python(block: str, address: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a block in a folder, against a server that is elsewhere than by default."""
    return _run([sys.executable, "-c", block.replace(DEFAULT_ADDRESS, address)], address, folder)


def run_shell(line: str, address: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The same for a line of shell."""
    return _run(["bash", "-c", f"set -o pipefail; {line}"], address, folder)


def _run(command: list[str], address: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "STEPSTATE_TARGET": address}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=120,
        check=False,
    )
