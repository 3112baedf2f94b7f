"""The HTTP server of the metrics port: /metrics for Prometheus, and /healthz."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]
_TEXT = ("Content-Type", "text/plain; charset=utf-8")


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # a scrape that hangs does not delay the stop


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Does not log requests."""


def start_http(
    host: str, port: int, registry: CollectorRegistry, *, serving: Callable[[], bool]
) -> tuple[WSGIServer, Thread]:
    """Starts a thread that serves /metrics and /healthz.

    Args:
        host: an address, IPv4 or IPv6.
        port: 0 for any.
        registry: what /metrics shows.
        serving: whether /healthz answers 200, otherwise 503.

    Raises:
        OSError: it can't listen there.
    """
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]

    class MetricsServer(_ThreadingServer):
        address_family = family

    app = _application(make_wsgi_app(registry), serving)
    server = make_server(host, port, app, MetricsServer, handler_class=_QuietHandler)
    thread = Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    return server, thread


def _application(metrics: Application, serving: Callable[[], bool]) -> Application:
    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return metrics(environ, start_response)
        if path == "/healthz":
            up = serving()
            start_response("200 OK" if up else "503 Service Unavailable", [_TEXT])
            return [b"SERVING\n" if up else b"NOT_SERVING\n"]
        start_response("404 Not Found", [_TEXT])
        return [b"there are /metrics and /healthz\n"]

    return answer
