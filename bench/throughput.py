"""What many tasks of one event loop get done: the library's calls beside the same EVALSHA on a plain asyncio client.

The plain client is redis-py's as it is made from a URL, with its own pool, which gives each of the tasks a connection;
its calls get their arguments ready made and leave the reply as it is. Both alternate round by round.
"""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import redis.asyncio

import presence
from bench.client import ComparedCall
from bench.fill import NAMESPACE, Population, new_sid, sample
from bench.measure import MeasurementError, Spread, ratios
from bench.progress import Progress
from bench.report import Row

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from bench.scale import Scale
    from bench.servers import Server

HOW = """64 tasks on one event loop through the manager, against the same EVALSHA through a plain `redis.asyncio` client
with its own pool, round by round in turns. Heartbeats that are awaited at the same time the manager sends as one call
of the script for many, while every other call keeps its own EVALSHA: a read shows what sharing the connection brings by
itself. A register is held by the server long before the client. So these two have no target."""

TASKS = 64
CONNECTIONS = 20_000
CALLS = 5_000
"""Calls of each client in a round."""
LEAST_RATIO = 5


class Kind(NamedTuple):
    """A kind of call, and its target if it has one: see above."""

    method: str
    of_user: bool
    target: float | None


KINDS = (
    Kind("update_heartbeat", of_user=False, target=LEAST_RATIO),
    Kind("get_connection", of_user=False, target=None),
    Kind("register_connection", of_user=True, target=None),
)


def measure_throughput(server: Server, scale: Scale) -> list[Row]:
    """Measure the operations per second of many tasks on one event loop."""
    population = Population(server.client, CONNECTIONS)
    population.fill()
    rows = []
    progress = Progress("kinds of calls from many tasks", len(KINDS))
    for kind in KINDS:
        library, plain = asyncio.run(_measure(server.url, population, kind, scale.throughput_rounds))
        rows.append(
            Row(
                f"{kind.method}, {TASKS} tasks",
                Spread.of(library),
                "/s",
                ratios(library, plain),
                "plain client",
                kind.target,
                at_least=True,
            )
        )
        progress.advance()
    return rows


def _calls(population: Population, kind: Kind) -> list[ComparedCall]:
    describe = getattr(population.operations, kind.method)

    def arguments(index: int) -> tuple[str, ...]:
        # Each register brings a new connection, and displaces the user's earlier one.
        return (new_sid(), population.user_ids[index]) if kind.of_user else (population.sids[index],)

    chosen = sample(population, 2 * CALLS)
    return [
        ComparedCall(arguments(ours), describe(*arguments(other)).command()[1:])
        for ours, other in zip(chosen[::2], chosen[1::2], strict=True)
    ]


async def _measure(url: str, population: Population, kind: Kind, rounds: int) -> tuple[list[float], list[float]]:
    library, plain = [], []
    client: Any = redis.asyncio.Redis.from_url(url)
    async with client, presence.ConnectionManager.from_url(url, namespace=NAMESPACE) as manager:
        call = getattr(manager, kind.method)
        for _ in range(rounds + 1):
            calls = _calls(population, kind)
            library.append(await _per_second(call, [one.arguments for one in calls]))
            plain.append(await _per_second(client.evalsha, [one.evalsha for one in calls]))
    # The first round opened the connections.
    return library[1:], plain[1:]


async def _per_second(call: Callable[..., Awaitable[object]], arguments: Iterable[tuple[Any, ...]]) -> float:
    """Let the tasks share the calls; give the calls per second."""
    pending = iter(arguments)

    answers: list[object] = []

    async def work() -> None:
        answers.extend([await call(*one) for one in pending])

    start = perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(TASKS):
            tasks.create_task(work())
    seconds = perf_counter() - start
    if not all(answers):
        raise MeasurementError("a call did not do what was to be measured")
    return CALLS / seconds
