"""`stepstate tokens`, and the page about identities as its readers follow it."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from stepstate.auth import digest_of, is_token, read_tokens
from stepstate.cli import main
from tests.credentials import revoke, token
from tests.markdown import ROOT, blocks_of, run_python, run_shell
from tests.processes import server_process

Run = Callable[..., str]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


@pytest.fixture
def run(file: Path) -> Run:
    """Runs `stepstate tokens` for the file; what it printed, or the one line of its error."""

    def invoke(*arguments: str) -> str:
        variables = {"STEPSTATE_TOKENS_FILE": str(file)}
        found = CliRunner().invoke(main, ["tokens", *arguments], env=variables)
        assert found.exception is None or isinstance(found.exception, SystemExit)
        assert (found.exit_code == 0) == (not found.stderr)
        return (found.stdout or found.stderr.splitlines()[-1]).strip()

    return invoke


def test_a_token_is_printed_once_and_listed_by_its_id(run: Run, file: Path):
    text = run("create", "meters", "--tenant", "acme", "--scope", "read", "--expires-in", "90d")
    assert is_token(text)
    (record,) = read_tokens(str(file))
    assert record.sha256 == digest_of(text)
    assert record.expires is not None
    assert (record.expires - record.created).days == 90
    assert abs((datetime.now(UTC) - record.created).total_seconds()) < 60
    listed = run("list")
    assert text not in listed
    assert re.search(rf"{record.id} +meters +acme +read +.* expires 20", listed)


def test_tokens_are_revoked_by_id_or_identity(run: Run):
    run("create", "a", "--expires-in", "never")
    run("create", "b")
    run("create", "b")
    first = run("list").splitlines()[1].split()[0]
    assert run("revoke", first) == f"revoked: {first}"
    assert [line.split()[1] for line in run("list").splitlines() if "revoked" in line] == ["a"]
    run("revoke", "--identity", "b")
    before = run("list")
    assert before.count("revoked") == 3
    run("revoke", first)  # it stays revoked since then
    assert run("list") == before


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["create", "a b"], "identity: "),
        (["create", "a", "--tenant", "A"], "tenant: .* no name of a tenant: expected a-z"),
        (["create", "a", "--expires-in", "90"], "expected such as 90d, or never"),
        (["create", "a", "--scope", "root"], "'root' is not one of"),
        (["create", "first", "--tenant", "other"], "identity first has tokens of two tenants"),
        (["revoke"], "no token which: give ids, or --identity"),
        (["revoke", "0123"], "no token 0123; `stepstate tokens list` shows them"),
        (["revoke", "--identity", "nobody"], "no token nobody"),
        (["list", "--tokens-file", "/nowhere/x"], "--tokens-file /nowhere/x: can't be read"),
        (["create", "a", "--tokens-file", "/nowhere/x"], "/nowhere"),
        (["list", "--tokens-file", ""], "which file"),
    ],
)
def test_what_can_not_be_done_is_said_and_changes_nothing(
    run: Run, file: Path, arguments: list[str], problem: str
):
    token(file, "first")
    before = file.read_bytes()
    assert re.search(problem, run(*arguments))
    assert file.read_bytes() == before


def test_a_revoked_token_of_tests_is_listed(run: Run, file: Path):
    revoke(file, token(file))
    assert "revoked" in run("list")


@pytest.mark.long
def test_the_page_about_identities_runs_from_top_to_bottom(tmp_path: Path):
    address, printed = "", []
    with ExitStack() as stack:
        for language, block in blocks_of(ROOT / "docs" / "identities.md"):
            if "stepstate serve --models models --tokens-file" in block:
                options = ("--tokens-file", str(tmp_path / "tokens.json"))
                models = ("--models", str(ROOT / "models"))
                address = stack.enter_context(server_process(*models, *options)).address
            elif language in ("shell", "python"):
                run = run_python if language == "python" else run_shell
                for line in [block] if language == "python" else block.splitlines():
                    done = run(line, address, tmp_path)
                    assert done.returncode == 0, done.stderr
                    assert not done.stderr
                    printed.append(done.stdout)
    created, used, listed, revoked = printed
    assert is_token(created.strip())
    assert used.strip() == "electricity"
    assert "meters" in listed
    assert revoked.startswith("revoked: ")
