"""Freed memory is given back when the process has grown by more than clients make it hold."""

from __future__ import annotations

from stepstate import trim
from stepstate.trim import MAX_GROWTH, PAUSE, Trimmer, resident_bytes


class Process:
    """One whose memory the test sets."""

    def __init__(self) -> None:
        self.resident = 10 * MAX_GROWTH
        self.held = 0
        self.kept = self.resident
        self.trims = 0

    def trim(self) -> None:
        self.trims += 1
        self.resident = self.kept

    def trimmer(self) -> Trimmer:
        return Trimmer(lambda: self.held, resident=lambda: self.resident, trim=self.trim)


async def test_what_clients_hold_is_no_reason_to_trim():
    process = Process()
    trimmer = process.trimmer()
    process.resident += 5 * MAX_GROWTH
    process.held += 5 * MAX_GROWTH
    await trimmer.look()
    assert process.trims == 0
    process.held = 0
    await trimmer.look()
    assert process.trims == 1


async def test_what_stays_is_tried_again_more_rarely():
    process = Process()
    trimmer = process.trimmer()
    process.resident = process.kept = process.kept + 2 * MAX_GROWTH
    for _ in range(2 * (1 + PAUSE)):
        await trimmer.look()
    assert process.trims == 2
    process.kept -= 2 * MAX_GROWTH  # it was in use
    await trimmer.look()
    assert process.resident == process.kept


async def test_freed_blocks_between_others_are_given_back():
    before = Trimmer(lambda: 0)
    size, kept = resident_bytes(), []
    for _ in range(2_000):
        blocks = [bytearray(50_000) for _ in range(2)]
        kept.append(blocks[0])
    grown = resident_bytes()
    assert grown > size + 2 * MAX_GROWTH
    kept = kept[-1:]
    await before.look()
    assert resident_bytes() < grown - MAX_GROWTH


def test_a_system_that_tells_nothing_is_never_trimmed(monkeypatch, tmp_path):
    monkeypatch.setattr(trim, "_STATM", tmp_path / "none")
    assert resident_bytes() == 0
