"""Attacks with odd data: sessions that can't be shown, and snapshots that nobody wrote."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress

import grpc
import numpy as np

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.attacks import forge
from tests.attacks.attack import Target
from tests.attacks.honest import MODEL
from tests.attacks.networks import CLOCK
from tests.integration.triton import infer, triton_stub
from tests.integration.wire import raw_stub

ODD_TIMES = (
    "0001-01-01T00:00:00+14:00",
    "9999-12-31T23:59:59-14:00",
    "0001-01-01T00:00:00",
    "9999-12-31T23:59:59",
)
ODD_NUMBERS = (-1, 2**53, 2**62, 2**63 - 1, -(2**63))
DEEP = 100_000
FORGED_BYTES = (15 * 2**20, 3_900_000)
"""Of remembered replies: more than any reply has, and as much as one may have."""


async def odd_start_times(target: Target, count: int) -> None:
    """Starts Triton sequences whose start time can't be converted to UTC, or has no time after it.

    ListSessions was INTERNAL for everybody from then on, and a restart did not help.
    """
    async with triton_stub(target.address) as stub:
        for place in range(count):
            for model, width in ((MODEL, 3), (CLOCK, 1)):
                request = infer(
                    model,
                    f"{model}-{place}",
                    np.zeros((1, width), np.float32),
                    sequence_start=True,
                    start_time=ODD_TIMES[place % len(ODD_TIMES)],
                )
                with suppress(grpc.aio.AioRpcError):
                    await stub.ModelInfer(request)


async def odd_snapshots(target: Target, count: int) -> None:
    """Imports snapshots with a right checksum, whose record has values of other types.

    A version that was a number made /metrics answer 500; JSON that is nested deeply was INTERNAL.
    """
    async with raw_stub(target.address) as stub:
        good = await exported(stub, "odd", MODEL)
        for place in range(count):
            for forged in odd(good):
                await imported(stub, f"odd-{place}-{len(forged)}", forged)


def odd(good: bytes) -> Iterator[bytes]:
    """Snapshots with one odd value each."""
    for name in ("version", "model", "session_id", "fingerprint", "start_time", "open_time"):
        for value in (1, None, "", "\x1b[31m\n", [[]], 1e300):
            yield forge.with_record(good, **{name: value})
    for value in (0, -1, float("nan"), 1e300, "1", None):
        yield forge.with_record(good, idle_timeout_seconds=value)
    yield forge.with_identity(good, b"[" * DEEP + b"]" * DEEP)
    yield forge.with_identity(good, json.dumps(["[" * DEEP + "]" * DEEP, ""]).encode())


async def odd_rows_of_the_store(target: Target, count: int) -> None:
    """Writes rows into the store whose numbers are out of range, and asks for all of them.

    Whole pages failed, some as "store is away", which clients wait out.
    """
    names = ("t", "epoch", "expires", "due")
    with closing(sqlite3.connect(target.store, isolation_level=None, timeout=30)) as file:
        columns = [row[1] for row in file.execute("PRAGMA table_info(sessions)")]
        row = dict(zip(columns, file.execute("SELECT * FROM sessions").fetchone(), strict=True))
        holes = ",".join("?" * len(columns))
        for place in range(count):
            for name in names:
                odd_row = row | {"session_id": f"row-{place}-{name}"}
                odd_row |= {"owner": "", name: ODD_NUMBERS[place % len(ODD_NUMBERS)]}
                file.execute(f"INSERT INTO sessions VALUES ({holes})", list(odd_row.values()))
    async with raw_stub(target.address) as stub:
        with suppress(grpc.aio.AioRpcError):
            await stub.ListSessions(pb.ListSessionsRequest(page_size=1000))
        for place in range(count):
            for name in names:
                ask = pb.StepRequest(session_id=f"row-{place}-{name}", x=[0.0] * 3)
                with suppress(grpc.aio.AioRpcError):
                    await stub.Step(ask)


async def slots_by_bad_imports(target: Target, count: int) -> None:
    """Imports snapshots of a model with a calendar, whose start time is in the year 1.

    Each took a slot that was not given back: with 200 slots, 200 of them, and nobody could open a
    session until a restart.
    """
    async with raw_stub(target.address) as stub:
        good = await exported(stub, "clock", CLOCK)
        forged = forge.with_record(good, start_time="0001-01-01T00:00:00+00:00")
        for place in range(count):
            await imported(stub, f"bad-{place}", forged)
            with suppress(grpc.aio.AioRpcError):
                await stub.Step(pb.StepRequest(session_id=f"bad-{place}", x=[0.0]))
            with suppress(grpc.aio.AioRpcError):
                await stub.CloseSession(pb.CloseSessionRequest(session_id=f"bad-{place}"))


async def forged_replies(target: Target, count: int) -> None:
    """Imports sessions that remember replies of 15 MB, which no server sends, and of 3.9 MB.

    18 of them pushed the remembered replies of others out: their retries were STEP_TOO_OLD.
    """
    async with raw_stub(target.address) as stub:
        good = await exported(stub, "forged", MODEL)
        for size in FORGED_BYTES:
            forged = forge.with_reply(good, size)
            for place in range(count):
                await imported(stub, f"forged-{size}-{place}", forged)
        for size in FORGED_BYTES:  # an open session may keep its last reply
            for place in range(count):
                with suppress(grpc.aio.AioRpcError):
                    ask = pb.CloseSessionRequest(session_id=f"forged-{size}-{place}")
                    await stub.CloseSession(ask)


async def exported(stub: StepstateServiceStub, name: str, model: str) -> bytes:
    """The snapshot of a new session with two rows."""
    width = 3 if model == MODEL else 1
    request = pb.OpenSessionRequest(session_id=name, model=model)
    request.start_time.FromSeconds(1_700_000_000)
    await stub.OpenSession(request)
    await stub.Step(pb.StepRequest(session_id=name, t=0, x=[0.5] * 2 * width))
    reply = await stub.ExportSession(pb.ExportSessionRequest(session_id=name))
    return bytes(reply.snapshot)


async def imported(stub: StepstateServiceStub, name: str, snapshot: bytes) -> None:
    """Imports a snapshot, if the server takes it."""
    with suppress(grpc.aio.AioRpcError):
        await stub.ImportSession(pb.ImportSessionRequest(session_id=name, snapshot=snapshot))
