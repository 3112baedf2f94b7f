"""Builds the programs in C++, `floor.cc` and `load.cc`, where that can be done."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import BenchError

_HERE = Path(__file__).parent
_PROTOS = _HERE.parent / "protos"
_BUILT = _HERE.parent / "build" / "benchmarks"

_PACKAGES = {
    "g++": "g++",
    "protoc": "protobuf-compiler",
    "grpc_cpp_plugin": "protobuf-compiler-grpc",
    "pkg-config": "pkg-config",
}
"""Debian's package of each program; beside them, libgrpc++-dev."""
_LIBRARIES = ("grpc++", "protobuf")
_CONTRACT = "stepstate/v1/stepstate"
_MESSAGES = (_CONTRACT, "google/rpc/status")
_COMPILE = ("g++", "-std=c++20", "-O2")


class MissingTools(BenchError):
    """The programs can't be built here: something is not installed."""


@dataclass(frozen=True, slots=True)
class CppPrograms:
    """The programs, ready to run."""

    floor: Path
    load: Path
    library: str
    """The version of libgrpc++ that they use."""


def build_programs() -> CppPrograms:
    """Builds the programs, if they are not newer than what they are made of.

    Raises:
        MissingTools: it names what to install.
        BenchError: the compiler failed.
    """
    _check_tools()
    floor, load = programs = (_BUILT / "floor", _BUILT / "load")
    if not all(path.exists() and _changed(_sources()) < _changed([path]) for path in programs):
        _build(programs)
    (library,) = _told("pkg-config", "--modversion", "grpc++")
    return CppPrograms(floor, load, library)


def _sources() -> list[Path]:
    return [*_HERE.glob("*.cc"), *_PROTOS.rglob("*.proto")]


def _changed(paths: Sequence[Path]) -> float:
    """When the youngest was written."""
    return max(path.stat().st_mtime for path in paths)


def _check_tools() -> None:
    missing = [package for program, package in _PACKAGES.items() if shutil.which(program) is None]
    if "pkg-config" not in missing and _fails("pkg-config", "--exists", *_LIBRARIES):
        missing.append("libgrpc++-dev")
    if missing:
        raise MissingTools(
            f"the load generator in C++ can't be built: install {' '.join(missing)} "
            "(names of Debian's packages)"
        )


def _build(programs: Sequence[Path]) -> None:
    _BUILT.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=_BUILT) as scratch:
        folder = Path(scratch)
        _generate(folder)
        generated = [*(f"{name}.pb" for name in _MESSAGES), f"{_CONTRACT}.grpc.pb"]
        sources = [folder / f"{name}.cc" for name in generated]
        sources += [_HERE / f"{path.name}.cc" for path in programs]
        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(partial(_compile, folder), sources))
        libraries = _told("pkg-config", "--libs", *_LIBRARIES)
        for path in programs:
            mine = [made for made in objects if made.stem == path.name or ".pb" in made.name]
            _told(*_COMPILE, *map(str, mine), "-o", str(folder / path.name), *libraries)
            (folder / path.name).replace(path)


def _generate(folder: Path) -> None:
    """Makes the contract's messages and stubs in C++."""
    plugin = f"--plugin=protoc-gen-grpc={shutil.which('grpc_cpp_plugin')}"
    messages = [f"{name}.proto" for name in _MESSAGES]
    _told("protoc", f"-I{_PROTOS}", f"--cpp_out={folder}", *messages)
    _told("protoc", f"-I{_PROTOS}", f"--grpc_out={folder}", plugin, f"{_CONTRACT}.proto")


def _compile(folder: Path, source: Path) -> Path:
    made = folder / f"{source.stem}.o"
    _told(*_COMPILE, f"-I{folder}", "-c", str(source), "-o", str(made))
    return made


def _fails(*command: str) -> bool:
    return subprocess.run(command, check=False, capture_output=True).returncode != 0


def _told(*command: str) -> list[str]:
    """Runs a command; returns the words that it prints.

    Raises:
        BenchError: it failed.
    """
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"`{shlex.join(command)}` failed:\n{done.stderr.strip()}")
    return done.stdout.split()
