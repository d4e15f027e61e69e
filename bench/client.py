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
from bench.fill import NAMESPACE, Population, new_sid, sample
from bench.measure import MeasurementError, Spread, send
from bench.progress import Progress
from bench.report import Row
from presence import addresses, clients

if TYPE_CHECKING:
    from collections.abc import Callable, Sized

    from bench.measure import Command
    from bench.scale import Scale
    from bench.servers import Server

HOW = """Calls through the managers and the same raw `EVALSHA` on the same redis-py client, in turns call by call, one
at a time; median of short rounds. What changes something has a connection of its own for each call, made before the
clock starts. The more a call answers, the more there is to be made of it: a room of 100 is 100 objects, where the raw
call leaves 300 texts."""

CONNECTIONS = 2_000
ROOM = 100
CALLS = 200
WRAPPER_RATIO = 1.2


class Actor(NamedTuple):
    """A connection of one call's own."""

    sid: str
    user_id: str
    game_id: str


class Kind(NamedTuple):
    """A kind of call."""

    name: str
    method: str
    """Of the manager."""
    arguments: Callable[[Actor], tuple[str, ...]]
    is_right: Callable[[Any], object] = bool
    is_registered: bool = True
    """Whether the actor is there before the call."""
    is_in_game: bool = True
    described_as: str = ""
    """In ``Operations``, where that is another name."""


def _are_two(answer: Sized) -> bool:
    return len(answer) == 2


# These act on who is there anyway.
READS = (
    Kind("update_heartbeat", "update_heartbeat", lambda actor: (actor.sid,)),
    Kind("get_connection", "get_connection", lambda actor: (actor.sid,)),
    Kind("get_user_connection", "get_user_connection", lambda actor: (actor.user_id,)),
    Kind("get_all_user_connections", "get_all_user_connections", lambda actor: (actor.user_id,)),
    Kind("is_user_online", "is_user_online", lambda actor: (actor.user_id,)),
    Kind("get_game_connections of 2", "get_game_connections", lambda actor: (actor.game_id,), _are_two),
    Kind("get_game_user_sids of 2", "get_game_user_sids", lambda actor: (actor.game_id,), _are_two),
    Kind("get_opponent_sid", "get_opponent_sid", lambda actor: (actor.game_id, actor.user_id)),
    Kind(
        "get_game_connection_count of 2", "get_game_connection_count", lambda actor: (actor.game_id,), lambda n: n == 2
    ),
    Kind("get_connection_count", "get_connection_count", lambda _: (), lambda count: count >= CONNECTIONS),
    Kind(
        f"get_game_connections of {ROOM}",
        "get_game_connections",
        lambda _: ("room",),
        lambda members: len(members) == ROOM,
    ),
    Kind(
        "cleanup_stale_connections, none",
        "cleanup_stale_connections",
        lambda _: (),
        lambda cleaned: not cleaned.removed,
        described_as="cleanup_batch",
    ),
)
# These have an actor of their own for each call.
CHANGES = (
    Kind(
        "register_connection, first",
        "register_connection",
        lambda actor: (actor.sid, actor.user_id),
        lambda registration: not registration.displaced,
        is_registered=False,
    ),
    Kind(
        "register_connection, displacing",
        "register_connection",
        lambda actor: (f"{actor.sid}'", actor.user_id),
        lambda registration: registration.displaced[0].game_id,
    ),
    Kind("join_game", "join_game", lambda actor: (actor.sid, actor.game_id), is_in_game=False),
    Kind("leave_game", "leave_game", lambda actor: (actor.sid,)),
    Kind("update_metadata", "update_metadata", lambda actor: (actor.sid, "metadata")),
    Kind("unregister_connection", "unregister_connection", lambda actor: (actor.sid,)),
)


class Times(NamedTuple):
    """Latencies of one round in microseconds, median of each."""

    library: float
    raw: float


class ComparedCall(NamedTuple):
    """One call, as the manager takes it, and one like it, as the raw client takes it."""

    arguments: tuple[str, ...]
    evalsha: Command


