"""A client in a process of its own, which knows after kill -9 where it was: it keeps a journal.

    python -m tests.chaos.journal ADDRESS FOLDER SESSIONS DURABILITY

Each session has a file in the folder. "> t count" is written before a request, and
"< t durable_t y" after its reply. Rows are made from a seed, as if read from a log.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TextIO

import grpc
import numpy as np

from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.chaos.clients import CHANNEL, Asking, by_call
from tests.chaos.ledger import Ledger

SEEDS = 10_000
"""From here on, so that no two sessions of a campaign have the same rows."""
OUTPUTS = 2
THINK_SECONDS = 0.05


class Journaled(Ledger):
    """A ledger that is also in a file."""

    __slots__ = ("file",)

    file: TextIO

    def request(self, t: int, count: int) -> pb.StepRequest:
        """See `Ledger.request`."""
        count = self.requests.get(t, count)
        self.file.write(f"> {t} {count}\n")
        return super().request(t, count)

    def answered(self, t: int, reply: pb.StepResponse) -> None:
        """See `Ledger.answered`."""
        super().answered(t, reply)
        y = np.asarray(reply.y, "<f4").tobytes().hex()
        self.file.write(f"< {t} {reply.durable_t} {y}\n")


def read(ledger: Ledger, path: Path) -> None:
    """Takes in what a journal says."""
    width = 4 * OUTPUTS
    for line in path.read_text().splitlines():
        mark, t, number, *y = line.split(" ")
        if mark == ">":
            assert ledger.requests.setdefault(int(t), int(number)) == int(number)
            continue
        data = bytes.fromhex(y[0])
        rows = [data[place : place + width] for place in range(0, len(data), width)]
        ledger.given[int(t) : int(t) + len(rows)] = rows
        ledger.durable_t = max(ledger.durable_t, int(number))


def named(place: int, durability: str, kind: type[Ledger] = Ledger) -> Ledger:
    """The ledger of a session, without what its journal says."""
    return kind(f"journal-{place}", SEEDS + place, durability)


async def run(address: str, folder: Path, sessions: int, durability: str) -> None:
    """Steps for ever."""
    async with grpc.aio.insecure_channel(address, options=list(CHANNEL)) as channel:
        stub = StepstateServiceStub(channel)
        async with asyncio.TaskGroup() as group:
            for place in range(sessions):
                ledger = named(place, durability, Journaled)
                path = folder / f"{place}.journal"
                read(ledger, path)
                ledger.file = path.open("a", buffering=1)
                ask = by_call(stub)
                client = Asking(ledger, ask, max_rows=3, think_seconds=THINK_SECONDS)
                group.create_task(client.run())


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
