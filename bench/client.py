"""What the library adds to a round trip: its calls beside the same raw EVALSHA on the same client, one at a time.

The raw calls get their arguments ready made and leave the reply as it is; the library checks ids, builds keys and makes
typed results. Both alternate call by call, so that a noisy moment meets both.
"""

from __future__ import annotations

import asyncio
import statistics
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NamedTuple

import presence
import presence.sync
from bench.fill import NAMESPACE, Population, sample
from bench.measure import Spread
from bench.progress import Progress
from bench.report import Row
from presence import clients

if TYPE_CHECKING:
    from bench.scale import Scale
    from bench.servers import Server
    from presence.operations import Command

HOW = """Calls through the managers and the same raw `EVALSHA` on the same redis-py client, in turns call by call, one
at a time; median of short rounds."""

CONNECTIONS = 2_000
CALLS = 200
WARM_UP_CALLS = 200
WRAPPER_RATIO = 1.2


class Kind(NamedTuple):
    """A kind of call: the manager's method, and what the same operation is called in ``Operations``."""

    method: str
    of_game: bool


KINDS = (
    Kind("update_heartbeat", of_game=False),
    Kind("get_connection", of_game=False),
    Kind("get_game_connections", of_game=True),
)


class Times(NamedTuple):
    """Latencies of one round in microseconds, median of each."""

    library: float
    raw: float


def measure_client(server: Server, scale: Scale) -> list[Row]:
    """Measure the latency of calls through the blocking and the asyncio manager."""
    population = Population(server.client, CONNECTIONS)
    population.fill()
    rows = []
    progress = Progress("kinds of calls timed by the client", 2 * len(KINDS))
    for kind in KINDS:
        rounds = [_calls(population, kind, CALLS) for _ in range(scale.client_rounds)]
        warm_up = _calls(population, kind, WARM_UP_CALLS)
        for flavour, run in (("blocking", _time_blocking), ("asyncio", _time_asyncio)):
            times = run(server.url, kind.method, [warm_up, *rounds])[1:]
            ratio = Spread.of([time.library / time.raw for time in times])
            latency = Spread.of([time.library for time in times])
            rows.append(Row(f"{kind.method}, {flavour}", latency, "µs", ratio, "raw evalsha", WRAPPER_RATIO))
            progress.advance()
    return rows


class Call(NamedTuple):
    """One call, as the manager takes it and as the raw client takes it."""

    argument: str
    evalsha: Command


def _calls(population: Population, kind: Kind, count: int) -> list[Call]:
    describe = getattr(population.operations, kind.method)
    indexes = [sample(population, 1)[0] for _ in range(count)]
    arguments = [population.game_id(index) if kind.of_game else population.sids[index] for index in indexes]
    return [Call(argument, describe(argument).command()[1:]) for argument in arguments]


def _time_blocking(url: str, method: str, rounds: list[list[Call]]) -> list[Times]:
    client: Any = clients.connect_blocking(clients.parse(url), {})
    with client, presence.sync.ConnectionManager(client, namespace=NAMESPACE) as manager:
        call = getattr(manager, method)
        times = []
        for calls in rounds:
            library, raw = [], []
            for argument, evalsha in calls:
                start = perf_counter_ns()
                call(argument)
                middle = perf_counter_ns()
                client.evalsha(*evalsha)
                end = perf_counter_ns()
                library.append(middle - start)
                raw.append(end - middle)
            times.append(_medians(library, raw))
        return times


def _time_asyncio(url: str, method: str, rounds: list[list[Call]]) -> list[Times]:
    async def run() -> list[Times]:
        client: Any = clients.connect_asyncio(clients.parse(url), {})
        async with client, presence.ConnectionManager(client, namespace=NAMESPACE) as manager:
            call = getattr(manager, method)
            times = []
            for calls in rounds:
                library, raw = [], []
                for argument, evalsha in calls:
                    start = perf_counter_ns()
                    await call(argument)
                    middle = perf_counter_ns()
                    await client.evalsha(*evalsha)
                    end = perf_counter_ns()
                    library.append(middle - start)
                    raw.append(end - middle)
                times.append(_medians(library, raw))
            return times

    return asyncio.run(run())


def _medians(library_ns: list[int], raw_ns: list[int]) -> Times:
    return Times(statistics.median(library_ns) / 1000, statistics.median(raw_ns) / 1000)
