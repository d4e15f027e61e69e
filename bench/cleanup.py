"""Cleanup of many stale connections: how long one script holds the server, and what each removed connection costs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.fill import OTHER_NAMESPACE, Population, sample, server_ms
from bench.measure import MeasurementError, Spread, percentile, ratios, server_time
from bench.progress import Progress
from bench.report import Row
from bench.slowlog import COUNTING, COUNTS_NOTHING_ELSE, LONGEST_SCRIPT_MS

if TYPE_CHECKING:
    from bench.scale import Scale
    from bench.servers import Server

HOW = """A twentieth of all connections, chosen at random, falls silent and is cleaned up in batches, several times.
The longest script is the strict maximum of all batches. Where the server waits for a CPU, or a virtual machine for its
host, it holds that wait: so between the batches runs a script that only counts, without touching any data, whose
longest call tells what the machine adds. And in about one batch of eight Lua ends a cycle of its garbage collection,
which takes once or twice as long as the rest of the batch."""

PER_REMOVED_RATIO = 2
STALE_MS = (100_000, 300_000)
"""How long ago the stale ones were last seen: longer than the threshold of 90 seconds."""

_random = random.Random(20_260_102)


@dataclass
class Cleanups:
    """What was measured of one population, over all rounds."""

    population: Population
    batch_ms: list[float] = field(default_factory=list)
    longest_ms: list[float] = field(default_factory=list)
    us_per_removed: list[float] = field(default_factory=list)
    counting_ms: list[float] = field(default_factory=list)

    def run_one(self, stale: int) -> None:
        """Let connections that are spread over all of the population go stale, clean up, and bring them back."""
        population = self.population
        chosen = sample(population, stale)
        now = server_ms(population.client)
        population.set_last_seen({index: now - _random.randint(*STALE_MS) for index in chosen})

        counting = ("EVALSHA", str(population.client.script_load(COUNTING)), 0)
        removed: set[str] = set()
        costs_us = []
        is_last = False
        while not is_last:
            batch = population.operations.cleanup_batch()
            cost = server_time(population.client, [batch.command()])
            costs_us.append(cost.whole)
            done = batch.parse(cost.replies[0])
            removed.update(connection.sid for connection in done.removed)
            is_last = done.is_last
            self.counting_ms.append(server_time(population.client, [counting]).whole / 1000)
        if removed != {population.sids[index] for index in chosen}:
            raise MeasurementError(
                f"the cleanup removed {len(removed)} connections, not exactly the {stale} stale ones"
            )
        self.us_per_removed.append(sum(costs_us) / stale)
        self.longest_ms.append(max(costs_us) / 1000)
        self.batch_ms += [cost / 1000 for cost in costs_us]
        population.restore(chosen)


def measure_cleanup(server: Server, scale: Scale) -> list[Row]:
    """Measure the cleanup of equally many stale connections among many and among few."""
    many = Cleanups(Population(server.client, scale.connections))
    few = Cleanups(Population(server.client, scale.few_connections, namespace=OTHER_NAMESPACE))
    for cleanups in (many, few):
        cleanups.population.fill()
    progress = Progress(f"cleanups of {scale.stale:,} among many and among few", scale.cleanup_rounds)
    for _ in range(scale.cleanup_rounds):
        for cleanups in (few, many):
            cleanups.run_one(scale.stale)
        progress.advance()

    rows = []
    for cleanups in (many, few):
        among = f"{scale.stale:,} stale among {len(cleanups.population.sids):,}"
        longest = Spread.exactly(max(cleanups.batch_ms))
        rows += [
            Row(f"{among}: longest script", longest, "ms", target=LONGEST_SCRIPT_MS if cleanups is many else None),
            Row(f"{among}: longest, median of {scale.cleanup_rounds} runs", Spread.of(cleanups.longest_ms), "ms"),
            Row(f"{among}: 99th percentile", Spread.exactly(percentile(cleanups.batch_ms, 99)), "ms"),
            Row(f"{among}: {COUNTS_NOTHING_ELSE}, longest", Spread.exactly(max(cleanups.counting_ms)), "ms"),
            Row(f"{among}: {COUNTS_NOTHING_ELSE}, usual", Spread.of(cleanups.counting_ms), "ms"),
        ]
    rows.append(Row(f"for each removed among {scale.few_connections:,}", Spread.of(few.us_per_removed), "µs"))
    ratio = ratios(many.us_per_removed, few.us_per_removed)
    rows.append(
        Row(
            f"for each removed among {scale.connections:,}",
            Spread.of(many.us_per_removed),
            "µs",
            ratio,
            f"among {scale.few_connections:,}",
            PER_REMOVED_RATIO,
        )
    )
    return rows
