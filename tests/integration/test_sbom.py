"""The list of what the package brings along: `make build` writes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.markdown import ROOT

SCRIPT = ROOT / ".ci" / "sbom.py"
NAMED = {"torch", "grpcio", "hpack", "cryptography", "pyjwt", "redis", "tritonclient"}
OTHERS = {"pytest", "mypy", "ruff", "mkdocs", "hypothesis", "atheris", "stepstate"}
PERMISSIVE = ("Apache", "BSD", "MIT", "PSF", "Python-2.0", "0BSD", "MPL-2.0")


@pytest.mark.long
def test_the_sbom_has_what_the_server_needs_and_nothing_else(tmp_path: Path):
    file = tmp_path / "made.cdx.json"
    subprocess.run([sys.executable, str(SCRIPT), str(file)], check=True, cwd=ROOT)
    bom = json.loads(file.read_text())
    assert bom["bomFormat"] == "CycloneDX"
    assert bom["metadata"]["component"]["name"] == "stepstate"
    names = {one["name"].lower() for one in bom["components"]}
    assert names >= NAMED
    assert not names & OTHERS
    assert all(one["version"] for one in bom["components"])
    for one in bom["components"]:
        licenses = json.dumps(one.get("licenses", []))
        assert licenses == "[]" or any(known in licenses for known in PERMISSIVE), one["name"]
        assert "GPL" not in licenses, one["name"]
