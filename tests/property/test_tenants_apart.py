"""Two tenants with the same ids on one server: each is told what it would be told alone.

Three servers: on the first both tenants take turns, on each of the others there is one of them.
Whatever they do, the replies have the same bytes, but for times, epochs and the server's name.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from hypothesis import example, given
from hypothesis import strategies as st

from stepstate.config import ServerConfig
from stepstate.server import running_server
from stepstate.sessions.snapshots.writer import SnapshotWriter
from stepstate.v1 import stepstate_pb2 as pb
from tests.hypothesis_profiles import examples
from tests.integration.requests_of import METHODS, Outcome, call, without_times
from tests.integration.triton import infer
from tests.integration.wire import HANG
from tests.tenants import SaidTenants, as_tenant

TENANTS = ("acme", "initech")
IDS = ("7", "8", "9")
UNKNOWN_FIELD = b"\xc2\x3e\x01a"
"""With it a message is parsed by protobuf, and takes no fast path."""
LASTING = ("StreamSteps", "StreamPacked", "ModelStreamInfer")


@dataclass(frozen=True, slots=True)
class Act:
    """One request of a tenant."""

    tenant: int
    method: str
    request: Message
    ordinary: bool


def _requests(kind: str, one: str, other: str, t: int) -> tuple[str, Message]:
    x = np.array([[0.5, -0.25, t / 8]], "<f4")
    row = pb.StepRequest(session_id=one, t=t, x=x.ravel())
    packed = pb.StreamPackedRequest(
        bindings=[pb.Binding(handle=0, session_id=one), pb.Binding(handle=1, session_id=other)],
        handles=np.array([0, 1], "<u4").tobytes(),
        x=np.concatenate([x, x]).tobytes(),
    )
    made: dict[str, tuple[str, Message]] = {
        "open": (
            "OpenSession",
            pb.OpenSessionRequest(session_id=one, model="lstm", durability=1 + t % 3),
        ),
        "close": ("CloseSession", pb.CloseSessionRequest(session_id=one)),
        "fork": ("ForkSession", pb.ForkSessionRequest(session_id=one, new_session_id=other)),
        "get": ("GetSession", pb.GetSessionRequest(session_id=one)),
        "list": ("ListSessions", pb.ListSessionsRequest()),
        "step": ("Step", row),
        "row": ("StreamSteps", row),
        "next": ("StreamSteps", pb.StepRequest(session_id=one, x=x.ravel())),
        "packed": ("StreamPacked", packed),
        "forecast": ("Forecast", pb.ForecastRequest(session_id=[one, other], horizon=1)),
        "infer": ("ModelStreamInfer", infer("lstm", int(one), x)),
        "start": ("ModelStreamInfer", infer("lstm", int(one), x, sequence_start=True)),
        "end": ("ModelStreamInfer", infer("lstm", int(one), x, sequence_end=True, step_t=t)),
    }
    return made[kind]


def _acts(draw: tuple[int, str, str, str, int, bool]) -> list[Act]:
    tenant, kind, one, other, t, ordinary = draw
    if kind != "rows":
        return [Act(tenant, *_requests(kind, one, other, t), ordinary)]
    # Several in order, so that all but the first are expected.
    return [Act(tenant, *_requests("row", one, other, t + more), ordinary) for more in range(3)]


KINDS = (
    *("open", "rows", "rows", "rows", "rows", "row", "step", "next", "packed", "infer", "start"),
    *("end", "close", "fork", "get", "list", "forecast"),
)
ACTS = st.tuples(
    st.integers(0, 1),
    st.sampled_from(KINDS),
    st.sampled_from(IDS),
    st.sampled_from(IDS),
    st.sampled_from((0, 0, 3, 3, 6, 1)),
    st.sampled_from((False, False, True)),
).map(_acts)


class Caller:
    """A tenant on one server, with a stream of each kind."""

    def __init__(self, channel: grpc.aio.Channel, tenant: str) -> None:
        self._channel = channel
        self._metadata = as_tenant(tenant)
        self._streams: dict[str, grpc.aio.StreamStreamCall] = {}

    async def told(self, act: Act) -> Outcome | bytes:
        """What it is told."""
        method = METHODS[act.method]
        if act.method not in LASTING:
            return await call(self._channel, method, act.request, self._metadata)
        if act.method not in self._streams:
            path = f"/{method.containing_service.full_name}/{method.name}"
            self._streams[act.method] = self._channel.stream_stream(path)(metadata=self._metadata)
        stream = self._streams[act.method]
        data = act.request.SerializeToString()
        await stream.write(data + UNKNOWN_FIELD if act.ordinary else data)
        return without_times(method, await stream.read())

    async def end(self) -> None:
        """Ends its streams."""
        for stream in self._streams.values():
            await stream.done_writing()


class Houses:
    """The servers, on a loop of their own. Each example has tenants of its own."""

    def __init__(self, runner: asyncio.Runner, channels: Sequence[grpc.aio.Channel]) -> None:
        self._runner = runner
        self._channels = channels
        self._examples = 0

    def told(self, acts: Sequence[Act]) -> list[tuple[object, object]]:
        """For each act what is told beside the other tenant, and what alone."""
        self._examples += 1
        return self._runner.run(self._told(acts, [f"{t}-{self._examples}" for t in TENANTS]))

    async def _told(self, acts: Sequence[Act], names: Sequence[str]) -> list[tuple[object, object]]:
        both, *alone = self._channels
        beside = [Caller(both, name) for name in names]
        apart = [Caller(channel, name) for channel, name in zip(alone, names, strict=True)]
        async with asyncio.timeout(HANG):
            told = [
                (await beside[act.tenant].told(act), await apart[act.tenant].told(act))
                for act in acts
            ]
            for caller in (*beside, *apart):
                await caller.end()
        return told


@pytest.fixture(scope="module", params=["memory:", "sqlite:"])
def houses(
    request: pytest.FixtureRequest, model_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Houses]:
    @asynccontextmanager
    async def channel(number: int) -> AsyncIterator[grpc.aio.Channel]:
        file = tmp_path_factory.mktemp("apart") / f"{number}.db"
        config = ServerConfig(
            models=model_root,
            listen="127.0.0.1:0",
            metrics_listen="127.0.0.1:0",
            store=request.param + (str(file) if request.param == "sqlite:" else ""),
            store_fsync=False,
            snapshot_interval=3600.0,
        )
        own = [("grpc.use_local_subchannel_pool", 1)]
        async with (
            running_server(config, authenticator=SaidTenants()) as server,
            grpc.aio.insecure_channel(server.address, options=own) as connected,
        ):
            yield connected

    stack = AsyncExitStack()
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as runner:
        patch.setattr(SnapshotWriter, "request_flush", lambda _: None)  # replies say what is saved

        async def enter() -> list[grpc.aio.Channel]:
            return [await stack.enter_async_context(channel(number)) for number in range(3)]

        yield Houses(runner, runner.run(enter()))
        runner.run(stack.aclose())


def _in_turn(*acts: tuple[int, str, int]) -> list[list[Act]]:
    """Acts of both tenants on the same session: the tenant, what, and t."""
    return [_acts((tenant, kind, "7", "8", t, False)) for tenant, kind, t in acts]


@example(drawn=_in_turn((0, "rows", 0), (1, "row", 3), (1, "rows", 0), (0, "row", 3)))
@example(drawn=_in_turn((0, "infer", 0), (1, "infer", 0), (0, "infer", 0), (1, "infer", 0)))
@example(drawn=_in_turn((0, "end", 0), (1, "end", 0), (0, "end", 0), (1, "end", 0)))
@given(drawn=st.lists(ACTS, min_size=1, max_size=25))
@examples(40)
def test_each_tenant_is_told_what_it_would_be_told_alone(houses: Houses, drawn: list[list[Act]]):
    opened = [
        Act(tenant, *_requests("open", one, one, 0), ordinary=False)
        for one in IDS[:2]
        for tenant in range(2)
    ]
    acts = opened + [act for some in drawn for act in some]
    for act, (beside, alone) in zip(acts, houses.told(acts), strict=True):
        assert beside == alone, act
