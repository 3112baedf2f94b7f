"""Logs on a real file, pipe or terminal as standard error."""

from __future__ import annotations

import json
import logging
import os
import pty
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import pytest

from stepstate.logging import DROPPED, LINES_PER_SECOND, logs_on_stderr, writer

log = logging.getLogger("stepstate.test")


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What logs change in the process is as before."""
    for owner, name in ((sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)


class Stderr:
    """A pipe, or a terminal, as standard error."""

    def __init__(self, *, terminal: bool = False) -> None:
        self.reading, self._writing = pty.openpty() if terminal else os.pipe()
        os.set_blocking(self.reading, False)
        self._before = os.dup(2)

    @contextmanager
    def logs(self, style: str = "json") -> Iterator[None]:
        """Logs to it in the block."""
        os.dup2(self._writing, 2)
        with logs_on_stderr("INFO", style):
            yield

    def read(self) -> str:
        """Everything that was written."""
        data = b""
        with suppress(OSError):  # there is no more
            while more := os.read(self.reading, 2**20):
                data += more
        return data.decode()

    def lines(self) -> list[dict]:
        """What the lines that were written say."""
        return [json.loads(line) for line in self.read().splitlines()]

    def close(self) -> None:
        """Closes both ends, when nobody writes any more."""
        while any(thread.name == "logs" for thread in threading.enumerate()):
            self.read()
        os.dup2(self._before, 2)
        with suppress(OSError):
            os.close(self.reading)
        os.close(self._writing)
        os.close(self._before)


@pytest.fixture
def stderr() -> Iterator[Stderr]:
    with closing(Stderr()) as pipe:
        yield pipe


@pytest.mark.parametrize(
    ("place", "variable", "escapes"),
    [("pipe", "", 0), ("terminal", "", 1), ("terminal", "NO_COLOR", 0)],
)
def test_text_has_colours_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, place: str, variable: str, escapes: int
):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    with closing(Stderr(terminal=place == "terminal")) as stderr:
        with stderr.logs("text"):
            log.info("hello")
        written = stderr.read()
    assert "hello" in written
    assert ("\x1b[" in written) is bool(escapes)


def test_what_is_logged_is_written_until_the_end(stderr: Stderr):
    with stderr.logs("auto"):
        for number in range(2 * LINES_PER_SECOND):
            log.info("it happened", extra={"number": number, "reason": f"R{number % 2}"})
        log.debug("not this")
    lines = stderr.lines()
    assert [line["number"] for line in lines] == list(range(2 * LINES_PER_SECOND))
    assert lines[0] | {"timestamp": ""} == {
        "event": "it happened",
        "level": "info",
        "logger": "stepstate.test",
        "number": 0,
        "reason": "R0",
        "timestamp": "",
    }


def test_a_line_says_what_was_so_when_it_was_logged(stderr: Stderr):
    """Although it is made later: the time too."""
    changing = {"a": 1}
    with stderr.logs():
        before = time.time()
        log.info("it has %s", changing, extra={"all": changing})
        changing["a"] = 2
    (line,) = stderr.lines()
    assert (line["event"], line["all"]) == ("it has {'a': 1}", "{'a': 1}")
    assert line["timestamp"][:10] == time.strftime("%Y-%m-%d", time.gmtime(before))


def test_a_place_that_logs_much_is_summed_up(stderr: Stderr):
    """The reason tells places apart; other places are not concerned."""
    before = DROPPED["rate_limit"]
    with stderr.logs():
        for _ in range(500):
            log.info("refused", extra={"reason": "BAD"})
        log.info("refused", extra={"reason": "OTHER"})
        log.warning("something else")
    lines = stderr.lines()
    assert len([line for line in lines if line["event"] == "refused"]) == LINES_PER_SECOND + 1
    assert [line["event"] for line in lines][-2:] == [
        "something else",
        f"{500 - LINES_PER_SECOND} more lines like this one were left out",
    ]
    assert lines[-1] | {"timestamp": ""} == {
        "event": lines[-1]["event"],
        "level": "info",
        "logger": "stepstate.test",
        "like": "refused",
        "reason": "BAD",
        "timestamp": "",
    }
    assert DROPPED["rate_limit"] == before + 500 - LINES_PER_SECOND


def test_the_first_error_of_another_fault_is_always_written(stderr: Stderr):
    """Also where one `except` logs both, and the other one comes thousands of times."""

    def fail(number: int) -> None:
        if number == 400:
            raise ValueError("the rare one")
        raise ValueError("the usual one")

    with stderr.logs():
        for number in range(500):
            try:
                fail(number)
            except ValueError:
                log.exception("an RPC failed", extra={"error_id": number})
    lines = stderr.lines()
    assert 400 in [line.get("error_id") for line in lines]
    rare = next(line for line in lines if line.get("error_id") == 400)
    assert rare["exception"].endswith("ValueError: the rare one")


def test_nobody_who_logs_waits_for_a_pipe_that_is_not_read(
    stderr: Stderr, monkeypatch: pytest.MonkeyPatch
):
    """Lines are dropped and counted, and the end does not wait either. It would hang here."""
    monkeypatch.setattr(writer, "FLUSH_SECONDS", 0.1)
    before = DROPPED["queue_full"]
    with stderr.logs():
        for number in range(5_000):
            log.info("x" * 1_000, extra={"reason": str(number)})
    assert DROPPED["queue_full"] - before > 3_000
    assert stderr.lines()  # each of them is whole


def test_a_pipe_whose_reader_is_gone_stops_nobody(stderr: Stderr):
    before = DROPPED["failed"]
    os.close(stderr.reading)
    with stderr.logs():
        log.info("one")
        log.info("two")
    assert DROPPED["failed"] == before + 2


def test_a_log_call_that_is_wrong_is_counted_and_named(stderr: Stderr):
    before = DROPPED["failed"]
    with stderr.logs():
        log.info("%d rows", "many")  # noqa: PLE1206, RUF100 - on purpose
        log.info("the next one")
    lines = stderr.lines()
    assert [line["event"] for line in lines] == [
        "the next one",
        "1 more lines like this one were left out",
    ]
    assert lines[1]["like"] == "%d rows"
    assert DROPPED["failed"] == before + 1


class _Noisy:
    def __del__(self) -> None:
        raise ValueError("in __del__")


def test_what_python_would_print_itself_is_logged(stderr: Stderr):
    """It would wait for standard error where it happens."""

    def fail() -> None:
        raise ValueError("in a thread")

    with warnings.catch_warnings(), stderr.logs():
        warnings.simplefilter("always")
        warnings.warn("be careful", stacklevel=1)
        noisy = _Noisy()
        del noisy
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    lines = stderr.lines()
    said = [line["event"] + line.get("exception", "").rpartition("\n")[2] for line in lines]
    assert ["be careful" in said[0], *said[1:]] == [
        True,
        "an exception was ignoredValueError: in __del__",
        "a thread endedValueError: in a thread",
    ]
