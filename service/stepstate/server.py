"""The composition root: wires the layers together, and starts, runs and drains them."""

from __future__ import annotations

import asyncio
import enum
import gc
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIServer

import grpc
from grpc_health.v1 import health_pb2
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from stepstate.auth import (
    CertificateMapping,
    CertificateRule,
    Credentials,
    JwtSettings,
    KeyFile,
    KeyRing,
    KeyUrl,
    TokenFile,
    WebTokens,
)
from stepstate.budget import MemoryAccount, MemoryBudget, limit_bytes
from stepstate.config import ServerConfig, split_address
from stepstate.configuration import Configuration, Load, check_exposure, has_identities
from stepstate.configuration.checks import tls_files
from stepstate.configuration.reload import ConfigurationReloader
from stepstate.engine import (
    EngineSettings,
    Precision,
    Runtime,
    check_accelerator,
    check_runtime,
    has_instructions,
    measure_loss,
    use_one_thread,
)
from stepstate.errors import AuditLogError, ListenError, StoreUnavailable
from stepstate.h2grpc import ConnectionTimes, H2Server, Http2Limits
from stepstate.logging import audit_lines
from stepstate.metrics import Metrics, MetricsCollector, start_http
from stepstate.models import EVERYONE, Catalog, Model, ModelAccess, load_catalog
from stepstate.sessions import Limits, SchedulerSettings, SessionService
from stepstate.stores import Durability, SessionStore, open_store, read_password
from stepstate.tenants import LimitTable, TenantTable
from stepstate.tls import ServerTls
from stepstate.transport import (
    MAX_MESSAGE_BYTES,
    Authenticator,
    Backend,
    CallAdmission,
    CredentialAuthenticator,
    ExpectedRows,
    HealthService,
    PeerTable,
    Receiver,
    ReceivingMemory,
    RpcInterceptor,
    SnapshotKeys,
    StepstateServicer,
    add_reflection,
    add_service,
    grpcio_credentials,
    parse_stepstate,
    read_keys,
)
from stepstate.trim import TRIM_SECONDS, Trimmer
from stepstate.uptime import HEARTBEAT_SECONDS, UptimeClock
from stepstate.v1.stepstate_pb2 import DESCRIPTOR

if TYPE_CHECKING:
    from stepstate.transport.triton import TritonService

log = logging.getLogger(__name__)

STORE_SERVICE = "stepstate.store"
"""Its health tells whether the store takes writes; the server's own stays SERVING without it."""
SERVICE = DESCRIPTOR.services_by_name["StepstateService"]
LAST_CALLS_SECONDS = 0.5
"""For the replies of unary calls on their way out; a watch of health would never end by itself."""
AGE_GRACE_SECONDS = 60.0
"""For the calls of a connection that has reached its age. Streams end by themselves at no time."""
SWEEP_SECONDS = 1.0
"""Expiry is exact when a session is used; this only bounds how late its slot is freed."""
LAG_SECONDS = 0.05
"""Between two measurements of how late the event loop is."""
STORE_CHECK_SECONDS = 1.0
"""Between two checks of the store; the next one waits for the answer to the last."""
TICK_SECONDS = 1.0
"""Between two looks at what changes by itself: uptime, idle tenants, the health of the store."""
CREDENTIALS_CHECK_SECONDS = 1.0
"""Between two looks whether files of credentials have changed, and whether those of open streams
still hold."""
UPTIME = UptimeClock(time.monotonic)
"""Seconds in which this process ran: idle times are measured in it. Every server keeps it going."""

CHANNEL_OPTIONS = (
    # With it two servers could share a port unseen, each with half of the sessions.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Find clients that vanished without a word within 80 s, and free what their streams hold.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients may ping as often as they like, and each ping is only answered. With a limit, gRPC
    # ends the connection; while it can't, as the client reads nothing, it adds each further ping
    # to one error, which it copies every time: that took its thread for seconds.
    ("grpc.http2.max_ping_strikes", 0),
    # What is not read stays with the client but for 64 KiB a call. The probe of bandwidth times
    # delay raises that to megabytes for all calls of a fast connection.
    ("grpc.http2.bdp_probe", 0),
)
ONLY_IDENTITY = 1
"""Bit of grpc.compression_enabled_algorithms_bitset: messages as they are."""


