"""What stands for bytes that are no message, on its way to whoever answers them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stepstate.errors import InvalidField


@dataclass(frozen=True, slots=True)
class DecodeFailure:
    """Stands for bytes that are no message of the RPC's type."""

    detail: str

    @property
    def error(self) -> InvalidField:
        """What is told of them."""
        return InvalidField("message", f"can't be parsed ({self.detail}): is the proto file old?")


def well_formed(message: Any) -> Any:
    """The message.

    Raises:
        InvalidField: it is `DecodeFailure`.
    """
    if isinstance(message, DecodeFailure):
        raise message.error
    return message
