"""The operations: which script, with which keys and arguments, and how its reply becomes a type; no I/O.

The asyncio and the blocking manager, and pipelines, all run what this module describes.
"""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar, get_args

from presence import arguments, scripts
from presence.commands import Command, new_token, renewed_keys
from presence.errors import PresenceError, unreadable
from presence.forks import call_in_child
from presence.replies import (
    CleanupBatch,
    EventsBatch,
    Position,
    has_cleaned_up,
    has_joined,
    has_registered,
    parse_cleanup,
    parse_connection,
    parse_events,
    parse_game,
    parse_heartbeats,
    parse_join,
    parse_listed,
    parse_registration,
    parse_users,
    parse_users_online,
    text_or_none,
)
from presence.results import (
    ConnectionInfo,
    GameSnapshot,
    HeartbeatStatus,
    JoinResult,
    Registration,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from uuid import UUID

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)

Displacement: TypeAlias = Literal["newest_wins", "newest_resumes", "reject_while_alive"]
"""Which connection gives way when a user has as many as are allowed."""

EventsMode: TypeAlias = Literal["off", "pubsub", "stream"]
"""Whether and how changes are published."""

HEARTBEATS_UNTIL_STALE = 3
SERVER_HEARTBEATS_UNTIL_WARNING = 2

logger: logging.Logger = logging.getLogger("presence")
SERVER_IS_SILENT = (
    "the game server %r has sent no heartbeat for %.0f s, or none gets through: after three are missing, cleanups take "
    "all of its players, whether these beat or not; keep run_server_heartbeat() running in the background"
)

EXPIRES_EARLY = (
    "conn_ttl_seconds (%g) is not longer than heartbeat_seconds (%g): connections expire between two heartbeats; make "
    "it longer than three heartbeats"
)

CLEANUP_BATCH_SIZE = 20
"""Connections that one cleanup script removes, if their records hold no more than 25 KiB: below a millisecond. Fewer
where users may have more than 30: each that goes has its user's whole list written again."""
HEARTBEAT_BATCH_SIZE = 100
"""Heartbeats that one script takes, if users may have no more than 30 connections: about a millisecond."""
LISTED_PER_CLEANUP_BATCH = 600
"""Connections that may be in the lists of all users whose connections one cleanup script removes."""
LISTED_PER_HEARTBEAT_BATCH = 3_000
"""The same for the heartbeats of one script: a refresh reads the list and seldom writes it."""
USERS_BATCH_SIZE = 100
"""Users that one script reads, if they may have no more than ten connections."""
USERS_BATCH_CONNECTIONS = 1000
"""Connections that one script reads of all its users: below 5 ms of the server even where all of them are detached."""
GAMES_BATCH_SIZE = 10
"""Games that one script reads: below 5 ms of the server also where a hundred connections are in each."""
EVENTS_BATCH_SIZE = 100
"""Changes that one script reads from the stream of events."""

MAX_CONNECTIONS_PER_USER = 100
MAX_CAPACITY = 1_000_000
MAX_EVENTS = 100_000_000

RETENTION_MS = 27 * 60 * 60 * 1000
"""How much longer than its connections a key lives: see lua/include/retention_ms.lua, which says the same."""
KEPT_SECONDS = 60
"""How long the scripts keep the answer of a call for when it is sent again, see lua/include/kept_ms.lua."""

