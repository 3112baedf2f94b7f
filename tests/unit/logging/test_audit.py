"""The audit log's file: who may read it, what is in it, and what happens when it is rotated."""

from __future__ import annotations

import json
import logging
import os
import resource
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from stepstate.logging import AUDIT_DROPPED, LINES_PER_SECOND, audit_lines
from stepstate.logging import audit as module
from stepstate.logging.audit import AuditEvent, AuditFile, AuditRecord, audit


def opened(session: str, **said: str) -> AuditRecord:
    return AuditRecord(event=AuditEvent.SESSION_OPENED, tenant="acme", session=session, **said)


def refused(reason: str) -> AuditRecord:
    return AuditRecord(event=AuditEvent.CREDENTIAL_REFUSED, result="UNAUTHENTICATED", reason=reason)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def test_a_line_says_all_of_an_act(file: Path):
    with audit_lines(str(file)):
        audit(opened("meter-1", identity="ci", peer="ipv4:10.0.0.7:1", model="lstm/1"))
    (line,) = lines(file)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "session opened",
        "level": "info",
        "logger": "stepstate.audit",
        "result": "OK",
        "reason": None,
        "method": None,
        "tenant": "acme",
        "identity": "ci",
        "identity_tenant": None,
        "admin": False,
        "peer": "ipv4:10.0.0.7:1",
        "session": "meter-1",
        "source": None,
        "model": "lstm/1",
        "detail": None,
    }


def test_only_its_owner_may_read_it(file: Path):
    before = os.umask(0)
    try:
        with audit_lines(str(file)):
            audit(opened("a"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_file_that_others_may_read_is_warned_of(file: Path, caplog: pytest.LogCaptureFixture):
    for mode in (0o600, 0o640):
        file.touch()
        file.chmod(mode)
        AuditFile(str(file)).close()
    assert [record.message for record in caplog.records] == [
        "others can read or change a private file: chmod go-rwx"
    ]


def test_it_is_continued_after_a_restart(file: Path):
    for name in "ab":
        with audit_lines(str(file)):
            audit(opened(name))
    assert [line["session"] for line in lines(file)] == ["a", "b"]


def written(file: AuditFile, name: str) -> None:
    file.write([json.dumps({"session": name}).encode() + b"\n"])


def test_a_file_that_is_moved_away_or_deleted_is_made_again(file: Path):
    """As logrotate does, without a word to the server."""
    made = AuditFile(str(file))
    written(made, "a")
    rotated = file.rename(file.with_suffix(".1"))
    written(made, "b")
    assert [line["session"] for line in lines(rotated) + lines(file)] == ["a", "b"]
    file.unlink()
    written(made, "c")
    made.close()
    assert [line["session"] for line in lines(file)] == ["c"]


@pytest.fixture
def many_files() -> Iterator[None]:
    """More files are open than `select` can name, as of a server with many connections."""
    with ExitStack() as opened:
        for _ in range(1024):
            opened.callback(os.close, os.open(os.devnull, os.O_WRONLY))
        yield


@pytest.mark.usefixtures("many_files")
def test_a_file_is_made_again_also_while_many_are_open(file: Path):
    made = AuditFile(str(file))
    written(made, "a")
    file.unlink()
    written(made, "b")
    made.close()
    assert [line["session"] for line in lines(file)] == ["b"]


def test_a_folder_that_is_gone_loses_lines_and_nothing_else(file: Path):
    made = AuditFile(str(file))
    file.unlink()
    file.parent.rmdir()
    with pytest.raises(OSError, match="No such file"):
        written(made, "lost")
    file.parent.mkdir()
    written(made, "a")
    made.close()
    assert file.read_text().lstrip("\n") == '{"session": "a"}\n'


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_counted_and_said_and_the_next_line_is_whole(
    file: Path, caplog: pytest.LogCaptureFixture
):
    before = AUDIT_DROPPED["failed"]
    with audit_lines(str(file)), caplog.at_level(logging.ERROR):
        with largest_file(100):  # Python ignores SIGXFSZ
            audit(opened("lost"))
            wait_until(lambda: AUDIT_DROPPED["failed"] > before)
        audit(opened("a"))
    assert AUDIT_DROPPED["failed"] == before + 1
    assert [record.message for record in caplog.records] == ["audit lines were not written"]
    torn, whole = file.read_text().splitlines()
    assert len(torn) == 100
    assert json.loads(whole)["session"] == "a"


def wait_until(true: object, seconds: float = 10.0) -> None:
    ticks = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if true():
            return
        ticks.wait(0.01)
    raise AssertionError("it did not come to pass")


def test_acts_that_were_done_are_all_written_and_refusals_are_limited_by_reason(file: Path):
    """A line says how many were left out."""
    before = AUDIT_DROPPED["rate_limit"]
    count = 20 * LINES_PER_SECOND
    with audit_lines(str(file)):
        for number in range(count):
            audit(opened(str(number)))
            audit(refused("EXPIRED"))
        audit(refused("REVOKED"))
    found = lines(file)
    sessions = [line["session"] for line in found if line["event"] == AuditEvent.SESSION_OPENED]
    assert sessions == [str(number) for number in range(count)]
    refusals = [line["reason"] for line in found if line["event"] == AuditEvent.CREDENTIAL_REFUSED]
    left_out = [line for line in found if "left out" in line["event"]]
    assert refusals.count("REVOKED") == 1
    assert {line["reason"] for line in left_out} == {"EXPIRED"}
    assert {line["like"] for line in left_out} == {"credential refused"}
    said = sum(int(line["event"].split()[0]) for line in left_out)
    assert said == AUDIT_DROPPED["rate_limit"] - before
    assert refusals.count("EXPIRED") + said == count


@pytest.mark.parametrize("result", ["OK", "CANCELLED", "INTERNAL"])
def test_an_act_that_may_have_been_done_is_never_left_out(file: Path, result: str):
    """Nobody hides one behind many others."""
    count = 3 * LINES_PER_SECOND
    with audit_lines(str(file)):
        for number in range(count):
            audit(replace(opened(str(number)), result=result))
    assert [line["session"] for line in lines(file)] == [str(number) for number in range(count)]


def test_nobody_waits_for_a_file_that_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A pipe that is not read: what does not fit the queue is counted. It would hang here."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setattr(module, "MAX_QUEUED", 50)
    monkeypatch.setattr("stepstate.logging.writer.FLUSH_SECONDS", 0.1)
    before = AUDIT_DROPPED["queue_full"]
    with audit_lines(str(pipe)):
        for number in range(1_000):
            audit(opened(str(number)))
    assert AUDIT_DROPPED["queue_full"] > before
    while any(thread.name == "logs" for thread in threading.enumerate()):
        with suppress(BlockingIOError):
            os.read(reading, 2**20)
    os.close(reading)


def test_a_minus_is_standard_output(capfd: pytest.CaptureFixture[str]):
    with audit_lines("-"):
        audit(opened("a"))
    printed = capfd.readouterr()
    assert json.loads(printed.out)["session"] == "a"
    assert not printed.err


def test_the_log_has_no_acts_with_or_without_a_file(
    file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler()])
    for path in ("", str(file)):
        with audit_lines(path):
            audit(opened("a"))
    assert capfd.readouterr() == ("", "")
