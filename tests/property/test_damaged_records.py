"""Whatever a store holds for one session, it stays a matter of that session.

Arbitrary bytes, types and numbers are put where a session's record, numbers, snapshot or ending
were. The others are then listed, stepped, saved, swept, counted and drained as if nothing were,
the odd one has typed errors only, and can be closed.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stepstate import errors
from stepstate.identity import DEFAULT_TENANT
from stepstate.sessions.options import CopyOptions
from stepstate.stores import Durability
from stepstate.v1 import stepstate_pb2 as pb
from tests.networks import make_network
from tests.property.homes import ODD, Door, FileHome, MemoryHome, RedisHome
from tests.redis_process import RedisProcess, redis_process
from tests.unit.rig import Clock, model_of, opening

NETWORK = make_network("lstm", hidden=8, seed=1)
MODEL = model_of(NETWORK)
X = np.random.default_rng(3).normal(size=(8, 3)).astype(np.float32)
GOOD = ("b", "g", "z")
CLOSE = 1e-5
DEEP = 100_000
TYPED = (
    errors.SessionUnreadable,
    errors.SnapshotModelMismatch,
    errors.NotFound,
    errors.SessionExists,
    errors.StaleOwner,
    errors.StepAhead,
    errors.StepMismatch,
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 2**53, 2**63, 2**64, 10**30, 10**400]),
    st.floats(),
    st.sampled_from(
        [
            "0000-01-01T00:00:00+00:00",
            "0001-01-01T00:00:00+23:59",
            "9999-12-31T23:59:59-23:59",
            "2026-01-01T00:00:00",
            "\ud800",
            "",
            "none",
            ODD * 5000,
        ]
    ),
    st.text(max_size=20),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
RECORD = {
    "session_id": ODD,
    "model": "lstm",
    "version": "1",
    "fingerprint": MODEL.manifest.fingerprint,
    "idle_timeout_seconds": 100.0,
    "start_time": None,
    "open_time": "2026-01-02T03:04:05+00:00",
    "durability": "sync",
    "missing": "reject",
    "interval_level": None,
    "tenant": DEFAULT_TENANT,
}

FIELDS = tuple(RECORD)


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


records = st.one_of(
    st.binary(max_size=50),
    values.map(as_json),
    st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=2).map(
        lambda some: as_json(RECORD | some)
    ),
    st.sampled_from(FIELDS).map(
        lambda name: as_json({key: value for key, value in RECORD.items() if key != name})
    ),
    st.sampled_from([b"[" * DEEP, b'{"x":' * DEEP, b"[" * DEEP + b"]" * DEEP]),
)
numbers = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=8), st.binary(max_size=8)
)
digits = st.one_of(
    st.binary(max_size=12),
    st.sampled_from([b"", b"nan", b"inf", b"-1", b"1e300", b"0x10", b"9" * 17, b"9" * 400]),
    st.integers(-(2**63), 2**80).map(lambda number: str(number).encode()),
)
blobs = st.one_of(st.binary(max_size=60), st.text(max_size=20), st.integers(-(2**63), 2**63 - 1))


async def survive(home: FileHome | RedisHome | MemoryHome, damage: object) -> None:
    """Damages one of four sessions between two servers, and looks what the second one does."""
    clock = Clock()
    clock.now = float(int(time.time()))
    store = await home.open(clock)
    first = Door(MODEL, store=store, clock=clock, owner="first")
    await first.rig.sessions.start()
    for name in (*GOOD, ODD):
        await first.rig.open(name, durability=Durability.SYNC)
        await first.step(name, X[0], 0)
    await first.rig.sessions.drain()
    home.damage(damage)

    second = Door(MODEL, store=store, clock=clock, owner="second")
    sessions = second.rig.sessions
    await sessions.start()
    await sessions.survey.look()
    assert set(await second.listed()) - {ODD} == set(GOOD)
    for ask in (
        sessions.look(ODD),
        sessions.get(ODD),
        sessions.open(opening(ODD)),
        sessions.fork(ODD, CopyOptions("copy", None, None)),
        sessions.restore_expired(ODD),
        sessions.reset_accuracy(ODD),
        sessions.page("", 10, "", expired=True, tenant=DEFAULT_TENANT),
        second.native.GetSession(pb.GetSessionRequest(session_id=ODD), None),
    ):
        with suppress(*TYPED):
            await ask
    # Many at once: whatever the store does together, each has its own outcome.
    y = await asyncio.gather(
        *(second.step(name, X[1], 1) for name in (GOOD[0], ODD, *GOOD[1:])), return_exceptions=True
    )
    good = [y[0], *y[2:]]
    assert np.abs(np.concatenate(good) - NETWORK.offline(X[:2])[1]).max() <= CLOSE
    assert isinstance(y[1], (np.ndarray, *TYPED)), y[1]
    await sessions.sweep()
    counts = await store.count()
    assert counts.get(("default", "lstm/1"), 0) >= len(GOOD)
    assert sessions.unreadable_sessions <= 1

    listed = await second.listed()
    try:
        await second.close(ODD)
    except errors.NotFound:  # by the damage it had expired, or is none
        assert ODD not in listed
    assert ODD not in await second.listed()
    assert sessions.unreadable_sessions == 0
    with pytest.raises(errors.NotFound):
        await sessions.get(ODD)
    await sessions.open(opening(ODD))
    await second.step(ODD, X[0], 0)
    await sessions.drain()
    await store.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    with redis_process(tmp_path_factory.mktemp("redis")) as running:
        yield running


def texts(of: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes | bytearray]:
    return st.one_of(of, of.map(bytearray))


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "record": st.one_of(texts(records), numbers),
            "t": numbers,
            "expires": numbers,
            "due": numbers,
            "expired": st.one_of(st.just(1), numbers),
            "epoch": numbers,
            "owner": st.one_of(texts(st.binary(max_size=20)), st.text(max_size=2000)),
            "model": st.one_of(texts(st.binary(max_size=20)), st.just("lstm/2"), numbers),
            "tenant": st.one_of(texts(st.binary(max_size=20)), st.just("acme"), numbers),
            "snapshot": st.one_of(texts(st.binary(max_size=60)), numbers),
        },
    )
)
@example({"record": b"[" * DEEP})
@example({"record": bytearray(b"\xff")})
@example({"epoch": "text"})
@example({"t": 2**53, "expires": 0.5})
@example({"tenant": bytearray(b"\xff")})
@example({"tenant": "acme"})
@example({"snapshot": bytearray(b"\x00\xff")})
def test_a_damaged_row_of_sqlite_is_a_matter_of_its_session(columns):
    with TemporaryDirectory() as folder:
        asyncio.run(survive(FileHome(Path(folder)), columns))


@given(
    st.one_of(
        st.fixed_dictionaries(
            {},
            optional={
                "r": st.none() | records,
                **{name: st.none() | digits for name in "txeqd"},
                **{name: st.none() | st.binary(max_size=20) for name in "ompfiws"},
            },
        ),
        st.binary(max_size=20),
    )
)
@example({"r": b"[" * DEEP})
@example({"e": b"text"})
@example({"x": b"nan"})
@example({"e": None})
@example({"i": b"acme/m"})
@example(b"no hash")
def test_a_damaged_hash_of_redis_is_a_matter_of_its_session(server, damage):
    asyncio.run(survive(RedisHome(server), damage))


@given(st.binary(max_size=80))
def test_a_damaged_snapshot_in_memory_is_a_matter_of_its_session(snapshot):
    asyncio.run(survive(MemoryHome(), snapshot))