REGISTER = scripts.load(
    "register",
    keys=("conn", "user_conns", "last_seen", "reply"),
    arguments=(
        "key_lifetime_ms",
        "connections_per_user",
        "reject_ms",
        "server",
        "metadata",
        "events",
        "resumes",
        "keep",
    ),
    tells_of_change=has_registered,
    reaches_others=True,
)
UNREGISTER = scripts.load(
    "unregister",
    keys=("conn", "last_seen", "reply"),
    arguments=("key_lifetime_ms", "grace_ms", "epoch", "events", "keep"),
)
JOIN = scripts.load(
    "join",
    keys=("conn", "game_conns", "last_seen", "reply"),
    arguments=("key_lifetime_ms", "capacity", "epoch", "events", "keep"),
    tells_of_change=has_joined,
)
LEAVE = scripts.load(
    "leave",
    keys=("conn", "last_seen", "reply"),
    arguments=("key_lifetime_ms", "epoch", "events", "keep"),
)
UPDATE_METADATA = scripts.load(
    "update_metadata",
    keys=("conn", "last_seen", "reply"),
    arguments=("key_lifetime_ms", "metadata", "epoch", "events", "keep"),
)
HEARTBEAT = scripts.load(
    "heartbeat",
    keys=("conn", "last_seen", "absent"),
    arguments=("key_lifetime_ms", "epoch"),
    tells_of_change=None,  # To be seen twice is as good as once.
)
HEARTBEATS = scripts.load(
    "heartbeats",
    keys=("last_seen", "absent"),
    arguments=("key_lifetime_ms", "sids"),
    tells_of_change=None,
)
CLEANUP = scripts.load(
    "cleanup",
    keys=("last_seen", "servers", "reply"),
    arguments=(
        "key_lifetime_ms",
        "threshold_ms",
        "batch_size",
        "server_threshold_ms",
        "server_grace_ms",
        "server_id",
        "newest_start",
        "events",
        "not_after_ms",
        "keep",
    ),
    tells_of_change=has_cleaned_up,
    reaches_others=True,
)
START_SERVER = scripts.load(
    "start_server",
    keys=("last_seen", "servers", "reply"),
    arguments=("server_id", "key_lifetime_ms"),
)
SERVER_HEARTBEAT = scripts.load(
    "server_heartbeat", keys=("servers",), arguments=("server", "key_lifetime_ms"), tells_of_change=None
)
GET_CONNECTION = scripts.load("get_connection", keys=("conn", "last_seen"), arguments=("conn_ttl_ms",))
GET_USERS_CONNECTIONS = scripts.load(
    "get_users_connections", keys=("last_seen", "absent"), arguments=("conn_ttl_ms", "user_ids")
)
GET_ALL_USER_CONNECTIONS = scripts.load(
    "get_all_user_connections", keys=("last_seen", "absent"), arguments=("conn_ttl_ms", "user_id")
)
ARE_USERS_ONLINE = scripts.load(
    "are_users_online",
    keys=("last_seen", "absent"),
    arguments=("threshold_ms", "user_ids"),
)
GET_GAME = scripts.load("get_game", keys=("game_conns", "last_seen"), arguments=())
GET_GAMES = scripts.load("get_games", keys=("last_seen", "absent"), arguments=("game_ids",))
GET_GAME_SNAPSHOT = scripts.load("get_game_snapshot", keys=("game_conns", "last_seen", "events"), arguments=())
GET_CONNECTION_COUNT = scripts.load("get_connection_count", keys=("last_seen",), arguments=("conn_ttl_ms",))
GET_GAME_CONNECTION_COUNT = scripts.load(
    "get_game_connection_count", keys=("game_conns", "last_seen"), arguments=("conn_ttl_ms",)
)
READ_EVENTS = scripts.load("read_events", keys=("events",), arguments=("after_id", "after_number", "limit", "again"))


_UNREADABLE = (ValueError, TypeError, ArithmeticError, AttributeError, LookupError, struct.error)
"""What parsers raise for a reply of another kind. What a signal handler raises in them means something else."""


@dataclass(slots=True, eq=False)
class Operation(Generic[Result_co]):
    """One call of one script: everything that is to be sent, and how the reply becomes a result.

    Every call that changes something, except heartbeats, carries a token. Sent again within a minute, because its reply
    was lost, it changes nothing more and gives the same answer. So for another call make another operation. One that
    changed nothing keeps no answer, unless it went through a pipeline with others or was a repetition itself: sent
    again, it acts as if it came later.
    """

    script: scripts.Script
    keys: tuple[bytes, ...]
    arguments: tuple[bytes, ...]
    parse: Callable[[Any], Result_co]

    def command(self) -> Command:
        """Give the EVALSHA command to send, without the empty arguments at its end: each would cost time."""
        values = self.arguments
        end = len(values)
        while end and not values[end - 1]:
            end -= 1
        return (*self.script.call, *self.keys, *values[:end])

    def renewed(self) -> Operation[Result_co]:
        """Give it with another token: as another call, which acts as a new one."""
        return replace(self, keys=renewed_keys(self.script, self.keys))

    def having(self, **values: bytes) -> Operation[Result_co]:
        """Give the same call with other values for some arguments, by their names in the script's header."""
        named = dict(zip(self.script.arguments, self.arguments, strict=True)) | values
        return replace(self, arguments=tuple(named.values()))

    def result(self, reply: Any) -> Result_co:
        """Parse the reply; raises ``UnexpectedReplyError`` where another program's data made it, or a broken proxy."""
        try:
            return self.parse(reply)
        except _UNREADABLE as error:
            raise unreadable(error) from error


