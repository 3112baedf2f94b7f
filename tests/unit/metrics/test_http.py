"""The metrics port, with real connections on loopback."""

from __future__ import annotations

import gzip
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from wsgiref.util import setup_testing_defaults

import pytest
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stepstate.metrics import http, pages, start_http
from stepstate.metrics.pages import MAX_PAGES, SharedPages

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
HALF_OPEN = 3 * http.MAX_CONNECTIONS


class Counted(Collector):
    """Two series that wait before they are collected if a test says so."""

    def __init__(self) -> None:
        self.collected = 0
        self.broken = False
        self.collecting = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def collect(self) -> Iterator[Metric]:
        self.collecting.set()
        assert self.go_on.wait(20)
        self.collected += 1
        if self.broken:
            raise ValueError("it is broken")
        made = CounterMetricFamily("made", "Times.", labels=("by",))
        for by in range(120):
            made.add_metric((str(by),), 7 * by)
        yield made
        yield GaugeMetricFamily("other", "Another one.", 1.5)


@dataclass(frozen=True, slots=True)
class Port:
    """A metrics port in this process."""

    address: tuple[str, int]
    collector: Counted

    def connect(self, request: bytes = b"") -> socket.socket:
        """A connection that has sent something."""
        connected = socket.create_connection(self.address, timeout=20)
        connected.sendall(request)
        return connected

    def get(self, path: str = "/metrics", *headers: str) -> tuple[bytes, bytes]:
        """Head and body of a response."""
        lines = [f"GET {path} HTTP/1.1", *headers, "", ""]
        with self.connect("\r\n".join(lines).encode()) as connected:
            head, _, body = read(connected).partition(b"\r\n\r\n")
        return head, body


def read(connected: socket.socket) -> bytes:
    data = b""
    while more := connected.recv(65_536):
        data += more
    return data


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[Port]:
    monkeypatch.setattr(http, "ACCEPT_SECONDS", 0.0)
    monkeypatch.setattr(pages, "PAUSE_SECONDS", 0.0)
    registry = CollectorRegistry(support_collectors_without_names=True)
    collector = Counted()
    registry.register(collector)
    server, thread = start_http("127.0.0.1", 0, registry, serving=lambda: True)
    yield Port(("127.0.0.1", server.server_port), collector)
    collector.go_on.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_who_asks_while_a_page_is_made_gets_the_same_bytes(
    port: Port, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pages, "SHARED_SECONDS", 60.0)
    port.collector.go_on.clear()
    with ThreadPoolExecutor(20) as threads:
        answers = [threads.submit(port.get) for _ in range(20)]
        assert port.collector.collecting.wait(20)
        port.collector.go_on.set()
        bodies = {answer.result()[1] for answer in answers}
    assert len(bodies) == 1
    assert port.collector.collected == 1
    assert port.get()[1] in bodies  # and shortly after
    assert port.collector.collected == 1