class ServerState(enum.Enum):
    """The life of a server."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"


class Server:
    """A server and its life: `start`, then `drain` (or `stop`)."""

    def __init__(
        self,
        config: ServerConfig,
        catalog: Catalog,
        *,
        store: SessionStore,
        keys: SnapshotKeys,
        tls: ServerTls | None = None,
        credentials: Credentials | None = None,
        authenticator: Authenticator | None = None,
        limits: LimitTable | None = None,
    ) -> None:
        use_one_thread()
        self.state = ServerState.STARTING
        self.address = ""
        self.metrics_address = ""
        self.tls = tls
        """Of both ports; None: plain text."""
        self._config = config
        self._store = store
        self._precision = Precision(config.weights)
        self._slots = min(config.slots, config.max_sessions)
        self._max_sessions = config.max_sessions if store.durable else self._slots
        self._registry = CollectorRegistry(support_collectors_without_names=True)
        self._metrics = Metrics()
        memory_limit = limit_bytes(config.memory_limit)
        self.receiver = Receiver(memory_limit)
        """Has the budgets for what is being received."""
        received = self.receiver.budget.limit + self.receiver.windows.limit
        self.memory = MemoryBudget(memory_limit - received)
        """What clients make it hold, beside what is being received."""
        self.tenants = TenantTable(limits)
        self.sessions = self._wire_sessions(catalog)
        self._registry.register(
            MetricsCollector(
                self._metrics,
                self.sessions,
                limits={
                    "sessions": self._max_sessions,
                    "slots": self._slots,
                    "backlog_rows": config.backlog_rows,
                    "queue_requests": config.queue_requests,
                    "queue_rows": config.queue_rows,
                    "replay_bytes": config.replay_bytes,
                    "memory_bytes": self.memory.limit,
                },
                memory=self.memory,
                tenants=self.tenants,
                skipped_models=len(catalog.skipped),
                tls=tls,
            )
        )
        for standard in (ProcessCollector, PlatformCollector, GCCollector):
            standard(registry=self._registry)
        self.peers = PeerTable(
            self.memory, self.receiver.budget, config.trusted_networks, self.tenants
        )
        admission = CallAdmission(self.peers, self._metrics)
        expected = ExpectedRows(self.sessions.table.limit)
        backend = Backend(self.sessions, self._metrics, admission, expected)
        self._servicer = StepstateServicer(backend, keys)
        self._triton = self._triton_service(backend)
        self._health = HealthService()
        self.credentials = credentials
        """What callers are known by; None: everyone is anonymous."""
        if credentials is not None:
            self._metrics.stale_credentials = credentials.stale
            authenticator = CredentialAuthenticator(credentials, config.trusted_networks)
        self._interceptor = RpcInterceptor(self._metrics, admission, self.receiver, authenticator)
        self._interceptor.expect(SERVICE.methods)
        if self._triton is not None:
            self._interceptor.expect(self._triton.methods())
        self._grpc = _transport(config, self._interceptor, self.receiver, tls)
        self._http: tuple[WSGIServer, Thread] | None = None
        self._audit = ExitStack()
        self._store_reported_up = True
        self._tasks: list[asyncio.Task[None]] = []
        self._drained: asyncio.Task[None] | None = None

    def set_limits(self, limits: LimitTable) -> None:
        """Changes the limits of all tenants, from the next request on."""
        self.peers.set_limits(limits)

    async def start(self) -> None:
        """Listens, then says that it serves.

        Raises:
            AuditLogError: the audit log can't be written.
            ListenError: an address is taken, or not ours.
        """
        self._open_audit_log()
        add_service(self._grpc, SERVICE, self._servicer, parse_stepstate)
        self._health.add_to(self._grpc)
        services = [SERVICE.full_name]
        if self._triton is not None:
            self._triton.add_to(self._grpc)
            services.append(self._triton.name)
        if self._config.reflection:
            add_reflection(self._grpc, *services)
        await self.sessions.start()
        self.metrics_address = self._listen_metrics()
        self.address = self._listen_grpc()
        await self._grpc.start()
        loops = (
            _repeat(self._tick, TICK_SECONDS),
            _repeat(self._check_credentials, CREDENTIALS_CHECK_SECONDS),
            # A task of its own for each: they may take long, and longest when no store answers.
            _repeat(self.sessions.sweep, SWEEP_SECONDS),
            _repeat(self.sessions.store.check, STORE_CHECK_SECONDS),
            _repeat(self.sessions.heartbeat, HEARTBEAT_SECONDS),
            self._measure_lag(),
            _repeat(Trimmer(lambda: self.memory.used).look, TRIM_SECONDS),
        )
        self._tasks = [asyncio.create_task(loop) for loop in loops]
        if self.tls is not None:
            self._tasks.append(asyncio.create_task(self.tls.watch()))
        if self._store.durable:
            saving = self.sessions.writer.run(self._config.snapshot_interval)
            self._tasks.append(asyncio.create_task(saving))
            self._tasks.append(asyncio.create_task(self.sessions.survey.run()))
        for service in ("", *services, STORE_SERVICE):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        self.state = ServerState.SERVING

    async def apply(self, configuration: Configuration) -> None:
        """Puts what can be reloaded into use; the files that it names were found to be usable."""
        logging.getLogger().setLevel(configuration.server.log_level)
        self.set_limits(configuration.limits)
        self.sessions.catalog.restrict(ModelAccess(configuration.model_tenants))
        if self.credentials is not None:
            rules = configuration.certificates
            self.credentials.map_certificates(CertificateMapping(rules) if rules else None)
            await self.credentials.refresh(force=True)
        if self.tls is not None:
            await asyncio.to_thread(self.tls.reload)

    async def drain(self) -> None:
        """Stops in order, and loses nothing that was accepted. Further calls wait for the first.

        1. Health says NOT_SERVING, so that load balancers turn away.
        2. New sessions and steps are refused with UNAVAILABLE and RetryInfo.
        3. Accepted steps are finished and answered, every session is saved, its lease is
           given up, and streams end, within `drain_seconds`.
        4. gRPC stops, which ends watches of health; metrics last, so that the end can be seen.
        """
        if self._drained is None:
            self._drained = asyncio.create_task(self._drain())
        await asyncio.shield(self._drained)

    def reload_with(self, load: Load, configuration: Configuration) -> ConfigurationReloader:
        """Lets a running server reload its configuration when the file of it changes.

        Args:
            load: makes the configuration anew.
            configuration: the one with which it has started.
        """
        file = Path(configuration.file)
        reloader = ConfigurationReloader(file, load, configuration, self.apply, self._metrics)
        self._tasks.append(asyncio.create_task(reloader.run()))
        return reloader

    async def stop(self, grace_seconds: float = 0.0) -> None:
        """Stops: calls that are not done within the grace are cut."""
        for task in self._tasks:
            task.cancel()
        if self._drained is not None and self._drained is not asyncio.current_task():
            self._drained.cancel()  # it would go on, and save to a store that is closed
            await asyncio.wait([self._drained])
        await self._grpc.stop(grace_seconds)
        await self.sessions.store.close()
        if self._http is not None:
            http, thread = self._http
            with suppress(OSError):  # wakes its thread, which looks up only twice a second
                http.socket.shutdown(socket.SHUT_RDWR)
            await asyncio.to_thread(http.shutdown)
            http.server_close()
            thread.join()
            self._http = None
        self._audit.close()
        self.state = ServerState.STOPPED

    async def _drain(self) -> None:
        self.state = ServerState.DRAINING
        log.info("draining", extra={"sessions": len(self.sessions)})
        self._health.shut_down()
        try:
            async with asyncio.timeout(self._config.drain_seconds):
                await self.sessions.drain()
                await self._servicer.drain()
                if self._triton is not None:
                    await self._triton.drain()
        except TimeoutError:
            log.warning("not all accepted steps were answered and saved in time: calls are cut")
        await self.stop(LAST_CALLS_SECONDS)
        log.info("stopped")

    def _open_audit_log(self) -> None:
        try:
            self._audit.enter_context(audit_lines(self._config.audit_log))
        except OSError as error:
            raise AuditLogError(self._config.audit_log, str(error.strerror)) from error

    def _triton_service(self, backend: Backend) -> TritonService | None:
        """The API for Triton's clients, if the package with its messages is installed."""
        try:
            from stepstate.transport.triton import TritonService  # noqa: PLC0415 - an extra
        except ImportError as error:
            if isinstance(error, ModuleNotFoundError) and "tritonclient" in (error.name or ""):
                log.info("Triton's clients are not served: the extra `triton` is not installed")
            else:
                log.warning("Triton's clients are not served: %s", error)
            return None
        return TritonService(backend, MemoryAccount(self.memory))

    def _wire_sessions(self, catalog: Catalog) -> SessionService:
        config = self._config
        for model in catalog:
            self._log_quantization_error(model)
        return SessionService(
            catalog,
            self._store,
            SchedulerSettings(
                EngineSettings(
                    capacity=self._slots,
                    batch_rows=config.batch_rows,
                    chunk_rows=config.chunk_rows,
                    precision=self._precision,
                    runtime=Runtime(config.engine),
                    accelerator=None if config.device == "cpu" else config.device,
                ),
                replay_rows=config.replay_rows,
                replay_bytes=config.replay_bytes,
                replay_memory=MemoryAccount(self.memory),
                backlog_rows=config.backlog_rows,
            ),
            limits=Limits(
                queued_requests=config.queue_requests,
                queued_rows=config.queue_rows,
                default_idle_seconds=config.idle_timeout,
                max_idle_seconds=config.max_idle_timeout,
                expired_grace_seconds=config.expired_grace,
                sessions=self._max_sessions,
                durability=Durability(config.durability),
                durable=self._store.durable,
                tenants=self.tenants,
            ),
            owner=f"{config.server_name or _host_and_port(config)}#{secrets.token_hex(4)}",
            clock=UPTIME,
            unix_time=time.time,
            observer=self._metrics,
        )

    def _log_quantization_error(self, model: Model) -> None:
        """Logs what weights with fewer bits do to a model, before anyone relies on its outputs."""
        if self._precision is Precision.FLOAT32:
            return
        loss = measure_loss(model, self._precision)
        log.info(
            "outputs differ from float32's, in units of their scale in the manifest",
            extra={
                "model": model.key,
                "weights": self._precision.value,
                "largest": f"{loss.largest:.2g}",
                "mean": f"{loss.mean:.2g}",
                "faster_here": has_instructions(self._precision),
            },
        )

    def _listen_grpc(self) -> str:
        try:
            port = _add_port(self._grpc, self._config, self.tls)
        except RuntimeError as error:
            raise ListenError("--listen", self._config.listen, str(error)) from error
        return f"{self._config.listen.rpartition(':')[0]}:{port}"

    def _listen_metrics(self) -> str:
        host, port = split_address(self._config.metrics_listen)
        try:
            self._http = start_http(
                host,
                port,
                self._registry,
                serving=lambda: self.state is ServerState.SERVING,
                tls=self.tls,
            )
        except OSError as error:
            address = self._config.metrics_listen
            raise ListenError("--metrics-listen", address, str(error)) from error
        return f"{self._config.metrics_listen.rpartition(':')[0]}:{self._http[0].server_port}"

    async def _tick(self) -> None:
        UPTIME.heartbeat()
        self.tenants.forget_idle()
        self._report_store_health()

    async def _check_credentials(self) -> None:
        if self.credentials is not None:
            await self.credentials.refresh()
            self._interceptor.open_calls.end_where(self.credentials.problem_of)

    async def _measure_lag(self) -> None:
        while True:
            due = time.perf_counter() + LAG_SECONDS
            await asyncio.sleep(LAG_SECONDS)
            self._metrics.loop_lag.observe(max(0.0, time.perf_counter() - due))

    def _report_store_health(self) -> None:
        """A service of its own, so that no load balancer turns away from all servers at once."""
        up = self.sessions.store.up
        if up is not self._store_reported_up and self.state is ServerState.SERVING:
            status = health_pb2.HealthCheckResponse
            self._health.set(STORE_SERVICE, status.SERVING if up else status.NOT_SERVING)
            self._store_reported_up = up


