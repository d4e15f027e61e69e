"""The contenders side by side, in one run on one server: a storm for each, and how many registers a second they do."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from bench.contenders import CONTENDERS, PRESENCE
from bench.explorer import PAIRS, explore
from bench.measure import MeasurementError, Spread, ratios
from bench.progress import Progress
from bench.report import Figure, Row
from bench.storm import ALL, Registering, run_storm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.report import Findings
    from bench.scale import Scale
    from bench.servers import Server
    from bench.storm import StormResult

HOW_STORM = """The same seeded storm for each contender: many users reconnect many times from four processes of 16
asyncio tasks each, with late disconnects, joins, leaves, heartbeats and two cleaners. Afterwards every key is read: a
violation is a broken invariant (a connection that its user's entry does not name, an entry or a game that names what is
not there, a partial record, …; of *presence* also a wrong count, or a key that would expire early). Then everybody is
cleaned up, which must report each connection that is there, and leave no key of it. Every connection that ended must
have been reported to exactly one caller: *twice* and *never* are counted apart. The recorded history (start, end and
answer of each call) is checked user by user: it must be linearizable, and no cleanup may have taken a connection that
was registered, or whose heartbeat was answered with yes, by a call which began less than the cleanup's threshold before
the cleanup ended. (*lock* may have a wrong history: it reads whose a sid is before it has that user's lock, and while a
register removes one connection of a user before it makes the other, neither is there.) Latency is the caller's, with
two cores for the server and all four processes. Reads of the server are what it took from its sockets
(`total_reads_processed`) by operation, the cleaners' among them; callers of *presence* share them, as what is asked for
in one turn of the event loop is sent together. The last rows run two registers of one user through every order of their
commands, and once more with one of the callers dying after each of them, such as while it holds the *lock* (500 drawn
by chance where there are more, some orders more often than others; `make prove` does it for every pair of operations,
and a storm of a million)."""

HOW_REGISTERS = """Registers per second, each of which displaces an earlier connection, by processes with so many
asyncio tasks each that register users chosen at random of the same 20,000, for a second and a half (QUICK: 0.3
seconds). Each contender's users are registered once, before the first measurement, and stay for all of them; they are
so many that two tasks seldom register the same user at once, which would make the others repeat or wait. *plain*,
*transaction* and *lock* have a redis-py client whose pool has a connection for each task, *presence* shares one of
it, as it does by itself. Two processes and the server share the two cores; one process and the server have a core
each. The contenders take turns in each round, and the ratio compares within the round."""

PROCESSES = 4
REGISTERING = ((2, 1), (2, 8), (1, 64), (2, 64))
"""Processes, and the tasks of each."""
WANTED = {"plain": 5.0, "transaction": 8.0, "lock": 8.0}
"""How many times a contender's registers presence does with 64 tasks a process."""
COMPARED_TASKS = 64
RACE = "register‖register"
SCHEDULES = 500
"""Of that race, at most, with all callers alive and with one of them dying."""
PERCENTILES = (("50 %", "p50"), ("99 %", "p99"), ("99.9 %", "p999"))


def measure_storms(server: Server, scale: Scale) -> Findings:
    """Run a storm for each contender, and the shortest of the races in every order."""
    progress = Progress("operations of the storms", scale.storm_operations * len(CONTENDERS))
    results = []
    with tempfile.TemporaryDirectory(prefix="presence-history-") as folder:
        for contender in CONTENDERS:
            record = Path(folder) / contender
            record.mkdir()
            results.append(
                run_storm(
                    contender,
                    server.url,
                    operations=scale.storm_operations,
                    processes=PROCESSES,
                    record=record,
                    progress=progress.advance,
                )
            )
    for result in results:
        if result.operations < scale.storm_operations:
            raise MeasurementError(f"the storm of {result.contender} did {result.operations:,} operations in its time")
    rows = [row for result in results for row in storm_rows(result)]
    for contender in CONTENDERS:
        race = explore(contender, PAIRS[RACE], url=server.url, limit=SCHEDULES)
        rows += [
            Row(
                f"{contender}: orders of {RACE}{how} that end wrong",
                Spread.exactly(tally.wrong),
                f"of {tally.schedules}",
                target=0 if contender == PRESENCE else None,
                is_promise=contender == PRESENCE,
            )
            for how, tally in (("", race.alive), (" with one caller dying", race.crashed))
        ]
    return [*rows, *_storm_figures(results)]


