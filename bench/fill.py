"""Populations of live connections, each in a two-player game, made with the library's own operations."""

from __future__ import annotations

import base64
import random
import struct
from itertools import islice
from typing import TYPE_CHECKING, Any
from uuid import UUID

from bench.measure import PIPELINE_SIZE, MeasurementError, send
from bench.progress import Progress
from presence import Operations, operations
from presence.scripts import Script

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import redis

    from presence.operations import Operation

NAMESPACE = "presence"
"""The default one: it stands in every key, so its length counts."""
OTHER_NAMESPACE = "presence-few"
CHUNK = 5_000
KEPT = struct.Struct("<12sd")
"""What a kept answer begins with: the token of its call, and the time in microseconds."""
HEARTBEAT_MS = 30_000

_random = random.Random(20_260_101)


def new_sid() -> str:
    """Make a random sid of the shape that Socket.IO's have: 15 bytes in 20 characters."""
    return base64.urlsafe_b64encode(_random.randbytes(15)).decode()


def new_uuid() -> str:
    """Make a random UUID as a user id."""
    return str(UUID(bytes=_random.randbytes(16), version=4))


def sample(population: Population, count: int, without: Iterable[int] = ()) -> list[int]:
    """Choose different connections at random, none of them in ``without``."""
    excluded = set(without)
    chosen = _random.sample(range(len(population.sids)), count + len(excluded))
    return [index for index in chosen if index not in excluded][:count]


def server_ms(client: redis.Redis) -> int:
    """Read the server's clock, in milliseconds."""
    seconds, micros = client.time()
    return int(seconds) * 1000 + int(micros) // 1000


def load_scripts(client: redis.Redis) -> None:
    """Load every script, so that no measured call misses one."""
    for script in vars(operations).values():
        if isinstance(script, Script):
            client.script_load(script.source)


def run_and_forget(client: redis.Redis, calls: Sequence[Operation[Any]]) -> None:
    """Run calls in pipelines, and drop the answers that the server keeps of them for a minute.

    Otherwise its tables would be sized for the answers of a fill that no fleet of servers does in a minute.
    """
    forget(client, run(client, calls))


def run(client: redis.Redis, calls: Sequence[Operation[Any]]) -> list[bytes]:
    """Run calls in pipelines, and name the keys in which the server may keep their answers for a minute."""
    send(client, [call.command() for call in calls])
    return [call.keys[call.script.keys.index("reply")] for call in calls]


def forget(client: redis.Redis, replies: Sequence[bytes]) -> int:
    """Drop kept answers, and count those that were there."""
    chunks = [replies[start : start + PIPELINE_SIZE] for start in range(0, len(replies), PIPELINE_SIZE)]
    return sum(send(client, [("DEL", *chunk) for chunk in chunks]))


class Population:
    """Connections 0, 1, 2, …: number n belongs to user n and is in game n // 2."""

    def __init__(
        self,
        client: redis.Redis,
        size: int,
        *,
        namespace: str = NAMESPACE,
        make_user_id: Callable[[int], str] = "user-{:06}".format,
    ) -> None:
        self.client = client
        self.operations = Operations(namespace)
        self.last_seen_key = f"{{{namespace}}}:last_seen"
        self.sids = [new_sid() for _ in range(size)]
        self.user_ids = [make_user_id(index) for index in range(size)]

    @staticmethod
    def game_id(index: int) -> str:
        """Give the game of a connection."""
        return f"game-{index // 2:06}"

    def register(self, index: int) -> Operation[Any]:
        """Describe the registration of a connection."""
        return self.operations.register_connection(self.sids[index], self.user_ids[index])

    def join(self, index: int) -> Operation[Any]:
        """Describe how a connection joins its game."""
        return self.operations.join_game(self.sids[index], self.game_id(index))

    def fill(self) -> None:
        """Register all connections, then let each join its game; the answers are not kept."""
        self._fill(run_and_forget)

    def fill_and_keep(self) -> list[bytes]:
        """Fill, and give the keys of the answers that are kept for a minute."""
        replies: list[bytes] = []
        self._fill(lambda client, calls: replies.extend(run(client, calls)))
        return replies

    def _fill(self, run_calls: Callable[[redis.Redis, Sequence[Operation[Any]]], None]) -> None:
        load_scripts(self.client)
        size = len(self.sids)
        for work, describe in (("connections registered", self.register), ("of them in a game", self.join)):
            progress = Progress(work, size)
            for start in range(0, size, CHUNK):
                chunk = range(start, min(start + CHUNK, size))
                run_calls(self.client, [describe(index) for index in chunk])
                progress.advance(len(chunk))
        count = self.client.zcount(self.last_seen_key, 0, "+inf")
        if count != size:
            raise MeasurementError(f"the fill left {count} connections instead of {size}")

    def restore(self, indexes: Iterable[int]) -> None:
        """Register connections that are gone, and let each join its game."""
        indexes = list(indexes)
        send(self.client, [self.register(index).command() for index in indexes])
        send(self.client, [self.join(index).command() for index in indexes])

    def shuffle_last_seen(self) -> None:
        """Let all have been seen at random moments of the last 30 seconds, as when they sent heartbeats meanwhile."""
        now = server_ms(self.client)
        self.set_last_seen({index: now - _random.randrange(HEARTBEAT_MS) for index in range(len(self.sids))})

    def age_answers(self, indexes: Iterable[int], seconds: float) -> None:
        """Let the answers of registrations, which are kept in the users' lists, be older by so many seconds.

        Only the time that such an answer begins with is looked at, see lua/include/is_recent.lua. A list that keeps
        none stays as it is.
        """
        keys = [self._list_key(index) for index in indexes]
        aged = []
        for key, users_list in zip(keys, send(self.client, [("GET", key) for key in keys]), strict=True):
            sids, _, kept = users_list.partition(b"=")
            if kept:
                token, time_us = KEPT.unpack_from(kept)
                earlier = KEPT.pack(token, time_us - 1e6 * seconds)
                aged.append(("SET", key, b"%b=%b%b" % (sids, earlier, kept[KEPT.size :]), "KEEPTTL"))
        send(self.client, aged)

    def forget_answers(self, indexes: Iterable[int]) -> None:
        """Let the TTLs be refreshed since the registrations: the users' lists keep no answers any more.

        It writes the lists as a refresh leaves them, see lua/include/split_sids.lua.
        """
        lists = [(self._list_key(index), self.sids[index]) for index in indexes]
        send(self.client, [("SET", key, f"{len(sid)}:{sid}", "KEEPTTL") for key, sid in lists])

    def _list_key(self, index: int) -> str:
        return f"{{{self.operations.namespace}}}:user_conns:{self.user_ids[index]}"

    def set_last_seen(self, times: dict[int, int]) -> None:
        """Move connections in last_seen to other times, in milliseconds."""
        send(self.client, [("ZADD", self.last_seen_key, "XX", time, self.sids[n]) for n, time in times.items()])


def remove_all(client: redis.Redis) -> None:
    """Remove every key of the benchmark from a server that was empty before."""
    for database in client.info("keyspace"):
        client.select(int(database.removeprefix("db")))
        remove_keys(client, NAMESPACE)


def remove_keys(client: redis.Redis, namespace: str) -> None:
    """Remove every key of a namespace."""
    keys = client.scan_iter(match=f"*{namespace}*", count=CHUNK)
    while chunk := list(islice(keys, CHUNK)):
        client.unlink(*chunk)
