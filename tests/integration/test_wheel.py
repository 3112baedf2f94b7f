"""What is published, as users install it: the client alone, then a server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from email.message import Message
from email.parser import BytesParser
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from stepstate import __version__
from tests.integration.wire import HANG
from tests.markdown import ROOT

pytestmark = pytest.mark.long  # builds the package and installs it

Install = Callable[..., Path]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make build` makes: the sdist, and the wheel from it.

    Built from a copy, so that nothing is left in the tree, by the packages that are here.
    """
    tree, made = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tree)
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("service", "benchmarks", "tests/unit", "models/electricity/2"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=skipped)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(made), str(tree)]
    subprocess.run(build, check=True, timeout=HANG, capture_output=True)
    return made


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return BytesParser().parsebytes(archive.read(f"stepstate-{__version__}.dist-info/METADATA"))


@pytest.fixture(scope="module")
def install(wheel: Path, metadata: Message, tmp_path_factory: pytest.TempPathFactory) -> Install:
    """Installs the wheel in a new environment, which has what it says that it needs, no more.

    The packages that it needs are linked from here: none is downloaded.
    """

    def installed(*extras: str, without: str = "") -> Path:
        folder = tmp_path_factory.mktemp("environment")
        venv.create(folder, symlinks=True)
        python = folder / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index"]
        command = [*pip, "--no-deps", "--quiet", str(wheel)]
        subprocess.run(command, check=True, timeout=HANG, env=away_from_the_tree())
        (site,) = folder.glob("lib/python*/site-packages")
        for name in needed(metadata.get_all("Requires-Dist", []), extras) - {without}:
            for path in top_level(name):
                if not (site / path.name).exists():
                    (site / path.name).symlink_to(path)
        return folder

    return installed


def needed(requirements: list[str], extras: tuple[str, ...]) -> set[str]:
    """The distributions that requirements ask for, and those that these need in turn."""
    found: set[str] = set()
    waiting = [(one, extras) for one in requirements]
    while waiting:
        text, asked = waiting.pop()
        one = Requirement(text)
        wanted = [{"extra": extra} for extra in (*asked, "")]
        if one.marker is not None and not any(map(one.marker.evaluate, wanted)):
            continue
        own = one.name == "stepstate"  # an extra that includes another
        more = requirements if own else distribution(one.name).requires or []
        if own or one.name not in found:
            found |= set() if own else {one.name}
            waiting += [(requirement, tuple(one.extras)) for requirement in more]
    return found


def top_level(name: str) -> set[Path]:
    """Where a distribution is installed here."""
    found = distribution(name)
    assert found.files is not None
    site = Path(str(found.locate_file("")))
    parts = {file.parts[0] for file in found.files} - {"..", "__pycache__"}
    return {site / part for part in parts}


@pytest.fixture(scope="module")
def client_alone(install: Install) -> Path:
    return install()


@pytest.fixture(scope="module")
def server_alone(install: Install) -> Path:
    """Without Triton's messages."""
    return install("server")


