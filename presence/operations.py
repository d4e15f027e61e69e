"""The operations: which script, with which keys and arguments, and how its reply becomes a type; no I/O.

The asyncio and the blocking manager, and pipelines, all run what this module describes.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar

from redis.exceptions import NoScriptError

from presence import arguments, scripts
from presence.errors import PipelineError, PresenceError, ReadOnlyServerError, explain
from presence.results import CleanupResult, ConnectionInfo, HeartbeatStatus, JoinResult, Registration

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from uuid import UUID

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)

Command: TypeAlias = "tuple[bytes | str | int, ...]"
Exchange: TypeAlias = "Generator[Sequence[Command], list[Any], Result]"
"""A conversation with the server: it yields commands to send together and is sent their replies, errors among them."""

Displacement: TypeAlias = Literal["newest_wins", "reject_while_alive"]
"""Which connection gives way when a user has as many as are allowed."""

SCRIPT_LOAD = "SCRIPT LOAD"
SCRIPT_LOADS = 2
"""Times that a missing script is loaded for a call: the second is for a failover between the first and the call."""

HEARTBEATS_UNTIL_STALE = 3
CLEANUP_BATCH_SIZE = 50
"""Connections that one cleanup script removes: under a millisecond of the server, with much room below 5 ms."""
HEARTBEAT_BATCH_SIZE = 250
"""Heartbeats that one script takes: about a millisecond of the server."""
MAX_CONNECTIONS_PER_USER = 100

RETENTION_MS = 24 * 60 * 60 * 1000
"""How much longer than its connections a key lives: a day in which cleanup can still find and report a dead record."""

REGISTER = scripts.load(
    "register",
    keys=("conn", "user_conns", "last_seen", "epoch", "reply"),
    arguments=("key_prefix", "sid", "user_id", "conn_ttl_ms", "key_lifetime_ms", "connections_per_user", "reject_ms"),
)
UNREGISTER = scripts.load(
    "unregister",
    keys=("conn", "last_seen", "reply"),
    arguments=("key_prefix", "sid", "epoch", "grace_ms", "conn_ttl_ms", "key_lifetime_ms"),
)
JOIN = scripts.load(
    "join",
    keys=("conn", "game_conns", "last_seen", "reply"),
    arguments=("key_prefix", "sid", "game_id", "epoch", "capacity", "conn_ttl_ms", "key_lifetime_ms"),
)
LEAVE = scripts.load(
    "leave", keys=("conn", "last_seen", "reply"), arguments=("key_prefix", "sid", "epoch", "conn_ttl_ms")
)
HEARTBEAT = scripts.load(
    "heartbeat",
    keys=("conn", "last_seen"),
    arguments=("key_prefix", "sid", "epoch", "conn_ttl_ms", "key_lifetime_ms"),
)
HEARTBEATS = scripts.load(
    "heartbeats", keys=("last_seen",), arguments=("key_prefix", "conn_ttl_ms", "key_lifetime_ms", "sids")
)
CLEANUP = scripts.load(
    "cleanup", keys=("last_seen", "reply"), arguments=("key_prefix", "threshold_ms", "conn_ttl_ms", "batch_size")
)
GET_CONNECTION = scripts.load("get_connection", keys=("conn", "last_seen"), arguments=("sid", "conn_ttl_ms"))
GET_USER_CONNECTION = scripts.load(
    "get_user_connection", keys=("user_conns", "last_seen"), arguments=("key_prefix", "user_id", "conn_ttl_ms")
)
IS_USER_ONLINE = scripts.load(
    "is_user_online", keys=("user_conns", "last_seen"), arguments=("threshold_ms", "conn_ttl_ms")
)
GET_GAME = scripts.load("get_game", keys=("game_conns", "last_seen"), arguments=())
GET_CONNECTION_COUNT = scripts.load("get_connection_count", keys=("last_seen",), arguments=("conn_ttl_ms",))
GET_GAME_CONNECTION_COUNT = scripts.load(
    "get_game_connection_count", keys=("game_conns", "last_seen"), arguments=("conn_ttl_ms",)
)

REJECT_WHILE_ALIVE = "reject_while_alive"
MAX_CAPACITY = 1_000_000

NOT_SEEN = {0: HeartbeatStatus.UNKNOWN, -1: HeartbeatStatus.EXPIRED, -2: HeartbeatStatus.DETACHED}
"""Why a heartbeat of many was not counted, as the script answers it."""

REFUSED, RESUMED = 0, 2
"""Outcomes of a register, as its script answers them."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Operation(Generic[Result_co]):
    """One call of one script: everything that is to be sent, and how the reply becomes a result.

    A call that changes more than a heartbeat carries a token. Sent again within a minute, because its reply was lost,
    it changes nothing more and gives the same answer. So for another call make another operation. One that had changed
    nothing keeps no answer: sent again, it is as if it came later.
    """

    script: scripts.Script
    keys: tuple[bytes, ...]
    arguments: tuple[bytes | str | int, ...]
    parse: Callable[[Any], Result_co]

    def command(self) -> Command:
        """Give the EVALSHA command to send."""
        return ("EVALSHA", self.script.sha, len(self.keys), *self.keys, *self.arguments)


