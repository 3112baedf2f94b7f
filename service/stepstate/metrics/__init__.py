"""Prometheus metrics: what call sites count, the table of series, and the port that shows them."""

from stepstate.metrics.collector import SERIES, MetricsCollector, Series
from stepstate.metrics.counters import Histogram, Metrics, ModelMetrics, RpcMetrics
from stepstate.metrics.http import start_http

__all__ = [
    "SERIES",
    "Histogram",
    "Metrics",
    "MetricsCollector",
    "ModelMetrics",
    "RpcMetrics",
    "Series",
    "start_http",
]
