"""Triton's requests that are recognized by their bytes and those that are parsed come to the same.

Two servers get the same requests at once, one of them with an unknown field in each, so that
protobuf parses it. The replies of each sequence have the same bytes, in the same order.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from stepstate.config import ServerConfig
from stepstate.identity import DEFAULT_TENANT
from stepstate.server import Server, running_server
from tests.hypothesis_profiles import examples
from tests.integration.triton import infer, put
from tests.integration.wire import HANG, TOLERANCE
from tests.networks import make_network

UNKNOWN_FIELD = b"\xc2\x3e\x01a"
METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
SEQUENCES: tuple[int | str, ...] = (7, "meter", 2**63, "8")
MODELS = ("first", "second", "first", "second")
"""Of each sequence."""

Change = Callable[[pb.ModelInferRequest], None]


def _values(*values: float) -> Change:
    def change(request: pb.ModelInferRequest) -> None:
        request.raw_input_contents[0] = np.array(values, "<f4").tobytes()

    return change


def _with(name: str, *, value: object) -> Change:
    return lambda request: put(request, name, value)


def _outputs(*names: str) -> Change:
    outputs = [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in names]
    return lambda request: request.outputs.MergeFrom(outputs)


def _flat(request: pb.ModelInferRequest) -> None:
    request.inputs[0].shape[:] = [3]


def _two_rows(request: pb.ModelInferRequest) -> None:
    request.inputs[0].shape[:] = [2, 3]
    request.raw_input_contents[0] *= 2


def _double(request: pb.ModelInferRequest) -> None:
    x = np.frombuffer(request.raw_input_contents[0], "<f4")
    request.inputs[0].datatype = "FP64"
    request.raw_input_contents[0] = x.astype("<f8").tobytes()


def _typed(request: pb.ModelInferRequest) -> None:
    x = np.frombuffer(request.raw_input_contents[0], "<f4")
    request.inputs[0].contents.fp32_contents.extend(x.tolist())
    request.ClearField("raw_input_contents")


WAYS: dict[str, Change] = {
    "row": lambda _: None,
    "flat": _flat,
    "start": _with("sequence_start", value=True),
    "end": _with("sequence_end", value=True),
    "two rows": _two_rows,
    "nan": _values(0, np.nan, 1),
    "huge": _values(3e38, 3e38, 3e38),
    "too short": _values(0, 1),
    "double": _double,
    "typed": _typed,
    "step_t": _with("step_t", value=2),
    "final": _with("triton_enable_empty_final_response", value=True),
    "states": _outputs("h", "y"),
    "other model": lambda request: setattr(request, "model_name", "second"),
    "any model": lambda request: request.ClearField("model_name"),
    "version": lambda request: setattr(request, "model_version", "1"),
    "other version": lambda request: setattr(request, "model_version", "2"),
    "not ASCII": lambda request: setattr(request, "id", f"é{request.id}"),
    "long id": lambda request: setattr(request, "id", request.id.rjust(130)),
}  # fmt: skip
MESSAGES = ("row", "row", "row", "flat", "final", *WAYS)


@dataclass(frozen=True, slots=True)
class Read:
    """Requests that are sent at once: of which sequence, and in which way."""

    requests: tuple[tuple[int, str], ...]
    swapped: bool
    """Whether the sequences have changed their streams, of which there are two."""


class Pair:
    """Both servers, on a loop of their own."""

    def __init__(self, runner: asyncio.Runner, servers: Sequence[Server], *, sync: bool) -> None:
        self._runner = runner
        self._servers = servers
        self.sync = sync
        """Rows are saved before they are answered: none takes the fast path."""

    def replies(self, reads: Sequence[Read]) -> list[Mapping[int, Sequence[bytes]]]:
        """Of each server: its replies, by sequence."""
        return [
            self._runner.run(_replies(server.address, reads, suffix))
            for server, suffix in zip(self._servers, (b"", UNKNOWN_FIELD), strict=True)
        ]

    def recognized(self, request: bytes) -> list[bool]:
        """Whether each server would recognize a request."""
        tritons = [server._triton for server in self._servers]  # noqa: SLF001 - it shows nowhere
        return [
            one is not None and one.expected.find(DEFAULT_TENANT, request) is not None
            for one in tritons
        ]


async def _replies(
    address: str, reads: Sequence[Read], suffix: bytes
) -> Mapping[int, Sequence[bytes]]:
    found: dict[int, list[bytes]] = defaultdict(list)
    sent: list[int] = []  # the sequence of each request
    async with asyncio.timeout(HANG), grpc.aio.insecure_channel(address) as channel:
        calls = [channel.stream_stream(METHOD)() for _ in range(2)]
        for read in reads:
            used = []
            for sequence, way in read.requests:
                used.append(calls[(sequence + read.swapped) % 2])
                await used[-1].write(message(sequence, way, len(sent)) + suffix)
                sent.append(sequence)
            for call in used:
                reply = await call.read()
                found[sent[_number(reply)]].append(reply)
        for call in calls:
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
    return found


def message(sequence: int, way: str, number: int) -> bytes:
    x = np.random.default_rng(number).standard_normal((1, 3)).astype(np.float32)
    request = infer(MODELS[sequence], SEQUENCES[sequence], x, request_id=str(number))
    request.outputs.add(name="y")
    WAYS[way](request)
    return request.SerializeToString()


def _number(reply: bytes) -> int:
    """Which request it answers."""
    return int(_parsed(reply).infer_response.id.lstrip("é"))


def _parsed(reply: bytes) -> pb.ModelStreamInferResponse:
    return pb.ModelStreamInferResponse.FromString(reply)


def assert_same_reply(one: bytes, other: bytes, *, exact: bool) -> None:
    """Bytes are equal, but for outputs that were computed in batches of different sizes."""
    if one == other:
        return
    mine, theirs = _parsed(one), _parsed(other)
    assert not exact, f"{mine} is not {theirs}"
    assert len(one) == len(other), f"{mine} is not {theirs}"
    outputs = [
        np.frombuffer(b"".join(reply.infer_response.raw_output_contents), "<f4")
        for reply in (mine, theirs)
    ]
    np.testing.assert_allclose(*outputs, rtol=TOLERANCE, atol=TOLERANCE)
    for reply in (mine, theirs):
        del reply.infer_response.raw_output_contents[:]
    assert mine == theirs, f"{mine} is not {theirs}"


@pytest.fixture(scope="module", params=["none", "async", "sync"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp("both")
    for seed, name in enumerate(("first", "second")):
        make_network(name, hidden=4, layers=1, seed=seed).write(root / "models")

    def config(name: str) -> ServerConfig:
        return ServerConfig(
            models=root / "models",
            listen="127.0.0.1:0",
            metrics_listen="127.0.0.1:0",
            store=f"sqlite:{root / name}.db",
            durability=request.param,
            batch_rows=3,
        )

    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        servers = [
            runner.run(stack.enter_async_context(running_server(config(name))))
            for name in ("straight", "parsed")
        ]
        yield Pair(runner, servers, sync=request.param == "sync")
        runner.run(stack.aclose())


def all_four(way: str) -> Read:
    return Read(tuple((place, way) for place in range(4)), swapped=False)


def sequences(count: int) -> st.SearchStrategy[list[Read]]:
    """What so many sequences send."""
    requests = st.tuples(st.integers(0, count - 1), st.sampled_from(MESSAGES))
    read = st.builds(Read, st.lists(requests, min_size=1, max_size=12).map(tuple), st.booleans())
    begin = Read(tuple((place, "start") for place in range(count)), swapped=False)
    return st.lists(read, min_size=1, max_size=4).map(lambda reads: [begin, *reads])


@examples(20)
@given(reads=sequences(4))
@example(reads=[Read(((0, "start"), *[(0, "row")] * 6, (0, "end")), swapped=False)])
@example(reads=[all_four("start"), *[all_four("row")] * 4])
def test_both_answer_alike(pair: Pair, reads: list[Read]) -> None:
    found, expected = pair.replies(reads)
    assert found.keys() == expected.keys()
    for sequence, replies in found.items():
        for one, other in zip(replies, expected[sequence], strict=True):
            assert_same_reply(one, other, exact=False)


@examples(20)
@given(reads=sequences(1))
def test_a_sequence_that_is_alone_gets_the_same_bytes(pair: Pair, reads: list[Read]) -> None:
    found, expected = pair.replies(reads)
    for one, other in zip(found[0], expected[0], strict=True):
        assert_same_reply(one, other, exact=True)


@pytest.mark.parametrize("way", ["row", "flat", "final", "version", "any model"])
def test_only_requests_without_more_fields_are_recognized(pair: Pair, way: str) -> None:
    pair.replies([Read(((0, "start"), (0, way), (0, way)), swapped=False)])
    assert pair.recognized(message(0, way, 12)) == [not pair.sync, False]
    assert pair.recognized(message(0, way, 12) + UNKNOWN_FIELD) == [False, False]


async def test_a_message_that_is_cut_short_is_no_row_of_a_wider_model(tmp_path: Path) -> None:
    """Requests without a model's name have rows of every width behind the same names."""
    widths = {"wide": 3, "narrow": 1}
    for name, width in widths.items():
        make_network(name, inputs=width).write(tmp_path)
    config = ServerConfig(
        models=tmp_path, listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", store="memory:"
    )

    def request(name: str, sequence: int, **start: bool) -> bytes:
        x = np.full((1, widths[name]), 0.5)
        return infer(name if start else "", sequence, x, **start).SerializeToString()

    async with running_server(config) as server, grpc.aio.insecure_channel(server.address) as there:
        stream = there.stream_stream(METHOD)()

        async def ask(message: bytes) -> pb.ModelStreamInferResponse:
            await stream.write(message)
            return _parsed(await asyncio.wait_for(stream.read(), HANG))

        for name, sequence in (("wide", 1), ("wide", 2), ("narrow", 3)):
            assert not (await ask(request(name, sequence, sequence_start=True))).error_message
            assert not (await ask(request(name, sequence))).error_message
        cut = request("wide", 1)[:-12] + np.array([np.nan], "<f4").tobytes()
        assert "can't be parsed" in (await ask(cut)).error_message
        for name, sequence in (("wide", 1), ("wide", 2), ("narrow", 3)):
            assert not (await ask(request(name, sequence))).error_message
