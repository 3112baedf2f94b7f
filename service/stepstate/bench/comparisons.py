"""The two benchmarks that compare rates: with a bare echo, and of durabilities with memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from stepstate.bench.figures import Comparison, Contest, Measurement, Plan, Spread, median_round
from stepstate.bench.load import Kind
from stepstate.bench.model import DESCRIPTION
from stepstate.bench.report import Report, spread_text
from stepstate.bench.rounds import Target, run, workload
from stepstate.bench.servers import bench_folder, running_echo, running_stepstate
from stepstate.bench.stores import Store, fresh_store

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Choice:
    """Which stores and durabilities are compared."""

    stores: tuple[str, ...]
    durabilities: tuple[str, ...]
    redis_url: str
    """Empty: a Redis of its own."""

    @property
    def redis_place(self) -> str:
        """Its URL without the password."""
        scheme, _, rest = self.redis_url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    @property
    def options(self) -> str:
        """It, as options of the command."""
        stores, durabilities = ",".join(self.stores), ",".join(self.durabilities)
        url = f" --redis-url {self.redis_place}" if self.redis_url else ""
        return f"--stores {stores} --durabilities {durabilities}{url}"


def beside_echo(plan: Plan, tell: Tell) -> Report:
    """Measures steps beside a bare echo of the same messages.

    Raises:
        BenchError: a server does not start, refuses a step, or breaks off.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(bench_folder())
        echo = Target("echo", stack.enter_context(running_echo()), Kind.ECHO)
        store = stack.enter_context(fresh_store("sqlite", folder))
        steps = Target("steps", stack.enter_context(running_stepstate(folder, store.url)))
        found = run(plan, echo, [steps], tell)
    return _report(found, workload(plan, "echo and steps"), f"stepstate bench {plan.options}")


def beside_memory(plan: Plan, choice: Choice, tell: Tell) -> Report:
    """Measures steps with each store and durability beside steps with the store `memory:`.

    Raises:
        BenchError: a server does not start, refuses a step, or breaks off.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(bench_folder())
        stores = [stack.enter_context(_store(kind, choice, folder)) for kind in choice.stores]
        memory = Target("memory", stack.enter_context(running_stepstate(folder, "memory:")))
        contenders: list[Target] = []
        for store in stores:
            server = stack.enter_context(running_stepstate(folder, store.url))
            contenders += (
                Target(f"{store.kind} {durability}", server, Kind.STEP, durability, store.pid)
                for durability in choice.durabilities
            )
        found = run(plan, memory, contenders, tell)
    what = "; ".join((workload(plan, "memory and each other"), *(store.told for store in stores)))
    return _report(found, what, f"stepstate bench durability {plan.options} {choice.options}")


@contextmanager
def _store(kind: str, choice: Choice, folder: Path) -> Iterator[Store]:
    if kind == "redis" and choice.redis_url:
        yield Store(kind, choice.redis_url, f"the redis at {choice.redis_place}")
    else:
        with fresh_store(kind, folder) as store:
            yield store


def _report(comparisons: Sequence[Comparison], what: str, command: str) -> Report:
    baseline = comparisons[0].baseline
    return Report(
        workload=f"{DESCRIPTION}; {what}",
        command=command,
        heads=(
            *("sessions", "what", "messages/s", "p50 ms", "p99 ms", "CPU µs", "store's CPU µs"),
            *(f"rate ÷ {baseline}'s", f"p50 ÷ {baseline}'s", f"CPU ÷ {baseline}'s"),
        ),
        rows=[row for compared in comparisons for row in _rows(compared)],
        notes=(
            "CPU is the server's, for one message; the store's, where a process of its own was",
            "started for it. Figures are those of the median round by rate; a ratio is the median",
            f"(least–most) of the rounds, each over the window of {baseline} just before it.",
        ),
        results=[_result(compared) for compared in comparisons],
    )


def _rows(compared: Comparison) -> list[tuple[str, ...]]:
    sessions = str(compared.sessions)
    base = _measured(median_round(compared.baseline_rounds))
    rows = [(sessions, compared.baseline, *base, "1", "1", "1")]
    for contest in compared.contests:
        measured = _measured(median_round(contest.measured))
        rows.append((sessions, contest.name, *measured, *map(spread_text, _ratios(contest))))
    return rows


def _measured(measured: Measurement) -> tuple[str, ...]:
    store = measured.store_cpu_us_per_message
    return (
        f"{measured.messages_per_second:,.0f}",
        f"{measured.p50_ms:.3f}",
        f"{measured.p99_ms:.3f}",
        f"{measured.cpu_us_per_message:.1f}",
        f"{store:.1f}" if store else "–",
    )


def _ratios(contest: Contest) -> tuple[Spread, Spread, Spread]:
    return contest.rate_ratio, contest.p50_ratio, contest.cpu_ratio


def _result(compared: Comparison) -> dict[str, object]:
    return {
        "sessions": compared.sessions,
        "baseline": {
            "name": compared.baseline,
            "median_round": asdict(median_round(compared.baseline_rounds)),
        },
        "contests": [
            {
                **asdict(contest),
                "median_round": asdict(median_round(contest.measured)),
                "rate_ratio": asdict(contest.rate_ratio),
                "p50_ratio": asdict(contest.p50_ratio),
                "cpu_ratio": asdict(contest.cpu_ratio),
            }
            for contest in compared.contests
        ],
    }
