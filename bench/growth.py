"""What the operations cost among ten thousand, a hundred thousand and a million connections, here and in *plain*.

Every crowd has a database of its own on one server. They take turns, operation by operation, so that a noisy moment
meets all of them; a ratio compares measurements that were made within a few seconds. Before each turn the crowd's own
data takes the place of the others' in the caches, as on a server of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import defaultdict
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import redis.asyncio

import presence
from bench.contenders import CONTENDERS, PLAIN, PRESENCE
from bench.contenders.library import Presence
from bench.contenders.plain import Plain
from bench.crowd import PATIENCE_SECONDS, Crowd
from bench.fill import NAMESPACE, load_scripts, server_ms
from bench.measure import LEAST_TIME, MeasurementError, Spread, command_stats, difference, ratios, used_memory
from bench.progress import Progress
from bench.report import Figure, Row
from bench.slowlog import SlowScripts

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from bench.contenders import Contender
    from bench.report import Findings
    from bench.scale import Scale
    from bench.servers import Server

HOW = """Crowds of *plain* and of *presence* (40 % of each in two-player games, 10 % in rooms of 10, 10 % in rooms of
100, 40 % in rooms of 1,000), each in a database of its own on one server, written by pipelines and then measured
through the contenders' own asyncio methods: one call at a time, one command or script per round trip (but for the
snapshots by 64 tasks, of which each has a connection of its own in *plain*, and for those that are said to be in
pipelines), on connections and rooms chosen at random, in rounds in which all crowds take turns operation by operation.
Before each turn 10,000 connections of the crowd, chosen at random, and rooms of as many are read and (in *presence*)
20,000 send a heartbeat, many calls in one write and not measured: so what is measured finds the small crowd in the
caches, as on a server of its own, and of a large one little more than what all calls share, or even less than on a
server of its own. What an operation needs is prepared at least a turn before (who joins was displaced, who is
unregistered in no game left it, who resumes was detached), so that it, too, finds caches in that state; nobody who
comes back has done so within the last minute, but for the quick run. *Server time* is the server's own account (`INFO
commandstats`): of the script, or of all commands that *plain* needed; it leaves out what the server spends on reading
and answering each command, so it flatters *plain*. *Time at the client* is what the caller waits for. Memory is the
difference in `used_memory` before and after a crowd was written, without the answers that are kept for a minute, and
with tables that never held them. For a cleanup, 1 % of a crowd chosen at random fell silent; *plain*'s runs once, since
it takes minutes. The growth of every operation is held against the smallest crowd, within one round; the rows *the
commands within* tell how much the native commands grow that its scripts issued, in the very same calls. The longest
script is found in `SLOWLOG`, over everything that this section ran after the crowds were written, but for what was not
measured before each turn; its strict maximum holds the time for which the server waited for a CPU, or a virtual machine
for its host: so beside it stand the longest call of a script that only counts, run all along, and the usual maximum of
a round."""

GROWTH_RATIO = 1.6
PLAIN_RATIO = 20
JUDGED = 10_000, 1_000_000
"""The smallest crowd and the largest for which the targets are meant."""
READ, BEATING = 10_000, 20_000
"""Connections that are read before each turn, and those that send a heartbeat: all of the smallest crowd, and of the
others so many that what all heartbeats share, the upper levels of the skip list, is in the caches as far as it fits."""
CALLS = {2: 200, 10: 80, 100: 20, 1_000: 4}
"""Snapshots in a round, by the members of the room."""
STALE_SHARE = 0.01
SILENT_SECONDS = 3.0
"""How much longer than all others the silent ones were silent: more than a cleanup takes."""
PLAIN_SILENT_SECONDS, PLAIN_THRESHOLD_SECONDS = 20_000, 10_000
"""*plain*'s silent ones get an older time: older than a whole run takes."""
GRACE_SECONDS = 60
HEARTBEAT_SECONDS = 1_200
"""So long that all of a crowd are online, however long ago they were heard of."""
MANY, GAMES, BATCHES = 100, 10, 6
"""How many ids a call takes that takes many, how many games, and how many such calls there are in a round."""
COMPARED_ROOM = 100
TASKS, CALLS_BY_TASKS = 64, 256
"""Snapshots of the compared room are also asked for by so many tasks at once, and so many of them in a round."""

COUNT = "count of all connections"
CLEANUP = "cleanup, for each removed"
FIRST, DISPLACING = "register, first of its user", "register, displacing one in a game"
PLOTTED = ("heartbeat", FIRST, DISPLACING, "join a game", "is_user_online", COUNT, CLEANUP)


def snapshot(members: int) -> str:
    """Name the snapshot of a room."""
    return f"snapshot of a room of {members:,}"


BY_TASKS = f"{snapshot(COMPARED_ROOM)} by {TASKS} tasks"
IN_PIPELINES = f"{snapshot(COMPARED_ROOM)} in two pipelines"
"""What *plain* could do, beside the snapshot of *presence*."""


class Sample(NamedTuple):
    """What a call cost on average in one round, in microseconds."""

    server: float
    client: float
    commands: float
    """In the server, but for what a script adds to its commands."""


class Measured:
    """One crowd, a contender that acts on it, and what its calls cost."""

    def __init__(self, crowd: Crowd, server: Server, calls: int) -> None:
        self.crowd = crowd
        self.samples: defaultdict[str, list[Sample]] = defaultdict(list)
        self.bytes_per_connection = 0.0
        self._server = server
        self._calls = calls
        self._unused: list[int] = []
        """Those in two-player games that have not come back since the crowd was made, in random order."""
        self._seatless: list[int] = []
        self._idle: list[int] = []
        self._going: list[int] = []
        self._detached: list[int] = []
        """Those of a round that were displaced, left, are to go or were detached, until their next turn."""
        self._blocking = crowd.connect()
        self._client: Any = redis.asyncio.Redis.from_url(
            crowd.url, decode_responses=True, socket_timeout=PATIENCE_SECONDS
        )
        contender: Any = CONTENDERS[crowd.contender]
        settings: dict[str, Any] = {"heartbeat_seconds": HEARTBEAT_SECONDS}
        self.contender: Contender = contender(self._client, NAMESPACE, **(settings if contender is Presence else {}))
        self._manager = presence.ConnectionManager(self._client, namespace=NAMESPACE, **settings)

    async def aclose(self) -> None:
        """Close the clients."""
        await self.contender.aclose()
        await self._manager.aclose()
        await self._client.aclose()
        self._blocking.close()

    def fill(self) -> None:
        """Make the crowd, and see what memory it takes."""
        before = used_memory(self._server.client)
        self.crowd.fill()
        self.bytes_per_connection = (used_memory(self._server.client) - before) / self.crowd.size

    def warm(self, silent: Collection[int] = ()) -> None:
        """Let the caches hold of the crowd what they would if no other crowd were there; the silent send nothing."""
        numbers = self.crowd.sample(READ)
        beating = self.crowd.sample(BEATING) if self.crowd.contender == PRESENCE else []
        beating = [number for number in beating if number not in silent]
        # As many rooms of each kind as so many connections are in.
        share = len(numbers) / self.crowd.size
        rooms = [
            self.crowd.game_id(first)
            for members, of_kind in self.crowd.rooms.items()
            for first in random.sample(of_kind[::members], max(1, round(share * len(of_kind) / members)))
        ]
        self.crowd.touch(self._blocking, numbers, beating, rooms)

    def _draw(self, parts: int) -> list[list[int]]:
        """Choose different connections in two-player games for several operations, each of them once in a run.

        A small crowd may run out of them; then it begins anew.
        """
        players = self.crowd.rooms[2]
        calls = min(self._calls, len(players) // parts)
        if len(self._unused) < parts * calls:
            self._unused = random.sample(players, len(players))
        return [[self._unused.pop() for _ in range(calls)] for _ in range(parts)]

    async def _time(
        self,
        name: str,
        calls: Sequence[Awaitable[Any]],
        is_right: Callable[[Any], object],
        *,
        parts: int = 1,
        tasks: int = 1,
    ) -> None:
        """Await calls, one by one in each task; ``parts`` is what each call is made of, where that is counted."""
        before = command_stats(self._server.client)
        start = perf_counter()
        answers = [await call for call in calls] if tasks == 1 else await _await_in_tasks(calls, tasks)
        seconds = perf_counter() - start
        used = difference(before, command_stats(self._server.client))
        for answer in answers:
            if not is_right(answer):
                raise MeasurementError(f"{name} of {self.crowd.contender} answered {answer!r:.200}, which is wrong")
        # A script's time holds that of its commands.
        script = used.pop("evalsha").time if self.crowd.contender == PRESENCE else None
        commands = sum(each.time for each in used.values())
        server = commands if script is None else script
        parts *= len(calls)
        self.samples[name].append(Sample(server / parts, seconds * 1e6 / parts, commands / parts))

    async def beat(self) -> None:
        """Measure heartbeats."""
        sids = [self.crowd.sid(number) for number in self.crowd.sample(self._calls)]
        await self._time("heartbeat", [self.contender.heartbeat(sid) for sid in sids], bool)

    async def register(self) -> None:
        """Measure registers of new users, who go again."""
        newcomers = [f"{random.getrandbits(90):030x}" for _ in range(self._calls)]
        calls = [self.contender.register(sid, f"guest-{sid}") for sid in newcomers]
        await self._time(FIRST, calls, lambda displaced: not displaced)
        for sid in newcomers:
            await self.contender.unregister(sid)

    async def displace(self) -> None:
        """Measure registers of users who are there, and are then in no game."""
        self._seatless, self._idle, self._going, self._detached = self._draw(4)
        earlier = [self.crowd.sid(number) for number in self._seatless]
        calls = [
            self.contender.register(self.crowd.change_sid(number), self.crowd.user_id(number))
            for number in self._seatless
        ]
        expected = iter(earlier)
        await self._time(DISPLACING, calls, lambda displaced: displaced == [next(expected)])

    async def leave(self) -> None:
        """Measure leaves."""
        calls = [self.contender.leave(self.crowd.sid(number)) for number in self._idle]
        await self._time("leave a game", calls, bool)

    async def detach(self) -> None:
        """Measure how connections in a game are detached."""
        if self.crowd.contender != PRESENCE:
            return
        calls = [
            self._manager.unregister_connection(self.crowd.sid(number), grace_seconds=GRACE_SECONDS)
            for number in self._detached
        ]
        await self._time("unregister one in a game with a grace", calls, lambda seat: seat.is_detached)

    async def join(self) -> None:
        """Measure how those that are in no game since they came back join theirs again."""
        joins = [self.contender.join(self.crowd.sid(number), self.crowd.game_id(number)) for number in self._seatless]
        await self._time("join a game", joins, lambda answer: answer == (True, None))

    async def unregister(self) -> None:
        """Measure the removal of connections in no game and in one, which come back."""
        for name, numbers in (("unregister one in no game", self._idle), ("unregister one in a game", self._going)):
            await self._time(name, [self.contender.unregister(self.crowd.sid(number)) for number in numbers], bool)
            self.crowd.add(self._blocking, numbers)

    async def read(self) -> None:
        """Measure what both contenders can be asked."""
        users = [self.crowd.user_id(number) for number in self.crowd.sample(self._calls)]
        calls = [self.contender.is_online(user) for user in users]
        # Whom *plain* has not heard of for 90 seconds is offline there; to find that out costs the same.
        kinds = (True,) if self.crowd.contender == PRESENCE else (True, False)
        await self._time("is_user_online", calls, lambda answer: answer in kinds)
        for members in self.crowd.rooms:
            await self._read_room(snapshot(members), members, self.contender.get_game, len)
        if COMPARED_ROOM in self.crowd.rooms:
            if isinstance(self.contender, Plain):
                await self._read_room(IN_PIPELINES, COMPARED_ROOM, self.contender.get_game_in_pipelines, len)
            # Each of plain's tasks has a connection, opened before the clock starts.
            await asyncio.gather(*(self._client.ping() for _ in range(TASKS)))
            games = self._games(COMPARED_ROOM, CALLS_BY_TASKS)
            reads = [self.contender.get_game(game) for game in games]
            await self._time(BY_TASKS, reads, lambda answer: len(answer) == COMPARED_ROOM, tasks=TASKS)

    async def read_more(self) -> None:
        """Measure the other reads of this library."""
        if self.crowd.contender != PRESENCE:
            return
        manager, crowd = self._manager, self.crowd
        numbers = crowd.sample(self._calls)
        await self._time("get_connection", [manager.get_connection(crowd.sid(number)) for number in numbers], bool)
        numbers = crowd.sample(self._calls)
        reads = [manager.get_user_connection(crowd.user_id(number)) for number in numbers]
        await self._time("get_user_connection", reads, bool)
        numbers = crowd.sample(self._calls)
        listings = [manager.get_all_user_connections(crowd.user_id(number)) for number in numbers]
        await self._time("get_all_user_connections", listings, lambda listed: len(listed) == 1)
        for members in crowd.rooms:
            what = f"count of a room of {members:,}"
            await self._read_room(what, members, manager.get_game_connection_count, int, self._calls)
        await self._read_room(
            "snapshot of a room of 2 with its position",
            2,
            manager.get_game_snapshot,
            lambda game: len(game.connections),
        )
        await self.count(self._calls)

    async def resume(self) -> None:
        """Measure how detached connections come back, and the metadata of others."""
        if self.crowd.contender != PRESENCE:
            return
        manager, crowd = self._manager, self.crowd
        calls: list[Awaitable[Any]]
        calls = [
            manager.register_connection(crowd.change_sid(number), crowd.user_id(number)) for number in self._detached
        ]
        await self._time("register, resuming one in a game", calls, lambda registration: registration.resumed)
        numbers = crowd.sample(self._calls, members=2)
        calls = [manager.update_metadata(crowd.sid(number), "metadata") for number in numbers]
        await self._time("update_metadata", calls, bool)
        for number in numbers:
            await manager.update_metadata(crowd.sid(number), "")

    async def act_in_bulk(self) -> None:
        """Measure what takes many ids."""
        if self.crowd.contender != PRESENCE:
            return
        manager, crowd = self._manager, self.crowd
        sids = [[crowd.sid(number) for number in crowd.sample(MANY)] for _ in range(BATCHES)]
        calls: list[Awaitable[Any]] = [manager.update_heartbeats(of_one) for of_one in sids]
        await self._time(f"update_heartbeats of {MANY}", calls, lambda statuses: all(statuses.values()))
        users = [[crowd.user_id(number) for number in crowd.sample(MANY)] for _ in range(2 * BATCHES)]
        calls = [manager.get_users_connections(of_one) for of_one in users[:BATCHES]]
        await self._time(f"get_users_connections of {MANY}", calls, lambda found: all(found.values()))
        calls = [manager.are_users_online(of_one) for of_one in users[BATCHES:]]
        await self._time(f"are_users_online of {MANY}", calls, lambda online: all(online.values()))
        games = [list(dict.fromkeys(self._games(2, GAMES))) for _ in range(BATCHES)]
        calls = [manager.get_games_connections(of_one) for of_one in games]
        await self._time(f"get_games_connections of {GAMES}", calls, lambda found: all(map(len, found.values())))

    async def _read_room(
        self,
        name: str,
        members: int,
        read: Callable[[str], Awaitable[Any]],
        count: Callable[[Any], int],
        calls: int | None = None,
    ) -> None:
        games = self._games(members, calls or CALLS[members])
        await self._time(name, [read(game) for game in games], lambda answer: count(answer) == members)

    def _games(self, members: int, count: int) -> list[str]:
        return [self.crowd.game_id(number) for number in self.crowd.sample(count, members)]

    async def count(self, calls: int = 1) -> None:
        """Measure the count of all connections."""
        counts = [self.contender.count() for _ in range(calls)]
        await self._time(COUNT, counts, lambda count: count == self.crowd.size)

    def fall_silent(self) -> list[int]:
        """Let 1 % of the crowd fall silent, while all others go on."""
        stale = self.crowd.sample(round(self.crowd.size * STALE_SHARE))
        self.crowd.leave_behind(stale, self._blocking, PLAIN_SILENT_SECONDS)
        return stale

    async def clean_up(self, stale: Sequence[int], silent_since_ms: int) -> None:
        """Measure the cleanup of the silent ones, who come back."""
        threshold: float = PLAIN_THRESHOLD_SECONDS
        if self.crowd.contender == PRESENCE:
            threshold = (server_ms(self._blocking) - silent_since_ms) / 1000
        expected = {self.crowd.sid(number) for number in stale}
        cleanup = self.contender.cleanup(threshold)
        await self._time(CLEANUP, [cleanup], lambda removed: {*removed} == expected, parts=len(stale))
        self.crowd.add(self._blocking, stale)


async def _await_in_tasks(calls: Sequence[Awaitable[Any]], tasks: int) -> list[Any]:
    left = iter(calls)

    async def work() -> list[Any]:
        return [await call for call in left]

    return list(itertools.chain.from_iterable(await asyncio.gather(*(work() for _ in range(tasks)))))


def measure_growth(server: Server, scale: Scale) -> Findings:
    """Measure crowds of all sizes."""
    # presence's first: the answers of its registers are to be older than a minute when calls are measured.
    kinds = itertools.product((PRESENCE, PLAIN), scale.sizes)
    crowds = [Crowd(contender, server.url, database, size) for database, (contender, size) in enumerate(kinds)]
    load_scripts(server.client)
    with SlowScripts(server.client) as slow_scripts:
        measured = asyncio.run(_measure(server, scale, crowds, slow_scripts))
    plain = {each.crowd.size: each for each in measured if each.crowd.contender == PLAIN}
    ours = {each.crowd.size: each for each in measured if each.crowd.contender == PRESENCE}
    return [
        *_memory(plain, ours),
        *_growth(ours),
        *_beside_plain(plain, ours),
        *slow_scripts.rows(),
    ]


async def _measure(server: Server, scale: Scale, crowds: Sequence[Crowd], slow_scripts: SlowScripts) -> list[Measured]:
    measured = [Measured(crowd, server, scale.growth_calls) for crowd in crowds]
    try:
        for each in measured:
            each.fill()
        slow_scripts.skip()
        await _clean_up_plain(measured)
        steps = (
            Measured.beat,
            Measured.register,
            Measured.displace,
            Measured.leave,
            Measured.detach,
            Measured.join,
            Measured.resume,
            Measured.unregister,
            Measured.read,
            Measured.read_more,
            Measured.act_in_bulk,
        )
        progress = Progress(
            f"rounds of {scale.growth_calls} calls of each operation in every crowd", scale.growth_rounds
        )
        for _ in range(scale.growth_rounds):
            for step in steps:
                for each in measured:
                    with slow_scripts.pause():
                        each.warm()
                    await step(each)
                    slow_scripts.count()
            slow_scripts.look()
            progress.advance()
        await _clean_up(server, scale, measured, slow_scripts)
    finally:
        for each in measured:
            await each.aclose()
    return measured


async def _clean_up(server: Server, scale: Scale, measured: Sequence[Measured], slow_scripts: SlowScripts) -> None:
    ours = [each for each in measured if each.crowd.contender == PRESENCE]
    progress = Progress("cleanups of all crowds", scale.growth_cleanups)
    for _ in range(scale.growth_cleanups):
        silent_since_ms = server_ms(server.client)
        await asyncio.sleep(SILENT_SECONDS)
        silent = [each.fall_silent() for each in ours]
        for each, stale in zip(ours, silent, strict=True):
            with slow_scripts.pause():
                each.warm({*stale})
            await each.clean_up(stale, silent_since_ms)
        slow_scripts.look()
        progress.advance()


async def _clean_up_plain(measured: Sequence[Measured]) -> None:
    """Measure *plain*'s cleanups and counts first: meanwhile the answers of presence's registers get old."""
    plain = [each for each in measured if each.crowd.contender == PLAIN]
    progress = Progress("cleanups and counts of plain", len(plain))
    for each in plain:
        each.warm()
        await each.count()
        await each.clean_up(each.fall_silent(), 0)
        progress.advance()


BySize = dict[int, Measured]


def _memory(plain: BySize, ours: BySize) -> Findings:
    rows = [
        Row(
            f"memory of a connection among {size:,}, {each.crowd.contender}",
            Spread.exactly(each.bytes_per_connection),
            "bytes",
        )
        for size in ours
        for each in (ours[size], plain[size])
    ]
    series = {
        name: [(f"{size:,}", each.bytes_per_connection) for size, each in crowds.items()]
        for name, crowds in ((PLAIN, plain), (PRESENCE, ours))
    }
    return [*rows, Figure("memory", "Memory by size", "connections", "bytes for each connection", series, "bars")]


def _server(each: Measured, name: str) -> list[float]:
    return [sample.server for sample in each.samples[name]]


def _client(each: Measured, name: str) -> list[float]:
    return [sample.client for sample in each.samples[name]]


def _commands(each: Measured, name: str) -> list[float]:
    return [max(sample.commands, LEAST_TIME) for sample in each.samples[name]]


def _growth(ours: BySize) -> Findings:
    """Give the server time of every operation at every size, beside the smallest size in the same round."""
    smallest, *larger = ours
    rows = []
    for name in ours[smallest].samples:
        if name == BY_TASKS:
            continue  # In the server it is what one task asks for.
        base = _server(ours[smallest], name)
        rows.append(Row(f"{name}, among {smallest:,}", Spread.of(base), "µs"))
        for size in larger:
            costs = _server(ours[size], name)
            target = GROWTH_RATIO if (smallest, size) == JUDGED else None
            row = Row(f"{name}, among {size:,}", Spread.of(costs), "µs", ratios(costs, base), f"{smallest:,}", target)
            rows.append(row)
        few, many = _commands(ours[smallest], name), _commands(ours[larger[-1]], name)
        what = f"the commands within: {name}, among {larger[-1]:,}"
        rows.append(Row(what, Spread.of(many), "µs", ratios(many, few), f"{smallest:,}"))
    points = {name: [(size, Spread.of(_server(each, name)).median) for size, each in ours.items()] for name in PLOTTED}
    rooms = {
        name: [(size, Spread.of(_server(each, name)).median) for size, each in ours.items() if name in each.samples]
        for name in map(snapshot, sorted(ours[larger[-1]].crowd.rooms))
    }
    title, x_label, y_label = "Server time by size, presence", "connections", "µs inside the server"
    return [
        *rows,
        Figure("server-time", title, x_label, y_label, points, log_x=True),
        Figure("snapshots", f"{title}: snapshots", x_label, y_label, rooms, log_x=True, log_y=True),
    ]


def _beside_plain(plain: BySize, ours: BySize) -> Findings:
    """Hold *plain* against *presence* at every size; the targets are for the largest."""
    smallest, largest = min(ours), max(ours)
    compared = (snapshot(COMPARED_ROOM), BY_TASKS, CLEANUP)
    rows = []
    for name in plain[largest].samples:
        for size in ours:
            if name in plain[size].samples:
                target = PLAIN_RATIO if (smallest, size) == JUDGED and name in compared else None
                rows += _comparison(name, plain[size], ours[size], target)
    cleanups = {
        name: [
            (size, Spread.of(_client(each, CLEANUP)).median * size * STALE_SHARE / 1e6) for size, each in crowds.items()
        ]
        for name, crowds in ((PLAIN, plain), (PRESENCE, ours))
    }
    rooms = {
        name: [(members, Spread.of(_client(each, snapshot(members))).median) for members in sorted(each.crowd.rooms)]
        for name, each in ((PLAIN, plain[largest]), (PRESENCE, ours[largest]))
    }
    cleanup_title = "A cleanup of the silent 1 %"
    snapshot_title = f"A snapshot of a room, among {largest:,} connections"
    return [
        *rows,
        Figure("cleanup", cleanup_title, "connections", "seconds at the client", cleanups, log_x=True, log_y=True),
        Figure("rooms", snapshot_title, "members of the room", "µs at the client", rooms, log_x=True, log_y=True),
    ]


def _comparison(name: str, plain: Measured, ours: Measured, target: float | None) -> list[Row]:
    rows = []
    for where, read in (("at the client", _client), ("server time", _server)):
        costs, bases = read(plain, name), read(ours, snapshot(COMPARED_ROOM) if name == IN_PIPELINES else name)
        if len(costs) != len(bases):  # plain's cleanup and count ran once
            bases = [Spread.of(bases).median] * len(costs)
        what = f"plain: {name}, among {plain.crowd.size:,}, {where}"
        bound = target if where == "at the client" else None
        rows.append(Row(what, Spread.of(costs), "µs", ratios(costs, bases), "presence", bound, at_least=True))
    return rows
