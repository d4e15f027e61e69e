"""What the operations answer: frozen values, exported from ``presence``."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from presence.arguments import milliseconds
from presence.errors import PresenceError  # noqa: TC001, for code that resolves the annotations, as pydantic does

if TYPE_CHECKING:
    from collections.abc import Iterator


def _now() -> datetime:
    return datetime.now(UTC)


def to_time(milliseconds: int) -> datetime:
    """Make an aware datetime of a server time."""
    # Exact: a double holds the seconds of this century to a quarter of a microsecond, and that is rounded.
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


class _Times:
    """The times of a connection as the server gave them, in milliseconds, until one is asked for.

    Most never are, and making datetimes of all took two fifths of the time to parse a room.
    """

    __slots__ = ("_connected_at", "_last_seen", "_observed_at")

    if not TYPE_CHECKING:  # To a type checker, a name that is not a field stays an error.

        def __getattr__(self, name):
            """Make a field of its milliseconds; Python calls this only for what is not set."""
            if name not in ("connected_at", "last_seen", "observed_at"):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
            time = to_time(getattr(self, "_" + name))
            object.__setattr__(self, name, time)
            return time


@dataclass(frozen=True, slots=True)
class ConnectionInfo(_Times):
    """One WebSocket connection, as the server saw it at ``observed_at``.

    All times are aware UTC datetimes of the Redis server's clock, in whole milliseconds.
    """

    sid: str
    """The Socket.IO session id, or whatever names the connection."""
    user_id: str
    """The user whose connection it is; a UUID is given back as its text."""
    game_id: str | None
    """The game that it is in, if any."""
    connected_at: datetime
    """When it was registered. Registering the same sid again for the same user does not change it."""
    last_seen: datetime
    """When it was registered or sent its last heartbeat, whichever is later."""
    observed_at: datetime = field(default_factory=_now, compare=False, repr=False)
    """The server's time when this was read (this machine's, if made by hand). Comparisons leave it out."""
    epoch: int = 0
    """The number of its registration, larger than every earlier one in the namespace: a fencing token."""
    detached_until: datetime | None = None
    """When the grace of a detached connection ends; None if it is connected."""
    server_id: str | None = None
    """The game server that it was registered for, if one was named; a detached connection belongs to none."""
    metadata: bytes = b""
    """What the application keeps with it, at most 4 KiB."""

    @property
    def is_detached(self) -> bool:
        """Whether its socket is gone and only its seat is kept, until ``detached_until``."""
        return self.detached_until is not None

    def is_stale(self, threshold_seconds: float = 90) -> bool:
        """Tell whether it had not been seen for longer than the threshold when it was read.

        What a manager reads has both times from the server, so this machine's clock does not matter (and an old value
        does not grow stale by lying around: read it again).

        Args:
            threshold_seconds: seconds, 0 or more; 90 is three heartbeats of 30 seconds. A manager with another
                ``heartbeat_seconds`` uses three of its own to tell who is online, and for cleanup.

        Returns:
            Whether ``observed_at - last_seen`` is longer than the threshold.

        Raises:
            TypeError: the threshold is no number.
            ValueError: it is negative, NaN, or more than ten years.

        """
        threshold_ms = milliseconds("threshold_seconds", threshold_seconds, allow_zero=True)
        return self.observed_at - self.last_seen > timedelta(milliseconds=threshold_ms)


class _Unfrozen(_Times):
    """The same fields as a ``ConnectionInfo``, which is what it becomes once they are set."""

    __slots__ = ConnectionInfo.__slots__


def make_connection(
    sid: str,
    user_id: str,
    game_id: str | None,
    connected_at: int,
    last_seen: int,
    observed_at: int,
    epoch: int,
    detached_until: int | None = None,
    server_id: str | None = None,
    metadata: bytes = b"",
) -> ConnectionInfo:
    """Make a ``ConnectionInfo``, its times in milliseconds, in a third of the time that setting frozen fields takes."""
    info: Any = _Unfrozen()
    info.sid = sid
    info.user_id = user_id
    info.game_id = game_id
    info._connected_at = connected_at
    info._last_seen = last_seen
    info._observed_at = observed_at
    info.epoch = epoch
    info.detached_until = None if detached_until is None else to_time(detached_until)
    info.server_id = server_id
    info.metadata = metadata
    # Both have the same slots, so the one may become the other.
    info.__class__ = ConnectionInfo
    return info  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Registration:
    """What ``register_connection`` did; true unless it was refused."""

    connection: ConnectionInfo
    """The user's active connection now; if the registration was refused, the one that is alive."""
    displaced: tuple[ConnectionInfo, ...] = ()
    """The user's earlier connections that it displaced: close their sockets. No other call reports them."""
    resumed: bool = False
    """Whether it took over the seat of an earlier connection, with its game."""
    replaced: ConnectionInfo | None = None
    """What had this same sid before and is gone: another user's connection, or one that had expired."""
    resumed_from: ConnectionInfo | None = None
    """The connection whose seat it took over, as it was before: a detached one, which may have had the same sid, or,
    with ``displacement="newest_resumes"``, one of those displaced."""
    refused: bool = False
    """Whether nothing was changed, because the user is connected and the policy is ``reject_while_alive``."""

    def __bool__(self) -> bool:
        return not self.refused


