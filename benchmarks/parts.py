"""The parts of a step in the server, and which of its functions belong to each.

A function belongs to the part that names it, or else its class, its file or its folder: the
narrowest counts. What no part names, as torch, NumPy and the counters of metrics, belongs to the
function that called it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

LOOP = "loop"
PARTS: dict[str, tuple[str, ...]] = {
    "frames": ("h2grpc/",),
    "decode": (
        "transport/expected_rows.py",
        "transport/interceptor.py: _codec.decoded",
        "transport/packed_request.py",
        "transport/parts.py",
        "transport/row_codec.py",
        "transport/steps.py: decode_step",
        "transport/steps.py: make_step",
        "transport/triton/expected_infers.py",
        "transport/triton/infer_codec.py",
    ),
    "checks": (
        "transport/",
        "sessions/",
        "engine/engine.py: Engine.submit",
    ),
    "forward": (
        "engine/",
        "sessions/rows.py: RowBatcher._take",
        "sessions/rows.py: RowBatcher._step",
    ),
    "commit": (
        "engine/engine.py: Engine._report",
        "sessions/admission.py: Admission.settled",
        "sessions/replay.py",
        "sessions/rows.py: RowCommitter",
        "sessions/rows.py: RowBatcher._answer",
        "sessions/scheduler.py: StepScheduler.stepped",
        "sessions/scheduler.py: StepScheduler.stepped_pack",
        "sessions/scheduler.py: StepScheduler._finish",
        "sessions/scheduler.py: StepScheduler._finish_pack",
        "sessions/scheduler.py: StepScheduler._settle",
        "sessions/types.py: Source.finished",
    ),
    "encode": (
        "transport/interceptor.py: _codec.encoded",
        "transport/packed_request.py: PackedRequest.put_pack",
        "transport/packed_request.py: PackedRequest.response",
        "transport/row_codec.py: saved",
        "transport/steps.py: encode_step",
        "transport/row_stream.py: RowStream.deliver_row",
        "transport/steps.py: StepStream._encode",
        "transport/steps.py: StepStream._encode_row",
    ),
    "write": (
        "h2grpc/call.py: Call.send",
        "h2grpc/server.py: _ServerProtocol._flush",
        "h2grpc/stream.py: Http2Stream.send",
        "transport/bidi.py: BidiStream.deliver",
        "transport/bidi.py: BidiStream._send",
        "transport/bidi.py: BidiStream._flush",
        "transport/bidi.py: BidiStream._next_reply",
        "transport/bidi.py: BidiStream._answered",
        "transport/bidi.py: BidiStream._release",
    ),
    LOOP: (),
}
"""In the order in which a step comes through them. The loop is all else: uvloop's, and with it the
system's calls that wait for sockets and read them."""
_PART_OF = {place: part for part, places in PARTS.items() for place in places}


@dataclass(frozen=True, slots=True)
class Frame:
    """A function that was running, or that had called one."""

    file: str
    """Below the package's folder."""
    function: str
    """With its class, or the function that it is in."""

    def places(self) -> Iterator[str]:
        """What a part may name it by, the narrowest first."""
        yield f"{self.file}: {self.function}"
        yield f"{self.file}: {self.function.rpartition('.')[0]}"
        yield self.file
        yield f"{self.file.partition('/')[0]}/"


def part_of(stack: Sequence[Frame]) -> tuple[str, str]:
    """The part that was at work, and the name of its function.

    Args:
        stack: functions of the package, the outermost first.
    """
    for frame in reversed(stack):
        for place in frame.places():
            if place in _PART_OF:
                return _PART_OF[place], frame.function
    return LOOP, "uvloop"
