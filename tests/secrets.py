"""Whether a secret is in a text, also encoded or in part."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote

FRAGMENT = 12
"""So many characters of a secret, from its beginning or end, are a leak."""


@dataclass(frozen=True, slots=True)
class Secret:
    """What nobody may read.

    Args:
        name: for the test.
        text: all of it.
        private: the part that does not stand in other texts too; empty: all of it.
    """

    name: str
    text: str
    private: str = ""

    def forms(self) -> Iterator[str]:
        """Texts of which none may be in anything that is written or shown."""
        private = self.private or self.text
        for part in (private, private[:FRAGMENT], private[-FRAGMENT:]):
            yield part
            yield quote(part, safe="")
            yield part.encode().hex()
            yield from _base64(part.encode())

    def is_in(self, text: str) -> bool:
        """Whether it can be read there, whatever the case of hexadecimal digits."""
        folded = text.lower()
        return any(form in text or form.lower() in folded for form in self.forms())


def _base64(data: bytes) -> Iterator[str]:
    """How bytes look within something that was encoded, at each of the three places (RFC 4648)."""
    for offset in range(3):
        whole = base64.b64encode(bytes(offset) + data).decode().rstrip("=")
        inner = whole[(0, 2, 3)[offset] : len(whole) - 1]
        yield inner
        yield inner.translate(str.maketrans("+/", "-_"))