@dataclass(frozen=True, slots=True)
class CleanupBatch:
    """What one run of the cleanup script removed, and whether it found fewer than it might have."""

    removed: tuple[ConnectionInfo, ...]
    is_last: bool


class Operations:
    """The operations of one namespace, each method checking its arguments and describing one call.

    Args:
        namespace: the keyspace and, being the hash tag of every key, the cluster slot; no braces.
        conn_ttl_seconds: a connection without a heartbeat for longer has expired; 0.001 s to ten years.
        heartbeat_seconds: how often clients beat; three missed heartbeats make a connection stale.
        connections_per_user: live connections that a user may have, 1 to 100; the oldest are displaced first.
        displacement: ``"newest_wins"``, or ``"reject_while_alive"``: a register is refused while as many are not stale.

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
    ) -> None:
        self.namespace = arguments.check_namespace(namespace)
        self._conn_ttl_ms = arguments.milliseconds("conn_ttl_seconds", conn_ttl_seconds)
        self._stale_ms = HEARTBEATS_UNTIL_STALE * arguments.milliseconds("heartbeat_seconds", heartbeat_seconds)
        self._connections_per_user = arguments.check_count(
            "connections_per_user", connections_per_user, MAX_CONNECTIONS_PER_USER
        )
        self._reject_ms = self._stale_ms if arguments.check_displacement(displacement) == REJECT_WHILE_ALIVE else 0
        # A key's TTL is refreshed by the first heartbeat in each quarter of the connections' TTL only.
        self._key_lifetime_ms = self._conn_ttl_ms + -(-self._conn_ttl_ms // 4) + RETENTION_MS
        self._prefix = f"{{{namespace}}}:".encode()
        self.last_seen_key = self._prefix + b"last_seen"
        self._epoch_key = self._prefix + b"epoch"

    def _conn(self, sid: bytes) -> bytes:
        return self._prefix + b"conn:" + sid

    def _user_conns(self, user_id: bytes) -> bytes:
        return self._prefix + b"user_conns:" + user_id

    def _game_conns(self, game_id: bytes) -> bytes:
        return self._prefix + b"game_conns:" + game_id

    def _reply(self) -> bytes:
        """Name the key under which the answer of one call is kept, for when it is sent again."""
        return self._prefix + b"reply:" + secrets.token_hex(12).encode()

    def register_connection(self, sid: str, user_id: str | UUID) -> Operation[Registration]:
        """Describe a registration."""
        sid_bytes = arguments.encode("sid", sid)
        user_bytes = arguments.encode_user_id("user_id", user_id)
        return Operation(
            REGISTER,
            (self._conn(sid_bytes), self._user_conns(user_bytes), self.last_seen_key, self._epoch_key, self._reply()),
            (
                self._prefix,
                sid_bytes,
                user_bytes,
                self._conn_ttl_ms,
                self._key_lifetime_ms,
                self._connections_per_user,
                self._reject_ms,
            ),
            lambda reply: _parse_registration(sid, user_bytes.decode(), reply),
        )

    def unregister_connection(
        self, sid: str, *, grace_seconds: float | None = None, epoch: int | None = None
    ) -> Operation[ConnectionInfo | None]:
        """Describe the removal of a connection, or how it is detached."""
        sid_bytes = arguments.encode("sid", sid)
        grace_ms = 0
        if grace_seconds is not None:
            grace_ms = arguments.milliseconds("grace_seconds", grace_seconds, allow_zero=True)
            if grace_ms > self._conn_ttl_ms:
                at_most = f"conn_ttl_seconds ({self._conn_ttl_ms / 1000:g})"
                raise ValueError(f"grace_seconds must be at most {at_most}, not {grace_seconds!r}")
        return Operation(
            UNREGISTER,
            (self._conn(sid_bytes), self.last_seen_key, self._reply()),
            (
                self._prefix,
                sid_bytes,
                arguments.check_epoch(epoch),
                grace_ms,
                self._conn_ttl_ms,
                self._key_lifetime_ms,
            ),
            _parse_connection,
        )

    def join_game(
        self, sid: str, game_id: str, *, capacity: int | None = None, epoch: int | None = None
    ) -> Operation[JoinResult]:
        """Describe a join."""
        sid_bytes = arguments.encode("sid", sid)
        game_bytes = arguments.encode("game_id", game_id)
        limit = 0 if capacity is None else arguments.check_count("capacity", capacity, MAX_CAPACITY)
        return Operation(
            JOIN,
            (self._conn(sid_bytes), self._game_conns(game_bytes), self.last_seen_key, self._reply()),
            (
                self._prefix,
                sid_bytes,
                game_bytes,
                arguments.check_epoch(epoch),
                limit,
                self._conn_ttl_ms,
                self._key_lifetime_ms,
            ),
            _parse_join,
        )

    def leave_game(self, sid: str, *, epoch: int | None = None) -> Operation[str | None]:
        """Describe a leave."""
        sid_bytes = arguments.encode("sid", sid)
        return Operation(
            LEAVE,
            (self._conn(sid_bytes), self.last_seen_key, self._reply()),
            (self._prefix, sid_bytes, arguments.check_epoch(epoch), self._conn_ttl_ms),
            _text_or_none,
        )

    def update_heartbeat(self, sid: str, *, epoch: int | None = None) -> Operation[bool]:
        """Describe a heartbeat."""
        sid_bytes = arguments.encode("sid", sid)
        return Operation(
            HEARTBEAT,
            (self._conn(sid_bytes), self.last_seen_key),
            (
                self._prefix,
                sid_bytes,
                arguments.check_epoch(epoch),
                self._conn_ttl_ms,
                self._key_lifetime_ms,
            ),
            bool,
        )

    def heartbeat_batch(self, sids: Sequence[str]) -> Operation[list[HeartbeatStatus]]:
        """Describe at most 250 heartbeats in one script; ``update_heartbeats`` of a manager takes any number."""
        sids_bytes = [arguments.encode("sids", sid) for sid in sids]
        if not 1 <= len(sids_bytes) <= HEARTBEAT_BATCH_SIZE:
            raise ValueError(f"sids must be 1 to {HEARTBEAT_BATCH_SIZE} ids, not {len(sids_bytes)}")
        return Operation(
            HEARTBEATS,
            (self.last_seen_key,),
            (self._prefix, self._conn_ttl_ms, self._key_lifetime_ms, *sids_bytes),
            lambda reply: _parse_heartbeats(len(sids_bytes), reply),
        )

    def heartbeat_batches(self, sids: Iterable[str]) -> list[Operation[list[HeartbeatStatus]]]:
        """Describe any number of heartbeats, in scripts of bounded size."""
        different = list(dict.fromkeys(arguments.check_iterable("sids", sids)))
        return [
            self.heartbeat_batch(different[start : start + HEARTBEAT_BATCH_SIZE])
            for start in range(0, len(different), HEARTBEAT_BATCH_SIZE)
        ]

    def get_connection(self, sid: str) -> Operation[ConnectionInfo | None]:
        """Describe the read of a connection."""
        sid_bytes = arguments.encode("sid", sid)
        return Operation(
            GET_CONNECTION,
            (self._conn(sid_bytes), self.last_seen_key),
            (sid_bytes, self._conn_ttl_ms),
            _parse_connection,
        )

    def get_user_connection(self, user_id: str | UUID) -> Operation[ConnectionInfo | None]:
        """Describe the read of a user's active connection."""
        user_bytes = arguments.encode_user_id("user_id", user_id)
        return Operation(
            GET_USER_CONNECTION,
            (self._user_conns(user_bytes), self.last_seen_key),
            (self._prefix, user_bytes, self._conn_ttl_ms),
            _parse_connection,
        )

    def is_user_online(self, user_id: str | UUID) -> Operation[bool]:
        """Describe the question whether a user is online."""
        user_bytes = arguments.encode_user_id("user_id", user_id)
        return Operation(
            IS_USER_ONLINE,
            (self._user_conns(user_bytes), self.last_seen_key),
            (self._stale_ms, self._conn_ttl_ms),
            bool,
        )

    def get_game_connections(self, game_id: str) -> Operation[list[ConnectionInfo]]:
        """Describe the snapshot of a game."""
        return self._get_game(game_id, list)

    def get_game_user_sids(self, game_id: str) -> Operation[dict[str, str]]:
        """Describe the snapshot of a game as user_id -> sid; of a user's connections the newest counts."""
        return self._get_game(
            game_id,
            lambda seats: {connection.user_id: connection.sid for connection in seats if not connection.is_detached},
        )

    def get_opponent_sid(self, game_id: str, current_user_id: str | UUID) -> Operation[str | None]:
        """Describe the search for the other player of a game."""
        current_user = arguments.encode_user_id("current_user_id", current_user_id).decode()

        def opponent(connections: list[ConnectionInfo]) -> str | None:
            sids = {connection.user_id: connection.sid for connection in connections if not connection.is_detached}
            return next((sid for user_id, sid in sids.items() if user_id != current_user), None)

        return self._get_game(game_id, opponent)

    def _get_game(self, game_id: str, select: Callable[[list[ConnectionInfo]], Result]) -> Operation[Result]:
        game_bytes = arguments.encode("game_id", game_id)
        return Operation(
            GET_GAME,
            (self._game_conns(game_bytes), self.last_seen_key),
            (),
            lambda reply: select(_parse_game(game_id, self._conn_ttl_ms, reply)),
        )

    def get_connection_count(self) -> Operation[int]:
        """Describe the count of live connections."""
        return Operation(GET_CONNECTION_COUNT, (self.last_seen_key,), (self._conn_ttl_ms,), int)

    def get_game_connection_count(self, game_id: str) -> Operation[int]:
        """Describe the count of live connections in a game."""
        game_bytes = arguments.encode("game_id", game_id)
        return Operation(
            GET_GAME_CONNECTION_COUNT,
            (self._game_conns(game_bytes), self.last_seen_key),
            (self._conn_ttl_ms,),
            int,
        )

    def cleanup_batch(self, threshold_seconds: float | None = None) -> Operation[CleanupBatch]:
        """Describe one bounded batch of a cleanup."""
        threshold_ms = (
            self._stale_ms
            if threshold_seconds is None
            else arguments.milliseconds("threshold_seconds", threshold_seconds, allow_zero=True)
        )
        return Operation(
            CLEANUP,
            (self.last_seen_key, self._reply()),
            (self._prefix, threshold_ms, self._conn_ttl_ms, CLEANUP_BATCH_SIZE),
            _parse_cleanup,
        )


