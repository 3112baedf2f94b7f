"""The pages of /metrics, shared by all who ask at about the same time.

A page of 2,000 samples takes some 20 ms of a core. It is made in a thread, so it takes Python's
lock from the event loop: it must be made rarely, one at a time, and with pauses.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from threading import Lock, Semaphore
from typing import Any
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder, gzip_accepted
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

log = logging.getLogger(__name__)

SHARED_SECONDS = 0.1
"""For so long after it is made, a page answers requests; and so long no other page is made."""
MAX_PAGES = 8
"""That are kept: a format, compressed or not, all series or some."""
MAX_UNUSUAL = 4
"""Requests that may wait for an unusual page: some of the series, or another version of a format.
There are any number of such pages, and each of them delays Prometheus."""
SAMPLES_AT_ONCE = 50
"""Half a millisecond."""
PAUSE_SECONDS = 0.001
"""Enough for the event loop to get Python's lock, which `time.sleep(0)` mostly keeps."""

_TEXT = ("Content-Type", "text/plain; charset=utf-8")

Environ = dict[str, Any]
StartResponse = Callable[[str, list[tuple[str, str]]], object]
Variant = tuple[str, bool, frozenset[str]]
"""Content type, whether it is compressed, and the names of the series (none: all)."""


@dataclass(frozen=True, slots=True)
class _Page:
    status: str
    headers: list[tuple[str, str]]
    body: bytes
    made_at: float


class SharedPages:
    """A WSGI application like prometheus_client's, from whatever threads it is called."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._app = make_wsgi_app(_Paced(registry))
        self.kept = OrderedDict[Variant, _Page]()
        """The last page of each variant, the newest last."""
        self._made_at = 0.0
        self._lock = Lock()
        self._unusual = Semaphore(MAX_UNUSUAL)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Answers a request; see PEP 3333."""
        if environ["REQUEST_METHOD"] != "GET":
            rejected: Iterable[bytes] = self._app(environ, start_response)
            return rejected
        variant = _variant(environ)
        page = self._page(variant, environ) if _is_usual(variant) else self._unusual_page(environ)
        start_response(page.status, page.headers)
        return [page.body]

    def _unusual_page(self, environ: Environ) -> _Page:
        if not self._unusual.acquire(blocking=False):
            head = [_TEXT, ("Retry-After", "1")]
            busy = b"others ask for some of the series too: ask again, or for all of them\n"
            return _Page("503 Service Unavailable", head, busy, time.monotonic())
        try:
            return self._page(_variant(environ), environ)
        finally:
            self._unusual.release()

    def _page(self, variant: Variant, environ: Environ) -> _Page:
        with self._lock:  # who comes while the page is made finds it made
            page = self.kept.get(variant)
            if page is None or time.monotonic() > page.made_at + SHARED_SECONDS:
                time.sleep(max(0.0, self._made_at + SHARED_SECONDS - time.monotonic()))
                page = self.kept[variant] = self._render(environ)
                self.kept.move_to_end(variant)
                self._made_at = page.made_at
                if len(self.kept) > MAX_PAGES:
                    self.kept.popitem(last=False)
            return page

    def _render(self, environ: Environ) -> _Page:
        head: list[tuple[str, list[tuple[str, str]]]] = []
        try:
            body = b"".join(self._app(environ, lambda *answer: head.append(answer)))
        except Exception:
            log.exception("the metrics could not be shown")
            return _Page("500 Internal Server Error", [_TEXT], b"see the log\n", time.monotonic())
        return _Page(*head[0], body, time.monotonic())


def _variant(environ: Environ) -> Variant:
    _, content_type = choose_encoder(environ.get("HTTP_ACCEPT", ""))
    names = parse_qs(environ.get("QUERY_STRING", "")).get("name[]", ())
    compressed = gzip_accepted(environ.get("HTTP_ACCEPT_ENCODING", ""))
    return content_type, compressed, frozenset(names)


def _is_usual(variant: Variant) -> bool:
    content_type, _, names = variant
    return not names and ("version=0.0.4" in content_type or "version=1.0.0" in content_type)


class _Paced(Collector):
    """A registry, or the series with some names, whose samples come with pauses."""

    def __init__(self, registry: CollectorRegistry, names: Iterable[str] | None = None) -> None:
        self._registry = registry
        self._names = names

    def collect(self) -> Iterator[Metric]:
        source: Collector = self._registry
        if self._names is not None:
            source = self._registry.restricted_registry(self._names)
        for metric in source.collect():
            metric.samples = _PacedSamples(metric.samples)
            yield metric

    def restricted_registry(self, names: Iterable[str]) -> Collector:
        return _Paced(self._registry, names)


class _PacedSamples(list[Sample]):
    """Samples that are given with pauses."""

    def __iter__(self) -> Iterator[Sample]:
        for place, sample in enumerate(super().__iter__()):
            if place % SAMPLES_AT_ONCE == 0:
                time.sleep(PAUSE_SECONDS)
            yield sample