def measure_client(server: Server, scale: Scale) -> list[Row]:
    """Measure the latency of calls through the blocking and the asyncio manager."""
    population = Population(server.client, CONNECTIONS)
    population.fill()
    joins = [population.operations.join_game(sid, "room") for sid in population.sids[:ROOM]]
    send(server.client, [join.command() for join in joins])
    rows = []
    kinds = (*READS, *CHANGES)
    progress = Progress("kinds of calls timed by the client", 2 * len(kinds))
    for kind in kinds:
        for flavour, run in (("blocking", _time_blocking), ("asyncio", _time_asyncio)):
            # The first round opens the connections.
            times = run(server.url, kind, _Rounds(population, kind, scale.client_rounds + 1))[1:]
            ratio = Spread.of([time.library / time.raw for time in times])
            latency = Spread.of([time.library for time in times])
            rows.append(Row(f"{kind.name}, {flavour}", latency, "µs", ratio, "raw evalsha", WRAPPER_RATIO))
            progress.advance()
    return rows


class _Rounds:
    """The calls of each round; what they need is there while they are made, and what they leave goes."""

    def __init__(self, population: Population, kind: Kind, count: int) -> None:
        self.count = count
        self._population = population
        self._kind = kind
        self._actors: list[Actor] = []

    def begin(self) -> list[ComparedCall]:
        """Give the calls of a round."""
        kind, population = self._kind, self._population
        if kind in READS:
            # Who is in the room is in no game of two.
            indexes = sample(population, 2 * CALLS, range(ROOM))
            actors = [Actor(population.sids[n], population.user_ids[n], population.game_id(n)) for n in indexes]
        else:
            actors = self._actors = [Actor(new_sid(), f"guest-{new_sid()}", "lounge") for _ in range(2 * CALLS)]
            operations = population.operations
            if kind.is_registered:
                registers = [operations.register_connection(actor.sid, actor.user_id) for actor in actors]
                send(population.client, [register.command() for register in registers])
            if kind.is_registered and kind.is_in_game:
                joins = [operations.join_game(actor.sid, actor.game_id) for actor in actors]
                send(population.client, [join.command() for join in joins])
        describe = getattr(population.operations, kind.described_as or kind.method)
        return [
            ComparedCall(kind.arguments(ours), describe(*kind.arguments(other)).command()[1:])
            for ours, other in zip(actors[::2], actors[1::2], strict=True)
        ]

    def check(self, answer: object) -> None:
        """Look at what the library answered; it is not kept, for as a rule nobody keeps two hundred rooms."""
        if not self._kind.is_right(answer):
            raise MeasurementError(
                f"{self._kind.name} answered {answer!r:.200}, so it did not do what was to be measured"
            )

    def end(self) -> None:
        """Let the actors of the round go."""
        population = self._population
        sids = [sid for actor in self._actors for sid in (actor.sid, f"{actor.sid}'")]
        send(population.client, [population.operations.unregister_connection(sid).command() for sid in sids])


def _time_blocking(url: str, kind: Kind, rounds: _Rounds) -> list[Times]:
    client: Any = clients.connect_blocking(addresses.parse(url), {})
    with client, presence.sync.ConnectionManager(client, namespace=NAMESPACE) as manager:
        call = getattr(manager, kind.method)
        times = []
        for _ in range(rounds.count):
            library, raw = [], []
            for arguments, evalsha in rounds.begin():
                start = perf_counter_ns()
                answer = call(*arguments)
                middle = perf_counter_ns()
                client.evalsha(*evalsha)
                end = perf_counter_ns()
                rounds.check(answer)
                library.append(middle - start)
                raw.append(end - middle)
            rounds.end()
            times.append(_medians(library, raw))
        return times


def _time_asyncio(url: str, kind: Kind, rounds: _Rounds) -> list[Times]:
    async def run() -> list[Times]:
        client: Any = clients.connect_asyncio(addresses.parse(url), {})
        async with client, presence.ConnectionManager(client, namespace=NAMESPACE) as manager:
            call = getattr(manager, kind.method)
            times = []
            for _ in range(rounds.count):
                library, raw = [], []
                for arguments, evalsha in rounds.begin():
                    start = perf_counter_ns()
                    answer = await call(*arguments)
                    middle = perf_counter_ns()
                    await client.evalsha(*evalsha)
                    end = perf_counter_ns()
                    rounds.check(answer)
                    library.append(middle - start)
                    raw.append(end - middle)
                rounds.end()
                times.append(_medians(library, raw))
            return times

    return asyncio.run(run())


def _medians(library_ns: list[int], raw_ns: list[int]) -> Times:
    return Times(statistics.median(library_ns) / 1000, statistics.median(raw_ns) / 1000)