def away_from_the_tree() -> dict[str, str]:
    """Variables by which neither the tree's package nor its settings are found."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("STEPSTATE", "PYTHONPATH"))}


def start(environment: Path, folder: Path, *command: str) -> subprocess.Popen[str]:
    """A program of an environment, away from the tree."""
    path = f"{environment}/bin{os.pathsep}{os.environ['PATH']}"
    program, *arguments = command
    return subprocess.Popen(
        [environment / "bin" / program, *arguments],
        cwd=folder,
        env=away_from_the_tree() | {"PATH": path, "STEPSTATE_VERSION": "0.1.0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(environment: Path, folder: Path, *command: str) -> tuple[int, str, str]:
    process = start(environment, folder, *command)
    stdout, stderr = process.communicate(timeout=HANG)
    return process.returncode, stdout, stderr


def test_an_index_would_take_them(dist: Path):
    files = sorted(map(str, dist.iterdir()))
    assert len(files) == 2
    check = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(check, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stdout


def test_it_says_what_it_is(metadata: Message):
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"]
    assert len(metadata.get_all("Project-URL")) >= 4
    assert {"cli", "plot", "server", "triton", "demo"} == set(metadata.get_all("Provides-Extra"))


def test_its_description_has_no_links_that_lead_nowhere_outside_the_repository(metadata: Message):
    description = metadata.get_payload(decode=True).decode()
    links = re.findall(r"\]\(([^)\s]+)|(?:src|href)=\"([^\"]+)", description)
    assert len(links) > 10
    assert [
        one for pair in links for one in pair if one and not one.startswith(("https://", "#"))
    ] == []


def test_it_holds_the_package_and_the_example_and_is_small(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    example = "stepstate/examples/electricity/2"
    assert {f"{example}/manifest.json", f"{example}/model.safetensors"} <= names
    assert {"stepstate/py.typed", "stepstate/v1/stepstate_pb2.py", "stepstate/server.py"} <= names
    assert not [name for name in names if not name.startswith(("stepstate/", "stepstate-"))]
    assert wheel.stat().st_size < 2_000_000


def test_the_sdist_holds_what_builds_the_wheel_and_no_more(dist: Path):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        paths = [Path(name).parts[1:] for name in archive.getnames()]
    top = {path[0] for path in paths if path}
    assert top == {
        *("LICENSE", "PKG-INFO", "README.md"),
        *("pyproject.toml", "service", "setup.cfg"),
    }


def test_the_client_needs_nothing_else(client_alone: Path, tmp_path: Path):
    code = (
        "import stepstate.client, sys, importlib.util\n"
        "print(stepstate.client.__file__)\n"
        "print([name for name in ('torch', 'click', 'pydantic', 'prometheus_client', 'benchmarks')"
        " if importlib.util.find_spec(name)])"
    )
    status, stdout, stderr = run(client_alone, tmp_path, "python", "-c", code)
    assert (status, stderr) == (0, "")
    where, others = stdout.splitlines()
    assert where.startswith(f"{client_alone}/lib/")
    assert others == "[]"


@pytest.mark.parametrize("arguments", [(), ("--help",), ("step",), ("serve",)], ids=" ".join)
def test_the_command_of_a_client_alone_says_what_it_lacks(
    client_alone: Path, tmp_path: Path, arguments: tuple[str, ...]
):
    for way in (("stepstate",), ("python", "-m", "stepstate.cli")):
        status, stdout, stderr = run(client_alone, tmp_path, *way, *arguments)
        assert (status, stdout, len(stderr.splitlines())) == (1, "", 1)
        assert stderr.startswith("stepstate: the command line needs the extra `cli`")
        assert "[cli]" in stderr


@pytest.mark.parametrize(
    ("extra", "without", "lacking"),
    [("cli", "", {"cryptography", "structlog", "uvloop"}), ("server", "torch", {"torch"})],
    ids=["the extra", "torch"],
)
def test_serve_says_which_package_it_lacks(
    install: Install, tmp_path: Path, extra: str, without: str, lacking: set[str]
):
    """With the extra `cli` alone, and with an installation that is broken."""
    environment = install(extra, without=without)
    status, _, stderr = run(environment, tmp_path, "stepstate", "serve")
    assert status == 1
    named = re.match(
        r"Error: `stepstate serve` needs (\w+), which comes with the extra `server`", stderr
    )
    assert named is not None, stderr
    assert named[1] in lacking
    assert len(stderr.splitlines()) == 1
    assert run(environment, tmp_path, "stepstate", "--help")[0] == 0


def test_a_server_of_the_wheel_serves_its_example(
    server_alone: Path, client_alone: Path, tmp_path: Path
):
    """From nothing, with the variable set that images set; the first log line is no traceback."""
    status, _, stderr = run(server_alone, tmp_path, "stepstate", "serve")
    assert status == 1
    assert "stepstate models example" in stderr
    assert list(tmp_path.iterdir()) == []
    status, stdout, stderr = run(server_alone, tmp_path, "stepstate", "models", "example")
    assert (status, stderr) == (0, "")
    assert stdout == "models/electricity/2 is written: stepstate serve --models models\n"
    ports = ("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0")
    server = start(server_alone, tmp_path, "stepstate", "serve", *ports)
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        assert line.startswith("serving electricity/2 on 127.0.0.1:")
        address = line.split(" on ")[1].split(",")[0]
        models = ("stepstate", "models", "--server", address)
        status, stdout, stderr = run(server_alone, tmp_path, *models)
        assert (status, stderr) == (0, "")
        assert stdout.startswith("electricity/2 ")
        assert step_once(client_alone, tmp_path, address) == (0, "1\n", "")
        server.send_signal(signal.SIGHUP)
        _, logged = server.communicate(timeout=HANG)
    finally:
        server.kill()
        server.communicate()
    assert server.returncode == 0
    first, *others = [json.loads(one) for one in logged.splitlines()]
    assert first["event"] == "Triton's clients are not served: the extra `triton` is not installed"
    assert (first["level"], "exception" in first) == ("info", False)
    assert [one["event"] for one in others][-2:] == ["draining", "stopped"]


def step_once(environment: Path, folder: Path, address: str) -> tuple[int, str, str]:
    code = (
        "import sys\n"
        "from datetime import datetime\n"
        "from stepstate.client import Client\n"
        "with Client(sys.argv[1]) as client:\n"
        "    with client.open('electricity', start_time=datetime(2000, 8, 28)) as session:\n"
        "        session.step(22262.0)\n"
        "        print(session.t)\n"
    )
    return run(environment, folder, "python", "-c", code, address)
