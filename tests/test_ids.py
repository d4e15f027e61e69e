"""Bad input is refused before the network (guarantee 9), and every other id works and reaches only its own keys."""

from __future__ import annotations

import asyncio
import inspect
from datetime import UTC, datetime
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest

import presence
import presence.sync
from presence import Operations, arguments

if TYPE_CHECKING:
    from presence.sync import ConnectionManager
    from tests.conftest import Keys, ManagerFactory

# Nothing listens there, so an operation that got as far as the network would raise another error.
NOWHERE = "redis://127.0.0.1:1/0"

ID_ARGUMENTS = [
    (name, argument)
    for name, method in inspect.getmembers(presence.Operations, inspect.isfunction)
    for argument in inspect.signature(method).parameters
    if argument.endswith("id") and not name.startswith("_") and hasattr(presence.ConnectionManager, name)
]

ID_ARGUMENTS.append(("cleanup_server", "server_id"))

BAD_IDS: dict[str, tuple[Any, type[Exception]]] = {
    "empty": ("", ValueError),
    "1,025 characters": ("x" * 1025, ValueError),
    "lone surrogate": ("sid-\ud800", ValueError),
    "bytes": (b"sid", TypeError),
    "None": (None, TypeError),
    "int": (7, TypeError),
    "bool": (True, TypeError),
    "list": (["sid"], TypeError),
}

ODD_IDS = [
    "}",
    "{",
    "{other}:conn:x",
    "a}b{c",
    ":",
    "a:b:c",
    "conn:a",
    "last_seen",
    "with space and 'quotes\"",
    "line\nbreak\r\n",
    "nul\0inside",
    "\0",
    "ünïcödé",
    "漢字🎮\u200d",
    "*?[a-z]\\",
    "1700000000000 5",
    "%s%d",
    "x" * 1024,
    "🎮" * 1024,
]


@pytest.mark.parametrize("kind", BAD_IDS)
@pytest.mark.parametrize(("operation", "argument"), ID_ARGUMENTS)
def test_a_bad_id_is_refused_before_the_network_and_named(operation: str, argument: str, kind: str) -> None:
    value, error = BAD_IDS[kind]
    with presence.sync.ConnectionManager.from_url(NOWHERE) as manager:
        method = getattr(manager, operation)
        arguments = dict.fromkeys(inspect.signature(method).parameters, "good") | {argument: value}
        with pytest.raises(error, match=argument):
            method(**arguments)


@pytest.mark.parametrize("argument", ["sid", "game_id"])
def test_only_user_ids_may_be_uuids(argument: str) -> None:
    with (
        presence.sync.ConnectionManager.from_url(NOWHERE) as manager,
        pytest.raises(TypeError, match=f"{argument} must be a str, not UUID"),
    ):
        manager.join_game(**{"sid": "good", "game_id": "good", argument: uuid4()})  # type: ignore[arg-type]


def test_a_uuid_is_the_same_user_as_its_text(manager: ConnectionManager) -> None:
    user_id = UUID("12345678-1234-5678-1234-567812345678")
    manager.register_connection("sid", user_id)
    manager.join_game("sid", "game")

    assert manager.is_user_online(str(user_id))
    connection = manager.get_user_connection(user_id)
    assert connection is not None
    assert connection.user_id == str(user_id)
    assert manager.get_opponent_sid("game", user_id) is None
    assert manager.get_opponent_sid("game", uuid4()) == "sid"


def test_an_id_may_be_a_subclass_of_str(manager: ConnectionManager) -> None:
    class Sid(str):
        __slots__ = ()

    manager.register_connection(Sid("sid"), "user")
    assert manager.update_heartbeat("sid")


@pytest.mark.parametrize("odd", ODD_IDS, ids=lambda odd: ascii(odd)[:20])
def test_an_odd_id_works_in_every_place(manager: ConnectionManager, odd: str) -> None:
    registration = manager.register_connection(odd, odd)
    assert (registration.connection.sid, registration.connection.user_id) == (odd, odd)
    assert manager.join_game(odd, odd)
    assert manager.update_heartbeat(odd)
    connection = manager.get_connection(odd)
    assert connection is not None
    assert connection.game_id == odd
    assert manager.get_user_connection(odd) == connection
    assert manager.get_game_connections(odd) == [connection]
    assert manager.get_game_user_sids(odd) == {odd: odd}
    assert manager.get_opponent_sid(odd, "another") == odd
    assert manager.get_game_connection_count(odd) == 1
    assert manager.leave_game(odd) == odd
    assert manager.join_game(odd, "game").left_game_id is None
    assert manager.register_connection("new", odd).displaced[0].sid == odd


