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

    @property
    def few_connections(self) -> int:
        """The smaller population that a cleanup is compared with."""
        return self.connections // 10

    @property
    def stale(self) -> int:
        """How many connections a cleanup finds stale."""
        return self.connections // 20


FULL = Scale("full", connections=200_000, rounds=100, calls=200, cleanup_rounds=5, client_rounds=20)
QUICK = Scale("quick", connections=20_000, rounds=20, calls=200, cleanup_rounds=3, client_rounds=5)
