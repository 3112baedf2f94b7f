"""All attacks, with their sizes."""

from __future__ import annotations

from tests.attacks import memory
from tests.attacks.attack import Attack

ATTACKS = (
    Attack(memory.bindings_of_a_megabyte, count=1_800, short=600),
    Attack(memory.tables_of_unread_messages, count=1_024, short=300),
    Attack(memory.requests_of_16_megabytes, count=100, short=40),
)
