"""Runs an attack, and measures what it does: to the server, to an honest client beside it, to the
sessions of others, and to the server that is started after it.

The server, the attacker and the honest client are processes of their own.
"""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.attacks.attack import Attack, Script, Target
from tests.attacks.honest import honest_client
from tests.attacks.load import warm_up
from tests.attacks.networks import write_networks
from tests.attacks.others import Bystanders, answers, broken
from tests.attacks.processes import Memory, in_child
from tests.chaos.restartable import RestartableServer
from tests.networks import Network

MIB = 2**20
MEMORY_LIMIT = 256 * MIB
"""What the servers under attack may hold for their clients."""
PEAK_ROOM = 64 * MIB
"""A peak may pass the limit by this: what Python and gRPC need around the bytes counted."""
REST_ROOM = 20 * MIB
"""What a server may keep when the attacker has gone: allocators keep some."""
SAFETY_NET = 12 * 1024 * MIB
"""Address space of a server: it fails before the machine suffers. With torch it begins at 3 GiB."""
CALM_SECONDS = 1.5
"""How long the honest client is alone before the attack."""
REST_SECONDS = 10.0
"""After the attack, until memory is measured."""
ATTACK_SECONDS = 30.0
"""Then the attacker gives up."""
UNREAD_SECONDS = 15.0
"""From the start of a server whose log nobody reads, until somebody does."""
MAX_P99_SECONDS = 5.0
"""Of the honest client beside an attack; generous, as the machine may be busy with other tests."""


@dataclass(frozen=True, slots=True)
class Ground:
    """Where servers run."""

    folder: Path
    models: Path
    network: Network

    @classmethod
    def of(cls, folder: Path) -> Ground:
        """A folder with models in it."""
        return cls(folder, folder / "models", write_networks(folder / "models"))

    @property
    def store(self) -> Path:
        """The SQLite file."""
        return self.folder / "sessions.db"


@dataclass(slots=True)
class Report:
    """What an attack did: bytes over those of the start, and seconds."""

    attack: str
    may_keep: int = REST_ROOM
    peak: int = 0
    rest: int = 0
    """10 s after its end; in a short run, as soon as it is low enough."""
    alone_p99: float = 0.0
    """Of the honest client, before the attack."""
    p99: float = 0.0
    """Of the honest client, beside it."""
    served_again: float = 0.0
    """From the attack's end to the next answer."""
    errors: list[str] = field(default_factory=list)
    """Of the honest client."""
    lost: list[str] = field(default_factory=list)
    """Sessions of others that are not as they were."""
    broken: list[str] = field(default_factory=list)
    """What does not work after it, or after a restart."""

    def problems(self) -> list[str]:
        """What somebody else noticed of it."""
        found = [*self.lost, *self.broken]
        if self.errors:
            found.append(f"{len(self.errors)} honest errors, the first: {self.errors[:3]}")
        if self.p99 > MAX_P99_SECONDS:
            found.append(f"honest p99: {self.p99:.1f} s")
        if self.served_again > MAX_P99_SECONDS:
            found.append(f"no answer for {self.served_again:.1f} s after it")
        if self.peak > MEMORY_LIMIT + PEAK_ROOM:
            found.append(f"memory rose by {self.peak / MIB:.0f} MiB")
        if self.rest > self.may_keep:
            found.append(f"{self.rest / MIB:.0f} MiB were kept")
        return found


async def under_attack(
    attack: Attack, count: int, ground: Ground, *, short: bool, transport: str = "lean"
) -> Report:
    """Runs an attack of a size on a server of its own."""
    keeps = attack.keeps + (attack.grpcio_keeps if transport == "grpcio" else 0)
    report = Report(attack.name, may_keep=keeps + REST_ROOM)
    async with _limited_server(ground, attack, transport) as server:
        others = Bystanders(server.address)
        await others.open()
        await _attack(attack.script, count, server, ground, report, short=short)
        if (status := server.process.poll()) is not None or not await answers(server.address):
            report.broken.append(f"the server ended with status {status}; None: it does not answer")
            server.kill_if_running()
            await server.start()
        await _look(report, server, others, ground.network, "")
        await _restart(server, report)
        await _look(report, server, others, ground.network, ", after a restart")
        if attack.log_is_read:
            report.broken += [f"logged: {line[:500]}" for line in server.surprises()[:3]]
    return report


