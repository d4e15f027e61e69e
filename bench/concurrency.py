"""Throughput of one process with many calls at once, beside raw ones on the same client and ``redis-benchmark``."""

from __future__ import annotations

import asyncio
import csv
import shutil
import subprocess
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import presence
import presence.sync
from bench.fill import NAMESPACE, Population, new_sid, sample
from bench.measure import MeasurementError, Spread, ratios
from bench.progress import Progress
from bench.report import Figure, Row
from presence import addresses, clients

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from bench.report import Findings
    from bench.scale import Scale
    from bench.servers import Server

HOW = """Calls per second of one Python process: heartbeats and registers through the manager, by so many asyncio tasks
or threads at once that each wait for their answer, and raw `EVALSHA`s of `return 1` through the very same redis-py
client. The three take turns in short rounds, and a ratio compares within a round. Where `redis-benchmark` is on PATH,
it sends the same `return 1` from as many connections, once, before the others: what this server can take from a client
that costs next to nothing. (A raw client has at most 64 connections: the pool's limit that presence sets.)"""

CONNECTIONS = 2_000
TASKS = (1, 8, 64, 256)
THREADS = (1, 8, 64, 256)
NOTHING = "return 1"
CEILING_FACTOR = 20
"""How many times as many calls redis-benchmark makes: it takes no longer."""
CEILING_SECONDS = 300
HEARTBEAT, REGISTER, RAW, CEILING = "heartbeat", "register", "raw return 1", "redis-benchmark"

Rates = dict[str, list[float]]
"""Calls per second of each kind, round by round."""


def measure_concurrency(server: Server, scale: Scale) -> Findings:
    """Measure the calls per second with several tasks and threads."""
    population = Population(server.client, CONNECTIONS)
    population.fill()
    sha = str(server.client.script_load(NOTHING))
    flavours: list[tuple[str, int, Callable[[str, _Work, int], Rates]]] = [
        *(("task", tasks, _run_asyncio) for tasks in TASKS),
        *(("thread", threads, _run_blocking) for threads in THREADS),
    ]
    progress = Progress("numbers of tasks and threads", len(flavours))
    ceilings = _ceilings(server.url, sha, CEILING_FACTOR * scale.throughput_calls)
    rows = [
        Row(f"{CEILING}, {NOTHING}, {_many(count, 'connection')}", Spread.exactly(ceiling), "/s")
        for count, ceiling in ceilings.items()
    ]
    points = defaultdict(list, {CEILING: list(ceilings.items())} if ceilings else {})
    for worker, count, run in flavours:
        rates = run(server.url, _Work(population, sha, scale.throughput_calls, count), scale.throughput_rounds)
        share = Spread.of([rate / ceilings[count] for rate in rates[RAW]]) if ceilings else None
        many = _many(count, worker)
        rows.append(Row(f"{RAW}, {many}", Spread.of(rates[RAW]), "/s", share, CEILING if share else ""))
        rows += [
            Row(f"{call}, {many}", Spread.of(rates[call]), "/s", ratios(rates[call], rates[RAW]), RAW)
            for call in (HEARTBEAT, REGISTER)
        ]
        for call, values in rates.items():
            points[f"{call}, {worker}s"].append((count, Spread.of(values).median))
        progress.advance()
    title = "Calls per second of one process"
    return [*rows, Figure("concurrency", title, "calls at once", "calls per second", dict(points), log_x=True)]


class _Work:
    """The calls of one round, dealt out to so many tasks or threads."""

    def __init__(self, population: Population, sha: str, calls: int, workers: int) -> None:
        self._population = population
        self.sha = sha
        self.workers = workers
        self._each = -(-calls // workers)
        self.calls = self._each * workers

    def sids(self) -> list[list[str]]:
        """Give each worker connections chosen at random, for its heartbeats."""
        return self._deal(lambda: self._population.sids[sample(self._population, 1)[0]])

    def new_sids(self) -> list[list[str]]:
        """Give each worker new sids to register, each for a user of its own."""
        return self._deal(new_sid)

    def _deal(self, make: Callable[[], str]) -> list[list[str]]:
        return [[make() for _ in range(self._each)] for _ in range(self.workers)]


def _run_asyncio(url: str, work: _Work, rounds: int) -> Rates:
    async def measure() -> Rates:
        client: Any = clients.connect_asyncio(addresses.parse(url), {})
        rates: Rates = defaultdict(list)
        async with client, presence.ConnectionManager(client, namespace=NAMESPACE) as manager:
            kinds: dict[str, Callable[[str], Awaitable[object]]] = {
                RAW: lambda _: client.evalsha(work.sha, 0),
                HEARTBEAT: manager.update_heartbeat,
                REGISTER: lambda sid: manager.register_connection(sid, f"user-{sid}"),
            }

            async def call_each(call: Callable[[str], Awaitable[object]], sids: Sequence[str]) -> bool:
                return all([await call(sid) for sid in sids])

            for _ in range(rounds + 1):  # the first opens the connections
                for kind, call in kinds.items():
                    dealt = work.new_sids() if kind == REGISTER else work.sids()
                    start = perf_counter()
                    right = await asyncio.gather(*(call_each(call, sids) for sids in dealt))
                    rates[kind].append(_rate(kind, work, right, perf_counter() - start))
        return {kind: values[1:] for kind, values in rates.items()}

    return asyncio.run(measure())


def _run_blocking(url: str, work: _Work, rounds: int) -> Rates:
    client: Any = clients.connect_blocking(addresses.parse(url), {})
    rates: Rates = defaultdict(list)
    with (
        client,
        presence.sync.ConnectionManager(client, namespace=NAMESPACE) as manager,
        ThreadPoolExecutor(work.workers) as threads,
    ):
        kinds: dict[str, Callable[[str], object]] = {
            RAW: lambda _: client.evalsha(work.sha, 0),
            HEARTBEAT: manager.update_heartbeat,
            REGISTER: lambda sid: manager.register_connection(sid, f"user-{sid}"),
        }
        for _ in range(rounds + 1):  # the first opens the connections
            for kind, call in kinds.items():
                dealt = work.new_sids() if kind == REGISTER else work.sids()
                start = perf_counter()
                right = list(threads.map(lambda sids, call=call: all(map(call, sids)), dealt))
                rates[kind].append(_rate(kind, work, right, perf_counter() - start))
    return {kind: values[1:] for kind, values in rates.items()}


def _rate(kind: str, work: _Work, right: Sequence[bool], seconds: float) -> float:
    if not all(right):
        raise MeasurementError(f"{kind} by {work.workers} at once did not do what was to be measured")
    return work.calls / seconds


def _ceilings(url: str, sha: str, calls: int) -> dict[int, float]:
    """Give redis-benchmark's calls per second by the number of its connections; none where it cannot be run."""
    program = shutil.which("redis-benchmark") or shutil.which("valkey-benchmark")
    address = urlsplit(url)
    if program is None or address.scheme != "redis" or address.password:
        return {}
    where = [program, "-h", address.hostname or "127.0.0.1", "-p", str(address.port or 6379)]
    ceilings = {}
    for count in TASKS:
        command = [*where, "-c", str(count), "-n", str(calls), "--csv", "EVALSHA", sha, "0"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=CEILING_SECONDS)
        heading, values = list(csv.reader(done.stdout.splitlines()))[-2:]
        ceilings[count] = float(dict(zip(heading, values, strict=True))["rps"])
    return ceilings


def _many(count: int, of: str) -> str:
    return f"{count} {of}s" if count > 1 else f"1 {of}"
