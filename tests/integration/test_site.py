"""The documentation site: what is generated is whole, and a broken link fails the build."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest

from stepstate.config import ServerConfig
from tests.markdown import ROOT

BROKEN = {
    "no-such-page.md": "no-such-page.md",
    "client.md#no-such-heading": "no-such-heading",
    "../service/no-such-file.py": "service/no-such-file.py",
}
"""Links, and what the warning about each names."""


@pytest.mark.long
def test_the_site_is_whole_and_each_broken_link_is_named(tmp_path):
    for path in ROOT.iterdir():
        if path.name not in {"docs", "build", "mkdocs.yml"}:
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "gates.md").open("a") as page:
        page.writelines(f"\n[broken]({link})\n" for link in BROKEN)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    warnings = re.findall(r"^WARNING.*$", done.stderr, re.MULTILINE)
    assert done.returncode == 1, done.stderr
    assert len(warnings) == len(BROKEN), warnings
    for named in BROKEN.values():
        assert any(named in warning for warning in warnings), warnings

    site = tmp_path / "build" / "site"
    rpcs = re.findall(
        r"^  rpc (\w+)", (ROOT / "protos/stepstate/v1/stepstate.proto").read_text(), re.MULTILINE
    )
    contract = (site / "contract.html").read_text()
    assert [name for name in rpcs if f'id="{name.lower()}"' not in contract] == []
    configuration = (site / "configuration.html").read_text()
    names = [field.name for field in fields(ServerConfig)]
    assert [n for n in names if f"STEPSTATE_{n.upper()}" not in configuration] == []
