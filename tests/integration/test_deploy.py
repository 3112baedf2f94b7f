"""What deploy/ ships fits the server: its files are valid, and name only series that exist."""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest
from click.testing import CliRunner, Result

from stepstate.cli import main as stepstate
from stepstate.config import ServerConfig
from stepstate.v1 import stepstate_pb2 as pb
from stepstate.v1.stepstate_pb2_grpc import StepstateServiceStub
from tests.certificates import Authority, Certificate
from tests.credentials import token
from tests.integration.prometheus import (
    DASHBOARD,
    DEPLOY,
    configured_prometheus,
    eventually,
    filled,
    panels,
)
from tests.networks import Network
from tests.offline import forecasting_network
from tests.processes import ServerProcess, server_process

ROOT = Path(__file__).parents[2]

FROM_PROMETHEUS = {"up", "ALERTS"}
"""Series that Prometheus itself makes."""

_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"')
_SELECTORS = re.compile(r"\{[^}]*\}|\[[^\]]*\]")
_GROUPINGS = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_NAMES = re.compile(r"\b[a-zA-Z_:][\w:]*\b(?!\s*\()")
_WORDS = {"and", "or", "unless", "offset", "bool", "by", "without"}


def metrics_of(expression: str) -> set[str]:
    """The names of the series in a PromQL expression."""
    text = _STRINGS.sub("", expression)
    for pattern in (_SELECTORS, _GROUPINGS):
        text = pattern.sub(" ", text)
    functions = set(re.findall(r"\b([a-z_0-9]+)\s*(?:\(|(?:by|without)\b)", text))
    return set(_NAMES.findall(text)) - _WORDS - functions


def _dashboard_expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def _alert_expressions() -> list[str]:
    """The `expr:` of each alert, on its line or as the block below it."""
    text = (DEPLOY / "alerts.yml").read_text()
    blocks = re.findall(r"^ {8}expr: (?:\|\n((?: {10}.*\n)+)|(.+)\n)", text, re.MULTILINE)
    return [block or line for block, line in blocks]


@pytest.fixture(scope="module")
def exposed(
    networks: dict[str, Network],
    tmp_path_factory: pytest.TempPathFactory,
    authority: Authority,
    certificate: Certificate,
) -> str:
    """/metrics of a server with TLS and tokens that was used and refused something."""
    root = tmp_path_factory.mktemp("models")
    for network in (networks["lstm"], forecasting_network()):
        network.write(root)
    tls = ("--tls-cert", str(certificate.file), "--tls-key", str(certificate.key))
    trusting = grpc.ssl_channel_credentials(authority.file.read_bytes())
    tokens = tmp_path_factory.mktemp("tokens") / "tokens.json"
    caller = grpc.access_token_call_credentials(token(tokens))
    limits = tokens.with_name("stepstate.toml")
    limits.write_text("[limits]\nstreams = 0\n")
    options = ("--models", str(root), *tls, "--tokens-file", str(tokens), "--config", str(limits))
    with server_process(*options) as server:
        both = grpc.composite_channel_credentials(trusting, caller)
        with grpc.secure_channel(server.address, both) as channel:
            stub = StepstateServiceStub(channel)
            for name in ("one", "two"):
                stub.OpenSession(pb.OpenSessionRequest(session_id=name, model="lstm"))
            stub.Step(pb.StepRequest(session_id="one", x=[0.0] * 3))
            stub.CloseSession(pb.CloseSessionRequest(session_id="two"))
            with pytest.raises(grpc.RpcError):
                stub.Step(pb.StepRequest(session_id="one", t=9, x=[0.0] * 3))
            with pytest.raises(grpc.RpcError):
                list(stub.StreamSteps(iter(())))
        context = ssl.create_default_context(cafile=authority.file)
        with urlopen(server.metrics_url, context=context) as answer:
            return answer.read().decode()


