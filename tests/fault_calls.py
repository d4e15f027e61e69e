"""The core's operations as a table: what each is called with in one fixed scene, and what it must answer there."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis.asyncio.retry
import redis.retry
from redis.backoff import NoBackoff

from presence import PresenceError, retrying
from presence.commands import load_command

if TYPE_CHECKING:
    from collections.abc import Callable

    from presence import Operation
    from presence.commands import Command
    from presence.scripts import Script
    from presence.sync import ConnectionManager


@dataclass(frozen=True)
class Call:
    """One call in the scene, and what of its result is compared with what."""

    arguments: tuple[Any, ...]
    of_result: Callable[[Any], Any]
    expected: Any


CALLS: dict[str, Call] = {
    "register_connection": Call(
        ("sid-3", "user-1"),
        lambda result: (result.connection.sid, [gone.sid for gone in result.displaced]),
        ("sid-3", ["sid-1"]),
    ),
    "unregister_connection": Call(("sid-1",), lambda result: (result.sid, result.game_id), ("sid-1", "game")),
    "join_game": Call(("sid-1", "next game"), lambda result: (result.joined, result.left_game_id), (True, "game")),
    "leave_game": Call(("sid-1",), lambda result: result, "game"),
    "update_heartbeat": Call(("sid-1",), lambda result: result, True),
    "get_connection": Call(("sid-1",), lambda result: (result.user_id, result.game_id), ("user-1", "game")),
    "get_user_connection": Call(("user-1",), lambda result: (result.sid, result.game_id), ("sid-1", "game")),
    "get_all_user_connections": Call(("user-1",), lambda result: [info.sid for info in result], ["sid-1"]),
    "is_user_online": Call(("user-1",), lambda result: result, True),
    "get_game_connections": Call(
        ("game",),
        lambda result: [(info.sid, info.user_id) for info in result],
        [("sid-1", "user-1"), ("sid-2", "user-2")],
    ),
    "get_game_user_sids": Call(("game",), lambda result: result, {"user-1": "sid-1", "user-2": "sid-2"}),
    "get_opponent_sid": Call(("game", "user-1"), lambda result: result, "sid-2"),
    "cleanup_stale_connections": Call((), lambda result: (result.removed, result.error), ((), None)),
    "get_connection_count": Call((), lambda result: result, 2),
    "get_game_connection_count": Call(("game",), lambda result: result, 2),
}

READS = tuple(name for name in CALLS if name.startswith(("get_", "is_")))


def set_the_scene(manager: ConnectionManager) -> None:
    """Register two users who play one game against each other."""
    for number in (1, 2):
        manager.register_connection(f"sid-{number}", f"user-{number}")
        manager.join_game(f"sid-{number}", "game")


def load_late(script: Script) -> Command:
    """Stand in for ``load_command``: it is too late then to send the call again."""
    time.sleep(retrying.RETRYING_SECONDS + 0.1)
    return load_command(script)


def call(manager: ConnectionManager, name: str) -> Any:
    """Call an operation as the table says."""
    return getattr(manager, name)(*CALLS[name].arguments)


def check(manager: ConnectionManager, name: str) -> None:
    """Call an operation in the scene, and compare what it answers."""
    assert CALLS[name].of_result(call(manager, name)) == CALLS[name].expected


def play(manager: ConnectionManager) -> None:
    """Check every operation, each in the same scene."""
    for name in CALLS:
        for sid in ("sid-1", "sid-2", "sid-3"):
            manager.unregister_connection(sid)
        set_the_scene(manager)
        check(manager, name)


def one_attempt(kind: str) -> dict[str, Any]:
    """Give the client options under which a fault is met at once, for tests of the error alone."""
    retry = redis.asyncio.retry.Retry if kind == "asyncio" else redis.retry.Retry
    return {"retry": retry(NoBackoff(), 0)}


def assert_cause(error: BaseException, cause: type[Exception]) -> None:
    """Check that an error is one of presence's, made of one of redis-py's."""
    assert isinstance(error, PresenceError)
    assert isinstance(error.__cause__, cause)


def pipeline(manager: ConnectionManager, *operations: Operation[Any]) -> list[Any]:
    """Run operations of any types together."""
    return manager.pipeline(operations)
