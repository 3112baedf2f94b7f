"""The HTTP server of the metrics port: /metrics for Prometheus, and /healthz.

Its threads compete with the event loop for Python's lock. So connections are taken one by one
with a pause, a new one ends the oldest if there are too many, and none lasts long.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from http.client import LineTooLong
from io import BufferedIOBase
from socketserver import ThreadingMixIn
from threading import Lock, Semaphore, Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry

from stepstate.metrics.pages import Environ, SharedPages, StartResponse
from stepstate.tls import ClientAuth, ServerTls

MAX_CONNECTIONS = 64
CONNECTION_SECONDS = 10.0
"""Prometheus gives up after as long."""
ACCEPT_SECONDS = 0.01
"""Between two connections. A request takes half a millisecond, and Prometheus makes one in 15 s."""
MAX_HEAD_BYTES = 16_384

Application = Callable[[Environ, StartResponse], Iterable[bytes]]
_TEXT = ("Content-Type", "text/plain; charset=utf-8")
_CERTIFICATE = "stepstate.certificate"
"""In the environment of a request: the fields of its client's certificate, or nothing."""


class _BoundedServer(ThreadingMixIn, WSGIServer):
    """A thread for each connection, few connections at a time, and none for long."""

    daemon_threads = True  # a scrape that hangs does not delay the stop
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self._open = OrderedDict[socket.socket, float]()
        """By the time of their start."""
        self._lock = Lock()
        self._threads_left = Semaphore(MAX_CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._cut(lambda: len(self._open) >= MAX_CONNECTIONS)
        self._threads_left.acquire()  # of the one that was cut, or of one that waits for a page
        with self._lock:
            self._open[request] = time.monotonic()
        super().process_request(request, client_address)
        time.sleep(ACCEPT_SECONDS)

    def service_actions(self) -> None:
        """Is called at least twice a second."""
        start = time.monotonic() - CONNECTION_SECONDS
        self._cut(lambda: bool(self._open) and next(iter(self._open.values())) < start)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)
        self._threads_left.release()

    def handle_error(self, *_: object) -> None:
        """Does not print that a client is gone; `SharedPages` logs errors of ours."""

    def _cut(self, too_many: Callable[[], bool]) -> None:
        """Ends the oldest connections: their threads, which read or write, find them closed."""
        with self._lock:
            while too_many():
                oldest, _ = self._open.popitem(last=False)
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)


class _BoundedHead(BufferedIOBase):
    """The file of a request; a head that is too long is an error."""

    def __init__(self, file: BufferedIOBase) -> None:
        self._file = file
        self._left = MAX_HEAD_BYTES

    def readline(self, size: int | None = None, /) -> bytes:
        line = self._file.readline(self._left + 1 if size is None else min(size, self._left + 1))
        self._left -= len(line)
        if self._left < 0:
            raise LineTooLong("head of the request")
        return line

    def close(self) -> None:
        super().close()
        self._file.close()


class _QuietHandler(WSGIRequestHandler):
    def setup(self) -> None:
        if isinstance(self.request, ssl.SSLSocket):
            self.request.do_handshake()  # here, as it may take long, and others are accepted
        super().setup()
        self.rfile = _BoundedHead(self.rfile)

    def get_environ(self) -> Environ:
        is_tls = isinstance(self.request, ssl.SSLSocket)
        certificate = self.request.getpeercert() if is_tls else None
        return {**super().get_environ(), _CERTIFICATE: certificate}

    def log_message(self, *_: object) -> None:
        """Does not log requests."""


def start_http(
    host: str,
    port: int,
    registry: CollectorRegistry,
    *,
    serving: Callable[[], bool],
    tls: ServerTls | None = None,
) -> tuple[WSGIServer, Thread]:
    """Starts a thread that serves /metrics and /healthz.

    Where clients need a certificate, /healthz is open all the same: an orchestrator has none.

    Args:
        host: an address, IPv4 or IPv6.
        port: 0 for any.
        registry: what /metrics shows.
        serving: whether /healthz answers 200, otherwise 503.
        tls: of its connections; None: plain text.

    Raises:
        OSError: it can't listen there.
    """
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]

    class MetricsServer(_BoundedServer):
        address_family = family

        def get_request(self) -> tuple[socket.socket, Any]:
            connection, address = super().get_request()
            if tls is not None:
                connection = tls.current.http.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
            return connection, address

    required = tls is not None and tls.current.files.client_auth is ClientAuth.REQUIRED
    app = _application(SharedPages(registry), serving, certificate_required=required)
    server = make_server(host, port, app, MetricsServer, handler_class=_QuietHandler)
    thread = Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    return server, thread


def _application(
    metrics: Application, serving: Callable[[], bool], *, certificate_required: bool
) -> Application:
    def answer(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics" and certificate_required and not environ[_CERTIFICATE]:
            start_response("403 Forbidden", [_TEXT])
            return [b"/metrics needs a client certificate of --tls-client-ca\n"]
        if path == "/metrics":
            return metrics(environ, start_response)
        if path == "/healthz":
            up = serving()
            start_response("200 OK" if up else "503 Service Unavailable", [_TEXT])
            return [b"SERVING\n" if up else b"NOT_SERVING\n"]
        start_response("404 Not Found", [_TEXT])
        return [b"there are /metrics and /healthz\n"]

    return answer
