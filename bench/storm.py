"""A storm: many users reconnect many times, from several processes at once, with all that comes too late.

Every process runs many tasks on one event loop. They register, join, leave, beat and unregister connections of their
own and of the other processes, among them displaced and unknown ones, while two cleaners remove what was idle for a
moment. Afterwards all keys are checked, every connection is accounted for, and the history of each user is checked,
with it that the cleaners took only who was silent for as long as they allow.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from dataclasses import dataclass, replace
from itertools import chain
from multiprocessing import connection
from typing import TYPE_CHECKING, Any, Self

import redis

from bench.contenders import CONTENDERS, PRESENCE, kind_of, violations
from bench.fill import remove_keys
from bench.history import CLEAN_UP, READ, HistoryReport, RecordedCall, Recorder, check_history
from bench.measure import percentile
from bench.storm_worker import StormPlan, WorkerOutcome, connect, run_process, user_name
from tests.processes import spawn

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path
    from types import TracebackType

    from bench.contenders import State

PROCESSES = 4
TASKS = 16
USERS = 100
GAMES = 20
OPERATIONS = 100_000
REGISTERING_USERS = 20_000
PREPARING_PROCESSES, PREPARING_TASKS = 2, 64
SEED = 4
LIMIT_SECONDS = 1_800.0
CHECKERS = 2

LEAST_SHARE = 0.005
"""Of all registrations that many must end in each of the three ways, or it was no storm."""

GRACE_SECONDS = 60
"""What the processes may take to start and to end."""
POLL_SECONDS = 0.2
SILENT_SECONDS = 0.01
"""After the storm, before everybody is cleaned up who was silent for longer than no time."""
EXAMPLES = 5
ALL = "all"


class StormError(Exception):
    """The storm could not be run, or was none."""


@dataclass(frozen=True)
class Latency:
    """How long the calls took, in milliseconds."""

    calls: int
    p50: float
    p99: float
    p999: float

    @classmethod
    def of(cls, nanoseconds: Iterable[int]) -> Self:
        """Find the percentiles: the smallest time within which so many of the calls were answered."""
        ordered = sorted(nanoseconds)
        points = (percentile(ordered, percent) / 1e6 if ordered else 0 for percent in (50, 99, 99.9))
        return cls(len(ordered), *points)


@dataclass(frozen=True)
class StormResult:
    """What a storm did to one contender."""

    contender: str
    operations: int
    """Those that were done, the cleanups not counted."""
    seconds: float
    operations_per_second: float
    latencies: dict[str, Latency]
    """Of each operation, and of all but the cleanups under ``ALL``."""
    server_reads_per_operation: float
    """Reads of the server from its clients (``total_reads_processed`` of INFO), the cleanups' among them. Where calls
    share a write, they share its read: it is not the round trips that a caller waits for."""
    errors: dict[str, int]
    """Calls that raised, by operation and error."""
    registered: int
    displaced: int
    """Reports; a connection that is reported twice counts twice. So do the next two."""
    unregistered: int
    cleaned_up: int
    remaining: int
    """Connections that were there at the end."""
    violations: int
    violations_by_kind: dict[str, int]
    violations_per_10_000: float
    reported_twice: int
    """Connections whose end was told to two callers or more."""
    reported_never: int
    """Connections that were gone at the end, and nobody was told."""
    reported_though_there: int
    """Connections whose end was told, and that were there at the end."""
    missed_at_last: int
    """When everybody is cleaned up after it: connections that are not reported just once, and keys that are left."""
    examples: list[str]
    history: HistoryReport | None = None

    def faults(self) -> list[str]:
        """Name all that an atomic contender would not have."""
        counts = {
            "violations": self.violations,
            "connections reported twice": self.reported_twice,
            "connections reported never": self.reported_never,
            "connections reported and still there": self.reported_though_there,
            "connections and keys missed by a last cleanup": self.missed_at_last,
            "calls that raised": sum(self.errors.values()),
        }
        if self.history:
            counts["users whose history is wrong"] = len(self.history.wrong)
            counts["users whose history is undecided"] = len(self.history.undecided)
        return [f"{count:,} {what}" for what, count in counts.items() if count]


def run_storm(
    contender: str,
    url: str,
    *,
    operations: int = OPERATIONS,
    processes: int = PROCESSES,
    tasks: int = TASKS,
    users: int = USERS,
    games: int = GAMES,
    seed: int = SEED,
    limit_seconds: float = LIMIT_SECONDS,
    record: Path | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> StormResult:
    """Run a storm on a server; with a folder to record it in, check its history, too.

    Raises:
        StormError: a process failed, or the storm was too calm to prove anything.

    """
    namespace = f"storm-{uuid.uuid4()}"
    plan = StormPlan(
        contender, url, namespace, operations, processes, tasks, users, games, seed, limit_seconds, record=record
    )
    with redis.Redis.from_url(url) as client:
        reads = _reads(client)
        outcomes = _run_processes(plan, progress)
        reads = _reads(client) - reads
        try:
            state, swept, left = asyncio.run(_read_and_sweep(plan))
        finally:
            remove_keys(client, namespace)
    result = _account(plan, outcomes, state, reads, _missed(state, swept, left))
    if record:
        _record_last_read(plan, record, state)
        result = replace(result, history=check_history(record, processes=CHECKERS))
    return result


class Registering:
    """Users of one contender, who are all there while this is entered, so that each register displaces a connection."""

    def __init__(self, contender: str, url: str, *, users: int = REGISTERING_USERS) -> None:
        self._plan = StormPlan(
            contender,
            url,
            namespace=f"registers-{uuid.uuid4()}",
            operations=0,
            processes=PREPARING_PROCESSES,
            tasks=PREPARING_TASKS,
            users=users,
            games=0,
            seed=SEED,
            limit_seconds=LIMIT_SECONDS,
            cleaners=0,
        )
        self._measurements = 0

    def __enter__(self) -> Self:
        try:
            self._run(replace(self._plan, registers_everyone=True, sid_prefix="first-"), displaced=0)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def throughput(self, *, processes: int, tasks: int, seconds: float) -> float:
        """Measure registers per second, each of which displaces an earlier connection; nobody else disturbs them."""
        self._measurements += 1
        plan = replace(
            self._plan,
            processes=processes,
            tasks=tasks,
            limit_seconds=seconds,
            only_registers=True,
            sid_prefix=f"{self._measurements}-",
        )
        outcomes = self._run(plan, displaced=1)
        return sum(len(outcome.registered) for outcome in outcomes) / _seconds(outcomes)

    def _run(self, plan: StormPlan, displaced: int) -> list[WorkerOutcome]:
        """Run registers, each of which displaces so many."""
        outcomes = _run_processes(plan, lambda _: None)
        errors = sum((outcome.errors for outcome in outcomes), Counter[str]())
        lost = sum(displaced * len(outcome.registered) - len(outcome.displaced) for outcome in outcomes)
        # The others may lose some to their races, which is for the storm to show.
        if plan.contender == PRESENCE and (errors or lost):
            raise StormError(f"registers of {plan.contender} raised {dict(errors)}, and {lost} displaced nobody")
        return outcomes

    def _remove(self) -> None:
        with redis.Redis.from_url(self._plan.url) as client:
            remove_keys(client, self._plan.namespace)


def _run_processes(plan: StormPlan, progress: Callable[[int], object]) -> list[WorkerOutcome]:
    """Run all processes to their end; whatever happens, none of them stays."""
    start = spawn.Barrier(plan.processes)
    done: Any = spawn.RawArray("Q", plan.processes)
    pipes = [spawn.Pipe(duplex=False) for _ in range(plan.processes)]
    workers = [
        spawn.Process(target=run_process, args=(plan, number, start, done, sender), daemon=True)
        for number, (_, sender) in enumerate(pipes)
    ]
    try:
        for (_, sender), worker in zip(pipes, workers, strict=True):
            worker.start()
            # The worker has an end of its own now; with ours closed, its death shows as the end of the pipe.
            sender.close()
        return _wait([receiver for receiver, _ in pipes], plan, done, progress)
    except BaseException:
        for worker in workers:
            if worker.pid:
                worker.kill()
        raise
    finally:
        for receiver, _ in pipes:
            receiver.close()
        for worker in workers:
            if worker.pid:
                worker.join()


def _wait(waiting: list[Any], plan: StormPlan, done: Any, progress: Callable[[int], object]) -> list[WorkerOutcome]:
    deadline = time.monotonic() + plan.limit_seconds + GRACE_SECONDS
    outcomes: list[WorkerOutcome] = []
    shown = 0
    while waiting:
        ready: list[Any] = connection.wait(waiting, POLL_SECONDS)
        for receiver in ready:
            try:
                outcomes.append(receiver.recv())
            except EOFError:
                raise StormError(f"a process of the storm of {plan.contender} died, see above") from None
            waiting.remove(receiver)
        begun = sum(done)  # Read once: the workers count on meanwhile.
        progress(begun - shown)
        shown = begun
        if time.monotonic() > deadline:
            raise StormError(f"the storm of {plan.contender} did not end within {plan.limit_seconds:,.0f} s")
    return outcomes


def _reads(client: redis.Redis) -> int:
    stats: Any = client.info("stats")
    return int(stats["total_reads_processed"])


async def _read_and_sweep(plan: StormPlan) -> tuple[State, list[str], State]:
    """Read all keys, clean up everybody, and read what is left; give what was removed between them."""
    async with connect(plan) as client:
        contender = CONTENDERS[plan.contender](client, plan.namespace)
        state = await contender.read_state()
        await asyncio.sleep(SILENT_SECONDS)
        swept = await contender.cleanup(0)
        left = await contender.read_state()
        await contender.aclose()
        return state, swept, left


def _missed(state: State, swept: Sequence[str], left: State) -> int:
    """Count what a cleanup of everybody did not report, reported twice or wrongly, or left behind."""
    reported, there = Counter(swept), Counter(state.records.keys() | state.partial.keys())
    unlike = (reported - there) + (there - reported)
    return unlike.total() + len(left.records) + len(left.partial) + len(left.users) + len(left.games)


def _seconds(outcomes: Sequence[WorkerOutcome]) -> float:
    return (max(outcome.end_ns for outcome in outcomes) - min(outcome.start_ns for outcome in outcomes)) / 1e9


def _account(plan: StormPlan, outcomes: Sequence[WorkerOutcome], state: State, reads: int, missed: int) -> StormResult:
    """Bring together what the callers were told and what is there."""

    def joined(name: str) -> list[str]:
        return [sid for outcome in outcomes for sid in getattr(outcome, name)]

    registered, displaced, unregistered, cleaned_up = map(
        joined, ("registered", "displaced", "unregistered", "cleaned_up")
    )
    ways = {"displaced": displaced, "unregistered": unregistered, "cleaned up": cleaned_up}
    for way, sids in ways.items():
        if not sids or len(sids) < LEAST_SHARE * len(registered):
            raise StormError(f"of {len(registered):,} connections of {plan.contender} only {len(sids):,} were {way}")
    ended = Counter(displaced + unregistered + cleaned_up)
    there = state.records.keys() | state.partial.keys()
    twice = [sid for sid, count in ended.items() if count > 1]
    never = [sid for sid in registered if sid not in ended and sid not in there]
    still_there = [sid for sid in ended if sid in there]
    wrong = violations(state)
    examples = [
        *wrong[:EXAMPLES],
        *(f"reported twice: {sid}" for sid in twice[:EXAMPLES]),
        *(f"reported never: {sid}" for sid in never[:EXAMPLES]),
        *(f"reported and still there: {sid}" for sid in still_there[:EXAMPLES]),
    ]
    errors = sum((outcome.errors for outcome in outcomes), Counter[str]())
    latencies = _latencies(outcomes)
    operations = latencies[ALL].calls + sum(
        count for what, count in errors.items() if not what.startswith(f"{CLEAN_UP}:")
    )
    seconds = _seconds(outcomes)
    return StormResult(
        contender=plan.contender,
        operations=operations,
        seconds=seconds,
        operations_per_second=operations / seconds,
        latencies=latencies,
        server_reads_per_operation=reads / operations,
        errors=dict(errors),
        registered=len(registered),
        displaced=len(displaced),
        unregistered=len(unregistered),
        cleaned_up=len(cleaned_up),
        remaining=len(there),
        violations=len(wrong),
        violations_by_kind=dict(Counter(map(kind_of, wrong))),
        violations_per_10_000=10_000 * len(wrong) / operations,
        reported_twice=len(twice),
        reported_never=len(never),
        reported_though_there=len(still_there),
        missed_at_last=missed,
        examples=examples,
    )


def _latencies(outcomes: Sequence[WorkerOutcome]) -> dict[str, Latency]:
    by_operation: dict[str, list[array[int]]] = {}
    for outcome in outcomes:
        for operation, latencies in outcome.latencies_ns.items():
            by_operation.setdefault(operation, []).append(latencies)
    players = [latencies for operation, parts in by_operation.items() if operation != CLEAN_UP for latencies in parts]
    return {
        operation: Latency.of(chain.from_iterable(parts)) for operation, parts in {ALL: players, **by_operation}.items()
    }


def _record_last_read(plan: StormPlan, folder: Path, state: State) -> None:
    """Let the history end with what the keys say of each user, read after all calls."""
    connections: dict[str, list[tuple[str, str | None]]] = {user_name(number): [] for number in range(plan.users)}
    for sid, (user_id, game_id) in state.records.items():
        connections.setdefault(user_id, []).append((sid, game_id))
    now = time.monotonic_ns()
    with Recorder(folder, plan.processes) as recorder:
        for user_id, of_user in connections.items():
            recorder.add(RecordedCall(now, now, READ, user_id, "", None, of_user))
