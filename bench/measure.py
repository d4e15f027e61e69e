"""How time and memory inside the server are measured, and how repeated measurements are summed up.

Time is the server's own account of it, ``usec`` and ``calls`` in INFO commandstats, as the difference of two readings:
nothing is reset and no setting is changed. It holds neither the network nor the client.

Calls are made one per round trip, never in a pipeline. A pipeline of one command repeated keeps a tiny script's code
and data in the CPU's caches, and Valkey even prefetches the keys of pipelined native commands; the traffic of game
servers offers neither, so a pipeline would flatter the numbers, and not evenly. For the same reason the commands take
turns in many short rounds, and so a moment in which the machine did something else spoils few rounds and no median.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import redis

Command: TypeAlias = "tuple[str | bytes | int, ...]"
"""A command to send, presence's own or a native one."""

LEAST_TIME = 0.05
"""Of the commands within a call, in µs: the server counts in whole ones, of which a few calls may take none."""
PIPELINE_SIZE = 500
STABLE_SECONDS = 1.0
STABLE_BYTES = 64 * 1024
"""Changes of the used memory below this are the buffers of our own connection."""
LONGEST_WAIT_SECONDS = 60


class MeasurementError(Exception):
    """The server did not do what was to be measured, so there is no result."""


def percentile(values: Sequence[float], percent: float) -> float:
    """Give the smallest of the values that at least this percentage of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of repeated measurements, and the range in which four of five of them are."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Sum up repeated measurements."""
        return cls(statistics.median(values), percentile(values, 10), percentile(values, 90))

    @classmethod
    def exactly(cls, value: float) -> Self:
        """Hold the result of a measurement that is made once."""
        return cls(float(value), float(value), float(value))


def ratios(costs: Sequence[float], baselines: Sequence[float]) -> Spread:
    """Sum up the ratios of measurements to the baselines of the same rounds."""
    return Spread.of([cost / baseline for cost, baseline in zip(costs, baselines, strict=True)])


def send(client: redis.Redis, commands: Sequence[Command]) -> list[Any]:
    """Send commands that are not measured, many in one write; an error reply is raised."""
    replies: list[Any] = []
    # A pipeline of redis-py takes twice as long, and there are millions to send.
    connection: Any = client.connection_pool.get_connection()
    try:
        for start in range(0, len(commands), PIPELINE_SIZE):
            chunk = commands[start : start + PIPELINE_SIZE]
            connection.send_packed_command(connection.pack_commands(chunk))
            replies += [connection.read_response() for _ in chunk]
    except BaseException:
        connection.disconnect()  # What it still has to say is for nobody.
        raise
    finally:
        client.connection_pool.release(connection)
    return replies


class ServerTime(NamedTuple):
    """What calls of one kind cost the server, each in microseconds per call."""

    whole: float
    """With everything that runs inside: for a script, Lua and its commands."""
    commands: Mapping[str, CommandTime]
    """For a script, the commands that it issued, by their names."""
    replies: Sequence[Any]


class CommandTime(NamedTuple):
    """What one command cost inside the calls of a script: how often it ran in a call, and its microseconds per call."""

    calls: float
    time: float


def server_time(client: redis.Redis, commands: Iterable[Command]) -> ServerTime:
    """Call commands of one kind, one per round trip.

    Args:
        client: the connection to the server, which nobody else uses at this time.
        commands: calls of one command (EVALSHA, or a native one).

    Returns:
        The time inside the server, and the replies.

    Raises:
        MeasurementError: the server counted other calls than these.

    """
    replies: list[Any] = []
    name = ""
    before: dict[str, CommandTime] = {}
    for command in commands:
        if not name:
            name = str(command[0]).lower()
            before = command_stats(client)
        replies.append(client.execute_command(*command))
    used = difference(before, command_stats(client))
    calls, microseconds = used.pop(name, CommandTime(0, 0))
    if calls != len(replies):
        raise MeasurementError(
            f"the server counted {calls:g} calls of {name} instead of {len(replies)}; does another program use it?"
        )
    inside = {inner: CommandTime(stats.calls / calls, stats.time / calls) for inner, stats in used.items()}
    return ServerTime(microseconds / calls, inside, replies)


def command_stats(client: redis.Redis) -> dict[str, CommandTime]:
    """Read how often every command ran on the server until now, and how long, but for the reading itself.

    The commands of a script are counted as the same ones from outside, and the script's own time holds theirs.
    """
    stats: Any = client.info("commandstats")
    return {
        name.removeprefix("cmdstat_").lower(): CommandTime(entry["calls"], entry["usec"])
        for name, entry in stats.items()
        if name != "cmdstat_info"
    }


def difference(before: Mapping[str, CommandTime], after: Mapping[str, CommandTime]) -> dict[str, CommandTime]:
    """Give what was used between two readings."""
    used = {}
    for name, (calls, microseconds) in after.items():
        calls_before, before_us = before.get(name, CommandTime(0, 0))
        if calls > calls_before:
            used[name] = CommandTime(calls - calls_before, microseconds - before_us)
    return used


def used_memory(client: redis.Redis) -> int:
    """Read the server's used memory once it stands still: a hash table that grows holds two tables for a while.

    Raises:
        MeasurementError: it does not stand still.

    """
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    reference, since = -STABLE_BYTES, 0.0
    while time.monotonic() < deadline:
        info: Any = client.info("memory")
        used: int = info["used_memory"]
        if abs(used - reference) >= STABLE_BYTES:
            reference, since = used, time.monotonic()
        elif time.monotonic() - since >= STABLE_SECONDS:
            return used
        time.sleep(0.1)
    raise MeasurementError(f"the server's used memory still changes after {LONGEST_WAIT_SECONDS} s")
