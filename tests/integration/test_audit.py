"""What calls put on record: exactly one line for each act, made from the tables of all RPCs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner
from tritonclient.grpc import service_pb2 as triton_pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from stepstate.cli.main import main
from stepstate.config import ServerConfig
from stepstate.errors import Unauthenticated
from stepstate.identity import Identity, Scope
from stepstate.logging.audit import AuditEvent, AuditRecord, audit
from stepstate.server import running_server
from stepstate.transport.auditing import MAX_NAMES
from stepstate.transport.authentication import TENANT_KEY
from stepstate.transport.methods import METHODS
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.integration.test_reload import ADDRESSES, reloading
from tests.integration.triton import infer
from tests.integration.wire import draw, request

pytestmark = pytest.mark.transports

PEOPLE = {
    "ci": Identity("ci", "acme", frozenset({Scope.STEP, Scope.READ})),
    "root": Identity("root", "platform", frozenset(Scope)),
    "reader": Identity("reader", "acme", frozenset({Scope.READ})),
}
ROW = draw(1)
MARK = AuditRecord(event=AuditEvent.ADMIN_ACT, detail="the test asks for what was before")


class ByName:
    """Believes the name in the metadata `who`."""

    async def identify(self, context: grpc.aio.ServicerContext) -> Identity:
        name = dict(context.invocation_metadata() or ()).get("who", "")
        if name not in PEOPLE:
            raise Unauthenticated("say who you are")
        return PEOPLE[name]


@dataclass(frozen=True, slots=True)
class Caller:
    """Calls of one identity, for its own tenant or another."""

    channel: grpc.aio.Channel
    metadata: tuple[tuple[str, str], ...]

    async def call(self, method: str, *requests: object) -> object:
        """The reply of an RPC, or those of a stream.

        Raises:
            AioRpcError: it was refused.
        """
        native = method in {found.name for found in NATIVE.methods}
        service = NATIVE if native else TRITON
        stub = (StepstateServiceStub if native else GRPCInferenceServiceStub)(self.channel)
        found = service.methods_by_name[method]
        sent = iter(requests) if found.client_streaming else requests[0]
        call = getattr(stub, method)(sent, metadata=self.metadata)
        if not found.server_streaming:
            return await call
        return [reply async for reply in call]


NATIVE = pb.DESCRIPTOR.services_by_name["StepstateService"]
TRITON = triton_pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
Call = Callable[[Caller], Awaitable[object]]


@pytest.fixture
def audit_file(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
async def channel(config: ServerConfig, audit_file: Path) -> AsyncIterator[grpc.aio.Channel]:
    """To a server that knows `PEOPLE`."""
    audited = replace(config, audit_log=str(audit_file))
    async with (
        running_server(audited, authenticator=ByName()) as server,
        grpc.aio.insecure_channel(server.address) as connected,
    ):
        yield connected


@pytest.fixture
def as_(channel: grpc.aio.Channel) -> Callable[..., Caller]:
    """Who calls, and for which tenant."""

    def caller(name: str, tenant: str = "") -> Caller:
        named = ((TENANT_KEY, tenant),) if tenant else ()
        return Caller(channel, (("who", name), *named))

    return caller


class Lines:
    """What was put on record since it was last asked."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._read = 0

    async def new(self) -> list[dict]:
        """The new lines: all that were queued before one of the test's own."""
        audit(MARK)
        while MARK.detail not in (details := [line["detail"] for line in self._unread()]):
            await asyncio.sleep(0.005)
        end = details.index(MARK.detail)
        new = self._unread()[:end]
        self._read += end + 1
        return new

    def _unread(self) -> list[dict]:
        whole = self._file.read_text().rpartition("\n")[0].splitlines()[self._read :]
        return [{"detail": None, **json.loads(line)} for line in whole]


@pytest.fixture
def lines(audit_file: Path) -> Lines:
    return Lines(audit_file)