def clean_up(describe_batch: Callable[[], Operation[CleanupBatch]]) -> Exchange[CleanupResult]:
    """Converse with the server batch by batch until nothing stale is left.

    What was removed before a fault is still reported: nobody else could report it.
    """
    removed: list[ConnectionInfo] = []
    while True:
        try:
            done = yield from perform(describe_batch())
        except PresenceError as error:
            if not removed:
                raise
            return CleanupResult(tuple(removed), error)
        removed += done.removed
        if done.is_last:
            return CleanupResult(tuple(removed))


def perform_all(operations: Sequence[Operation[Any]]) -> Exchange[list[Any]]:
    """Converse with the server to run operations, together and in order.

    A script that the server does not have is loaded and exactly the calls that missed it are repeated; nothing of them
    had run. Scripts are gone after SCRIPT FLUSH, a restart or a failover. Of different scripts some could be there and
    others not, and the calls would run out of order: so these are loaded in the same breath.

    Returns:
        An item for each operation: its result, or the ``PresenceError`` that it met.

    """
    different = list(dict.fromkeys(operation.script for operation in operations))
    loads = [load_command(script) for script in different] if len(different) > 1 else []
    replies = yield [*loads, *(operation.command() for operation in operations)]
    return (yield from _settle(operations, replies[len(loads) :]))


