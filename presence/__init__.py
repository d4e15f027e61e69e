"""Who is online, on which WebSocket connection and in which game, for game servers that share Redis or Valkey.

Every operation on a connection, a user or a game is one Lua script, so it is atomic and takes one round trip.
``ConnectionManager`` is for asyncio, ``presence.sync.ConnectionManager`` for blocking code.
"""

from presence import sync
from presence.errors import (
    AuthenticationFailedError,
    EventsLostError,
    OutOfMemoryError,
    PermissionDeniedError,
    PipelineError,
    PresenceError,
    ReadOnlyServerError,
    ServerBusyError,
    ServerUnreachableError,
    UnexpectedReplyError,
)
from presence.manager import ConnectionManager
from presence.operations import Displacement, EventsMode, Operation, Operations
from presence.results import (
    CleanupResult,
    ConnectionInfo,
    Event,
    EventType,
    GameSnapshot,
    HeartbeatStatus,
    JoinResult,
    Registration,
)
from presence.subscriptions import AsyncSubscription, Subscription

__all__ = [
    "AsyncSubscription",
    "AuthenticationFailedError",
    "CleanupResult",
    "ConnectionInfo",
    "ConnectionManager",
    "Displacement",
    "Event",
    "EventType",
    "EventsLostError",
    "EventsMode",
    "GameSnapshot",
    "HeartbeatStatus",
    "JoinResult",
    "Operation",
    "Operations",
    "OutOfMemoryError",
    "PermissionDeniedError",
    "PipelineError",
    "PresenceError",
    "ReadOnlyServerError",
    "Registration",
    "ServerBusyError",
    "ServerUnreachableError",
    "Subscription",
    "UnexpectedReplyError",
    "connection_manager",
    "sync",
]

connection_manager: ConnectionManager = ConnectionManager()
"""A ready-made manager. It connects on first use: to ``PRESENCE_REDIS_URL``, ``REDIS_URL``, or the local server."""