async def prepare(caller: Caller) -> bytes:
    """Opens the sessions that `REQUESTS` name; returns a snapshot."""
    for name in ("a", "b"):
        await caller.call("OpenSession", pb.OpenSessionRequest(session_id=name, model="lstm"))
    exported = await caller.call("ExportSession", pb.ExportSessionRequest(session_id="a"))
    return exported.snapshot


def imports(snapshot: bytes) -> list[object]:
    return [pb.StreamImportRequest(data=snapshot, size=len(snapshot), session_id="f")]


REQUESTS: dict[str, Callable[[bytes], Iterable[object]]] = {
    "OpenSession": lambda _: [pb.OpenSessionRequest(session_id="c", model="lstm")],
    "GetSession": lambda _: [pb.GetSessionRequest(session_id="a")],
    "ListSessions": lambda _: [pb.ListSessionsRequest()],
    "RestoreSession": lambda _: [pb.RestoreSessionRequest(session_id="a")],  # it is open
    "CloseSession": lambda _: [pb.CloseSessionRequest(session_id="b")],
    "ResetAccuracy": lambda _: [pb.ResetAccuracyRequest(session_id="a")],
    "ForkSession": lambda _: [pb.ForkSessionRequest(session_id="a", new_session_id="d")],
    "ExportSession": lambda _: [pb.ExportSessionRequest(session_id="a")],
    "ImportSession": lambda data: [pb.ImportSessionRequest(snapshot=data, session_id="e")],
    "StreamExport": lambda _: [pb.StreamExportRequest(session_id="a")],
    "StreamImport": imports,
    "Step": lambda _: [request("a", 0, ROW)],
    "StreamSteps": lambda _: [request("a", None, ROW), request("b", None, ROW)],
    "StreamPacked": lambda _: [
        pb.StreamPackedRequest(bindings=[pb.Binding(handle=1, session_id="a")])
    ],
    "Forecast": lambda _: [pb.ForecastRequest(session_id=["a", "b"], horizon=1)],
    "ListModels": lambda _: [pb.ListModelsRequest()],
    "GetModel": lambda _: [pb.GetModelRequest(model="lstm")],
    "ListTenants": lambda _: [pb.ListTenantsRequest()],
    "ModelReady": lambda _: [triton_pb.ModelReadyRequest(name="lstm")],
    "ModelMetadata": lambda _: [triton_pb.ModelMetadataRequest(name="lstm")],
    "ModelConfig": lambda _: [triton_pb.ModelConfigRequest(name="lstm")],
    "ModelInfer": lambda _: [infer("lstm", "a", ROW)],
    "ModelStreamInfer": lambda _: [infer("lstm", "a", ROW)],
    "ModelStatistics": lambda _: [triton_pb.ModelStatisticsRequest(name="lstm")],
    "RepositoryIndex": lambda _: [triton_pb.RepositoryIndexRequest()],
}
"""A call of each RPC that needs a credential."""
SUBJECT = {
    "OpenSession": "c",
    "RestoreSession": "a",
    "CloseSession": "b",
    "ForkSession": "d",
    "ExportSession": "a",
    "ImportSession": "e",
    "StreamExport": "a",
    "StreamImport": "f",
}
"""The session of each call that is an event."""


def test_every_rpc_has_its_entry():
    assert REQUESTS.keys() == {method for method, policy in METHODS.items() if policy.scopes}
    events = {method: policy.event for method, policy in METHODS.items() if policy.event}
    assert events.pop("ListTenants") == "admin act"
    assert SUBJECT.keys() == events.keys()


async def made(caller: Caller, method: str, snapshot: bytes) -> str:
    """Makes the call; the name of its status."""
    try:
        await caller.call(method, *REQUESTS[method](snapshot))
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def test_each_event_of_a_tenants_own_is_one_line_and_nothing_else_is_on_record(
    as_: Callable[..., Caller], lines: Lines
):
    caller = as_("ci")
    snapshot = await prepare(caller)
    await lines.new()
    for method, policy in METHODS.items():
        if method not in REQUESTS or Scope.ADMIN in policy.scopes:
            continue
        result = await made(caller, method, snapshot)
        found = await lines.new()
        assert [line["event"] for line in found] == ([policy.event] if policy.event else []), method
        for line in found:
            assert line["session"] == SUBJECT[method]
            assert line["result"] == result
            assert (line["tenant"], line["identity"], line["admin"]) == ("acme", "ci", False)
            assert line["method"] == method
            assert line["peer"].startswith("ipv4:127.0.0.1:")
            assert line["model"] == (None if method == "RestoreSession" else "lstm/1")
            assert line["source"] == ("a" if method == "ForkSession" else None)