def test_odd_ids_do_not_reach_each_others_keys(manager: ConnectionManager, keys: Keys) -> None:
    for number, odd in enumerate(ODD_IDS):
        manager.register_connection(odd, f"user-{number}")
        manager.join_game(odd, odd)
    for odd in ODD_IDS:
        assert [connection.sid for connection in manager.get_game_connections(odd)] == [odd]
    assert manager.get_connection_count() == len(ODD_IDS)
    assert set(keys().records) == set(keys().games) == set(ODD_IDS)
    for odd in ODD_IDS:
        assert manager.unregister_connection(odd)
    assert keys().ttls_ms == {}


@pytest.mark.parametrize(
    ("threshold", "error"),
    [
        (-1, ValueError),
        (-0.001, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (1e12, ValueError),
        (0.0001, ValueError),
        ("90", TypeError),
        (True, TypeError),
    ],
)
def test_a_bad_threshold_is_refused_before_the_network(threshold: Any, error: type[Exception]) -> None:
    with presence.sync.ConnectionManager.from_url(NOWHERE) as manager:
        with pytest.raises(error, match="threshold_seconds"):
            manager.cleanup_stale_connections(threshold)
        with pytest.raises(error, match="threshold_seconds"):
            manager.run_cleanup(threshold_seconds=threshold)
    with pytest.raises(error, match="threshold_seconds"):
        asyncio.run(presence.ConnectionManager.from_url(NOWHERE).run_cleanup(threshold_seconds=threshold))


@pytest.mark.parametrize(
    ("time", "error"), [(-1, ValueError), (1 << 63, ValueError), (1.5, TypeError), ("1", TypeError), (True, TypeError)]
)
def test_a_bad_time_for_a_batch_is_refused(time: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="not_after_ms"):
        Operations("ns").cleanup_batch(not_after_ms=time)


def test_a_batch_of_no_ids_is_refused() -> None:
    operations = Operations("ns")
    for describe in (operations.heartbeat_batch, operations.users_online_batch, operations.games_connections_batch):
        with pytest.raises(ValueError, match=r"must be 1 to 100? ids, not 0"):
            describe([])


def test_the_largest_numbers_are_accepted() -> None:
    operations = Operations("ns", conn_ttl_seconds=arguments.MAX_SECONDS, connections_per_user=100)
    operations.cleanup_batch(arguments.MAX_SECONDS, not_after_ms=(1 << 63) - 1)
    operations.unregister_connection("sid", grace_seconds=arguments.MAX_SECONDS, epoch=(1 << 63) - 1)


def test_what_cannot_be_called_back_is_refused_before_anything_is_removed() -> None:
    async def awaited(result: presence.CleanupResult) -> None:
        """Nobody would await it for the blocking manager."""

    class Awaited:
        async def __call__(self, result: presence.CleanupResult) -> None:
            """Nobody would await this one either."""

    with presence.sync.ConnectionManager.from_url(NOWHERE) as manager:
        for wrong in ("tell", awaited, Awaited()):
            with pytest.raises(TypeError, match="on_removed must be a function"):
                manager.run_cleanup(on_removed=wrong)  # type: ignore[arg-type]
    asyncio_manager = presence.ConnectionManager.from_url(NOWHERE)
    with pytest.raises(TypeError, match="on_removed must be a function"):
        asyncio.run(asyncio_manager.run_cleanup(on_removed="tell"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("namespace", "", ValueError),
        ("namespace", "a}b", ValueError),
        ("namespace", "a{b", ValueError),
        ("namespace", "x" * 1025, ValueError),
        ("namespace", "\ud800", ValueError),
        ("namespace", b"presence", TypeError),
        ("conn_ttl_seconds", 0, ValueError),
        ("conn_ttl_seconds", -1, ValueError),
        ("conn_ttl_seconds", float("inf"), ValueError),
        ("conn_ttl_seconds", 10 * 365 * 24 * 60 * 60 + 1, ValueError),
        ("conn_ttl_seconds", "3600", TypeError),
        ("conn_ttl_seconds", None, TypeError),
        ("heartbeat_seconds", 0, ValueError),
        ("heartbeat_seconds", False, TypeError),
        ("connections_per_user", 0, ValueError),
        ("connections_per_user", 101, ValueError),
        ("connections_per_user", 1.5, TypeError),
        ("connections_per_user", True, TypeError),
    ],
)
@pytest.mark.parametrize("manager_type", [presence.ConnectionManager, presence.sync.ConnectionManager])
def test_a_bad_option_is_refused_when_the_manager_is_made(
    manager_type: Any, option: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=option):
        manager_type.from_url(NOWHERE, **{option: value})


def test_namespaces_do_not_see_each_other(server_url: str, namespace: str, manager: ConnectionManager) -> None:
    manager.register_connection("sid", "user")
    with presence.sync.ConnectionManager.from_url(server_url, namespace=f"{namespace}-2") as other:
        assert other.get_connection("sid") is None
        assert other.get_connection_count() == 0
        assert not other.cleanup_stale_connections(0)
    assert manager.is_user_online("user")


class Shade(str, Enum):  # noqa: UP042 - a StrEnum shows its text, these do not.
    """As an application keeps its settings; ``str()`` and ``format()`` of these are not their text."""

    NAMESPACE = "shade"
    DISPLACEMENT = "reject_while_alive"
    EVENTS = "stream"


class Small(IntEnum):
    ONE = 1


class Name(str, Enum):  # noqa: UP042 - see above.
    SID = "sid"
    USER = "user"
    GAME = "game"


def test_an_id_that_is_an_enum_comes_back_as_its_text(make_manager: ManagerFactory) -> None:
    manager = make_manager(events="stream")
    made = manager.register_connection(Name.SID, Name.USER).connection
    manager.join_game(Name.SID, Name.GAME)
    (of_user,) = manager.get_all_user_connections(Name.USER)
    (in_game,) = manager.get_game_connections(Name.GAME)
    (in_snapshot,) = manager.get_game_snapshot(Name.GAME).connections
    in_games, in_users = manager.get_games_connections([Name.GAME]), manager.get_users_connections([Name.USER])
    found = [
        *(made, of_user, in_game, in_snapshot, *in_games["game"], in_users["user"], manager.get_connection(Name.SID)),
        manager.get_user_connection(Name.USER),
    ]
    names: list[Any] = [
        *in_games,
        *in_users,
        *manager.are_users_online([Name.USER]),
        *manager.update_heartbeats([Name.SID]),
    ]
    names += [*manager.get_game_user_sids(Name.GAME), *manager.get_game_user_sids(Name.GAME).values()]
    found.append(manager.unregister_connection(Name.SID))
    for connection in found:
        assert connection is not None
        names += [connection.sid, connection.user_id, connection.game_id or ""]
    assert {type(name) for name in names} == {str}


def test_an_option_may_be_an_enum_that_is_a_str(make_manager: ManagerFactory, namespace: str) -> None:
    with presence.sync.ConnectionManager(namespace=Shade.NAMESPACE) as manager:
        assert manager.operations.last_seen_key == b"{shade}:last_seen"
    manager = make_manager(displacement=Shade.DISPLACEMENT, events=Shade.EVENTS)
    assert manager.register_connection("sid", "user")
    assert not manager.register_connection("next", "user")
    assert manager.get_game_snapshot("game").position.endswith("/1")


def test_a_number_may_be_an_enum_that_is_an_int(make_manager: ManagerFactory) -> None:
    manager = make_manager(connections_per_user=Small.ONE, conn_ttl_seconds=Small.ONE)
    registered = manager.register_connection("sid", "user").connection
    epoch = IntEnum("Epoch", {"CURRENT": registered.epoch}).CURRENT  # type: ignore[attr-defined]
    assert manager.join_game("sid", "game", capacity=Small.ONE, epoch=epoch)


HUGE = 10**5_000
"""Python refuses to show it, and hiredis ends the process when it is to send it."""


@pytest.mark.parametrize("huge", [HUGE, -HUGE], ids=["huge", "minus huge"])
@pytest.mark.parametrize(
    ("operation", "argument"),
    [
        ("update_heartbeat", "sid"),
        ("update_heartbeat", "epoch"),
        ("join_game", "epoch"),
        ("join_game", "capacity"),
        ("leave_game", "epoch"),
        ("unregister_connection", "epoch"),
        ("unregister_connection", "grace_seconds"),
        ("update_metadata", "epoch"),
        ("update_metadata", "metadata"),
        ("register_connection", "user_id"),
        ("cleanup_stale_connections", "threshold_seconds"),
        ("cleanup_server", "grace_seconds"),
        ("update_heartbeats", "sids"),
    ],
)
def test_a_number_that_python_cannot_show_is_refused_and_named(operation: str, argument: str, huge: int) -> None:
    with presence.sync.ConnectionManager.from_url(NOWHERE) as manager:
        method = getattr(manager, operation)
        needed = [name for name, one in inspect.signature(method).parameters.items() if one.default is one.empty]
        with pytest.raises((TypeError, ValueError), match=argument):
            method(**dict.fromkeys(needed, "good") | {argument: huge})


@pytest.mark.parametrize(
    ("threshold", "error"),
    [(-1, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), ("90", TypeError), (None, TypeError)],
)
def test_a_bad_threshold_for_a_connection_is_refused_and_named(threshold: Any, error: type[Exception]) -> None:
    now = datetime.now(UTC)
    connection = presence.ConnectionInfo("sid", "user", None, now, now)
    with pytest.raises(error, match="threshold_seconds"):
        connection.is_stale(threshold)