async def _repeat(do: Callable[[], Awaitable[object]], seconds: float) -> None:
    """Does something at once, and every so many seconds; and goes on whatever it raises."""
    while True:
        try:
            await do()
        except StoreUnavailable:
            pass  # noted where it was asked; health tells it
        except Exception:
            extra = {"work": do.__qualname__}
            log.exception("periodic work failed; it is tried again", extra=extra)
        await asyncio.sleep(seconds)


async def build_server(
    config: ServerConfig,
    *,
    certificates: Sequence[CertificateRule] = (),
    authenticator: Authenticator | None = None,
    limits: LimitTable | None = None,
    access: ModelAccess = EVERYONE,
) -> Server:
    """A server that is to be started; where there are no models, nothing is left behind.

    Args:
        config: the settings.
        certificates: whose the certificates of clients are.
        authenticator: knows who calls, where the settings name no credentials; None: everyone is
            anonymous there.
        limits: of the tenants.
        access: which of them may use which models.

    Raises:
        InsecureAddress: other machines could reach sessions that nothing protects.
        ModelInvalid: there is no model to serve, or one can't be served.
        DeviceUnavailable: the device is not here.
        RuntimeUnavailable: a package of the engine is not installed.
        SnapshotKeyInvalid: the keys of snapshots can't be read.
        TlsInvalid: the certificate, its key or the authority of clients can't be used.
        CredentialsInvalid: tokens, or keys of JWTs, can't be read.
        StoreOpenError: the store is not to be had.
    """
    identities = has_identities(config, certificates) or authenticator is not None
    check_exposure(config, identities=identities)
    if config.device != "cpu":
        check_accelerator(config.device)
    check_runtime(Runtime(config.engine))
    catalog = load_catalog(config.models, skip_invalid=config.skip_invalid_models, access=access)
    for error in catalog.skipped:
        log.warning("a model is skipped", extra={"folder": error.folder, "problem": error.problem})
    keys = read_keys(config.snapshot_key)
    credentials, files = await _credentials(config, certificates), tls_files(config)
    tls = ServerTls(files) if files is not None else None
    return Server(
        config,
        catalog,
        store=await _store(config),
        keys=keys,
        tls=tls,
        credentials=credentials,
        authenticator=authenticator,
        limits=limits,
    )