def test_a_later_scrape_gets_a_new_page(port: Port, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pages, "SHARED_SECONDS", 0.0)
    for number in range(1, 4):
        port.get()
        assert port.collector.collected == number


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST"])
@pytest.mark.parametrize("query", ["", "name[]=other", "name[]=made_total&name[]=other"])
def test_a_shared_page_is_what_prometheus_client_gives(
    monkeypatch: pytest.MonkeyPatch, method: str, query: str
):
    """In every format, compressed or not, first or again."""
    monkeypatch.setattr(pages, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(pages, "SHARED_SECONDS", 0.01)
    registry = CollectorRegistry(support_collectors_without_names=True)
    registry.register(Counted())
    shared, plain = SharedPages(registry), make_wsgi_app(registry)
    accepted = ("", "text/plain", "text/plain;version=1.0.0;escaping=allow-utf-8", OPENMETRICS)
    for accept, encoding, _ in itertools.product(accepted, ("", "gzip, deflate"), range(2)):
        environ = {
            "REQUEST_METHOD": method,
            "PATH_INFO": "/metrics",
            "QUERY_STRING": query,
            "HTTP_ACCEPT": accept,
            "HTTP_ACCEPT_ENCODING": encoding,
        }
        setup_testing_defaults(environ)
        assert _answer(shared, environ) == _answer(plain, environ)


def _answer(application: Callable[..., object], environ: dict[str, object]) -> tuple[object, ...]:
    head: list[object] = []
    body = b"".join(application(environ, lambda *answer: head.extend(answer)))
    if ("Content-Encoding", "gzip") in head[1]:
        body = gzip.decompress(body)  # it has the time in it
    return *head, body


def test_few_pages_are_kept_whatever_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pages, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(pages, "SHARED_SECONDS", 0.001)
    registry = CollectorRegistry(support_collectors_without_names=True)
    registry.register(Counted())
    shared = SharedPages(registry)
    for number in range(3 * MAX_PAGES):
        environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": f"name[]=other&name[]=x{number}"}
        setup_testing_defaults(environ)
        assert b"other 1.5" in _answer(shared, environ)[-1]
    assert len(shared.kept) == MAX_PAGES


def test_connections_left_half_open_keep_nobody_out_and_few_threads(port: Port):
    before = threading.active_count()
    held = []
    for number in range(HALF_OPEN):
        held.append(port.connect(b"GET /metr" if number % 2 else b""))
        if number % 20 == 0:
            assert b"200 OK" in port.get()[0]
    assert threading.active_count() - before <= http.MAX_CONNECTIONS + 2
    assert b"200 OK" in port.get()[0]
    for connected in held:
        connected.close()


def test_pages_that_nobody_shares_keep_few_threads_and_no_scraper_out(
    port: Port, monkeypatch: pytest.MonkeyPatch
):
    """Some are told to ask again; all series are to be had meanwhile."""
    before = threading.active_count()
    port.collector.go_on.clear()
    requests = [f"GET /metrics?name[]=x{n} HTTP/1.1\r\n\r\n" for n in range(HALF_OPEN)]
    held = [port.connect(request.encode()) for request in requests]
    everything = port.connect(b"GET /metrics HTTP/1.1\r\n\r\n")
    assert threading.active_count() - before <= http.MAX_CONNECTIONS + 1
    monkeypatch.setattr(pages, "SHARED_SECONDS", 0.0)
    port.collector.go_on.set()
    assert b"other 1.5" in read(everything)
    statuses = [read(connected).split(b" ")[1] for connected in held]
    assert statuses.count(b"200") >= pages.MAX_UNUSUAL
    assert statuses.count(b"503") == HALF_OPEN - statuses.count(b"200") > 0
    for connected in [*held, everything]:
        connected.close()


@pytest.mark.parametrize("request_", [b"", b"GET /met", b"GET /metrics HTTP/1.1\r\nA: b\r\n"])
def test_a_connection_ends_after_a_time_whatever_it_waits_for(
    port: Port, monkeypatch: pytest.MonkeyPatch, request_: bytes
):
    monkeypatch.setattr(http, "CONNECTION_SECONDS", 0.1)
    with port.connect(request_) as connected:
        assert read(connected) == b""
    _until_no_thread_is_left()


def test_a_client_that_does_not_read_holds_no_thread_for_ever(
    port: Port, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(http, "CONNECTION_SECONDS", 0.1)
    monkeypatch.setattr(Counted, "collect", lambda _: [GaugeMetricFamily("big", "x" * 10**7, 1)])
    with port.connect(b"GET /metrics HTTP/1.1\r\n\r\n"):
        _until_no_thread_is_left()


def _until_no_thread_is_left() -> None:
    """The threads of connections are those with the name of their target."""
    deadline = time.monotonic() + 20
    while any("process_request_thread" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "head", [b"GET /" + b"x" * 10**6, b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 10**5]
)
def test_the_head_of_a_request_is_short(port: Port, head: bytes):
    with port.connect() as connected:
        try:
            connected.sendall(head)
            answer = read(connected)
        except ConnectionError:  # it is closed while more arrives
            answer = b""
    assert answer == b"" or b"431" in answer.partition(b"\r\n")[0]
    assert b"200 OK" in port.get()[0]


def test_nothing_is_printed_about_clients_that_vanish(
    port: Port, capfd: pytest.CaptureFixture[str]
):
    for request in (b"", b"GET / HT", b"nonsense\r\n\r\n", b"GET /metrics HTTP/1.1\r\n\r\n"):
        for _ in range(10):
            connected = port.connect(request)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connected.close()  # with a reset
    assert b"200 OK" in port.get()[0]
    _until_no_thread_is_left()
    assert capfd.readouterr().err == ""


def test_an_error_is_logged_and_over_when_its_cause_is(
    port: Port,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(pages, "SHARED_SECONDS", 0.0)
    port.collector.broken = True
    assert b"500 Internal Server Error" in port.get()[0]
    assert [record.message for record in caplog.records] == ["the metrics could not be shown"]
    port.collector.broken = False
    assert b"200 OK" in port.get()[0]
    assert "Traceback" not in capfd.readouterr().err
