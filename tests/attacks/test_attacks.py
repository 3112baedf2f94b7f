"""What one client does costs nobody else a session, an answer, or the server its memory.

`make attacks` runs every attack at full size and prints the table of SECURITY.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attacks.attack import Attack
from tests.attacks.catalog import ATTACKS
from tests.attacks.harness import Ground, under_attack

pytestmark = pytest.mark.attacks


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground.of(tmp_path)


ON_GRPCIO = ("exports_not_read", "requests_of_16_megabytes", "pings")
"""Attacks that run on the other transport too: on memory by replies and requests, and on HTTP/2."""


def cases() -> list[object]:
    made = []
    for attack in ATTACKS:
        marks = [pytest.mark.long] if attack.short is None else []
        made.append(pytest.param(attack, marks=marks, id=attack.name))
    return made


@pytest.mark.parametrize("attack", cases())
async def test_an_attack_harms_nobody_else(attack: Attack, ground: Ground):
    count = attack.count if attack.short is None else attack.short
    report = await under_attack(attack, count, ground, short=True)
    print(report)
    assert not report.problems(), report


@pytest.mark.parametrize("name", ON_GRPCIO)
async def test_an_attack_harms_nobody_else_on_grpcio(name: str, ground: Ground):
    (attack,) = (one for one in ATTACKS if one.name == name)
    assert attack.short is not None
    report = await under_attack(attack, attack.short, ground, short=True, transport="grpcio")
    print(report)
    assert not report.problems(), report