@asynccontextmanager
async def running_server(
    config: ServerConfig,
    *,
    certificates: Sequence[CertificateRule] = (),
    authenticator: Authenticator | None = None,
    limits: LimitTable | None = None,
    access: ModelAccess = EVERYONE,
) -> AsyncIterator[Server]:
    """A server that serves inside the block and is drained at its end; see `build_server`."""
    server = await build_server(
        config,
        certificates=certificates,
        authenticator=authenticator,
        limits=limits,
        access=access,
    )
    try:
        await server.start()
        yield server
        await server.drain()
    finally:
        await server.stop()


async def _credentials(
    config: ServerConfig, certificates: Sequence[CertificateRule]
) -> Credentials | None:
    """What callers are known by, if anything is configured.

    Raises:
        CredentialsInvalid: a file of it can't be read.
    """
    if not has_identities(config, certificates):
        return None
    return Credentials(
        tokens=TokenFile(config.tokens_file) if config.tokens_file else None,
        jwts=await _web_tokens(config) if config.jwt_jwks else None,
        certificates=CertificateMapping(certificates) if certificates else None,
    )


async def _web_tokens(config: ServerConfig) -> WebTokens:
    settings = JwtSettings(
        issuer=config.jwt_issuer,
        audience=config.jwt_audience,
        tenant_claim=config.jwt_tenant_claim,
        scopes_claim=config.jwt_scopes_claim,
        leeway_seconds=config.jwt_leeway,
    )
    if "://" in config.jwt_jwks:  # read in the background: its provider may be away now
        return WebTokens(settings, KeyRing(KeyUrl(config.jwt_jwks)))
    keys = KeyRing(KeyFile(config.jwt_jwks))
    await keys.read_now()
    return WebTokens(settings, keys)