class ServerNotStartedError(ValueError):
    """A manager with a server_id has not been given its boot epoch; its own methods see to that."""

    def __init__(self) -> None:
        super().__init__("the game server has no boot epoch yet: start_server() of the manager gives it one")


def shown_with(operations: Operations, shown: object) -> str:
    """Show operations, or the manager that has them, with namespace and server_id."""
    server = "" if operations.server_id is None else f" server_id={operations.server_id!r}"
    return f"<{type(shown).__module__}.{type(shown).__qualname__} namespace={operations.namespace!r}{server}>"


class Operations:
    """The operations of one namespace, each method checking its arguments and describing one call.

    Where a manager has a method of the same name, that says what arguments, result, errors and costs are. The others
    are the parts of the managers' bulk calls, cleanups and subscriptions: a ``…_batch`` is one script, ``…_batches``,
    for the managers, are as many as it takes. All raise ``TypeError`` or ``ValueError`` for a bad argument, a
    ``…_batch`` also for more ids than one script takes.

    Args:
        namespace: the keyspace and, being the hash tag of every key, the cluster slot; 1 to 1,024 characters, no
            braces.
        conn_ttl_seconds: a connection without a heartbeat for longer has expired; 0.001 s to ten years.
        heartbeat_seconds: how often clients send heartbeats, 0.001 s to ten years; three missed ones make a connection
            stale.
        connections_per_user: live connections that a user may have, 1 to 100; the oldest are displaced first.
        displacement: ``"newest_wins"``; ``"newest_resumes"``: and takes the seat of the one that it displaces; or
            ``"reject_while_alive"``: a register is refused while as many are not stale.
        server_id: the game server that connections are registered for, 1 to 1,024 characters; None for none.
        server_grace_seconds: how long the seats of a dead game server's are kept, 0 to ``conn_ttl_seconds``.
        events: whether changes are published: ``"off"``, ``"pubsub"`` or ``"stream"``.
        events_max_length: changes that the stream keeps, about, 1 to 100,000,000.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of its bounds.

    """

    def __init__(
        self,
        namespace: str = "presence",
        *,
        conn_ttl_seconds: float = 3600,
        heartbeat_seconds: float = 30,
        connections_per_user: int = 1,
        displacement: Displacement = "newest_wins",
        server_id: str | None = None,
        server_grace_seconds: float = 0,
        events: EventsMode = "off",
        events_max_length: int = 100_000,
    ) -> None:
        self.namespace: str = arguments.check_namespace(namespace)
        self._conn_ttl_ms = arguments.milliseconds("conn_ttl_seconds", conn_ttl_seconds)
        self._stale_ms = HEARTBEATS_UNTIL_STALE * arguments.milliseconds("heartbeat_seconds", heartbeat_seconds)
        self.heartbeat_seconds = heartbeat_seconds
        if conn_ttl_seconds <= heartbeat_seconds:
            logger.warning(EXPIRES_EARLY, conn_ttl_seconds, heartbeat_seconds)
        self._connections_per_user = arguments.check_count(
            "connections_per_user", connections_per_user, MAX_CONNECTIONS_PER_USER
        )
        self._users_batch_size = min(USERS_BATCH_SIZE, USERS_BATCH_CONNECTIONS // self._connections_per_user)
        self._cleanup_batch_size = min(CLEANUP_BATCH_SIZE, LISTED_PER_CLEANUP_BATCH // self._connections_per_user)
        self._heartbeat_batch_size = min(HEARTBEAT_BATCH_SIZE, LISTED_PER_HEARTBEAT_BATCH // self._connections_per_user)
        policy: Displacement = arguments.check_choice("displacement", displacement, get_args(Displacement))
        self.server_id: str | None = None if server_id is None else arguments.encode("server_id", server_id).decode()
        self._server_grace_ms = self._grace_ms("server_grace_seconds", server_grace_seconds)
        self.events_mode: EventsMode = arguments.check_choice("events", events, get_args(EventsMode))
        max_length = arguments.check_count("events_max_length", events_max_length, MAX_EVENTS)
        self._events = {"off": b"", "pubsub": b"pubsub", "stream": b"%d" % max_length}[self.events_mode]
        # What nearly every call passes, as it is passed.
        self._conn_ttl = b"%d" % self._conn_ttl_ms
        self._key_lifetime = b"%d" % (self._conn_ttl_ms + RETENTION_MS)
        self._most_connections = b"" if self._connections_per_user == 1 else b"%d" % self._connections_per_user
        self._reject = b"%d" % self._stale_ms if policy == "reject_while_alive" else b""
        self._resumes = b"1" if policy == "newest_resumes" else b""
        prefix = f"{{{self.namespace}}}:".encode()
        self._conn_prefix = prefix + b"conn:"
        self._user_conns_prefix = prefix + b"user_conns:"
        self._game_conns_prefix = prefix + b"game_conns:"
        self._reply_prefix = prefix + b"reply:"
        self.last_seen_key: bytes = prefix + b"last_seen"
        self._servers_key = prefix + b"servers"
        # With one of its keys there and one not, a cluster's node answers TRYAGAIN while it moves the slot: otherwise a
        # script would run where records that it names itself are missing.
        self.absent_key: bytes = prefix + b"absent"
        self._guarded_keys = (self.last_seen_key, self.absent_key)
        self.events_key: bytes = prefix + b"events"
        self.boot_epoch: int | None = None
        """The epoch of this start of the game server, once ``start_server`` has been answered."""
        self.silent_after_seconds: float = SERVER_HEARTBEATS_UNTIL_WARNING * heartbeat_seconds
        """How long the game server may send no heartbeat before that is warned of."""
        self._beaten_at = inf
        """When its start or heartbeat was answered last; infinite from a warning to the next heartbeat."""
        self._start: Operation[int] | None = None
        self._start_anew()
        call_in_child(self, Operations._start_anew)

    def _start_anew(self) -> None:
        """Make this another start of its game server, as a forked process is one."""
        self.boot_epoch = None
        if self.server_id is not None:
            self._start = Operation(
                START_SERVER,
                (self.last_seen_key, self._servers_key, self._reply()),
                (self.server_id.encode(), self._key_lifetime),
                self._started,
            )

    def _started(self, reply: int) -> int:
        self.boot_epoch = int(reply)
        self._beaten_at = monotonic()
        return self.boot_epoch

    def _grace_ms(self, name: str, seconds: float) -> int:
        grace_ms = arguments.milliseconds(name, seconds, allow_zero=True)
        if grace_ms > self._conn_ttl_ms:
            at_most = f"conn_ttl_seconds ({self._conn_ttl_ms / 1000:g})"
            raise ValueError(f"{name} must be at most {at_most}, not {arguments.shown(seconds)}")
        return grace_ms

    def _server(self) -> bytes:
        """Name this start of the game server, as the scripts take it; empty for none."""
        if self.server_id is None:
            return b""
        if self.boot_epoch is None:
            raise ServerNotStartedError
        return f"{self.boot_epoch}:{self.server_id}".encode()

    def __repr__(self) -> str:
        return shown_with(self, self)

    def _warn_if_silent(self) -> None:
        """Warn once where a game server that has started sends no heartbeats: its players are about to be taken."""
        if self.boot_epoch is None:
            return
        silence = monotonic() - self._beaten_at
        if silence > self.silent_after_seconds:
            logger.warning(SERVER_IS_SILENT, self.server_id, silence)
            self._beaten_at = inf

    def _reply(self) -> bytes:
        """Name the key under which the answer of one call is kept, for when it is sent again: it ends with a token."""
        return self._reply_prefix + new_token()

    def register_connection(
        self, sid: str, user_id: str | UUID, *, metadata: str | bytes | None = None
    ) -> Operation[Registration]:
        """Describe a registration."""
        sid_bytes = arguments.encode("sid", sid)
        user_bytes = arguments.encode_user_id("user_id", user_id)
        metadata_bytes = b"" if metadata is None else arguments.encode_metadata(metadata)
        server = self._server()
        self._warn_if_silent()
        return Operation(
            REGISTER,
            (self._conn_prefix + sid_bytes, self._user_conns_prefix + user_bytes, self.last_seen_key, self._reply()),
            (
                self._key_lifetime,
                self._most_connections,
                self._reject,
                server,
                metadata_bytes,
                self._events,
                self._resumes,
                b"",
            ),
            partial(parse_registration, sid_bytes.decode(), user_bytes.decode(), self.server_id, metadata_bytes),
        )

    def unregister_connection(
        self, sid: str, *, grace_seconds: float | None = None, epoch: int | None = None
    ) -> Operation[ConnectionInfo | None]:
        """Describe the removal of a connection, or how it is detached."""
        sid_bytes = arguments.encode("sid", sid)
        grace_ms = 0 if grace_seconds is None else self._grace_ms("grace_seconds", grace_seconds)
        return Operation(
            UNREGISTER,
            (self._conn_prefix + sid_bytes, self.last_seen_key, self._reply()),
            (
                self._key_lifetime,
                b"%d" % grace_ms,
                arguments.encode_number("epoch", epoch),
                self._events,
                b"",
            ),
            partial(parse_connection, sid_bytes.decode()),
        )

    def join_game(
        self, sid: str, game_id: str, *, capacity: int | None = None, epoch: int | None = None
    ) -> Operation[JoinResult]:
        """Describe a join."""
        sid_bytes = arguments.encode("sid", sid)
        game_bytes = arguments.encode("game_id", game_id)
        return Operation(
            JOIN,
            (self._conn_prefix + sid_bytes, self._game_conns_prefix + game_bytes, self.last_seen_key, self._reply()),
            (
                self._key_lifetime,
                b"" if capacity is None else b"%d" % arguments.check_count("capacity", capacity, MAX_CAPACITY),
                arguments.encode_number("epoch", epoch),
                self._events,
                b"",
            ),
            parse_join,
        )

    def leave_game(self, sid: str, *, epoch: int | None = None) -> Operation[str | None]:
        """Describe a leave."""
        sid_bytes = arguments.encode("sid", sid)
        return Operation(
            LEAVE,
            (self._conn_prefix + sid_bytes, self.last_seen_key, self._reply()),
            (
                self._key_lifetime,
                arguments.encode_number("epoch", epoch),
                self._events,
                b"",
            ),
            text_or_none,
        )

    def update_metadata(self, sid: str, metadata: str | bytes, *, epoch: int | None = None) -> Operation[bool]:
        """Describe the replacement of a connection's metadata."""
        sid_bytes = arguments.encode("sid", sid)
        return Operation(
            UPDATE_METADATA,
            (self._conn_prefix + sid_bytes, self.last_seen_key, self._reply()),
            (
                self._key_lifetime,
                arguments.encode_metadata(metadata),
                arguments.encode_number("epoch", epoch),
                self._events,
                b"",
            ),
            bool,
        )

    def update_heartbeat(self, sid: str, *, epoch: int | None = None) -> Operation[bool]:
        """Describe a heartbeat."""
        sid_bytes = arguments.encode("sid", sid)
        self._warn_if_silent()
        return Operation(
            HEARTBEAT,
            (self._conn_prefix + sid_bytes, *self._guarded_keys),
            (self._key_lifetime, arguments.encode_number("epoch", epoch)),
            bool,
        )

    def heartbeat_batch(self, sids: Sequence[str]) -> Operation[list[HeartbeatStatus]]:
        """Describe heartbeats of one script: see ``update_heartbeats`` of a manager.

        Args:
            sids: different ids of connections, 1 to 100, fewer where ``connections_per_user`` is more than 30, down to
                30.

        Returns:
            The operation, whose result is what became of each, in their order.

        """
        return self._heartbeats(arguments.encode_batch("sids", sids, self._heartbeat_batch_size))

    def heartbeat_batches(self, sids: Iterable[str]) -> Batches[HeartbeatStatus]:
        """Describe any number of heartbeats, in scripts of bounded size."""
        return Batches(arguments.encode_several("sids", sids), self._heartbeat_batch_size, self._heartbeats)

    def _heartbeats(self, sids: list[bytes]) -> Operation[list[HeartbeatStatus]]:
        self._warn_if_silent()
        return Operation(
            HEARTBEATS, self._guarded_keys, (self._key_lifetime, *sids), partial(parse_heartbeats, len(sids))
        )

    def get_connection(self, sid: str) -> Operation[ConnectionInfo | None]:
        """Describe the read of a connection."""
        sid_bytes = arguments.encode("sid", sid)
        return Operation(
            GET_CONNECTION,
            (self._conn_prefix + sid_bytes, self.last_seen_key),
            (self._conn_ttl,),
            partial(parse_connection, sid_bytes.decode()),
        )

    def get_user_connection(self, user_id: str | UUID) -> Operation[ConnectionInfo | None]:
        """Describe the read of a user's active connection."""
        user_bytes = arguments.encode_user_id("user_id", user_id)
        return self._get_users([user_bytes], lambda reply: parse_users(reply)[0])

    def get_all_user_connections(self, user_id: str | UUID) -> Operation[list[ConnectionInfo]]:
        """Describe the read of all connections of a user."""
        user_bytes = arguments.encode_user_id("user_id", user_id)
        return Operation(GET_ALL_USER_CONNECTIONS, self._guarded_keys, (self._conn_ttl, user_bytes), parse_listed)

    def users_connections_batch(self, user_ids: Sequence[str | UUID]) -> Operation[list[ConnectionInfo | None]]:
        """Describe the read of the active connections of some users, at one moment: see ``get_users_connections``.

        Args:
            user_ids: ids of users, 1 to 100, fewer where ``connections_per_user`` is more than ten: the script reads at
                most 1,000 connections.

        Returns:
            The operation, whose result is the connection of each or None, in their order.

        """
        return self._get_users(self._users_of_one_script(user_ids), parse_users)

    def users_connections_batches(self, user_ids: Iterable[str | UUID]) -> Batches[ConnectionInfo | None]:
        """Describe the read of the active connections of any number of users, in scripts of bounded size."""
        users = arguments.encode_several("user_ids", user_ids, arguments.encode_user_id)
        return Batches(users, self._users_batch_size, partial(self._get_users, parse=parse_users))

    def _get_users(self, users: list[bytes], parse: Callable[[list[Any]], Result]) -> Operation[Result]:
        return Operation(GET_USERS_CONNECTIONS, self._guarded_keys, (self._conn_ttl, *users), parse)

    def _users_of_one_script(self, user_ids: object) -> list[bytes]:
        return arguments.encode_batch("user_ids", user_ids, self._users_batch_size, arguments.encode_user_id)

    def is_user_online(self, user_id: str | UUID) -> Operation[bool]:
        """Describe the question whether a user is online."""
        user_bytes = arguments.encode_user_id("user_id", user_id)
        return self._ask_users([user_bytes], lambda reply: bool(reply[0]))

    def users_online_batch(self, user_ids: Sequence[str | UUID]) -> Operation[list[bool]]:
        """Describe the question which of some users are online, at one moment: see ``are_users_online``.

        Args:
            user_ids: ids of users, as many as in ``users_connections_batch``.

        Returns:
            The operation, whose result is whether each is online, in their order.

        """
        return self._ask_users(self._users_of_one_script(user_ids), parse_users_online)

    def users_online_batches(self, user_ids: Iterable[str | UUID]) -> Batches[bool]:
        """Describe the question which of any number of users are online, in scripts of bounded size."""
        users = arguments.encode_several("user_ids", user_ids, arguments.encode_user_id)
        return Batches(users, self._users_batch_size, partial(self._ask_users, parse=parse_users_online))

    def _ask_users(self, users: list[bytes], parse: Callable[[list[int]], Result]) -> Operation[Result]:
        return Operation(
            ARE_USERS_ONLINE,
            self._guarded_keys,
            (b"%d" % min(self._stale_ms, self._conn_ttl_ms), *users),
            parse,
        )

    def get_game_connections(self, game_id: str) -> Operation[list[ConnectionInfo]]:
        """Describe the snapshot of a game."""
        return self._get_game(game_id, lambda game, reply: parse_game(game, self._conn_ttl_ms, reply))

    def games_connections_batch(self, game_ids: Sequence[str]) -> Operation[list[list[ConnectionInfo]]]:
        """Describe the snapshots of some games, at one moment: see ``get_games_connections``.

        Args:
            game_ids: ids of games, 1 to 10.

        Returns:
            The operation, whose result is the list of connections of each, in their order.

        """
        return self._get_games(arguments.encode_batch("game_ids", game_ids, GAMES_BATCH_SIZE))

    def games_connections_batches(self, game_ids: Iterable[str]) -> Batches[list[ConnectionInfo]]:
        """Describe the snapshot of any number of games, in scripts of bounded size."""
        return Batches(arguments.encode_several("game_ids", game_ids), GAMES_BATCH_SIZE, self._get_games)

    def _get_games(self, games: list[bytes]) -> Operation[list[list[ConnectionInfo]]]:
        def parse(reply: list[Any]) -> list[list[ConnectionInfo]]:
            now, *members = reply
            return [
                parse_game(game.decode(), self._conn_ttl_ms, [*of_game, now])
                for game, of_game in zip(games, members, strict=True)
            ]

        return Operation(GET_GAMES, self._guarded_keys, tuple(games), parse)

    def get_game_snapshot(self, game_id: str) -> Operation[GameSnapshot]:
        """Describe the snapshot of a game with its position in the stream of events."""
        game_bytes = arguments.encode("game_id", game_id)

        def parse(reply: list[Any]) -> GameSnapshot:
            last_id, added, members = reply
            return GameSnapshot(
                tuple(parse_game(game_bytes.decode(), self._conn_ttl_ms, members)),
                Position(last_id.decode(), added).text(),
            )

        return Operation(
            GET_GAME_SNAPSHOT, (self._game_conns_prefix + game_bytes, self.last_seen_key, self.events_key), (), parse
        )

    def read_events(self, position: Position, limit: int = EVENTS_BATCH_SIZE) -> Operation[EventsBatch]:
        """Describe the read of changes, 100 at most, that come after a position in the stream; for subscriptions."""
        return Operation(
            READ_EVENTS,
            (self.events_key,),
            (
                position.entry_id.encode(),
                b"%d" % position.number,
                b"%d" % limit,
                b"" if position.events_seen is None else b"again",
            ),
            partial(parse_events, position),
        )

    def get_game_user_sids(self, game_id: str) -> Operation[dict[str, str]]:
        """Describe the snapshot of a game as user_id -> sid; of a user's connections the newest counts."""
        return self._get_game(game_id, self._parse_user_sids)

    def get_opponent_sid(self, game_id: str, current_user_id: str | UUID) -> Operation[str | None]:
        """Describe the search for the other player of a game."""
        current_user = arguments.encode_user_id("current_user_id", current_user_id).decode()

        def parse(game: str, reply: list[Any]) -> str | None:
            for user_id, sid in self._parse_user_sids(game, reply).items():
                if user_id != current_user:
                    return sid
            return None

        return self._get_game(game_id, parse)

    def _get_game(self, game_id: str, parse: Callable[[str, list[Any]], Result]) -> Operation[Result]:
        game_bytes = arguments.encode("game_id", game_id)
        parse_reply = partial(parse, game_bytes.decode())
        return Operation(GET_GAME, (self._game_conns_prefix + game_bytes, self.last_seen_key), (), parse_reply)

    def _parse_user_sids(self, game: str, reply: list[Any]) -> dict[str, str]:
        seats = parse_game(game, self._conn_ttl_ms, reply)
        return {connection.user_id: connection.sid for connection in seats if connection.detached_until is None}

    def get_connection_count(self) -> Operation[int]:
        """Describe the count of live connections."""
        return Operation(GET_CONNECTION_COUNT, (self.last_seen_key,), (self._conn_ttl,), int)

    def get_game_connection_count(self, game_id: str) -> Operation[int]:
        """Describe the count of live connections in a game."""
        game_bytes = arguments.encode("game_id", game_id)
        return Operation(
            GET_GAME_CONNECTION_COUNT,
            (self._game_conns_prefix + game_bytes, self.last_seen_key),
            (self._conn_ttl,),
            int,
        )

    def cleanup_batch(
        self, threshold_seconds: float | None = None, *, not_after_ms: int | None = None
    ) -> Operation[CleanupBatch]:
        """Describe one bounded batch of a cleanup: see ``cleanup_stale_connections``.

        Args:
            threshold_seconds: seconds, 0 to ten years; None for three heartbeats.
            not_after_ms: when it runs after this time of the server, milliseconds since 1970, it does nothing; None for
                any time.

        Returns:
            The operation, whose result has ``removed`` and ``detached``, together at most 20 connections; ``is_last``:
            whether there was no more to do; ``now_ms``, the server's time; and ``is_late``: whether it came too late.

        """
        threshold_ms = (
            self._stale_ms
            if threshold_seconds is None
            else arguments.milliseconds("threshold_seconds", threshold_seconds, allow_zero=True)
        )
        not_after = arguments.encode_number("not_after_ms", not_after_ms)
        self._warn_if_silent()
        return self._clean_up(threshold_ms, self._server_grace_ms, not_after=not_after)

    def cleanup_server_batch(self, server_id: str, *, grace_seconds: float | None = None) -> Operation[CleanupBatch]:
        """Describe one bounded batch of the cleanup of a game server's connections: see ``cleanup_server``.

        Args:
            server_id: the game server's id.
            grace_seconds: how long their seats are kept, 0 to ``conn_ttl_seconds``; None for ``server_grace_seconds``.

        Returns:
            The operation, whose result is that of ``cleanup_batch``.

        """
        server_bytes = arguments.encode("server_id", server_id)
        grace_ms = self._server_grace_ms if grace_seconds is None else self._grace_ms("grace_seconds", grace_seconds)
        newest_start = self.boot_epoch if server_id == self.server_id else None
        return self._clean_up(0, grace_ms, server_bytes, arguments.encode_number("newest_start", newest_start))

    def _clean_up(
        self,
        threshold_ms: int,
        server_grace_ms: int,
        server_id: bytes = b"",
        newest_start: bytes = b"",
        not_after: bytes = b"",
    ) -> Operation[CleanupBatch]:
        return Operation(
            CLEANUP,
            (self.last_seen_key, self._servers_key, self._reply()),
            (
                self._key_lifetime,
                b"%d" % threshold_ms,
                b"%d" % self._cleanup_batch_size,
                b"%d" % self._stale_ms,
                b"%d" % server_grace_ms,
                server_id,
                newest_start,
                self._events,
                not_after,
                b"",
            ),
            partial(parse_cleanup, self._cleanup_batch_size, server_grace_ms > 0),
        )

    def start_server(self) -> Operation[int]:
        """Describe the start of this game server: one call, so that all who make it get one boot epoch."""
        if self._start is None:
            raise ValueError("server_id is None: give the manager the id of its game server")
        return self._start

    def update_server_heartbeat(self) -> Operation[bool]:
        """Describe a heartbeat of this game server."""
        self.start_server()  # Refuses one without a server_id.
        return Operation(SERVER_HEARTBEAT, (self._servers_key,), (self._server(), self._key_lifetime), self._beaten)

    def _beaten(self, reply: int) -> bool:
        self._beaten_at = monotonic()
        return bool(reply)


class Batches(Generic[Result_co]):
    """A call for any number of ids: the different ones, and the scripts of bounded size that together serve them."""

    def __init__(
        self, ids: list[bytes], size: int, describe: Callable[[list[bytes]], Operation[list[Result_co]]]
    ) -> None:
        different = list(dict.fromkeys(ids))
        self.ids: list[str] = [each.decode() for each in different]
        self._parts = [different[start : start + size] for start in range(0, len(different), size)]
        self.operations: list[Operation[list[Result_co]]] = [describe(part) for part in self._parts]

    def answers(self, results: Sequence[list[Result_co] | PresenceError]) -> list[Result_co | PresenceError]:
        """Give the answer for each id, or the error that its script met."""
        answers: list[Result_co | PresenceError] = []
        for part, result in zip(self._parts, results, strict=True):
            answers += [result] * len(part) if isinstance(result, PresenceError) else result
        return answers
