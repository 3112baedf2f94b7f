"""A process that saves until it is killed, and says what was acknowledged.

`python -m ... URL [NAME]`: its sessions are NAME0, NAME1, ...; the default is s.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import suppress

from stepstate.errors import StoreUnavailable
from stepstate.stores import SaveRequest, SaveResult, SessionStore, open_store
from tests.stores import record


def sessions(name: str) -> list[str]:
    """The ids of a writer's sessions."""
    return [f"{name}{i}" for i in range(16)]


SESSIONS = sessions("s")


def snapshot(t: int) -> bytes:
    """What is saved at t: long enough to be torn."""
    return t.to_bytes(8) * 500


async def write(store: SessionStore, names: list[str]) -> None:
    """Saves all sessions over and over; what is refused is saved again."""
    how = {"owner": "writer", "t": 0, "expires_at": time.time() + 600}
    for name in names:
        await store.create(record(name), **how, snapshot=snapshot(0))
    taken = [await store.acquire(s, owner="writer", fingerprints=["sha256:00"]) for s in names]
    epochs = [entry.epoch for entry, _ in taken]
    t = max(entry.t for entry, _ in taken)
    while True:
        t += 1
        saves = [
            SaveRequest(name, epoch, "writer", t, time.time() + 600, snapshot(t))
            for name, epoch in zip(names, epochs, strict=True)
        ]
        await asyncio.gather(*(save(store, saves[i::4]) for i in range(4)))
        print(t, flush=True)


async def save(store: SessionStore, saves: list[SaveRequest]) -> None:
    """Saves sessions."""
    while True:
        with suppress(StoreUnavailable):
            results = await store.save(saves)
            assert set(results) == {SaveResult.DONE}
            return
        await asyncio.sleep(0.001)


async def main() -> None:
    """Runs the writer."""
    url, name = (*sys.argv[1:], "s")[:2]
    await write(await open_store(url, clock=time.time), sessions(name))


if __name__ == "__main__":
    asyncio.run(main())
