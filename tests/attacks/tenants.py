"""One tenant floods, another steps at a steady rate: prints the table of SECURITY.md.

`python -m tests.attacks.tenants NAME ...` runs the floods whose names contain one of the words.
The honest tenant's p99 beside each flood is compared with that beside an equally busy tenant that
waits for its replies, in interleaved rounds. It is shown without limits (the server is only shared
fairly), and with limits of the tenant that floods.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tests.attacks.floods import FLOODS, flood
from tests.attacks.honest import Metadata, honest_client
from tests.attacks.networks import write_networks
from tests.attacks.processes import in_child
from tests.chaos.restartable import RestartableServer
from tests.credentials import bearer, token

REFERENCE = "honest load"
CALM_SECONDS = 0.5
"""From the begin of a flood until the honest client's steps count."""
LIMITS = """
[tenants.flooding]
rows_per_second = 500
forecasts_per_second = 50
open_sessions = 2000
streams = 64
calls = 64
"""
NO_LIMITS = ""


@dataclass(slots=True)
class Measured:
    """What the honest tenant had beside a flood."""

    p99: list[float] = field(default_factory=list)
    """Seconds, by round."""
    errors: list[str] = field(default_factory=list)


@asynccontextmanager
async def server_of(
    folder: Path, limits: str, transport: str
) -> AsyncIterator[tuple[str, Metadata, Metadata]]:
    """A server with two tenants; its address, and the metadata of the honest and the other one."""
    write_networks(folder / "models")
    (folder / "stepstate.toml").write_text(limits)
    tokens = folder / "tokens"
    honest, flooding = (
        bearer(token(tokens, tenant, tenant=tenant)) for tenant in ("honest", "flooding")
    )
    settings = ["--models", str(folder / "models"), "--store", f"sqlite:{folder / 'sessions.db'}"]
    settings += ["--transport", transport, "--tokens-file", str(tokens)]
    settings += ["--config", str(folder / "stepstate.toml")]
    server = RestartableServer(*settings, log=folder / "server.log")
    try:
        await server.start()
        yield server.address, honest, flooding
        await server.drained()
    finally:
        server.kill_if_running()


async def beside(
    address: str, name: str, honest: Metadata, flooding: Metadata, seconds: float
) -> tuple[float, list[str]]:
    """The p99 and the errors of the honest client beside a flood."""
    with honest_client(address, honest) as client:
        await asyncio.sleep(CALM_SECONDS)
        with in_child(_flood, address, name, flooding, seconds) as flooder:
            start = time.monotonic() + CALM_SECONDS
            await asyncio.to_thread(flooder.join, 2 * seconds + 30)
            end = time.monotonic()
        record = await client.stop()
    return record.p99(start, end), record.errors


def _flood(address: str, name: str, metadata: Metadata, seconds: float) -> None:
    asyncio.run(flood(address, name, metadata, seconds))


async def measure(
    names: Sequence[str], limits: str, *, rounds: int, seconds: float, transport: str
) -> dict[str, Measured]:
    """Every flood and the reference, in interleaved rounds on one server."""
    found = {name: Measured() for name in names}
    with tempfile.TemporaryDirectory(prefix="stepstate-floods-") as folder:
        async with server_of(Path(folder), limits, transport) as (address, honest, flooding):
            for _ in range(rounds):
                for name in names:
                    p99, errors = await beside(address, name, honest, flooding, seconds)
                    found[name].p99.append(p99)
                    found[name].errors += errors
                    await asyncio.sleep(CALM_SECONDS)
    return found


def ratio(one: Measured, reference: Measured) -> float:
    """Median over the rounds of p99 ÷ p99 beside honest load."""
    return median(mine / its for mine, its in zip(one.p99, reference.p99, strict=True))


def main(arguments: Sequence[str]) -> int:
    """Returns how many floods harmed the honest tenant."""
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.tenants", description=__doc__)
    parser.add_argument("words", nargs="*", help="parts of names; none: all floods")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--transport", choices=["lean", "grpcio"], default="lean")
    chosen = parser.parse_args(arguments)
    words = chosen.words or [""]
    names = [one for one in FLOODS if one == REFERENCE or any(word in one for word in words)]
    options = {"rounds": chosen.rounds, "seconds": chosen.seconds, "transport": chosen.transport}
    both = [asyncio.run(measure(names, limits, **options)) for limits in (NO_LIMITS, LIMITS)]
    print("| flood | p99 ÷ beside honest load | with limits | p99, ms | with limits | errors |")
    print("|---" * 6 + "|")
    harmful = 0
    for name in names:
        reference, its = both[0][REFERENCE], [found[name] for found in both]
        ratios = [ratio(one, reference) for one in its]
        errors = [error for one in its for error in one.errors]
        cells = [f"{one:.1f}" for one in ratios] + [f"{1000 * median(m.p99):.0f}" for m in its]
        print(f"| {' | '.join([name, *cells, str(len(errors))])} |", flush=True)
        for error in errors[:3]:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        harmful += bool(errors) or max(ratios) > 2
    return harmful


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
