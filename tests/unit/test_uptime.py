"""The clock that stands still while its process does."""

from __future__ import annotations

import pytest

from stepstate.uptime import MAX_HEARTBEAT_SECONDS, UptimeClock


def test_it_shows_the_seconds_that_pass(clock):
    uptime = UptimeClock(clock)
    for _ in range(100):
        clock.advance(1.0)
        uptime.heartbeat()
    clock.advance(0.5)
    assert uptime() == pytest.approx(100.5)


def test_a_pause_counts_as_little_of_it(clock):
    uptime = UptimeClock(clock)
    clock.advance(86_400.0)
    assert uptime() == MAX_HEARTBEAT_SECONDS
    uptime.heartbeat()
    clock.advance(1.0)
    assert uptime() == MAX_HEARTBEAT_SECONDS + 1.0


def test_it_can_be_set_to_have_shown_a_time_earlier(clock):
    uptime = UptimeClock(clock, start=7.0)
    _, since, at = uptime.read()
    clock.advance(2.0)
    uptime.set(100.0, at)
    assert since == 0.0
    assert uptime() == 102.0
