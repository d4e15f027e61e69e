"""Server time of each operation, beside native commands on the same data.

Every round measures every operation on connections chosen at random, and leaves the state as it found it.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from bench.fill import NAMESPACE, Population, new_sid, sample, server_ms
from bench.measure import LEAST_TIME, MeasurementError, Spread, ratios, send, server_time
from bench.progress import Progress
from bench.report import Row
from presence.operations import HEARTBEAT_BATCH_SIZE, Operations
from presence.operations import REGISTER as REGISTER_SCRIPT
from presence.replies import Position

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from bench.measure import Command, CommandTime
    from bench.scale import Scale
    from bench.servers import Server
    from presence.operations import Operation

HOW = """Every operation acts on connections chosen at random among 200,000 that are each in a two-player game (QUICK:
20,000) and, if not said otherwise, were registered more than a minute ago and less than about 15, in which time the
TTLs are refreshed (who joins a game has come back a moment before). So the user's list still holds the answer of the
last register, which is too old to be given again: that is the usual state of a player who comes back, and a register
that displaces a connection is held against its target in it. Times are the server's own (`INFO commandstats`), so they
hold neither the network nor the client. One call per round trip, never pipelined: a pipeline of one command keeps a
tiny script's code and data in the CPU's caches, which the traffic of game servers does not. The commands take turns in
short rounds; a ratio compares within a round. The rows *the commands within* give the time of the native commands that
a script issued, in the very same calls: the server counts them in `commandstats` one by one, as if they came from
outside, so they meet the same data in the same caches; the ratio is the whole script to them, and what is above 1 is
Lua's and the answer's. A heartbeat is one that comes soon after the one before; of those that come every 30 seconds,
one in 30 refreshes the TTLs as well. What events cost where they are off is a register beside the same script without
its part for events."""

Result = TypeVar("Result")

NOTHING = "return 1 as EVALSHA"
ZADD = "ZADD XX, same index"
ZADD_LATE = "ZADD XX, same moment"
ZADD_MANY = f"ZADD XX, {HEARTBEAT_BATCH_SIZE} members"
MANY_HEARTBEATS = f"{HEARTBEAT_BATCH_SIZE} heartbeats in one script"
BATCHES = 4
HSET = "HSET, 4 fields, new key"
REGISTER = "register, first of its user"
REGISTER_PUBSUB = "the same with events in pub/sub, no subscriber"
REGISTER_STREAM = "the same with events in the stream"
DISPLACING = "register, displacing one in a game"
DISPLACING_LATE = "register, displacing one in a game, more than 15 minutes after the last register"
DISPLACING_NO_GAME = "register, displacing one in no game"
DISPLACING_SOON = "register, displacing one in a game within a minute"
DISPLACING_RESUMES = "register, displacing one in a game, whose seat it takes"
WITHOUT_EVENTS = "register, first of its user, cut: no part for events"
DETACHING = "unregister one in a game with a grace"
RESUMING = "register, resuming one in a game"
STREAM_EVENTS = 100
EVENTS_OFF = 1.05
"""No cost that could be measured: two scripts that do the same differ by as much."""

REFRESHING = "heartbeat that refreshes TTLs"
"""About one in 15 minutes of each connection."""

# Operation, the native command that it is held against, and how many times that one's time it may take.
COMPARED: tuple[tuple[str, str, float | None], ...] = (
    ("heartbeat", ZADD, 3.5),
    (REFRESHING, ZADD_LATE, None),
    (MANY_HEARTBEATS, ZADD_MANY, 2),
    (REGISTER, HSET, 9),
    (REGISTER_PUBSUB, REGISTER, 1.25),
    (REGISTER_STREAM, REGISTER, None),
    (DISPLACING, HSET, 13),
    (DISPLACING_LATE, HSET, None),
    (DISPLACING_NO_GAME, HSET, None),
    (DISPLACING_SOON, HSET, None),
    (DISPLACING_RESUMES, HSET, None),
    ("snapshot of a two-player game", NOTHING, 10),
    ("join a game", HSET, None),
    ("leave a game", HSET, None),
    ("unregister one in a game", HSET, None),
    (DETACHING, HSET, None),
    (RESUMING, HSET, None),
    ("update_metadata", HSET, None),
    ("update_server_heartbeat, one server", ZADD, None),
    ("cleanup, none stale", NOTHING, None),
    ("snapshot of a two-player game with its position", NOTHING, None),
    ("get_games_connections of 10 games of two", NOTHING, None),
    ("get_users_connections of 100", NOTHING, None),
    ("are_users_online of 100", NOTHING, None),
    (f"events: {STREAM_EVENTS} changes from the stream", NOTHING, None),
    ("get_connection", NOTHING, None),
    ("get_user_connection", NOTHING, None),
    ("get_all_user_connections", NOTHING, None),
    ("is_user_online", NOTHING, None),
    ("get_connection_count", NOTHING, None),
    ("get_game_connection_count", NOTHING, None),
)

DUE_SILENCE_MS = 15 * 60 * 1000
"""After so long a silence a heartbeat refreshes the TTLs in any case."""
ANSWERED_SECONDS = 5 * 60
"""How long ago the last register of most was: its answer is too old to be given again, and is still in the list."""
SHORT_TTL_MS = 3_600_000
"""Less than any record is left with."""


class Rounds:
    """The measured rounds: for each name the server time per call, in microseconds, round by round."""

    def __init__(self, population: Population, calls: int, late: list[int]) -> None:
        self.costs: defaultdict[str, list[float]] = defaultdict(list)
        self.commands: defaultdict[str, list[Mapping[str, CommandTime]]] = defaultdict(list)
        """The same for the commands that each script issued."""
        self._population = population
        self._operations = population.operations
        self._patient = Operations(NAMESPACE, heartbeat_seconds=3600)
        """To these, nobody is stale, however long ago the population was made."""
        self._client = population.client
        self._calls = calls
        self._registered: list[int] = []
        self._late = late
        """Those whose TTLs were refreshed since they were registered, and more than all rounds need."""
        self._nothing = str(self._client.script_load("return 1"))
        events = r"\nif events ~= '' then\n.*(?=\nreturn answer\n)"
        source, count = re.subn(events, "", REGISTER_SCRIPT.source, flags=re.DOTALL)
        if count != 1 or "publish" in source:
            raise MeasurementError("the register's part for events was not found")
        self._without_events = str(self._client.script_load(source))
        self._server = Operations(NAMESPACE, server_id="server")
        start = self._server.start_server()
        start.parse(self._client.execute_command(*start.command()))

    def run_one(self) -> None:
        """Measure everything once; a native command comes right before the operations that are held against it."""
        self._population.age_answers(self._registered, ANSWERED_SECONDS)
        self._measure_heartbeats()
        self._measure_reads()
        self._measure_registrations()
        self._measure_joins_and_removals()
        self._measure_servers()
        self._measure_bulk()
        registered = set(self._registered)
        self._late = [index for index in self._late if index not in registered]

    def run_refreshing_heartbeats(self, rounds: int) -> None:
        """Measure heartbeats of connections that were silent for long; each connection can be measured once."""
        due = sample(self._population, rounds * self._calls)
        sids = [self._population.sids[index] for index in due]
        keys = [f"{{{NAMESPACE}}}:conn:{sid}" for sid in sids]
        send(self._client, [("PEXPIRE", key, SHORT_TTL_MS) for key in keys])
        send(self._client, [("ZINCRBY", self._population.last_seen_key, -DUE_SILENCE_MS, sid) for sid in sids])
        for start in range(0, len(due), self._calls):
            self._time_native(ZADD_LATE, self._native_heartbeats(self._sample(without=due)), 0)
            self._time(REFRESHING, self._heartbeats(due[start : start + self._calls]), bool)
        if min(send(self._client, [("PTTL", key) for key in keys])) <= SHORT_TTL_MS:
            raise MeasurementError("heartbeats did not refresh the TTLs")

    def _measure_heartbeats(self) -> None:
        self._time_native(ZADD, self._native_heartbeats(self._sample()), 0)
        self._time("heartbeat", self._heartbeats(self._sample()), bool)

        # Each draws its own connections: those of one would be in the CPU's caches for the other.
        native, many = ([sample(self._population, HEARTBEAT_BATCH_SIZE) for _ in range(BATCHES)] for _ in range(2))
        self._time_native(ZADD_MANY, [self._native_batch(batch) for batch in native], 0)
        self._time(
            MANY_HEARTBEATS,
            [self._operations.heartbeat_batch([self._population.sids[index] for index in batch]) for batch in many],
            all,
        )

    def _native_batch(self, indexes: list[int]) -> Command:
        pairs = [command[3:] for command in self._native_heartbeats(indexes)]
        return ("ZADD", self._population.last_seen_key, "XX", *(part for pair in pairs for part in pair))

    def _heartbeats(self, indexes: list[int]) -> list[Operation[bool]]:
        return [self._operations.update_heartbeat(self._population.sids[index]) for index in indexes]

    def _native_heartbeats(self, indexes: list[int]) -> Iterator[Command]:
        offset = server_ms(self._client) - time.time_ns() // 1_000_000
        for index in indexes:
            now = time.time_ns() // 1_000_000 + offset
            yield "ZADD", self._population.last_seen_key, "XX", now, self._population.sids[index]

    def _measure_reads(self) -> None:
        sids, user_ids = self._population.sids, self._population.user_ids
        describe, game_id = self._operations, self._population.game_id
        self._time_native(NOTHING, [("EVALSHA", self._nothing, 0)] * self._calls, 1)
        self._time(
            "snapshot of a two-player game",
            [describe.get_game_connections(game_id(index)) for index in self._sample()],
            lambda connections: len(connections) == 2,
        )
        self._time(
            "snapshot of a two-player game with its position",
            [describe.get_game_snapshot(game_id(index)) for index in self._sample()],
            lambda snapshot: len(snapshot.connections) == 2,
        )
        self._time("get_connection", [describe.get_connection(sids[index]) for index in self._sample()], _is_found)
        self._time(
            "get_user_connection",
            [describe.get_user_connection(user_ids[index]) for index in self._sample()],
            _is_found,
        )
        self._time(
            "get_all_user_connections",
            [describe.get_all_user_connections(user_ids[index]) for index in self._sample()],
            lambda connections: len(connections) == 1,
        )
        online = [self._patient.is_user_online(user_ids[index]) for index in self._sample()]
        self._time("is_user_online", online, bool)
        self._time(
            "get_connection_count", [describe.get_connection_count()] * self._calls, lambda count: count == len(sids)
        )
        self._time(
            "get_game_connection_count",
            [describe.get_game_connection_count(game_id(index)) for index in self._sample()],
            lambda count: count == 2,
        )

    def _measure_registrations(self) -> None:
        now = server_ms(self._client)
        records = [f"{{{NAMESPACE}}}:conn:{new_sid()}" for _ in range(self._calls)]
        users = [f"user-{len(self._population.sids) + index:06}" for index in range(self._calls)]
        try:
            self._time_native(
                HSET,
                [
                    ("HSET", record, "user_id", user, "game_id", "game-000005", "connected_at", now, "last_seen", now)
                    for record, user in zip(records, users, strict=True)
                ],
                4,
            )
        finally:
            send(self._client, [("DEL", record) for record in records])

        # In turns, for the first of the two finds colder caches.
        first, second = (REGISTER, WITHOUT_EVENTS) if len(self.costs[REGISTER]) % 2 else (WITHOUT_EVENTS, REGISTER)
        for name, operations in (
            (first, self._operations),
            (second, self._operations),
            (REGISTER_PUBSUB, Operations(NAMESPACE, events="pubsub")),
            (REGISTER_STREAM, Operations(NAMESPACE, events="stream")),
        ):
            sids = [new_sid() for _ in users]
            self._time(
                name,
                [operations.register_connection(sid, user) for sid, user in zip(sids, users, strict=True)],
                lambda registration: not registration.displaced,
                sha=self._without_events if name == WITHOUT_EVENTS else "",
            )
            send(self._client, [self._operations.unregister_connection(sid).command() for sid in sids])
        start = Position()
        reads = [self._operations.read_events(start) for _ in range(BATCHES)]
        of_each = 2  # registered, and user_online
        expected = of_each * min(STREAM_EVENTS, self._calls)
        self._time(
            f"events: {STREAM_EVENTS} changes from the stream",
            reads,
            lambda batch: len(batch.events) == expected,
        )
        self._client.delete(self._operations.events_key)

        returning = self._sample(without=self._late)
        late, self._late = self._late[: self._calls], self._late[self._calls :]
        # In turns, for what is measured first finds colder caches.
        both = [[(DISPLACING, returning), (DISPLACING_SOON, returning)], [(DISPLACING_LATE, late)]]
        for name, indexes in chain(*(both if len(self.costs[DISPLACING]) % 2 else reversed(both))):
            for index in indexes:
                self._population.sids[index] = new_sid()
            self._time(
                name,
                [self._population.register(index) for index in indexes],
                lambda registration: len(registration.displaced) == 1 and registration.displaced[0].game_id is not None,
            )
            send(self._client, [self._population.join(index).command() for index in indexes])
        self._registered = [*returning, *late]

    def _measure_joins_and_removals(self) -> None:
        sids = self._population.sids
        moving = self._sample(without=self._registered)
        self._time("leave a game", [self._operations.leave_game(sids[index]) for index in moving], _is_found)
        going = self._sample(without=moving + self._registered)
        self._time(
            "unregister one in a game",
            [self._operations.unregister_connection(sids[index]) for index in going],
            lambda connection: connection is not None and connection.game_id is not None,
        )
        self._population.restore(going)
        seated = self._sample(without=moving + going + self._registered)
        self._time(
            DETACHING,
            [self._operations.unregister_connection(sids[index], grace_seconds=60) for index in seated],
            lambda connection: connection is not None and connection.is_detached,
        )
        for index in seated:
            sids[index] = new_sid()
        self._time(
            RESUMING,
            [self._population.register(index) for index in seated],
            lambda registration: registration.resumed and registration.connection.game_id is not None,
        )
        taking_over = self._sample(without=moving + going + seated + self._registered)
        for index in taking_over:
            sids[index] = new_sid()
        resuming, user_ids = Operations(NAMESPACE, displacement="newest_resumes"), self._population.user_ids
        self._time(
            DISPLACING_RESUMES,
            [resuming.register_connection(sids[index], user_ids[index]) for index in taking_over],
            lambda registration: len(registration.displaced) == 1 and registration.connection.game_id is not None,
        )
        update = self._operations.update_metadata
        self._time("update_metadata", [update(sids[index], "metadata") for index in seated], bool)
        send(self._client, [update(sids[index], "").command() for index in seated])
        for index in moving:
            sids[index] = new_sid()
        self._time(
            DISPLACING_NO_GAME,
            [self._population.register(index) for index in moving],
            lambda registration: len(registration.displaced) == 1 and registration.displaced[0].game_id is None,
        )
        self._time("join a game", [self._population.join(index) for index in moving], bool)
        self._registered += going + moving + seated + taking_over

    def _measure_bulk(self) -> None:
        # Last, since all that they read would be in the caches of the others, or drive theirs out.
        describe, user_ids, game_id = self._operations, self._population.user_ids, self._population.game_id
        self._time(
            "get_games_connections of 10 games of two",
            [describe.games_connections_batch([game_id(index) for index in many]) for many in self._many(10)],
            lambda games: all(len(game) == 2 for game in games),
        )
        self._time(
            "get_users_connections of 100",
            [describe.users_connections_batch([user_ids[index] for index in many]) for many in self._many(100)],
            all,
        )
        self._time(
            "are_users_online of 100",
            [self._patient.users_online_batch([user_ids[index] for index in many]) for many in self._many(100)],
            all,
        )
        self._time(
            "cleanup, none stale",
            [self._patient.cleanup_batch() for _ in range(BATCHES)],
            lambda batch: batch.is_last and not batch.removed,
        )

    def _measure_servers(self) -> None:
        self._time("update_server_heartbeat, one server", [self._server.update_server_heartbeat()] * self._calls, bool)

    def _many(self, count: int) -> list[list[int]]:
        return [sample(self._population, count) for _ in range(BATCHES)]

    def _sample(self, without: Sequence[int] = ()) -> list[int]:
        return sample(self._population, self._calls, without)

    def _time_native(self, name: str, commands: Sequence[Command] | Iterator[Command], expected: object) -> None:
        cost = server_time(self._client, commands)
        for reply in cost.replies:
            if reply != expected:
                raise MeasurementError(f"{name} answered {reply!r} instead of {expected!r}")
        self.costs[name].append(cost.whole)

    def _time(
        self,
        name: str,
        operations: Sequence[Operation[Result]],
        is_right: Callable[[Result], object],
        *,
        sha: str = "",
    ) -> None:
        """Measure calls; with a ``sha`` that script runs in the place of theirs."""
        commands = [operation.command() for operation in operations]
        if sha:
            commands = [(name_, sha, *rest) for name_, _, *rest in commands]
        cost = server_time(self._client, commands)
        for operation, reply in zip(operations, cost.replies, strict=True):
            if not is_right(operation.parse(reply)):
                raise MeasurementError(f"{name} answered {reply!r:.200}, so it did not do what was to be measured")
        self.costs[name].append(cost.whole)
        self.commands[name].append(cost.commands)


def _is_found(answer: Any) -> bool:
    return answer is not None


def measure_speed(server: Server, scale: Scale) -> list[Row]:
    """Measure the server time of each operation."""
    population = Population(server.client, scale.connections)
    population.fill()
    population.age_answers(range(scale.connections), ANSWERED_SECONDS)
    late = sample(population, 2 * scale.rounds * scale.calls)
    population.forget_answers(late)
    population.shuffle_last_seen()
    rounds = Rounds(population, scale.calls, late)
    progress = Progress(f"rounds of {scale.calls:,} calls of each operation", scale.rounds)
    for _ in range(scale.rounds):
        rounds.run_one()
        progress.advance()
    rounds.run_refreshing_heartbeats(scale.rounds)

    costs = rounds.costs
    natives = [Row(name, Spread.of(costs[name]), "µs") for name in (NOTHING, ZADD, ZADD_MANY, HSET, WITHOUT_EVENTS)]
    compared = [
        Row(name, Spread.of(costs[name]), "µs", ratios(costs[name], costs[native]), native, target)
        for name, native, target in COMPARED
    ]
    register, cut = costs[REGISTER], costs[WITHOUT_EVENTS]
    compared.append(
        Row(f"{REGISTER}, events off", Spread.of(register), "µs", ratios(register, cut), WITHOUT_EVENTS, EVENTS_OFF)
    )
    own = [_beside_own_commands(name, costs[name], rounds.commands[name]) for name, _, _ in COMPARED]
    return natives + compared + own


def _beside_own_commands(name: str, costs: Sequence[float], commands: Sequence[Mapping[str, CommandTime]]) -> Row:
    """Hold a script against the commands that it issued in the very same calls."""
    counts = {command.upper(): used.calls for command, used in sorted(commands[-1].items())}
    listed = ", ".join(command if count == 1 else f"{count:.3g} {command}" for command, count in counts.items())
    sums = [max(sum(used.time for used in round_.values()), LEAST_TIME) for round_ in commands]
    return Row(f"the commands within: {name}", Spread.of(sums), "µs", ratios(costs, sums), listed)