async def _store(config: ServerConfig) -> SessionStore:
    file = config.store_password_file
    return await open_store(
        config.store,
        password=read_password(file) if file else config.store_password,
        ca_file=config.store_ca_file,
        clock=UPTIME,
        unix_time=time.time,
        fsync=config.store_fsync,
    )


def _add_port(server: Any, config: ServerConfig, tls: ServerTls | None) -> int:
    """Listens with TLS or without; returns the port.

    Raises:
        RuntimeError: it can't.
    """
    if tls is None:
        port: int = server.add_insecure_port(config.listen)
    elif config.transport == "grpcio":
        port = server.add_secure_port(config.listen, grpcio_credentials(tls))
    else:
        port = server.add_secure_port(config.listen, lambda: tls.current.http2)
    return port


def _transport(
    config: ServerConfig,
    interceptor: RpcInterceptor,
    receiver: Receiver,
    tls: ServerTls | None,
) -> Any:
    """The gRPC server that was chosen: both take the same servicers."""
    if config.transport == "grpcio":
        return grpc.aio.server(interceptors=[interceptor], options=_channel_options(config))
    limits = Http2Limits(concurrent_streams=config.max_concurrent_streams)
    return H2Server(
        [interceptor],
        times=ConnectionTimes(age=config.max_connection_age, age_grace=AGE_GRACE_SECONDS),
        compressed_requests=config.allow_compressed_requests,
        limits=limits,
        memory=lambda: ReceivingMemory(receiver),
        is_outdated=tls.is_outdated if tls is not None else None,
    )


