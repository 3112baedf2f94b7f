"""What the package brings along: writes an SBOM, and asks a database what of it is vulnerable.

`python .ci/sbom.py FILE` writes the packages that the server with all extras takes, in CycloneDX's
format. `python .ci/sbom.py --audit` asks PyPI's database about them (pip-audit).
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
Bom = dict[str, Any]


def bom_of_server() -> Bom:
    """The packages of this environment that stepstate needs with all its extras, and no others."""
    command = [sys.executable, "-m", "cyclonedx_py", "environment", sys.executable]
    command += ["--pyproject", str(ROOT / "pyproject.toml"), "--output-reproducible"]
    bom: Bom = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)  # noqa: S603
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    names = needed([*project["dependencies"], *itertools.chain.from_iterable(extras)])
    names.discard("stepstate")
    bom["components"] = [one for one in bom["components"] if normal(one["name"]) in names]
    refs = {bom["metadata"]["component"]["bom-ref"], *(one["bom-ref"] for one in bom["components"])}
    for one in bom["dependencies"]:
        one["dependsOn"] = [ref for ref in one.get("dependsOn", []) if ref in refs]
    bom["dependencies"] = [one for one in bom["dependencies"] if one["ref"] in refs]
    return bom


def needed(requirements: Iterable[str]) -> set[str]:
    """The names of what has to be installed here for these requirements."""
    found, new = set[tuple[str, str]](), [(Requirement(one), "") for one in requirements]
    while new:
        requirement, extra = new.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = normal(requirement.name)
        for asked in {"", *requirement.extras} - {extra for known, extra in found if known == name}:
            found.add((name, asked))
            with suppress(metadata.PackageNotFoundError):
                new += [(Requirement(one), asked) for one in metadata.requires(name) or ()]
    return {name for name, _ in found}


def normal(name: str) -> str:
    """A name as the index has it (packaging.python.org/specifications/name-normalization)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def audit(bom: Bom) -> int:
    """Prints what is known of these versions; returns how many have a known vulnerability."""
    lines = [f"{one['name']}=={one['version'].partition('+')[0]}" for one in bom["components"]]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(lines))
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "-f", "json"]
        done = subprocess.run([*command, "-r", file.name], capture_output=True, text=True)  # noqa: S603, PLW1510
    try:
        found = json.loads(done.stdout)["dependencies"]
    except ValueError:
        print(f"NO AUDIT of packages, the database can't be asked: {done.stderr[-300:]}")
        return 0
    asked = [one for one in found if "skip_reason" not in one]
    if not asked:
        print("NO AUDIT of packages: this registry has no database of vulnerabilities")
    vulnerable = [one for one in asked if one["vulns"]]
    for one in vulnerable:
        ids = ", ".join(vulnerability["id"] for vulnerability in one["vulns"])
        print(f"{one['name']} {one['version']} is vulnerable: {ids}")
    print(f"{len(asked)} of {len(found)} packages were audited, {len(vulnerable)} are vulnerable")
    return len(vulnerable)


def main(what: str) -> int:
    """See above."""
    bom = bom_of_server()
    if what == "--audit":
        return audit(bom)
    Path(what).parent.mkdir(parents=True, exist_ok=True)
    Path(what).write_text(json.dumps(bom, indent=1) + "\n")
    print(f"{what}: {len(bom['components'])} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
