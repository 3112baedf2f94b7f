"""What a server's metrics say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families


def counters(url: str) -> Counter[str]:
    """Every counter of a server, its labels summed up."""
    found: Counter[str] = Counter()
    for name, _, value in _samples(url):
        if name.endswith("_total"):
            found[name] += int(value)
    return found


def series(url: str, name: str, **labels: str) -> float:
    """The sum of the series of a name that have these labels."""
    return sum(
        value for found, held, value in _samples(url) if found == name and labels.items() <= held
    )


def _samples(url: str) -> list[tuple[str, set[tuple[str, str]], float]]:
    with urlopen(url) as answer:  # noqa: S310 - our own server
        families = text_string_to_metric_families(answer.read().decode())
    return [
        (sample.name, _items(sample.labels), sample.value)
        for family in families
        for sample in family.samples
    ]


def _items(labels: Mapping[str, str]) -> set[tuple[str, str]]:
    return set(labels.items())