def storm_rows(result: StormResult) -> list[Row]:
    """Tell of one storm; presence must not break anything."""
    name, must = result.contender, 0 if result.contender == PRESENCE else None
    at_all = result.latencies[ALL]
    counts = {
        "violations per 10,000 operations": (result.violations_per_10_000, ""),
        "connections reported twice": (result.reported_twice, ""),
        "connections reported never": (result.reported_never, ""),
        "connections reported and still there": (result.reported_though_there, ""),
        "connections and keys missed by a last cleanup": (result.missed_at_last, ""),
        "calls that raised": (sum(result.errors.values()), ""),
    }
    if not result.history and must == 0:
        raise MeasurementError("the history of presence's storm was not checked")
    if result.history:
        of_users = f"of {result.history.users:,}"
        counts["users whose history is wrong"] = (len(result.history.wrong), of_users)
        counts["users whose history is undecided"] = (len(result.history.undecided), of_users)
    rows = [
        Row(f"{name}: {what}", Spread.exactly(count), unit, target=must, is_promise=must is not None)
        for what, (count, unit) in counts.items()
    ]
    rows += [Row(f"{name}: calls in the history", Spread.exactly(result.history.calls), "")] if result.history else []
    rows += [
        Row(f"{name}: operations", Spread.exactly(result.operations), ""),
        Row(f"{name}: operations per second", Spread.exactly(result.operations_per_second), ""),
        Row(f"{name}: reads of the server per operation", Spread.exactly(result.server_reads_per_operation), ""),
    ]
    rows += [
        Row(f"{name}: latency, {label} within", Spread.exactly(getattr(at_all, point)), "ms")
        for label, point in PERCENTILES
    ]
    return rows


def _storm_figures(results: Sequence[StormResult]) -> Findings:
    broken = {
        "violations": [(each.contender, each.violations_per_10_000) for each in results],
        "reported twice": [(each.contender, 1e4 * each.reported_twice / each.operations) for each in results],
        "reported never": [(each.contender, 1e4 * each.reported_never / each.operations) for each in results],
    }
    latencies = {
        each.contender: [(label, getattr(each.latencies[ALL], point)) for label, point in PERCENTILES]
        for each in results
    }
    return [
        Figure(
            "violations", "What a storm breaks", "contender", "per 10,000 operations", broken, kind="bars", log_y=True
        ),
        Figure(
            "latency",
            "Latency in the storm, 64 tasks in 4 processes",
            "percentile of all operations",
            "milliseconds at the client",
            latencies,
            kind="bars",
            log_y=True,
        ),
    ]


def measure_registers(server: Server, scale: Scale) -> Findings:
    """Measure the registers per second of each contender, with several numbers of tasks."""
    rates: defaultdict[tuple[str, int, int], list[float]] = defaultdict(list)
    progress = Progress("measurements of registers", scale.register_rounds * len(REGISTERING) * len(CONTENDERS))
    with ExitStack() as stack:
        registering = {contender: stack.enter_context(Registering(contender, server.url)) for contender in CONTENDERS}
        for _ in range(scale.register_rounds):
            for processes, tasks in REGISTERING:
                for contender, users in registering.items():
                    rate = users.throughput(processes=processes, tasks=tasks, seconds=scale.register_seconds)
                    rates[contender, processes, tasks].append(rate)
                    progress.advance()
    rows = []
    for processes, tasks in REGISTERING:
        each = f"{processes} process{'es' * (processes > 1)} of {tasks} task{'s' * (tasks > 1)}"
        ours = rates[PRESENCE, processes, tasks]
        rows += [Row(f"{name}: {each}", Spread.of(rates[name, processes, tasks]), "/s") for name in CONTENDERS]
        rows += [
            Row(
                f"presence to {other}: {each}",
                ratios(ours, rates[other, processes, tasks]),
                "x",
                target=wanted if tasks == COMPARED_TASKS else None,
                at_least=True,
            )
            for other, wanted in WANTED.items()
        ]
    most = max(processes for processes, _ in REGISTERING)
    points = {
        contender: [
            (tasks, Spread.of(rates[contender, most, tasks]).median)
            for processes, tasks in REGISTERING
            if processes == most
        ]
        for contender in CONTENDERS
    }
    title = f"Registers by {most} processes"
    return [*rows, Figure("registers", title, "tasks of each process", "registers per second", points, log_x=True)]