async def test_each_call_of_an_admin_on_another_tenant_is_one_line(
    as_: Callable[..., Caller], lines: Lines
):
    caller = as_("root", "acme")
    snapshot = await prepare(caller)
    await lines.new()
    for method in REQUESTS:
        await made(caller, method, snapshot)
        found = await lines.new()
        event = METHODS[method].event or "admin act"
        assert [line["event"] for line in found] == [event], method
        (line,) = found
        assert (line["tenant"], line["identity"]) == ("acme", "root")
        assert (line["identity_tenant"], line["admin"]) == ("platform", True)


async def test_a_forecast_of_an_admin_says_of_how_many_sessions(
    as_: Callable[..., Caller], lines: Lines
):
    """Also if the line has no room for all of their ids."""
    caller, ids = as_("root", "acme"), [f"{number}-{'x' * 100}" for number in range(20)]
    for session_id in ids:
        await caller.call("OpenSession", pb.OpenSessionRequest(session_id=session_id, model="lstm"))
        await caller.call("Step", request(session_id, 0, ROW))
    await lines.new()
    await caller.call("Forecast", pb.ForecastRequest(session_id=ids, horizon=1))
    (line,) = await lines.new()
    assert line["detail"] == "20 sessions"
    assert line["session"] == " ".join(ids)[:MAX_NAMES]


async def test_an_admin_who_lists_all_tenants_is_on_record(
    as_: Callable[..., Caller], lines: Lines
):
    assert await made(as_("root"), "ListTenants", b"") == "OK"
    (line,) = await lines.new()
    assert (line["event"], line["admin"], line["session"]) == ("admin act", True, None)


async def test_a_session_that_expires_and_is_deleted_is_on_record(
    as_: Callable[..., Caller], lines: Lines
):
    """Nobody did it."""
    opening = pb.OpenSessionRequest(session_id="brief", model="lstm")
    opening.idle_timeout.FromMilliseconds(1)
    await as_("ci").call("OpenSession", opening)
    await asyncio.sleep(0.02)
    opening.ClearField("idle_timeout")
    await as_("ci").call("OpenSession", opening)  # takes the place of the one that has expired
    found = [line for line in await lines.new() if line["event"] != "session opened"]
    assert found[-1]["event"] == "expired session deleted"
    assert {(one["tenant"], one["session"], one["identity"]) for one in found} == {
        ("acme", "brief", None)
    }


async def test_a_stream_of_an_admin_is_on_record_while_it_lasts(
    as_: Callable[..., Caller], lines: Lines
):
    caller = as_("root", "acme")
    for method in ("StreamSteps", "StreamPacked"):
        stub = StepstateServiceStub(caller.channel)
        call = getattr(stub, method)(metadata=caller.metadata)
        await call.write(next(iter(REQUESTS[method](b""))))
        while not (found := await lines.new()):
            await asyncio.sleep(0.005)
        assert [line["method"] for line in found] == [method]
        call.cancel()
    assert await lines.new() == []


FAILURES: dict[str, tuple[object, str]] = {
    "OpenSession": (pb.OpenSessionRequest(session_id="a", model="lstm"), "SESSION_EXISTS"),
    "CloseSession": (pb.CloseSessionRequest(session_id="none"), "SESSION_UNKNOWN"),
    "RestoreSession": (pb.RestoreSessionRequest(session_id="none"), "SESSION_UNKNOWN"),
    "ForkSession": (
        pb.ForkSessionRequest(session_id="a", new_session_id="b"),
        "SESSION_EXISTS",
    ),
    "ExportSession": (pb.ExportSessionRequest(session_id="none"), "SESSION_UNKNOWN"),
    "ImportSession": (pb.ImportSessionRequest(snapshot=b"none"), "SNAPSHOT_CORRUPT"),
    "StreamExport": (pb.StreamExportRequest(session_id="none"), "SESSION_UNKNOWN"),
    "StreamImport": (pb.StreamImportRequest(data=b"none", size=4), "SNAPSHOT_CORRUPT"),
}