@dataclass(frozen=True, slots=True)
class JoinResult:
    """What ``join_game`` did; true when the connection is in the game now."""

    joined: bool
    """Whether the connection is in the game; False when there is no such connection, or the game is full."""
    left_game_id: str | None = None
    """The other game that it left for this one, if any."""
    is_full: bool = False
    """Whether it did not join because the game is full; it stays in the game that it was in."""

    def __bool__(self) -> bool:
        return self.joined


class HeartbeatStatus(StrEnum):
    """What became of one heartbeat of many; true when the connection was seen. Each equals its text."""

    SEEN = "seen"
    """It is live, and was seen now."""
    UNKNOWN = "unknown"
    """There is no such connection: it was displaced or removed, or there never was one."""
    EXPIRED = "expired"
    """It had not been seen for ``conn_ttl_seconds``, or its grace is over, and no cleanup has removed it yet."""
    DETACHED = "detached"
    """Its socket was reported as gone, or its game server was taken for dead, and only its seat is kept."""

    def __bool__(self) -> bool:
        return self is HeartbeatStatus.SEEN


class EventType(StrEnum):
    """What happened to a connection, or to its user; each equals its text: ``EventType.JOINED == "joined"``."""

    REGISTERED = "registered"
    """It was registered, or registered again."""
    DISPLACED = "displaced"
    """A newer one of its user displaced it, another user took its sid, or it had expired and its sid was registered
    again."""
    RESUMED = "resumed"
    """It took over the seat of ``Event.resumed_from``, with its game."""
    DETACHED = "detached"
    """Its socket is gone, and its seat is kept."""
    JOINED = "joined"
    """It joined ``connection.game_id``."""
    LEFT = "left"
    """It left ``connection.game_id``."""
    UNREGISTERED = "unregistered"
    """It was removed."""
    EXPIRED = "expired"
    """Cleanup removed it, because it or its game server was no longer seen, or its grace was over."""
    METADATA_UPDATED = "metadata_updated"
    """Its metadata was replaced."""
    USER_ONLINE = "user_online"
    """With it, its user has a connection that is not detached; before, the user had none."""
    USER_OFFLINE = "user_offline"
    """With its end, its user has no connection left that is not detached."""


@dataclass(frozen=True, slots=True)
class Event:
    """One change, as the script that made it published it."""

    type: EventType
    connection: ConnectionInfo
    """The connection after the change or, when it is gone or has left a game, as it was before."""
    at: datetime
    """When it happened, by the server's clock."""
    resumed_from: ConnectionInfo | None = None
    """Of ``RESUMED``, the connection whose seat was taken over: a detached one, which may have had the same sid, or one
    that was displaced just before."""
    position: str | None = None
    """Its position in the stream, to go on after it with ``subscribe(after=…)``; None through pub/sub."""


@dataclass(frozen=True, slots=True)
class GameSnapshot:
    """The connections in a game, and the position in the stream of events at that same moment."""

    connections: tuple[ConnectionInfo, ...]
    """By their epoch, so the earliest registration comes first; detached ones included."""
    position: str
    """What happened later comes after it: ``subscribe(game_id=…, after=position)``."""


@dataclass(frozen=True, slots=True)
class CleanupResult:
    """What a cleanup removed and detached; true when it did either. Its length is how many it removed."""

    removed: tuple[ConnectionInfo, ...] = ()
    """The connections that this call removed, in each batch the stale ones first, beginning with the longest silent. No
    other call reports them."""
    error: PresenceError | None = None
    """Why it stopped before everything stale was removed, if it did; what it had removed is reported nevertheless."""
    detached: tuple[ConnectionInfo, ...] = ()
    """The connections that this call detached, as they are now: those of dead game servers, or of the one asked for,
    and stale ones whose server has missed a heartbeat and a half. No other call reports them."""

    def __bool__(self) -> bool:
        return bool(self.removed or self.detached)

    def __len__(self) -> int:
        return len(self.removed)

    def __iter__(self) -> Iterator[ConnectionInfo]:
        return iter(self.removed)
