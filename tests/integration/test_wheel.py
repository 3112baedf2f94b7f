"""The wheel, as it is installed: the client alone, and a server without Triton's messages."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.wire import HANG

ROOT = Path(__file__).parents[2]
SITE = Path(sysconfig.get_paths()["purelib"])
OF_CLIENT = ("grpc", "google", "numpy", "numpy.libs", "typing_extensions.py")
"""What `pip install` of the wheel brings, by the names in site-packages."""


OTHERS = re.compile(r"tritonclient|stepstate|__editable__|.*\.pth$|_?virtualenv")
"""Not in a server's: Triton's messages, and what leads to the tree."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the tree."""
    tree, made = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "service", tree / "service", symlinks=True, ignore=skipped)
    shutil.copytree(ROOT / "models" / "electricity" / "2", tree / "models" / "electricity" / "2")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(made), str(tree)], check=True, timeout=HANG)
    (found,) = made.iterdir()
    return found


@pytest.fixture(scope="module")
def install(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Installs the wheel beside links to some of the packages that are here."""

    def installed(wanted: Callable[[str], bool]) -> Path:
        target = tmp_path_factory.mktemp("site")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
        for package in SITE.iterdir():
            if wanted(package.name) and not (target / package.name).exists():
                (target / package.name).symlink_to(package)
        return target

    return installed


@pytest.fixture(scope="module")
def client_alone(install: Callable[..., Path]) -> Path:
    return install(lambda name: name in OF_CLIENT)


@pytest.fixture(scope="module")
def server_alone(install: Callable[..., Path]) -> Path:
    """All packages but Triton's, and not the tree's own."""
    return install(lambda name: not OTHERS.match(name))


def start(site: Path, folder: Path, *command: str) -> subprocess.Popen[str]:
    """Python without any other packages, and without the tree."""
    variables = {name: value for name, value in os.environ.items() if "STEPSTATE" not in name}
    return subprocess.Popen(
        [sys.executable, "-S", *command],
        cwd=folder,
        env=variables | {"PYTHONPATH": str(site), "STEPSTATE_VERSION": "0.1.0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(site: Path, folder: Path, *command: str) -> tuple[int, str, str]:
    process = start(site, folder, *command)
    stdout, stderr = process.communicate(timeout=HANG)
    return process.returncode, stdout, stderr


def test_it_holds_the_package_and_the_example_and_is_small(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    example = "stepstate/examples/electricity/2"
    assert {f"{example}/manifest.json", f"{example}/model.safetensors"} <= names
    assert {"stepstate/py.typed", "stepstate/v1/stepstate_pb2.py", "stepstate/server.py"} <= names
    assert not [name for name in names if not name.startswith(("stepstate/", "stepstate-"))]
    assert wheel.stat().st_size < 2_000_000


def test_the_client_needs_nothing_else(client_alone: Path, tmp_path: Path):
    code = "import stepstate.client, sys; print(stepstate.client.__file__, 'torch' in sys.modules)"
    status, stdout, stderr = run(client_alone, tmp_path, "-c", code)
    assert (status, stderr) == (0, "")
    assert stdout == f"{client_alone}/stepstate/client/__init__.py False\n"


@pytest.mark.parametrize("arguments", [(), ("--help",), ("step",), ("serve",)], ids=" ".join)
def test_the_command_of_a_client_alone_says_what_it_lacks(
    client_alone: Path, tmp_path: Path, arguments: tuple[str, ...]
):
    code = "import sys; from stepstate.cli import main; sys.exit(main())"  # as the script does
    for way in (("-c", code), ("-m", "stepstate.cli")):
        status, stdout, stderr = run(client_alone, tmp_path, *way, *arguments)
        assert (status, stdout, len(stderr.splitlines())) == (1, "", 1)
        assert stderr.startswith("stepstate: the command line needs the extra `cli`")
        assert "[cli]" in stderr


@pytest.mark.parametrize("lacking", ["uvloop", "torch"])
def test_serve_says_which_package_it_lacks(
    install: Callable[..., Path], tmp_path: Path, lacking: str
):
    """With the extra `cli` alone, and with an installation that is broken."""

    def wanted(name: str) -> bool:
        if lacking == "uvloop":
            return name in ("click", *OF_CLIENT)
        return not OTHERS.match(name) and not name.startswith("torch")

    site = install(wanted)
    command = ("-m", "stepstate.cli", "serve")
    status, _, stderr = run(site, tmp_path, *command)
    assert status == 1
    assert stderr.startswith(
        f"Error: `stepstate serve` needs {lacking}, which comes with the extra"
    )
    assert len(stderr.splitlines()) == 1
    assert run(site, tmp_path, *command[:2], "--help")[0] == 0


def test_a_server_of_the_wheel_serves_its_example(server_alone: Path, tmp_path: Path):
    """From nothing, with the variable set that images set; the first log line is no traceback."""
    cli = ("-m", "stepstate.cli")
    status, _, stderr = run(server_alone, tmp_path, *cli, "serve")
    assert status == 1
    assert "stepstate models example" in stderr
    assert list(tmp_path.iterdir()) == []
    status, stdout, stderr = run(server_alone, tmp_path, *cli, "models", "example")
    assert (status, stderr) == (0, "")
    assert stdout == "models/electricity/2 is written: stepstate serve --models models\n"
    ports = ("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0")
    server = start(server_alone, tmp_path, *cli, "serve", *ports)
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        assert line.startswith("serving electricity/2 on 127.0.0.1:")
        address = line.split(" on ")[1].split(",")[0]
        status, stdout, stderr = run(server_alone, tmp_path, *cli, "models", "--server", address)
        assert (status, stderr) == (0, "")
        assert stdout.startswith("electricity/2 ")
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