def _channel_options(config: ServerConfig) -> list[tuple[str, int]]:
    options = [*CHANNEL_OPTIONS, ("grpc.max_concurrent_streams", config.max_concurrent_streams)]
    if config.max_connection_age:
        options.append(("grpc.max_connection_age_ms", int(config.max_connection_age * 1000)))
        options.append(("grpc.max_connection_age_grace_ms", int(AGE_GRACE_SECONDS * 1000)))
    if not config.allow_compressed_requests:
        options.append(("grpc.compression_enabled_algorithms_bitset", ONLY_IDENTITY))
    return options


def _host_and_port(config: ServerConfig) -> str:
    return f"{socket.gethostname()}:{split_address(config.listen)[1]}"


def _calm_collector() -> None:
    """Lets Python's cycle collector run less often, and leave alone what is there for good.

    A collection looks at all objects since the last one while the event loop waits: 2 ms for 5,000
    of them, and 50 ms for 50,000. Steps leave no cycles behind.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 100)


async def serve(
    load: Load, configuration: Configuration, announce: Callable[[Server], None]
) -> bool:
    """Runs a server until a signal: the first one drains it, a second one cuts that short.

    With a configuration file, SIGHUP reloads that; without one, and when the terminal of the server
    closes, it drains as the others do.

    Args:
        load: makes the configuration anew.
        configuration: what it has made for the start.
        announce: called once, when the server listens.

    Returns:
        Whether it drained to the end.
    """
    signals = asyncio.Semaphore(0)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.release)
    listens_to_hangup = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # as under nohup
    if listens_to_hangup:
        loop.add_signal_handler(signal.SIGHUP, signals.release)
    server = await build_server(
        configuration.server,
        certificates=configuration.certificates,
        limits=configuration.limits,
        access=ModelAccess(configuration.model_tenants),
    )
    try:
        await server.start()
        if configuration.file:
            reloader = server.reload_with(load, configuration)
            if listens_to_hangup:
                loop.add_signal_handler(signal.SIGHUP, _hung_up(reloader, signals.release))
        _calm_collector()
        announce(server)
        await signals.acquire()
        drained = asyncio.create_task(server.drain())
        forced = asyncio.create_task(signals.acquire())
        await asyncio.wait((drained, forced), return_when=asyncio.FIRST_COMPLETED)
        if forced.done():
            log.warning("forced by a second signal: accepted steps may go unanswered")
        forced.cancel()
        return drained.done()
    finally:
        await server.stop()


def _hung_up(reloader: ConfigurationReloader, drain: Callable[[], None]) -> Callable[[], None]:
    """What SIGHUP does: it asks for a reload, unless it says that the terminal has closed."""
    had_terminal = _has_terminal()

    def hung_up() -> None:
        if had_terminal and not _has_terminal():
            drain()
        else:
            reloader.ask()

    return hung_up


def _has_terminal() -> bool:
    """Whether a terminal controls this process; one that has closed does not any more."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