async def test_an_act_that_failed_is_one_line_that_says_why(
    as_: Callable[..., Caller], lines: Lines
):
    assert FAILURES.keys() == SUBJECT.keys()
    caller = as_("ci")
    await prepare(caller)
    await lines.new()
    for method, (sent, reason) in FAILURES.items():
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await caller.call(method, sent)
        (line,) = await lines.new()
        assert (line["event"], line["reason"]) == (METHODS[method].event, reason)
        assert line["result"] == failed.value.code().name


@pytest.fixture
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a server that starts afterwards."""
    monkeypatch.setattr("stepstate.logging.audit.LINES_PER_SECOND", 1_000)


async def test_every_call_without_a_credential_is_one_line_without_what_it_sent(
    unlimited: None, as_: Callable[..., Caller], lines: Lines
):
    for method, requests in REQUESTS.items():
        writes = METHODS[method].lasts or method == "StreamImport"
        sent = () if writes else requests(b"")  # a write may meet the end
        with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
            await as_("no-one-you-know").call(method, *sent)
        (line,) = await lines.new()
        assert line["event"] == "credential refused"
        assert (line["method"], line["result"]) == (method, "UNAUTHENTICATED")
        assert line["peer"].startswith("ipv4:127.0.0.1:")
        assert "no-one-you-know" not in json.dumps(line)


async def test_behind_a_trusted_proxy_the_address_is_the_clients(
    config: ServerConfig, audit_file: Path, lines: Lines
):
    audited = replace(config, audit_log=str(audit_file), trusted_proxies="127.0.0.1")
    async with (
        running_server(audited, authenticator=ByName()) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        forwarded = ("x-forwarded-for", "203.0.113.9")
        for who in ("ci", "nobody"):
            await made(Caller(channel, (("who", who), forwarded)), "OpenSession", b"")
        opened, refused = await lines.new()
    assert (opened["event"], refused["event"]) == ("session opened", "credential refused")
    assert {opened["peer"], refused["peer"]} == {"forwarded:203.0.113.9"}


async def test_what_an_identity_may_not_do_is_on_record_with_its_name(
    as_: Callable[..., Caller], lines: Lines
):
    assert await made(as_("reader"), "CloseSession", b"") == "PERMISSION_DENIED"
    assert await made(as_("ci", "platform"), "ListSessions", b"") == "PERMISSION_DENIED"
    first, second = await lines.new()
    assert (first["identity"], second["identity"]) == ("reader", "ci")
    assert {first["event"], second["event"]} == {"credential refused"}


async def test_guesses_are_limited_and_counted(as_: Callable[..., Caller], lines: Lines):
    caller = as_("nobody")
    count = 50
    sent = pb.GetSessionRequest(session_id="a")
    calls = (caller.call("GetSession", sent) for _ in range(count))
    await asyncio.gather(*calls, return_exceptions=True)
    await asyncio.sleep(1.2)  # the count comes once a second
    found = await lines.new()
    refused = [line for line in found if line["event"] == "credential refused"]
    left_out = [int(line["event"].split()[0]) for line in found if "left out" in line["event"]]
    assert len(refused) < count
    assert len(refused) + sum(left_out) == count


async def test_a_sequence_of_triton_is_opened_and_closed_once_also_when_it_is_retried(
    as_: Callable[..., Caller], lines: Lines
):
    caller = as_("ci")
    first = infer("lstm", 7, ROW, sequence_start=True, step_t=0)
    last = infer("lstm", 7, ROW, sequence_end=True, step_t=1)
    for sent in (first, first, last, last):
        await caller.call("ModelInfer", sent)
    found = await lines.new()
    assert [line["event"] for line in found] == ["session opened", "session closed"]
    assert {(line["tenant"], line["model"]) for line in found} == {("acme", "lstm/1")}
    assert {line["session"] for line in found} == {"7"}


async def test_a_sequence_that_is_restarted_is_closed_and_opened(
    as_: Callable[..., Caller], lines: Lines
):
    caller = as_("ci")
    for _ in range(2):
        await caller.call("ModelStreamInfer", infer("lstm", 7, ROW, sequence_start=True))
    found = await lines.new()
    assert [line["event"] for line in found] == [
        "session opened",
        "session closed",
        "session opened",
    ]


@asynccontextmanager
async def many_opened(caller: Caller, count: int) -> AsyncIterator[None]:
    names = [f"many-{place}" for place in range(count)]
    opening = (
        caller.call("OpenSession", pb.OpenSessionRequest(session_id=name, model="lstm"))
        for name in names
    )
    await asyncio.gather(*opening)
    yield
    with suppress(grpc.aio.AioRpcError):
        for name in names:
            await caller.call("CloseSession", pb.CloseSessionRequest(session_id=name))


async def test_no_session_that_opens_is_left_out(as_: Callable[..., Caller], lines: Lines):
    count = 300
    async with many_opened(as_("ci"), count):
        found = await lines.new()
    assert len({line["session"] for line in found}) == len(found) == count


async def test_changes_of_tokens_are_on_record_where_they_are_made_and_where_they_are_read(
    config: ServerConfig, audit_file: Path, tmp_path: Path
):
    """Once each, with what names a token and never with the token."""
    tokens, cli_log = str(tmp_path / "tokens.json"), tmp_path / "cli.jsonl"

    def run(*arguments: str) -> str:
        options = ("--tokens-file", tokens, "--audit-log", str(cli_log))
        done = CliRunner().invoke(main, ["tokens", *arguments, *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout.strip()

    secrets = [run("create", "ci", "--tenant", "acme")]
    audited = replace(config, audit_log=str(audit_file), tokens_file=tokens)
    async with running_server(audited) as server:
        secrets.append(run("create", "cd", "--tenant", "acme"))
        await server.credentials.refresh(force=True)
        run("revoke", "--identity", "ci")
        await server.credentials.refresh(force=True)
    made, all_here = (
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in (cli_log, audit_file)
    )
    read = [line for line in all_here if line["identity"] is None]  # the CLI runs here as well
    assert [line["event"] for line in made] == ["token created", "token created", "token revoked"]
    assert [line["event"] for line in read] == ["token loaded", "token dropped"]
    for line, name in zip([*made, *read], ["ci", "cd", "ci", "cd", "ci"], strict=True):
        assert line["tenant"] == "acme"
        assert line["detail"].startswith(f"{name}#")
        assert not [secret for secret in secrets if secret in json.dumps(line)]
    assert {line["identity"].partition(":")[0] for line in made} == {"os"}


def test_a_token_that_can_not_be_put_on_record_is_not_made(tmp_path: Path):
    tokens = tmp_path / "tokens.json"
    options = ("--tokens-file", str(tokens), "--audit-log", str(tmp_path / "none" / "audit"))
    done = CliRunner().invoke(main, ["tokens", "create", "ci", *options])
    assert done.exit_code == 1
    assert "No such file" in done.stderr
    assert not tokens.exists()


async def test_reloads_of_the_configuration_are_on_record(
    config: ServerConfig, audit_file: Path, tmp_path: Path, lines: Lines
):
    audited = f"audit_log = '{audit_file}'\n"
    async with reloading(config, tmp_path / "stepstate.toml", audited) as one:
        assert await one.reload(f"{ADDRESSES}{audited}[limits]\nstreams = 3")
        assert not await one.reload(f"{ADDRESSES}{audited}slotz = 3")
        found = await lines.new()
    assert [(line["event"], line["result"]) for line in found] == [
        ("configuration reloaded", "OK"),
        ("configuration reloaded", "INVALID_ARGUMENT"),
    ]
