"""unregister_connection, and what a late call on a connection that is gone may do: nothing (guarantee 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from presence.sync import ConnectionManager
    from tests.conftest import Keys, ManagerFactory


def test_it_removes_the_connection_everywhere_and_says_what_it_removed(manager: ConnectionManager, keys: Keys) -> None:
    manager.register_connection("sid", "user")
    manager.join_game("sid", "game")
    connection = manager.get_connection("sid")

    assert manager.unregister_connection("sid") == connection

    assert not manager.is_user_online("user")
    assert manager.get_connection_count() == 0
    assert keys().ttls_ms == {}


def test_it_leaves_the_other_players_of_the_game_alone(manager: ConnectionManager) -> None:
    for sid, user_id in (("sid-1", "user-1"), ("sid-2", "user-2")):
        manager.register_connection(sid, user_id)
        manager.join_game(sid, "game")

    manager.unregister_connection("sid-1")

    assert manager.get_game_user_sids("game") == {"user-2": "sid-2"}


LATE_CALLS: dict[str, tuple[Callable[[ConnectionManager, str], Any], Any]] = {
    "unregister": (lambda manager, sid: manager.unregister_connection(sid), None),
    "leave": (lambda manager, sid: manager.leave_game(sid), None),
    "join": (lambda manager, sid: manager.join_game(sid, "game").joined, False),
    "heartbeat": (lambda manager, sid: manager.update_heartbeat(sid), False),
}


@pytest.mark.parametrize("late_call", LATE_CALLS)
class TestTheLateDisconnectIsHarmless:
    """Unregister, leave, join and heartbeat on a sid that is not live change nothing and recreate nothing."""

    def test_on_an_unknown_sid(self, manager: ConnectionManager, keys: Keys, late_call: str) -> None:
        call, answer = LATE_CALLS[late_call]
        assert call(manager, "unknown") == answer
        assert keys().ttls_ms == {}

    def test_on_a_displaced_sid(self, manager: ConnectionManager, keys: Keys, late_call: str) -> None:
        manager.register_connection("old", "user")
        manager.join_game("old", "game")
        manager.register_connection("new", "user")
        manager.join_game("new", "game")
        before = keys()

        call, answer = LATE_CALLS[late_call]
        assert call(manager, "old") == answer

        assert self.stored(keys) == (before.records, before.users, before.games, before.last_seen)
        assert manager.is_user_online("user")

    def test_on_a_removed_sid(self, manager: ConnectionManager, keys: Keys, late_call: str) -> None:
        manager.register_connection("sid", "user")
        manager.unregister_connection("sid")

        call, answer = LATE_CALLS[late_call]
        assert call(manager, "sid") == answer
        assert keys().ttls_ms == {}

    def test_on_an_expired_sid(
        self, make_manager: ManagerFactory, keys: Keys, wait: Callable[[float], None], late_call: str
    ) -> None:
        manager = make_manager(conn_ttl_seconds=60)
        manager.register_connection("sid", "user")
        manager.join_game("sid", "another game")
        wait(61)
        before = keys()

        call, answer = LATE_CALLS[late_call]
        assert call(manager, "sid") == answer

        assert self.stored(keys) == (before.records, before.users, before.games, before.last_seen)

    @staticmethod
    def stored(keys: Keys) -> tuple[object, ...]:
        keyspace = keys()
        return keyspace.records, keyspace.users, keyspace.games, keyspace.last_seen