async def _restart(server: RestartableServer, report: Report) -> None:
    try:
        await server.end()
    except subprocess.TimeoutExpired:
        report.broken.append("SIGTERM does not end the server")
        server.kill()
    await server.start()


async def _look(
    report: Report, server: RestartableServer, others: Bystanders, network: Network, moment: str
) -> None:
    """Reports what is lost or does not work."""
    report.lost += [f"{one}{moment}" for one in await others.changed()]
    found = await broken(server.address, server.metrics_address, network)
    report.broken += [f"{one}{moment}" for one in found]


@asynccontextmanager
async def _limited_server(
    ground: Ground, attack: Attack, transport: str
) -> AsyncIterator[RestartableServer]:
    settings = ["--models", str(ground.models), "--store", f"sqlite:{ground.store}"]
    settings += ["--memory-limit", str(MEMORY_LIMIT), "--transport", transport]
    log = ground.folder / "server.log"
    with nullcontext() if attack.log_is_read else _full_pipe(log):
        server = RestartableServer(*settings, *attack.options, log=log)
        try:
            await server.start()
            resource.prlimit(server.process.pid, resource.RLIMIT_AS, (SAFETY_NET, SAFETY_NET))
            yield server
        finally:
            server.kill_if_running()


@contextmanager
def _full_pipe(path: Path) -> Iterator[None]:
    """A pipe that somebody reads only when the server has been waiting for seconds."""
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    loop = asyncio.get_running_loop()
    later = loop.call_later(UNREAD_SECONDS, loop.add_reader, pipe, os.read, pipe, 2**16)
    try:
        yield
    finally:
        later.cancel()
        loop.remove_reader(pipe)
        os.close(pipe)


async def _attack(
    script: Script,
    count: int,
    server: RestartableServer,
    ground: Ground,
    report: Report,
    *,
    short: bool,
) -> None:
    target = Target(server.address, server.metrics_address, ground.store)
    memory = Memory(server.process.pid)
    await _in_process(warm_up, target, 256)
    with honest_client(target.address) as honest:
        await asyncio.sleep(CALM_SECONDS)
        start, before = time.monotonic(), memory.now()
        memory.forget_peak()
        if problem := await _in_process(script, target, count):
            report.broken.append(problem)
        end = time.monotonic()
        if server.process.poll() is None:
            report.peak = memory.peak() - before
            report.rest = await _rest(memory, before, short=short)
            await asyncio.sleep(0.3)
        record = await honest.stop()
    report.alone_p99 = record.p99(start - 2 * CALM_SECONDS / 3, start)
    report.p99 = record.p99(start, end)
    report.served_again = record.served_again(end)
    report.errors = record.errors
    report.lost += record.wrong(ground.network)


async def _in_process(script: Script, target: Target, count: int) -> str:
    """Runs a script in a process, which then is gone; returns why it failed."""
    with in_child(_run, script, target, count) as attacker:
        await asyncio.to_thread(attacker.join, 2 * ATTACK_SECONDS)
        if attacker.exitcode == 0:
            return ""
        return f"the attacker ended with status {attacker.exitcode}; None: it did not end"


def _run(script: Script, target: Target, count: int) -> None:
    async def until_it_gives_up() -> None:
        with suppress(TimeoutError):  # a server may well let it wait
            async with asyncio.timeout(ATTACK_SECONDS):
                await script(target, count)

    asyncio.run(until_it_gives_up())


async def _rest(memory: Memory, before: int, *, short: bool) -> int:
    """The memory over the start, when the attacker has gone."""
    end = time.monotonic() + REST_SECONDS
    while time.monotonic() < end and not (short and memory.now() - before <= REST_ROOM):
        await asyncio.sleep(0.2)
    return memory.now() - before
