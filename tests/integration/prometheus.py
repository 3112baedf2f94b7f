"""A real Prometheus that scrapes servers under test, with the rules of deploy/; its dashboard."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from tests.processes import ServerProcess

CONFIG = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: stepstate
    static_configs: [{{targets: {targets}}}]
"""

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "stepstate.json"

Labels = frozenset[tuple[str, str]]


def panels() -> list[dict]:
    """The panels of the dashboard, without its rows."""
    dashboard = json.loads(DASHBOARD.read_text())
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def filled(expression: str) -> str:
    """An expression of the dashboard as Grafana sends it: all servers, all models."""
    text = re.sub(r"\$(instance|model)\b", ".*", expression.replace("$__rate_interval", "20s"))
    assert "$" not in text
    return text


@dataclass(frozen=True, slots=True)
class Prometheus:
    """The HTTP API of a running Prometheus."""

    url: str
    servers: int
    """How many it scrapes."""

    def get(self, path: str, **parameters: str) -> dict:
        """The `data` of an answer."""
        with urlopen(f"{self.url}/api/v1/{path}?{urlencode(parameters)}") as answer:
            return json.load(answer)["data"]

    def samples(self, expression: str) -> dict[Labels, float]:
        """What an expression gives now, by labels."""
        result = self.get("query", query=expression)["result"]
        return {frozenset(each["metric"].items()): float(each["value"][1]) for each in result}

    def value(self, expression: str) -> float | None:
        """What it gives, where that is one sample or none."""
        samples = list(self.samples(expression).values())
        assert len(samples) <= 1, f"{expression}: {len(samples)} samples"
        return samples[0] if samples else None

    def by(self, label: str, expression: str) -> dict[str, float]:
        """What it gives, by the one label."""
        return {dict(labels)[label]: value for labels, value in self.samples(expression).items()}

    def scraped_after(self, moment: float) -> bool:
        """Whether every server was scraped later than a time since the epoch."""
        # timestamp() of anything but a series by itself is the time of the query.
        scraped = self.samples('timestamp(up{job="stepstate"}) and up == 1').values()
        return sum(at > moment for at in scraped) == self.servers

    def scrape(self) -> None:
        """Waits until what holds now was scraped."""
        now = time.time()
        eventually(lambda: self.scraped_after(now))


def eventually(condition: Callable[[], object], *, seconds: float = 20.0) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.1)


def instance(server: ServerProcess) -> str:
    """A server by its label."""
    return server.metrics_url.removeprefix("http://").removesuffix("/metrics")


@contextmanager
def running_prometheus(folder: Path, *servers: ServerProcess) -> Iterator[Prometheus]:
    """Scrapes servers every second until the block ends, with the rules of deploy/."""
    targets = json.dumps([instance(server) for server in servers])
    config = CONFIG.format(targets=targets, rules=DEPLOY / "alerts.yml")
    with configured_prometheus(folder, config, len(servers)) as prometheus:
        yield prometheus


@contextmanager
def configured_prometheus(folder: Path, config: str, servers: int) -> Iterator[Prometheus]:
    """Runs with a configuration, which has so many targets."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("MISSING PROGRAM: prometheus; .ci/run installs it, or apt-get install it")
    file, log = folder / "prometheus.yml", folder / "log"
    file.write_text(config)
    command = [program, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    command += ["--web.listen-address=127.0.0.1:0"]
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink)
    try:
        eventually(lambda: _port(log) is not None or process.poll() is not None)
        prometheus = Prometheus(f"http://127.0.0.1:{_port(log)}", servers)
        eventually(lambda: _is_ready(prometheus))
        yield prometheus
    finally:
        process.terminate()
        process.wait(timeout=30)


def _port(log: Path) -> str | None:
    """The port it took, by its log: `msg="Listening on" address=127.0.0.1:34567`."""
    for line in log.read_text().splitlines():
        if "Listening on" in line:
            return line.rpartition(":")[2].strip()
    return None


def _is_ready(prometheus: Prometheus) -> bool:
    try:
        with urlopen(f"{prometheus.url}/-/ready") as answer:
            return answer.status == 200
    except URLError:
        return False
