"""A process that saves until it is killed, and says what was acknowledged: `python -m ... URL`."""

from __future__ import annotations

import asyncio
import sys
import time

from stepstate.stores import SaveRequest, SessionStore, open_store
from tests.stores import record

SESSIONS = [f"s{i}" for i in range(16)]


def snapshot(t: int) -> bytes:
    """What is saved at t: long enough to be torn."""
    return t.to_bytes(8) * 500


async def write(store: SessionStore) -> None:
    """Saves all sessions over and over."""
    how = {"owner": "writer", "t": 0, "expires_at": time.time() + 600}
    for name in SESSIONS:
        await store.create(record(name), **how, snapshot=snapshot(0))
    taken = [await store.acquire(s, owner="writer", fingerprints=["sha256:00"]) for s in SESSIONS]
    epochs = [entry.epoch for entry, _ in taken]
    t = max(entry.t for entry, _ in taken)
    while True:
        t += 1
        saves = [
            SaveRequest(name, epoch, "writer", t, time.time() + 600, snapshot(t))
            for name, epoch in zip(SESSIONS, epochs, strict=True)
        ]
        await asyncio.gather(*(store.save(saves[i::4]) for i in range(4)))
        print(t, flush=True)


async def main() -> None:
    await write(await open_store(sys.argv[1], clock=time.time))


if __name__ == "__main__":
    asyncio.run(main())