@pytest.fixture
def promtool(program: Callable[[str], str]) -> Callable[..., None]:
    """Runs promtool in deploy/; it must have nothing to say against its input."""
    path = program("promtool")

    def run(*arguments: str, text: str | None = None) -> None:
        command = [path, *arguments]
        done = subprocess.run(
            command, input=text, cwd=DEPLOY, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def test_the_exposition_passes_promtools_lint(promtool: Callable[..., None], exposed: str) -> None:
    promtool("check", "metrics", text=exposed)


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "--lint=all", "--lint-fatal", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts_what_is_shipped(
    promtool: Callable[..., None], arguments: tuple[str, ...]
) -> None:
    promtool(*arguments)


def test_names_are_found_in_expressions() -> None:
    """The parser of these tests, tried."""
    found = metrics_of(
        'histogram_quantile(0.9, sum by (le) (rate(a_bucket{x=~"b_c|{d}"}[5m]))) > 0.1 '
        "or sum(e_total) by (instance) unless f:g offset 5m"
    )
    assert found == {"a_bucket", "e_total", "f:g"}


@pytest.mark.parametrize("expressions", [_dashboard_expressions(), _alert_expressions()])
def test_every_series_named_in_deploy_exists(exposed: str, expressions: list[str]) -> None:
    series = set(re.findall(r"^([a-zA-Z_:][\w:]*)[{ ]", exposed, re.MULTILINE))
    named = {name for expression in expressions for name in metrics_of(expression)}
    assert len(named) >= 5
    assert named - FROM_PROMETHEUS <= series


def test_every_expression_of_the_dashboard_is_promql(
    promtool: Callable[..., None], tmp_path: Path
) -> None:
    """As recording rules, which promtool parses; Grafana's variables are filled in."""
    texts = map(filled, _dashboard_expressions())
    rules = [{"record": f"panel:{place}", "expr": text} for place, text in enumerate(texts)]
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(path))


def test_panels_are_titled_explained_and_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert all(target["expr"] for target in panel["targets"])
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_panel_ids_are_unique_and_variables_are_declared() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    declared = {variable["name"] for variable in dashboard["templating"]["list"]}
    text = json.dumps(dashboard["panels"])
    used = set(re.findall(r"\$\{?([a-zA-Z]\w*)", text)) | set(re.findall(r"\$\{(\w+)\}", text))
    assert used <= declared
    assert {"instance", "model"} <= used


