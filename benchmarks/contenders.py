"""Who takes part in `benchmarks transports`: echoes, and servers of sessions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.cpp import CppPrograms
from benchmarks.models import VARIANTS
from benchmarks.runner import Target
from benchmarks.servers import (
    bench_folder,
    fresh_store,
    running_floor,
    running_step_echo,
    running_stepstate,
)

CPP_ECHO, AIO_ECHO, LEAN_ECHO = "C++ echo", "grpc.aio echo", "lean echo"
LEAN, GRPCIO, OTHER = "Stepstate lean", "Stepstate grpcio", "other commit"
SQLITE = "Stepstate lean, sqlite"

Targets = dict[str, Target]


@contextmanager
def echoes(programs: CppPrograms | None) -> Iterator[Targets]:
    """Echoes by name; the one in C++ only if its program is given."""
    with ExitStack() as stack:
        found = {}
        if programs is not None:
            found[CPP_ECHO] = stack.enter_context(running_floor(programs.floor))
        for name, transport in ((AIO_ECHO, "grpcio"), (LEAN_ECHO, "lean")):
            found[name] = stack.enter_context(running_step_echo(transport))
        yield {name: Target(name, server, stateless=True) for name, server in found.items()}


@contextmanager
def stepping(folder: Path, other: Path | None) -> Iterator[Targets]:
    """Servers of sessions with the store `memory:`, by name.

    Args:
        folder: a `bench_folder`.
        other: another checkout, whose server takes part.
    """
    with ExitStack() as stack:
        found = {
            name: stack.enter_context(
                running_stepstate(folder, "memory:", "--transport", transport)
            )
            for name, transport in ((LEAN, "lean"), (GRPCIO, "grpcio"))
        }
        if other is not None:
            found[OTHER] = stack.enter_context(running_stepstate(folder, "memory:", checkout=other))
        yield {name: Target(name, server) for name, server in found.items()}


@contextmanager
def durable(folder: Path) -> Iterator[Targets]:
    """A server whose store is a file, and whose sessions are saved while they step."""
    with (
        fresh_store("sqlite", folder) as store,
        running_stepstate(folder, store.url) as server,
    ):
        yield {SQLITE: Target(SQLITE, server, durability="async")}


@contextmanager
def variants(other: Path | None) -> Iterator[dict[str, Targets]]:
    """For each of the other models: its servers by name."""
    with ExitStack() as stack:
        folder = stack.enter_context(bench_folder(*VARIANTS))
        checkouts = {LEAN: None} if other is None else {LEAN: None, OTHER: other}
        servers = {
            name: stack.enter_context(running_stepstate(folder, "memory:", checkout=path))
            for name, path in checkouts.items()
        }
        yield {
            model: {name: Target(name, server, model=model) for name, server in servers.items()}
            for model in VARIANTS
        }
