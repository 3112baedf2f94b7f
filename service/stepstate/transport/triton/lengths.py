"""How long the fields of a request may be.

A request holds at most `MAX_REST_BYTES` beside the values of its tensors, which is checked before
it is parsed. Each field has a bound of its own, so that an error names the field.
"""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import Message

from stepstate.errors import InvalidField

MAX_TEXT_BYTES = 256
"""Of a name or an id."""
MAX_ITEMS = 64
"""Of a list or a map."""
MAX_VALUE_BYTES = 4096
"""Of a parameter: clients may send some that mean nothing here."""
MAX_OUTPUTS = 1024
VALUES = frozenset(
    {
        "inference.ModelInferRequest.raw_input_contents",
        "inference.InferTensorContents.fp32_contents",
        "inference.InferTensorContents.fp64_contents",
    }
)
"""The values of tensors, which may be as long as a message: they must match the shape."""

_ONE = (Message, str, bytes, int, float)
_OTHER_BOUNDS: Mapping[str, int] = {
    "inference.InferParameter.string_param": MAX_VALUE_BYTES,
    "inference.ModelInferRequest.outputs": MAX_OUTPUTS,
}


def check_lengths(message: Message, where: str = "") -> None:
    """Refuses a message with a field that is too long.

    Args:
        message: the message, or a part of it.
        where: what the names of its fields begin with.

    Raises:
        InvalidField: it names the field.
    """
    for field, value in message.ListFields():
        if field.full_name in VALUES:
            continue
        name, most = f"{where}{field.name}", _OTHER_BOUNDS.get(field.full_name)
        if isinstance(value, _ONE):
            _check_item(name, value, most or MAX_TEXT_BYTES)
            continue
        _check(name, "items", len(value), most or MAX_ITEMS)
        if isinstance(value, Mapping):
            for key, item in value.items():
                _check_item(f"{name}.key", key, MAX_TEXT_BYTES)
                _check_item(f"{name}.value", item, MAX_TEXT_BYTES)
        else:
            for item in value:
                _check_item(name, item, MAX_TEXT_BYTES)


def _check_item(name: str, item: object, most: int) -> None:
    if isinstance(item, Message):
        check_lengths(item, f"{name}.")
    elif isinstance(item, str | bytes):
        _check(name, "bytes", len(item.encode() if isinstance(item, str) else item), most)


def _check(name: str, unit: str, count: int, most: int) -> None:
    if count > most:
        raise InvalidField(name, f"has {count} {unit}, a request takes at most {most}")