def test_dashboard_and_data_source_agree() -> None:
    source = (DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text()
    variables = json.loads(DASHBOARD.read_text())["templating"]["list"]
    (variable,) = [each for each in variables if each["type"] == "datasource"]
    assert f"uid: {variable['current']['value']}\n" in source


def test_alerts_near_a_limit_compare_with_the_one_that_the_server_tells(exposed: str) -> None:
    told = set(re.findall(r'^stepstate_limit\{of="(\w+)"\}', exposed, re.MULTILINE))
    asked = set(re.findall(r'stepstate_limit\{[^}]*of="(\w+)"', "\n".join(_alert_expressions())))
    limits = {"sessions", "queue_requests", "queue_rows", "backlog_rows", "memory_bytes"}
    assert asked == limits
    assert asked <= told


def test_every_alert_is_tried() -> None:
    alerts = re.findall(r"^ +- alert: (\w+)$", (DEPLOY / "alerts.yml").read_text(), re.MULTILINE)
    tests = (DEPLOY / "alerts_test.yml").read_text()
    assert len(alerts) >= 13
    assert [name for name in alerts if name not in tests] == []


def test_every_series_of_the_server_is_on_the_dashboard(exposed: str) -> None:
    """By family: what is never looked at need not be exposed."""
    families = set(re.findall(r"^# TYPE (stepstate_\w+) ", exposed, re.MULTILINE))
    shown = {name for expression in _dashboard_expressions() for name in metrics_of(expression)}
    unseen = {family for family in families if not any(name.startswith(family) for name in shown)}
    assert unseen == {"stepstate_limit"}  # for alerts


COMPOSE = ("docker-compose.yml", "docker-compose.redis.yml")


def _services(name: str) -> dict[str, str]:
    """The lines of each service of a compose file, by its name."""
    text = (ROOT / name).read_text()
    services = re.search(r"^services:\n(.*?)(?=^\S)", text, re.MULTILINE | re.DOTALL)
    assert services is not None
    parts = re.split(r"^  (\S+):\n", services[1], flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize(("name", "least"), [(COMPOSE[0], 4), (COMPOSE[1], 2)])
def test_compose_publishes_on_loopback_only(name: str, least: int) -> None:
    published = re.findall(r'^ +- "([^"]*:\d+)"$', (ROOT / name).read_text(), re.MULTILINE)
    assert len(published) >= least
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_every_server_of_compose_outlives_a_drain_and_writes_to_its_store_only() -> None:
    servers = {**_services(COMPOSE[1]), **_services(COMPOSE[0])}
    for server in (servers["stepstate"], servers["stepstate-2"]):
        (grace,) = re.findall(r"stop_grace_period: (\d+)s", server)
        assert int(grace) > ServerConfig().drain_seconds
        for line in ("read_only: true", "cap_drop: [ALL]", "restart: unless-stopped"):
            assert line in server


def test_every_server_of_compose_has_the_configuration_and_the_credentials() -> None:
    servers = {**_services(COMPOSE[1]), **_services(COMPOSE[0])}
    for server in (servers["stepstate"], servers["stepstate-2"]):
        for line in (
            "STEPSTATE_CONFIG: /etc/stepstate.toml",
            "- ./deploy/stepstate.toml:/etc/stepstate.toml:ro",
            "- credentials:/etc/stepstate:ro",
            "      credentials:\n        condition: service_completed_successfully\n",
        ):
            assert line in server
    maker = servers["credentials"]
    for line in (
        "entrypoint: [/bin/sh, /dev-credentials.sh, /etc/stepstate]",
        "- ./deploy/dev-credentials.sh:/dev-credentials.sh:ro",
        "- credentials:/etc/stepstate\n",
        "network_mode: none",
        "read_only: true",
        "cap_drop: [ALL]",
    ):
        assert line in maker


@dataclass(frozen=True, slots=True)
class Composed:
    """A server with the configuration and the credentials of compose."""

    process: ServerProcess
    folder: Path
    """What is in /etc/stepstate there."""
    variables: dict[str, str]
    """Of its container."""

    def run(self, *arguments: str, **variables: str) -> Result:
        """Runs `stepstate` there."""
        return CliRunner(env=self.variables | variables).invoke(stepstate, arguments)


@pytest.fixture
def composed(program: Callable[[str], str], model_root: Path, tmp_path: Path) -> Iterator[Composed]:
    program("openssl")
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["sh", str(DEPLOY / "dev-credentials.sh"), str(tmp_path)]
    for _ in range(2):  # the second one finds all there
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PATH": here})
    server = _services(COMPOSE[0])["stepstate"]
    variables = dict(re.findall(r"^      (STEPSTATE_\w+): (\S+)$", server, re.MULTILINE))
    file = tmp_path / "stepstate.toml"
    assert variables.pop("STEPSTATE_CONFIG") == "/etc/stepstate.toml"
    file.write_text(
        (DEPLOY / "stepstate.toml").read_text().replace("/etc/stepstate", str(tmp_path))
    )
    with server_process("--config", str(file), "--models", str(model_root)) as process:
        assert variables == {
            "STEPSTATE_TARGET": "grpcs://localhost:50051",
            "STEPSTATE_CA_FILE": "/etc/stepstate/ca.pem",
        }
        port = process.address.rpartition(":")[2]
        variables["STEPSTATE_TARGET"] = f"grpcs://localhost:{port}"
        variables["STEPSTATE_CA_FILE"] = str(tmp_path / "ca.pem")
        yield Composed(process, tmp_path, variables)


def test_the_health_check_of_the_image_works_in_compose_and_sessions_need_the_token(
    composed: Composed,
) -> None:
    check = re.search(r'CMD \["stepstate", "(\w+)"\]', (ROOT / "Dockerfile").read_text())
    assert check is not None
    done = composed.run(check[1])
    assert (done.exit_code, done.stdout) == (0, "SERVING\n")
    done = composed.run("sessions", "list")
    assert done.exit_code == 1
    assert "credential" in done.stderr
    done = composed.run("sessions", "list", STEPSTATE_TOKEN_FILE=str(composed.folder / "token"))
    assert done.exit_code == 0, done.output


def test_what_is_secret_in_compose_can_be_read_by_its_owner_only(composed: Composed) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in composed.folder.iterdir()}
    readable = {name for name, mode in modes.items() if mode & 0o077}
    assert {"key.pem", "token", "tokens.json"} <= modes.keys() - readable
    assert {"ca.pem", "cert.pem"} <= readable
    assert "ca.key" not in modes


def test_the_prometheus_of_compose_scrapes_with_tls(composed: Composed, tmp_path: Path) -> None:
    config = (DEPLOY / "prometheus.yml").read_text()
    config = config.replace("/etc/stepstate", str(composed.folder)).replace("5s", "1s")
    config = config.replace("alerts.yml", str(DEPLOY / "alerts.yml"))
    port = composed.process.metrics_url.rpartition(":")[2].removesuffix("/metrics")
    servers = (DEPLOY / "servers.yml").read_text().replace("stepstate:9464", f"localhost:{port}")
    (tmp_path / "servers.yml").write_text(servers)
    with configured_prometheus(tmp_path, config, 1) as prometheus:
        eventually(lambda: prometheus.value('up{job="stepstate"}') == 1)


def test_sessions_are_in_a_volume_that_the_image_lets_its_user_write_to() -> None:
    image = (ROOT / "Dockerfile").read_text()
    (folder,) = re.findall(r"STEPSTATE_STORE=sqlite:(\S+)/sessions\.db", image)
    (user,) = re.findall(r"^USER (\d+):", image, re.MULTILINE)
    assert f"--owner={user} " in image
    assert image.index(f"--mode=700 {folder}\n") < image.index(f"VOLUME {folder}\n")
    assert f"- sessions:{folder}\n" in _services(COMPOSE[0])["stepstate"]
    assert f"--owner={user} --group={user} --mode=755 /etc/stepstate\n" in image


def test_both_servers_of_one_redis_are_scraped() -> None:
    servers = _services(COMPOSE[1])
    for server in ("stepstate", "stepstate-2"):
        assert "STEPSTATE_STORE: redis://redis:6379/0" in servers[server]
        assert "      redis:\n        condition: service_healthy\n" in servers[server]
    targets = re.findall(r'"([^"]+)"', (DEPLOY / "servers-redis.yml").read_text())
    assert targets == ["stepstate:9464", "stepstate-2:9464"]
    assert "./deploy/servers-redis.yml:/etc/prometheus/servers.yml:ro" in servers["prometheus"]


def test_the_redis_of_compose_keeps_what_it_has_acknowledged() -> None:
    redis = _services(COMPOSE[1])["redis"]
    words = re.findall(r'^      - "?([^"\n]+)"?$', redis, re.MULTILINE)
    assert words[words.index("--appendonly") + 1] == "yes"
    assert words[words.index("--maxmemory-policy") + 1] == "noeviction"
    assert "redis:/data" in words


@pytest.mark.parametrize(("name", "least"), [(COMPOSE[0], 2), (COMPOSE[1], 1)])
def test_images_are_pinned(name: str, least: int) -> None:
    """Those from elsewhere, by a full version."""
    images = re.findall(r"^ +image: (\S+)$", (ROOT / name).read_text(), re.MULTILINE)
    foreign = [image for image in images if image != "stepstate"]
    assert len(foreign) >= least
    assert all(re.fullmatch(r"[^:]+:v?\d+\.\d+\.\d+", image) for image in foreign)