def _settle(operations: Sequence[Operation[Any]], replies: list[Any]) -> Exchange[list[Any]]:
    """Do what the first replies ask for, and give the results."""
    for _ in range(SCRIPT_LOADS):
        missed = [index for index, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if not missed:
            break
        failed: dict[scripts.Script, Exception] = {}
        for script in dict.fromkeys(operations[index].script for index in missed):
            (loaded,) = yield [load_command(script)]
            if isinstance(loaded, Exception):
                failed[script] = loaded
        # What was answered is still to be reported: only the calls of a script that cannot be loaded have failed.
        again = [index for index in missed if operations[index].script not in failed]
        repeated = (yield [operations[index].command() for index in again]) if again else []
        replies = [
            failed.get(operation.script, reply) if isinstance(reply, NoScriptError) else reply
            for operation, reply in zip(operations, replies, strict=True)
        ]
        for index, reply in zip(again, repeated, strict=True):
            replies[index] = reply
    results = [
        explain(reply) if isinstance(reply, Exception) else operation.parse(reply)
        for operation, reply in zip(operations, replies, strict=True)
    ]
    refused = [index for index, result in enumerate(results) if isinstance(result, ReadOnlyServerError)]
    if refused and len(operations) > 1:
        # Nothing of these ran. redis-py leaves a server that became a replica for a single call only: one goes ahead.
        first, *rest = refused
        (results[first],) = yield from perform_all((operations[first],))
        if rest and not isinstance(results[first], ReadOnlyServerError):
            repeated = yield from perform_all([operations[index] for index in rest])
            for index, result in zip(rest, repeated, strict=True):
                results[index] = result
    return results


def check_operations(operations: object) -> tuple[Operation[Any], ...]:
    """Check what is to go through a pipeline, before anything is sent."""
    if not isinstance(operations, Iterable):
        raise TypeError(f"operations must be a sequence of Operation, not {type(operations).__name__}")
    checked = tuple(operations)
    for operation in checked:
        if not isinstance(operation, Operation):
            raise TypeError(
                f"operations must hold what manager.operations makes, not {type(operation).__name__}: "
                "manager.operations.update_heartbeat(sid), not manager.update_heartbeat(sid)"
            )
    return checked


def as_sent(command: Command) -> dict[str, bool]:
    """Give redis-py's options for a command: replies of scripts stay bytes, however the client decodes."""
    return {} if command[0] == SCRIPT_LOAD else {"NEVER_DECODE": True}


def load_command(script: scripts.Script) -> Command:
    """Give the command that loads a script. It has no key; a cluster needs it on the node of the namespace."""
    return (SCRIPT_LOAD, script.source)


def perform_each(operations: Sequence[Operation[Result]]) -> Exchange[list[Result]]:
    """Converse with the server to run operations together; raises ``PipelineError`` when some failed."""
    if not operations:
        return []
    results = yield from perform_all(operations)
    if any(isinstance(result, PresenceError) for result in results):
        raise PipelineError(results)
    return results


def perform(operation: Operation[Result]) -> Exchange[Result]:
    """Converse with the server to run one operation; raises the ``PresenceError`` that it met."""
    (reply,) = yield [operation.command()]
    if not isinstance(reply, Exception):
        return operation.parse(reply)
    (result,) = yield from _settle((operation,), [reply])
    if isinstance(result, PresenceError):
        raise result
    return result  # type: ignore[no-any-return]


def _time(milliseconds: bytes | int) -> datetime:
    return EPOCH + timedelta(milliseconds=int(milliseconds))


def _parse_connection_at(observed_at: datetime, fields: list[Any]) -> ConnectionInfo:
    """Parse a connection as every reply lists one, see lua/include/read_connection.lua."""
    sid, user_id, game_id, epoch, connected_at, heartbeat_at, score = fields
    return _connection(
        sid.decode(), user_id, game_id.decode() or None, [epoch, connected_at, heartbeat_at], score, observed_at
    )


def _connection(
    sid: str,
    user_id: bytes,
    game_id: str | None,
    times: Sequence[bytes],
    score: bytes | int,
    observed_at: datetime,
) -> ConnectionInfo:
    epoch, connected_at, heartbeat_at = times
    return ConnectionInfo(
        sid,
        user_id.decode(),
        game_id,
        _time(connected_at or int(epoch) // 1000),
        _time(heartbeat_at or score),
        observed_at,
        int(epoch),
        _time(-int(score)) if heartbeat_at else None,
    )


def _parse_connection(reply: list[Any]) -> ConnectionInfo | None:
    return _parse_connection_at(_time(reply[0]), reply[1]) if reply else None


def _parse_registration(sid: str, user_id: str, reply: bytes | list[Any]) -> Registration:
    if isinstance(reply, bytes):
        epoch = int(reply)
        now = _time(epoch // 1000)
        return Registration(ConnectionInfo(sid, user_id, None, now, now, now, epoch))
    observed_at, outcome = _time(reply[0]), reply[1]
    connection, replaced, resumed_from, *displaced = reply[2:]
    return Registration(
        _parse_connection_at(observed_at, connection),
        tuple(_parse_connection_at(observed_at, gone) for gone in displaced),
        resumed=outcome == RESUMED,
        replaced=_parse_connection_at(observed_at, replaced) if replaced else None,
        resumed_from=_parse_connection_at(observed_at, resumed_from) if resumed_from else None,
        refused=outcome == REFUSED,
    )


def _parse_join(reply: bytes | int) -> JoinResult:
    return JoinResult(True, _text_or_none(reply)) if isinstance(reply, bytes) else JoinResult(False, is_full=reply == 1)


def _text_or_none(reply: bytes) -> str | None:
    return reply.decode() or None


def _parse_game(game_id: str, conn_ttl_ms: int, reply: list[Any]) -> list[ConnectionInfo]:
    """Parse a snapshot: choose who is live, or detached and within the grace, in the order of registration."""
    now, members, scores = int(reply[0]), reply[1], reply[2]
    oldest_live, observed_at = now - conn_ttl_ms, _time(now)
    connections = []
    for sid, entry, score in zip(members[::2], members[1::2], scores, strict=True):
        seen = int(score or 0)
        if seen < oldest_live and -seen < now:
            continue
        head, _, user_id = entry.partition(b" ")
        if b":" in head:
            times = [*head.split(b":"), b""][:3]
            connections.append(_connection(sid.decode(), user_id, game_id, times, seen, observed_at))
        else:
            epoch = int(head)
            connected_at = EPOCH + timedelta(milliseconds=epoch // 1000)
            last_seen = EPOCH + timedelta(milliseconds=seen)
            connections.append(
                ConnectionInfo(sid.decode(), user_id.decode(), game_id, connected_at, last_seen, observed_at, epoch)
            )
    connections.sort(key=attrgetter("epoch"))
    return connections


def _parse_heartbeats(count: int, reply: list[int]) -> list[HeartbeatStatus]:
    statuses = [HeartbeatStatus.SEEN] * count
    for position, status in zip(reply[::2], reply[1::2], strict=True):
        statuses[position - 1] = NOT_SEEN[status]
    return statuses


def _parse_cleanup(reply: list[Any]) -> CleanupBatch:
    now, examined, *removed = reply
    observed_at = _time(now)
    return CleanupBatch(
        tuple(_parse_connection_at(observed_at, fields) for fields in removed), is_last=examined < CLEANUP_BATCH_SIZE
    )
