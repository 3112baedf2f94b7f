"""To one tenant the sessions and models of another do not exist, whatever it asks for.

The calls are generated from the contract and from Triton's protocol: see `requests_of`.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from stepstate.config import ServerConfig
from stepstate.identity import SessionKey, session_key
from stepstate.models import ModelAccess
from stepstate.server import Server, running_server
from stepstate.sessions import Hold
from stepstate.sessions.snapshots.format import decode, encode
from stepstate.stores import EndReason, StoredSession, Tombstone
from stepstate.transport import methods
from stepstate.transport.authentication import TENANT_KEY
from stepstate.v1 import stepstate_pb2 as pb
from tests.integration import requests_of
from tests.integration.requests_of import METHODS, MODEL, ROWS, Case, Names, Outcome, Own, X
from tests.integration.triton import infer
from tests.integration.wire import HANG
from tests.redis_process import redis_process
from tests.tenants import SaidTenants, as_tenant

OWNER, OTHER = "acme", "initech"
SECRET, NO_MODEL = "gru", "grx"
"""A model that only the owner may use, and one that is not there: of the same length."""
WITHOUT_ADMIN = "step,read"
RESTRICTED = ModelAccess({SECRET: frozenset({OWNER})})


def test_every_rpc_has_a_request():
    assert requests_of.REQUESTS.keys() == METHODS.keys()


def test_every_field_of_every_request_is_known_to_name_a_session_or_not():
    fields = {
        path[-1].full_name for method in METHODS.values() for path in requests_of.paths(method)
    }
    assert requests_of.FIELDS.keys() == fields


@dataclass(frozen=True, slots=True)
class House:
    """A server with two tenants, and the file that it keeps their sessions in."""

    server: Server
    channel: grpc.aio.Channel
    file: Path
    snapshot: bytes
    """Of a session of the owner's."""
    holds: list[Hold]
    """What makes others wait, until the end of the test."""

    async def call(self, tenant: str, request: Message, method: str = "") -> Outcome:
        """What a tenant is told."""
        name = method or type(request).__name__.removesuffix("Request")
        async with asyncio.timeout(HANG):
            return await requests_of.call(
                self.channel, METHODS[name], request, as_tenant(tenant, WITHOUT_ADMIN)
            )

    async def done(self, tenant: str, request: Message, method: str = "") -> Outcome:
        """The same, of a call that must succeed."""
        outcome = await self.call(tenant, request, method)
        assert outcome.code is grpc.StatusCode.OK, outcome.message
        return outcome

    async def open(
        self, tenant: str, session_id: str, durability: pb.Durability = pb.DURABILITY_SYNC
    ) -> SessionKey:
        """Opens a session and steps it."""
        if not self.server.sessions.store.backend.durable:
            durability = pb.DURABILITY_NONE
        await self.done(
            tenant, pb.OpenSessionRequest(session_id=session_id, model=MODEL, durability=durability)
        )
        x = X * ROWS
        await self.done(tenant, pb.StepRequest(session_id=session_id, x=x, t=0), "Step")
        return session_key(tenant, session_id)

    async def own(self, tenant: str, session_id: str) -> Own:
        """A session of a tenant's to ask for."""
        key = await self.open(tenant, session_id)
        return Own(session_id, (await self.server.sessions.export(key))[0])

    async def spill(self, key: SessionKey) -> StoredSession:
        """Sends a session to the store."""
        sessions = self.server.sessions
        session = sessions.table.by_key[key]
        sessions.table.begin_spill(session)
        await sessions.writer.save([session], release=True)
        sessions.table.remove(session)
        stored = await sessions.store.backend.find(key)
        assert isinstance(stored, StoredSession)
        return stored

    def change(self, what: str, key: SessionKey) -> None:
        """Changes a session in the file, behind the server's back."""
        with closing(sqlite3.connect(self.file)) as file, file:
            changed = file.execute(f"UPDATE sessions SET {what} WHERE session_id = ?", (key,))
            assert changed.rowcount == 1

    async def told(self, case: Case, own: str, session_id: str) -> Outcome:
        """What the other tenant is told that names a session, or what was exported of it.

        Args:
            case: the call.
            own: the id of a session of the tenant's, for the rest of the request.
            session_id: of the session that it names.
        """
        mine = await self.own(OTHER, own) if case.needs_own else Own(own)
        value: str | bytes = session_id
        if case.names is Names.SNAPSHOT:
            value = renamed_snapshot(self.snapshot, session_id)
        return await self.call(OTHER, case.request(mine, value), case.method.name)

    async def seen(self, key: SessionKey) -> object:
        """All that can be seen of a session from within, to compare with later."""
        sessions = self.server.sessions
        session = sessions.table.get(key)
        stored = await sessions.store.backend.find(key)
        if session is None:
            return stored
        handle, table = session.handle, sessions.table
        numbers = (table.t[handle], table.expires_at[handle], table.generation[handle])
        return stored, session.state, session.epoch, numbers, sessions.writer.snapshot(session)


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of the store: of a file, or of what a test asks for."""
    kind = getattr(request, "param", f"sqlite:{tmp_path / 'two.db'}")
    if kind != "redis:":
        yield kind
        return
    with redis_process(tmp_path) as redis:
        yield redis.url


@pytest.fixture
async def house(config: ServerConfig, store: str, tmp_path: Path) -> AsyncIterator[House]:
    quiet = replace(config, store=store, snapshot_interval=3600.0, store_fsync=False)
    async with (
        running_server(quiet, authenticator=SaidTenants(), access=RESTRICTED) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        house = House(server, channel, tmp_path / "two.db", b"", [])
        exported = await house.own(OWNER, "exported")
        await house.done(OWNER, pb.CloseSessionRequest(session_id="exported"))
        yield replace(house, snapshot=exported.snapshot)
        for hold in house.holds:
            hold.release()


# The states of a session of the owner's


async def resident(house: House, session_id: str) -> None:
    await house.open(OWNER, session_id)


async def stepped_on_a_stream(house: House, session_id: str) -> None:
    """Its next row is expected, by its bytes."""
    await house.open(OWNER, session_id, pb.DURABILITY_ASYNC)
    row = pb.StepRequest(session_id=session_id, x=X, t=ROWS - 1)
    table = house.server.sessions.table
    table.t[table.by_key[session_key(OWNER, session_id)].handle] = ROWS - 1
    await house.done(OWNER, row, "StreamSteps")


async def stepped_by_triton(house: House, session_id: str) -> None:
    """Its requests are recognized, by their bytes."""
    await house.open(OWNER, session_id, pb.DURABILITY_ASYNC)
    x = np.array([X], "<f4")
    row = infer(model=MODEL, sequence_id=int(session_id), x=x, request_id="r")
    await house.done(OWNER, row, "ModelStreamInfer")


async def ended_by_triton(house: House, session_id: str) -> None:
    """Its last reply is kept for a retry."""
    x = np.array([X], "<f4")
    row = infer(MODEL, int(session_id), x, sequence_start=True, sequence_end=True, step_t=0)
    await house.done(OWNER, row, "ModelInfer")


async def busy(house: House, session_id: str) -> None:
    key = await house.open(OWNER, session_id)
    table = house.server.sessions.table
    table.busy[table.by_key[key].handle] = True


async def waited_for(house: House, session_id: str) -> None:
    """Whoever asks for it waits."""
    house.holds.append(house.server.sessions.hold(await house.open(OWNER, session_id)))


async def spilled(house: House, session_id: str) -> None:
    await house.spill(await house.open(OWNER, session_id))


async def expired(house: House, session_id: str) -> None:
    key = await house.open(OWNER, session_id)
    table = house.server.sessions.table
    table.expires_at[table.by_key[key].handle] = 0.0
    await house.server.sessions.sweep()


async def overdue(house: House, session_id: str) -> None:
    """Nobody has seen yet that its time is up."""
    stored = await house.spill(await house.open(OWNER, session_id))
    house.change("expires = 1", stored.key)


async def closed(house: House, session_id: str) -> None:
    await house.open(OWNER, session_id)
    await house.done(OWNER, pb.CloseSessionRequest(session_id=session_id))


async def lost(house: House, session_id: str) -> None:
    stored = await house.spill(await house.open(OWNER, session_id))
    tombstone = Tombstone(EndReason.LOST, stored.t, 60.0)
    assert await house.server.sessions.store.backend.end(stored.key, stored.epoch, tombstone)


async def unreadable(house: House, session_id: str) -> None:
    stored = await house.spill(await house.open(OWNER, session_id))
    house.change("record = '{'", stored.key)


async def of_a_lost_model(house: House, session_id: str) -> None:
    stored = await house.spill(await house.open(OWNER, session_id))
    house.change("record = replace(record, 'sha256:', 'sha256:0')", stored.key)


async def on_another_server(house: House, session_id: str) -> None:
    stored = await house.spill(await house.open(OWNER, session_id))
    prints = [stored.record.fingerprint]
    backend = house.server.sessions.store.backend
    await backend.acquire(stored.key, owner="another", fingerprints=prints)


State = Callable[[House, str], Awaitable[None]]
STATES: Mapping[str, State] = {
    state.__name__: state
    for state in (
        resident,
        stepped_on_a_stream,
        stepped_by_triton,
        ended_by_triton,
        busy,
        waited_for,
        spilled,
        expired,
        overdue,
        closed,
        lost,
        unreadable,
        of_a_lost_model,
        on_another_server,
    )
}
CASES = requests_of.cases(Names.SESSION, Names.SNAPSHOT)


@pytest.mark.transports(long=True)
@pytest.mark.parametrize("state", STATES)
async def test_another_tenants_session_is_answered_as_one_that_never_was(house: House, state: str):
    numbers = itertools.count(10_000)
    for case in CASES:
        taken, free, own, another = (str(next(numbers)) for _ in range(4))
        await STATES[state](house, taken)
        key = session_key(OWNER, taken)
        before = await house.seen(key)
        told = await house.told(case, own, taken)
        expected = await house.told(case, another, free)
        changed = {free: taken, another: own}
        assert told == _renamed(expected, changed), f"{case} tells that {taken} is {state}"
        assert await house.seen(key) == before, f"{case} changes one that is {state}"


@pytest.mark.long
@pytest.mark.parametrize("store", ["memory:", "redis:"], indirect=True)
@pytest.mark.parametrize("state", ["resident", "waited_for", "expired", "closed"])
async def test_it_is_the_same_on_other_stores(house: House, state: str):
    await test_another_tenants_session_is_answered_as_one_that_never_was(house, state)


@pytest.mark.long
@pytest.mark.parametrize("store", ["redis:"], indirect=True)
@pytest.mark.parametrize("state", ["spilled", "lost", "on_another_server"])
async def test_it_is_the_same_on_a_store_of_several_servers(house: House, state: str):
    await test_another_tenants_session_is_answered_as_one_that_never_was(house, state)


MODEL_CASES = requests_of.cases(Names.MODEL)


@pytest.mark.transports(long=True)
async def test_a_model_of_others_is_answered_as_one_that_is_not_loaded(house: House):
    await house.done(OWNER, pb.GetModelRequest(model=SECRET))
    numbers = itertools.count(10_000)
    for case in MODEL_CASES:
        own, another = str(next(numbers)), str(next(numbers))
        told = await house.call(OTHER, case.request(Own(own), SECRET), case.method.name)
        expected = await house.call(OTHER, case.request(Own(another), NO_MODEL), case.method.name)
        assert told == _renamed(expected, {NO_MODEL: SECRET, another: own}), str(case)


async def test_models_of_others_are_in_no_list(house: House):
    for method in ("ListModels", "RepositoryIndex", "ModelStatistics"):
        request = GetMessageClass(METHODS[method].input_type)()
        listed, told = await house.done(OWNER, request), await house.done(OTHER, request)
        assert SECRET.encode() in listed.replies[0]
        assert SECRET.encode() not in told.replies[0]
        assert MODEL.encode() in told.replies[0]


async def test_a_snapshot_of_a_model_of_others_is_refused_as_one_of_a_model_that_is_not_loaded(
    house: House,
):
    opened = pb.OpenSessionRequest(session_id="1", model=SECRET, durability=pb.DURABILITY_SYNC)
    await house.done(OWNER, opened)
    snapshot = (await house.server.sessions.export(session_key(OWNER, "1")))[0]
    whole = decode(snapshot)
    elsewhere = encode(replace(whole, record=replace(whole.record, model=NO_MODEL)))
    told = await house.call(OTHER, pb.ImportSessionRequest(snapshot=snapshot))
    expected = await house.call(OTHER, pb.ImportSessionRequest(snapshot=elsewhere))
    assert told.code is grpc.StatusCode.FAILED_PRECONDITION
    assert told == _renamed(expected, {NO_MODEL: SECRET})


async def test_a_session_is_as_one_of_a_lost_model_once_its_tenant_may_not_use_that(
    house: House, config: ServerConfig
):
    await house.open(OTHER, "1")
    await house.server.drain()
    denied = replace(config, store=f"sqlite:{house.file}")
    access = ModelAccess({MODEL: frozenset({OWNER})})
    async with (
        running_server(denied, authenticator=SaidTenants(), access=access) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        there = replace(house, server=server, channel=channel)
        step = await there.call(OTHER, pb.StepRequest(session_id="1", x=X))
        assert (step.code, b"SNAPSHOT_MODEL_MISMATCH" in step.details) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            True,
        )
        reply = (await there.done(OTHER, pb.GetSessionRequest(session_id="1"))).replies[0]
        assert (
            pb.GetSessionResponse.FromString(reply).session.status
            == pb.SESSION_STATUS_MODEL_MISSING
        )
        await there.done(OTHER, pb.CloseSessionRequest(session_id="1"))


async def test_a_session_in_memory_goes_on_and_is_not_copied_once_its_tenant_may_not_use_its_model(
    house: House,
):
    await house.open(OTHER, "1")
    house.server.sessions.catalog.restrict(ModelAccess({MODEL: frozenset({OWNER})}))
    await house.done(OTHER, pb.StepRequest(session_id="1", x=X), "Step")
    for method in ("ForkSession", "ImportSession", "OpenSession"):
        own = Own("1", house.snapshot)
        told = await house.call(OTHER, requests_of.REQUESTS[method](own)[0], method)
        assert told.code in {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND}


@pytest.mark.transports(long=True)
async def test_an_admin_who_names_a_tenant_is_told_what_the_tenant_is(house: House):
    numbers = itertools.count(10_000)
    admin = (*as_tenant("operator"), (TENANT_KEY, OWNER))
    for method, requests in requests_of.REQUESTS.items():
        if method in NOT_OF_A_TENANT:
            continue
        for variant in range(len(requests(Own("0")))):
            mine, same = str(next(numbers)), str(next(numbers))
            request = requests(await house.own(OWNER, mine))[variant]
            expected = await house.call(OWNER, request, method)
            request = requests(await house.own(OWNER, same))[variant]
            told = await requests_of.call(house.channel, METHODS[method], request, admin)
            assert expected == _renamed(told, {same: mine}), f"{method}.{variant}"


NOT_OF_A_TENANT = {"ListSessions", "ListTenants", "ModelStatistics"}
"""What they tell changes while the others are called."""


async def test_sessions_of_one_tenant_only_are_listed_whatever_token_is_sent(house: House):
    for tenant in (OWNER, OTHER):
        for number in range(5):
            await house.open(tenant, str(number))
    first = await house.done(OWNER, pb.ListSessionsRequest(page_size=2))
    token = pb.ListSessionsResponse.FromString(first.replies[0]).next_page_token
    for sent, tenant in itertools.product(("", token), (OWNER, OTHER)):
        reply = await house.done(tenant, pb.ListSessionsRequest(page_token=sent))
        listed = pb.ListSessionsResponse.FromString(reply.replies[0]).sessions
        assert {one.tenant for one in listed} == {tenant}
        if tenant == OWNER or not sent:
            left = range(2 if sent else 0, 5)
            assert [one.session_id for one in listed] == list(map(str, left))


@pytest.mark.parametrize("method", METHODS)
async def test_whoever_names_a_tenant_is_an_admin_and_names_one_that_can_be(
    house: House, method: str
):
    if methods.METHODS[method].scopes == methods.OPEN:
        return
    streams = METHODS[method].client_streaming
    request = None if streams else requests_of.REQUESTS[method](Own("1"))[0]
    for metadata, code in (
        (
            (*as_tenant(OTHER, WITHOUT_ADMIN), (TENANT_KEY, OWNER)),
            grpc.StatusCode.PERMISSION_DENIED,
        ),
        ((*as_tenant(OTHER), (TENANT_KEY, "No Name")), grpc.StatusCode.INVALID_ARGUMENT),
    ):
        told = await requests_of.call(house.channel, METHODS[method], request, metadata)
        assert (told.code, told.replies) == (code, ())


async def test_ids_and_sequences_of_two_tenants_never_collide(house: House):
    x = np.array([X], "<f4")
    start = infer(MODEL, 7, x, sequence_start=True)
    one, other = [await house.done(tenant, start, "ModelInfer") for tenant in (OWNER, OTHER)]
    assert one == other
    for tenant in (OWNER, OTHER):
        await house.open(tenant, "meter-1")
        reply = await house.done(tenant, pb.GetSessionRequest(session_id="7"))
        session = pb.GetSessionResponse.FromString(reply.replies[0]).session
        assert (session.tenant, session.t) == (tenant, 1)


def renamed_snapshot(snapshot: bytes, session_id: str) -> bytes:
    """The snapshot that the owner would export of a session of another id."""
    whole = decode(snapshot)
    return encode(replace(whole, record=replace(whole.record, session_id=session_id)))


def _renamed(outcome: Outcome, names: Mapping[str, str]) -> Outcome:
    """What would be told of sessions of other ids; they have the same length."""

    def bytes_of(data: bytes) -> bytes:
        for before, after in names.items():
            data = data.replace(before.encode(), after.encode())
        return data

    return replace(
        outcome,
        message=bytes_of(outcome.message.encode()).decode(),
        details=bytes_of(outcome.details),
        replies=tuple(map(bytes_of, outcome.replies)),
    )


SAMPLES = 10_000
ALPHA = 1e-4
"""How often the test may find a difference where there is none."""


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "state"),
    [
        ("GetSession", "resident"),
        ("GetSession", "expired"),
        ("Step", "resident"),
        ("Step", "spilled"),
    ],
)
async def test_another_tenants_session_takes_as_long_as_one_that_never_was(
    house: House, state: str, method: str
):
    """Kolmogorov-Smirnov over interleaved calls; one's own session shows that it would be seen."""
    await STATES[state](house, "10000")
    await house.open(OTHER, "10002")
    seconds: dict[str, list[float]] = {"10000": [], "10001": [], "10002": []}
    order = list(seconds)
    for number in range(SAMPLES):
        random.shuffle(order)
        for session_id in order:
            if session_id == "10002" and number % 10:
                continue
            request = requests_of.REQUESTS[method](Own(session_id))[0]
            begun = time.perf_counter()
            await house.call(OTHER, request, method)
            seconds[session_id].append(time.perf_counter() - begun)
    taken, never, own = seconds.values()
    print(f"{method} of one that is {state}: p = {same_distribution(taken, never):.3f}")
    assert same_distribution(own, never[: len(own)]) < ALPHA
    assert same_distribution(taken, never) > ALPHA


def same_distribution(one: Sequence[float], other: Sequence[float]) -> float:
    """The p-value of the Kolmogorov-Smirnov test of two samples of N values, asymptotically.

    Source: Smirnov (1948), Table for estimating the goodness of fit of empirical distributions.
    """
    every = np.sort(np.concatenate([one, other]))
    shares = [np.searchsorted(np.sort(some), every, side="right") for some in (one, other)]
    scaled = np.abs(shares[0] - shares[1]).max() / np.sqrt(2 * len(one))
    terms = ((-1) ** (k - 1) * np.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))
    return float(min(1.0, 2 * sum(terms))) if scaled else 1.0
