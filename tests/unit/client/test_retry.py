from __future__ import annotations

from types import SimpleNamespace

import pytest

from stepstate.client._protocol import retry
from stepstate.client._protocol.retry import Backoff
from stepstate.errors import Draining, QueueFull, ServerUnreachable

LOST = ServerUnreachable("host:1", "gone")


@pytest.fixture
def ticking(clock, monkeypatch):
    """The clock that `Backoff` reads."""
    monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=clock))
    return clock


def test_waits_double_up_to_a_second_with_jitter(ticking):
    backoff = Backoff(1000.0)
    nominal = [0.02 * 2**n for n in range(6)] + [1.0] * 4
    for expected in nominal:
        assert expected / 2 <= backoff.wait(LOST) <= expected


def test_waits_differ_so_that_clients_do_not_come_back_together(ticking):
    assert len({Backoff(10.0).wait(LOST) for _ in range(10)}) > 1


def test_a_wait_is_at_least_what_the_server_asks_for(ticking):
    assert Backoff(10.0).wait(Draining(3.0)) == 3.0
    assert Backoff(10.0).wait(QueueFull("rows", 1, 0.5)) == 0.5


def test_it_gives_up_with_the_error_when_the_deadline_would_pass(ticking):
    backoff = Backoff(2.0)
    error = Draining(1.0)
    backoff.wait(error)
    ticking.advance(1.5)
    assert backoff.left == 0.5
    with pytest.raises(Draining) as raised:
        backoff.wait(error)
    assert raised.value is error
