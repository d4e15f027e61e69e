"""update_heartbeat, is_user_online, and TTLs: nothing leaks, nothing expires early (guarantee 6)."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    import redis

    from presence.sync import ConnectionManager
    from tests.conftest import Keys, ManagerFactory


def test_it_marks_the_connection_as_seen_now(manager: ConnectionManager, wait: Callable[[float], None]) -> None:
    manager.register_connection("sid", "user")
    wait(80)
    before = manager.get_connection("sid")
    assert before is not None

    assert manager.update_heartbeat("sid")

    after = manager.get_connection("sid")
    assert after is not None
    assert after.last_seen - before.last_seen >= timedelta(seconds=80)
    assert after.connected_at == before.connected_at


@pytest.mark.parametrize(("silent_seconds", "online"), [(89, True), (91, False)])
def test_a_user_is_online_for_three_heartbeats(
    manager: ConnectionManager, wait: Callable[[float], None], silent_seconds: float, online: bool
) -> None:
    manager.register_connection("sid", "user")
    wait(silent_seconds)

    assert manager.is_user_online("user") is online
    connection = manager.get_user_connection("user")
    assert connection is not None
    assert connection.is_stale() is not online


def test_the_stale_threshold_follows_the_heartbeat(make_manager: ManagerFactory, wait: Callable[[float], None]) -> None:
    manager = make_manager(heartbeat_seconds=10)
    manager.register_connection("sid", "user")
    wait(29)
    assert manager.is_user_online("user")
    wait(2)
    assert not manager.is_user_online("user")
    assert len(manager.cleanup_stale_connections()) == 1


def test_a_ttl_shorter_than_the_stale_threshold_ends_being_online(
    make_manager: ManagerFactory, wait: Callable[[float], None]
) -> None:
    manager = make_manager(conn_ttl_seconds=20)
    manager.register_connection("sid", "user")
    wait(21)
    assert not manager.is_user_online("user")


@pytest.mark.parametrize("interval_hours", [0.4, 1.4, 5.9])
def test_a_player_who_beats_never_falls_out_however_long_the_game_lasts(
    make_manager: ManagerFactory, wait: Callable[[float], None], interval_hours: float
) -> None:
    # Beats that come often, about once in a quarter of the TTL, and as seldom as they may, for longer than any key
    # lives without a refresh.
    manager = make_manager(conn_ttl_seconds=6 * 60 * 60)
    manager.register_connection("sid", "user")
    manager.join_game("sid", "game")
    for _ in range(round(100 / interval_hours)):
        wait(interval_hours * 60 * 60)
        assert manager.update_heartbeat("sid")

    connection = manager.get_connection("sid")
    assert connection is not None
    assert connection.game_id == "game"
    assert manager.get_user_connection("user") == connection
    assert manager.get_game_connections("game") == [connection]
    assert manager.get_connection_count() == manager.get_game_connection_count("game") == 1
    assert manager.is_user_online("user")


def test_every_key_outlives_its_connection_from_each_operation_on(
    make_manager: ManagerFactory, wait: Callable[[float], None], keys: Keys
) -> None:
    """No part of a connection may be gone while another part is still live, at whatever moment it was touched last."""
    manager = make_manager(conn_ttl_seconds=100)

    def shortest_ttl_seconds() -> float:
        return min(keys().ttls_ms.values()) / 1000

    manager.register_connection("sid", "user")
    assert shortest_ttl_seconds() > 100
    for seconds in (20, 24, 26, 99):
        wait(seconds)
        manager.join_game("sid", f"game-{seconds}")
        assert manager.update_heartbeat("sid")
        assert shortest_ttl_seconds() > 100
        manager.register_connection("sid", "user")
        assert shortest_ttl_seconds() > 100


def test_a_heartbeat_of_a_connection_whose_record_was_evicted_is_refused(
    manager: ConnectionManager, client: redis.Redis, namespace: str, keys: Keys
) -> None:
    manager.register_connection("sid", "user")
    client.delete(f"{{{namespace}}}:conn:sid", f"{{{namespace}}}:user_conns:user")
    assert not manager.update_heartbeat("sid")
    assert keys().ttls_ms == {}


def test_all_keys_of_an_abandoned_namespace_expire(
    make_manager: ManagerFactory, wait: Callable[[float], None], keys: Keys
) -> None:
    manager = make_manager(conn_ttl_seconds=100)
    manager.register_connection("sid", "user")
    manager.join_game("sid", "game")
    manager.update_heartbeat("sid")
    wait(150 + 24 * 60 * 60)
    assert keys().ttls_ms | keys().other_ttls_ms == {}
