"""ARCHITECTURE.md is true: a request enters the files and functions that it lists, in order."""

from __future__ import annotations

import asyncio
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest

from stepstate.config import ServerConfig
from stepstate.server import running_server
from stepstate.v1 import stepstate_pb2 as pb
from tests.integration.wire import raw_stub

PAGE = (Path(__file__).parents[2] / "ARCHITECTURE.md").read_text()
LAYERS = ("h2grpc/", "transport/", "sessions/", "engine/", "stores/")
STATION = re.compile(r"`([\w/]+\.py)`: (`[\w.]+`(?:, `[\w.]+`)*)")
OTHER_FRAMES = {
    "h2grpc/frames.py", "h2grpc/waiting.py", "h2grpc/lifetime.py", "h2grpc/limits.py"
}  # fmt: skip
"""What the client's HTTP/2 sends beside messages, when it likes: window updates and pings. And what
is done at the end of a read, with as many frames as have come."""
WARM_UP = 20

Walk = list[tuple[str, str]]
"""Files of the package, and functions in them, in the order in which they were entered."""


class Recorder:
    """Records the functions of the package that are called in this process, in all its threads."""

    def __init__(self) -> None:
        self.walk: Walk = []
        self.on = False

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if not self.on or event != "call":
            return
        file = frame.f_code.co_filename.rpartition("/stepstate/")[2]
        if file.startswith(LAYERS):
            self.walk.append((file, frame.f_code.co_qualname.replace(".<locals>", "")))


@pytest.fixture
def recorder():
    recorder = Recorder()
    threading.setprofile(recorder)
    sys.setprofile(recorder)
    yield recorder
    threading.setprofile(None)
    sys.setprofile(None)


def listed(heading: str) -> Walk:
    """What the page lists under a heading."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    found = STATION.findall(section)
    return [(file, name.strip("` ")) for file, names in found for name in names.split(",")]


async def stream_row(stub, session_id: str, recorder: Recorder, *, counted: bool = True) -> None:
    """Steps a session on an open stream; records the last row. `counted`: with its t."""
    call = stub.StreamSteps()
    for t in range(WARM_UP):
        await asyncio.sleep(0.05 if t == WARM_UP - 1 else 0)  # what came before has ended
        recorder.on = t == WARM_UP - 1
        sent_t = t if counted else None
        await call.write(pb.StepRequest(session_id=session_id, x=(0.5, 0.5, 0.5), t=sent_t))
        assert (await call.read()).t == t + 1
    await asyncio.sleep(0.05)
    recorder.on = False
    await call.done_writing()


async def uncounted_row(stub, session_id: str, recorder: Recorder) -> None:
    """Steps a session on an open stream without t; records the last row."""
    await stream_row(stub, session_id, recorder, counted=False)


async def unary_step(stub, session_id: str, recorder: Recorder) -> None:
    """Steps a session with unary calls; records the last one."""
    for t in range(WARM_UP):
        await asyncio.sleep(0.05 if t == WARM_UP - 1 else 0)
        recorder.on = t == WARM_UP - 1
        reply = await stub.Step(pb.StepRequest(session_id=session_id, x=(0.5, 0.5, 0.5), t=t))
        assert reply.t == t + 1
    recorder.on = False


WALKS = {
    "The way of one `StreamSteps` row": (stream_row, "memory:", pb.DURABILITY_NONE),
    "The way of any other `StreamSteps` request": (uncounted_row, "memory:", pb.DURABILITY_NONE),
    "The way of one sync `Step`": (unary_step, "sqlite:", pb.DURABILITY_SYNC),
}


@pytest.mark.parametrize("heading", WALKS)
async def test_a_request_enters_the_files_that_the_page_lists(
    heading: str, config: ServerConfig, tmp_path: Path, recorder: Recorder
):
    step, store, durability = WALKS[heading]
    store += str(tmp_path / "walk.db") if store == "sqlite:" else ""
    async with (
        running_server(replace(config, store=store)) as server,
        raw_stub(server.address) as stub,
    ):
        await stub.OpenSession(
            pb.OpenSessionRequest(session_id="a", model="lstm", durability=durability)
        )
        await step(stub, "a", recorder)
    walk, told = recorder.walk, listed(heading)
    assert [place for place in told if place not in walk] == []
    rest = iter(walk)
    assert [place for place in told if place not in rest] == []  # in this order
    assert {file for file, _ in walk} - OTHER_FRAMES == {file for file, _ in told} - OTHER_FRAMES
