"""How much a run measures: the full scale, for which the targets are meant, and a quick one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """The numbers of a run."""

    name: str
    connections: int
    """Live connections, each in a two-player game."""
    rounds: int
    """Rounds of the measurements of server time; every ratio is taken within one round."""
    calls: int
    """Calls of each command in a round."""
    cleanup_rounds: int
    client_rounds: int
    sizes: tuple[int, ...]
    """Connections of the crowds that are held against each other, the smallest first."""
    growth_rounds: int
    growth_calls: int
    """Calls of each operation in a round, in each crowd."""
    growth_cleanups: int
    throughput_rounds: int
    throughput_calls: int
    """Calls of one kind in a round, over all tasks or threads."""
    storm_operations: int
    """Of each contender."""
    register_rounds: int
    register_seconds: float

    @property
    def few_connections(self) -> int:
        """The smaller population that a cleanup is compared with."""
        return self.connections // 10

    @property
    def stale(self) -> int:
        """How many connections a cleanup finds stale."""
        return self.connections // 20


FULL = Scale(
    "full",
    connections=200_000,
    rounds=60,
    calls=200,
    cleanup_rounds=4,
    client_rounds=12,
    sizes=(10_000, 100_000, 1_000_000),
    growth_rounds=4,
    growth_calls=200,
    growth_cleanups=3,
    throughput_rounds=8,
    throughput_calls=2_000,
    storm_operations=60_000,
    register_rounds=4,
    register_seconds=1.5,
)
QUICK = Scale(
    "quick",
    connections=20_000,
    rounds=8,
    calls=200,
    cleanup_rounds=3,
    client_rounds=3,
    sizes=(1_000, 10_000),
    growth_rounds=2,
    growth_calls=50,
    growth_cleanups=1,
    throughput_rounds=2,
    throughput_calls=1_000,
    storm_operations=4_000,
    register_rounds=1,
    register_seconds=0.3,
)
