"""A process that opens and closes sessions of tenants, as a server does.

`python -m ... URL fill NAME LIMIT`: opens sessions of the tenant `acme` until it is told that the
tenant has no room, and says how many.
`python -m ... URL churn NAME`: opens, takes, expires, restores and ends sessions until it is
killed; says so after each.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time

from stepstate.identity import SessionKey
from stepstate.stores import SaveRequest, SessionStore, StoredSession, TenantFull, open_store
from tests.stores import CLOSED, FINGERPRINT, SNAPSHOT, record

HOW = {"owner": "opener", "t": 0, "snapshot": SNAPSHOT}


async def fill(store: SessionStore, name: str, limit: int) -> None:
    """Opens sessions, several at once, until the tenant has no room."""
    count = 0
    while True:
        keys = [f"acme/{name}-{count}-{i}" for i in range(4)]
        until = store.now() + 600
        told = await asyncio.gather(
            *(
                store.create(record(key), **HOW, expires_at=until, max_open_sessions=limit)
                for key in keys
            )
        )
        count += sum(isinstance(one, int) for one in told)
        if any(isinstance(one, TenantFull) for one in told):
            print(count, flush=True)
            return


async def churn(store: SessionStore, name: str) -> None:
    """Changes how many sessions are open, in every way."""
    chance = random.Random(name)
    while True:
        tenant = chance.choice(("", "acme/", "other/"))
        key = SessionKey(f"{tenant}{name}-{chance.randrange(20)}")
        found = await store.find(key)
        until = store.now() + 600
        if not isinstance(found, StoredSession):
            await store.create(record(key), **HOW, expires_at=until)
        elif found.delete_at is not None:
            await store.restore(key, found.epoch, expires_at=until)
        elif chance.random() < 0.3:
            await store.end(key, found.epoch, CLOSED)
        elif chance.random() < 0.5:
            save = SaveRequest(key, found.epoch, "", 1, 0.0, b"later")
            await store.expire([save], delete_at=until)
        else:
            await store.acquire(key, owner=name, fingerprints=[FINGERPRINT])
        print(key, flush=True)


async def main() -> None:
    """Runs the process."""
    url, what, name, *limit = sys.argv[1:]
    store = await open_store(url, clock=time.time)
    await store.heartbeat()
    await (fill(store, name, int(limit[0])) if what == "fill" else churn(store, name))
    await store.close()


if __name__ == "__main__":
    asyncio.run(main())
