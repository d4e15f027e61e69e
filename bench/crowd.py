"""Crowds: connections by the million, kept by one contender in a database of their own.

Connection n belongs to user n. Of a crowd, 40 % are in two-player games, 10 % in rooms of 10, 10 % in rooms of 100 and
40 % in rooms of 1,000, so that a room chosen at random is as cold in the CPU's caches as it would be for real.
"""

from __future__ import annotations

import base64
import hashlib
import random
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import redis

from bench.contenders import PLAIN
from bench.contenders.interface import CONN_TTL_SECONDS
from bench.fill import NAMESPACE, load_scripts, run_and_forget
from bench.measure import MeasurementError, send
from bench.progress import Progress
from presence import Operations
from tests.processes import spawn

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bench.measure import Command

ROOM_SHARES = {1_000: 0.4, 100: 0.1, 10: 0.1, 2: 0.4}
"""Members of a room → the part of all connections that are in such rooms."""
CHUNK = 2_000
FILLING_PROCESSES = 2
PATIENCE_SECONDS = 120
"""What a client waits for an answer, on a machine that is busy with other things."""


class Crowd:
    """So many connections of one contender; only numbers, until ``fill`` makes them."""

    def __init__(self, contender: str, url: str, database: int, size: int) -> None:
        address = urlsplit(url)
        if address.scheme not in ("redis", "rediss"):
            raise MeasurementError(f"crowds need databases of their own, for which {address.scheme}:// is not prepared")
        self.contender = contender
        self.url = address._replace(path=f"/{database}").geturl()
        self.size = size
        self.rooms = _rooms(size)
        """Members of a room → the connections in such rooms."""
        self._new_sids: dict[int, str] = {}

    def sid(self, number: int) -> str:
        """Give the sid of a connection, of the shape that Socket.IO's have."""
        return self._new_sids.get(number) or _sid(f"{self.contender}-{self.size}-{number}")

    def change_sid(self, number: int) -> str:
        """Let a user come back with another sid."""
        self._new_sids[number] = _sid(self.sid(number))
        return self._new_sids[number]

    @staticmethod
    def user_id(number: int) -> str:
        """Give the user of a connection."""
        return f"user-{number:07}"

    def game_id(self, number: int) -> str:
        """Give the room of a connection."""
        for members, numbers in self.rooms.items():
            if number in numbers:
                return f"room-of-{members}-{number // members:06}"
        raise IndexError(number)

    def sample(self, count: int, members: int | None = None) -> list[int]:
        """Choose different connections at random, of all or of those in rooms of one kind."""
        numbers = self.rooms[members] if members else range(self.size)
        return random.sample(numbers, min(count, len(numbers)))

    def connect(self) -> redis.Redis:
        """Open a blocking client for the crowd's database."""
        return redis.Redis.from_url(self.url, socket_timeout=PATIENCE_SECONDS)

    def fill(self) -> None:
        """Make all connections, by several processes."""
        progress = Progress(f"connections of {self.contender}", self.size)
        parts = [range(start, min(start + CHUNK, self.size)) for start in range(0, self.size, CHUNK)]
        with ProcessPoolExecutor(FILLING_PROCESSES, spawn, _prepare_filling, (self,)) as processes:
            for done in as_completed([processes.submit(_fill_part, part) for part in parts]):
                progress.advance(done.result())

    def add(self, client: redis.Redis, numbers: Iterable[int]) -> None:
        """Make some connections, in pipelines."""
        if self.contender == PLAIN:
            send(client, [command for number in numbers for command in self._plain_commands(number)])
            return
        operations = Operations(NAMESPACE, conn_ttl_seconds=CONN_TTL_SECONDS)
        numbers = list(numbers)
        run_and_forget(client, [operations.register_connection(self.sid(n), self.user_id(n)) for n in numbers])
        run_and_forget(client, [operations.join_game(self.sid(n), self.game_id(n)) for n in numbers])

    def _plain_commands(self, number: int) -> list[Command]:
        """Give what *plain* leaves behind when it registers a connection and lets it join."""
        sid, user_id, game_id, now = self.sid(number), self.user_id(number), self.game_id(number), repr(time.time())
        conn, game_conns = f"{NAMESPACE}:conn:{sid}", f"{NAMESPACE}:game_conns:{game_id}"
        record = ("user_id", user_id, "game_id", game_id, "connected_at", now, "last_seen", now)
        return [
            ("HSET", conn, *record),
            ("EXPIRE", conn, CONN_TTL_SECONDS),
            ("SET", f"{NAMESPACE}:user_conn:{user_id}", sid, "EX", CONN_TTL_SECONDS),
            ("SADD", game_conns, sid),
            ("EXPIRE", game_conns, CONN_TTL_SECONDS),
        ]

    def touch(self, client: redis.Redis, numbers: Sequence[int], beating: Sequence[int], games: Sequence[str]) -> None:
        """Read some connections, their users and some rooms, and let those beat that are to; in pipelines."""
        sids, users = [self.sid(number) for number in numbers], [self.user_id(number) for number in numbers]
        commands: list[Command]
        if self.contender == PLAIN:
            commands = [
                *(("HGETALL", f"{NAMESPACE}:conn:{sid}") for sid in sids),
                *(("GET", f"{NAMESPACE}:user_conn:{user}") for user in users),
                *(("SMEMBERS", f"{NAMESPACE}:game_conns:{game}") for game in games),
            ]
        else:
            operations = Operations(NAMESPACE, conn_ttl_seconds=CONN_TTL_SECONDS)
            heartbeats = operations.heartbeat_batches(self.sid(number) for number in beating)
            commands = [
                *(batch.command() for batch in operations.users_connections_batches(users).operations),
                *(operations.get_game_connections(game).command() for game in games),
                # Last, since they are most of what a server is asked for.
                *(batch.command() for batch in heartbeats.operations),
            ]
        send(client, commands)

    def leave_behind(self, stale: Iterable[int], client: redis.Redis, seconds: float) -> None:
        """Let some connections fall silent: *plain*'s get an older time, of *presence* all others send a heartbeat."""
        if self.contender == PLAIN:
            then = repr(time.time() - seconds)
            send(client, [("HSET", f"{NAMESPACE}:conn:{self.sid(number)}", "last_seen", then) for number in stale])
            return
        silent = set(stale)
        beating = [self.sid(number) for number in range(self.size) if number not in silent]
        batches = Operations(NAMESPACE, conn_ttl_seconds=CONN_TTL_SECONDS).heartbeat_batches(beating)
        send(client, [batch.command() for batch in batches.operations])


def _rooms(size: int) -> dict[int, range]:
    """Share connections out to whole rooms; what is left over is in two-player games."""
    rooms, start = {}, 0
    for members, share in ROOM_SHARES.items():
        count = round(size * share) // members * members if members > 2 else size - start
        if count:
            rooms[members] = range(start, start + count)
        start += count
    return rooms


def _sid(seed: str) -> str:
    return base64.urlsafe_b64encode(hashlib.blake2b(seed.encode(), digest_size=15).digest()).decode()


_filling: Any = None
"""In a filling process: the crowd, and a client for it."""


def _prepare_filling(crowd: Crowd) -> None:
    global _filling
    _filling = crowd, crowd.connect()
    load_scripts(_filling[1])


def _fill_part(numbers: range) -> int:
    crowd, client = _filling
    crowd.add(client, numbers)
    return len(numbers)
