"""The guides in docs/ run from top to bottom, as their readers run them."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from stepstate.configuration import parse, resolve
from tests.integration.test_isolation import CASES, STATES
from tests.markdown import ROOT, blocks_of, dead_links, run_python, run_shell
from tests.processes import server_process

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
NOT_RUN_HERE = {
    "benchmarks.md": "its commands take a quarter of an hour: `make benchmarks`",
    "decisions.md": "has no commands",
    "deployment.md": "needs two machines: see test_deployment",
    "identities.md": "has files of its own: `test_cli_tokens`",
    "security.md": "has no commands",
    "style.md": "quotes the code, see below",
    "ten-minutes.md": "trains a model of its own, above",
}
SERVE = "stepstate serve --models models"


def run_through(
    guide: Path, folder: Path, served: Callable[[], str], address: str = ""
) -> list[str]:
    """Runs every block in turn; what each printed."""
    printed = []
    for language, block in blocks_of(guide):
        if language == "text":
            continue
        if language == "json":
            json.loads(block)
            continue
        if language == "toml":
            resolve({}, parse(guide.name, block.encode()))
            continue
        lines = [block] if language == "python" else block.splitlines()
        for line in lines:
            if line == SERVE:
                address = served()
                continue
            run = run_python if language == "python" else run_shell
            done = run(line, address, folder)
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip()
            assert not done.stderr
            printed.append(done.stdout)
    return printed


@pytest.mark.long
def test_ten_minutes_from_training_to_live_forecasts(tmp_path):
    with ExitStack() as stack:

        def served() -> str:
            models = str(tmp_path / "models")
            return stack.enter_context(server_process("--models", models)).address

        printed = run_through(DOCS / "ten-minutes.md", tmp_path, served)
    live = printed[2]
    inside = int(live.partition("%")[0].rpartition("\n")[2])
    assert 80 <= inside <= 97
    assert live.count("of a seasonal naive forecast's error") == 3


@pytest.mark.long
@pytest.mark.parametrize(
    "guide", [page for page in PAGES if page.name not in NOT_RUN_HERE], ids=lambda path: path.name
)
def test_the_blocks_run_against_the_shipped_models(guide):
    with server_process("--models", str(ROOT / "models")) as server:
        run_through(guide, ROOT, lambda: server.address, server.address)


@pytest.mark.parametrize(
    "document",
    [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))],
    ids=lambda path: path.name,
)
def test_every_linked_file_exists(document):
    assert dead_links(document) == []


def test_the_style_page_quotes_the_code_as_it_is():
    text = (DOCS / "style.md").read_text()
    quotes = re.findall(r"\]\(\.\./(\S+)\):\s`\S+`\n\n```python\n(.*?)```", text, re.DOTALL)
    assert len(quotes) == text.count("```python")
    for path, code in quotes:
        source = (ROOT / path).read_text()
        assert code in source or textwrap.indent(code, "    ") in source, path


@pytest.mark.parametrize("document", ["docs/security.md", "SECURITY.md"])
def test_every_test_that_a_threat_is_said_to_have_is_there(document: str):
    text = (ROOT / document).read_text()
    for path, name in re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", text):
        source = (ROOT / path).read_text() if (ROOT / path).is_file() else ""
        assert f"def {name}(" in source if name else (ROOT / path).exists(), f"{path}::{name}"


def test_each_line_of_the_threats_has_a_test():
    table = (DOCS / "security.md").read_text().partition("| attack | outcome | test |")[2]
    lines = table.partition("\n\n")[0].splitlines()[2:]
    assert len(lines) > 20
    assert [line for line in lines if "`tests/" not in line.split("|")[3]] == []


def test_the_counts_of_the_threats_are_those_of_the_generated_test():
    rpcs = {case.method.name for case in CASES}
    places = f"{len(CASES)} places in the requests of {len(rpcs)} RPCs"
    said = f"{places}, of sessions in {len(STATES)} states"
    assert said in (DOCS / "security.md").read_text()
