"""update_heartbeat, is_user_online, and TTLs: nothing leaks, nothing expires early (guarantee 6)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import redis

import presence
from presence.operations import RETENTION_MS
from presence.scripts import lua_folder

if TYPE_CHECKING:
    from collections.abc import Callable

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


@pytest.mark.parametrize("of", ["one", "many"])
def test_it_marks_it_as_seen_now_even_if_the_clock_was_set_back(
    manager: ConnectionManager, wait: Callable[[float], None], of: str
) -> None:
    """The heartbeat before is still to come; if it stayed, the connection would outlive its silence by as much."""
    manager.register_connection("sid", "user")
    wait(-7200)
    before = manager.get_connection("sid")
    assert before is not None
    assert before.last_seen > before.observed_at

    assert manager.update_heartbeat("sid") if of == "one" else manager.update_heartbeats(["sid"])["sid"]

    after = manager.get_connection("sid")
    assert after is not None
    assert before.observed_at <= after.last_seen <= after.observed_at


@pytest.mark.parametrize(("silent_seconds", "online"), [(89, True), (91, False)])
def test_a_user_is_online_for_three_heartbeats(
    manager: ConnectionManager, wait: Callable[[float], None], silent_seconds: float, online: bool
) -> None:
    manager.register_connection("sid", "user")
    wait(silent_seconds)

    assert manager.is_user_online("user") is online
    connection = manager.get_user_connection("user")
    assert connection is not None
    assert connection.is_stale() is (not online)


@pytest.mark.parametrize(
    ("silent_ms", "threshold_seconds", "is_stale"),
    [(90_000, 90, False), (90_001, 90, True), (0, 0, False), (1, 0, True)],
)
def test_a_connection_is_stale_once_it_was_silent_for_longer_than_the_threshold(
    silent_ms: int, threshold_seconds: float, is_stale: bool
) -> None:
    seen = datetime(2026, 11, 30, tzinfo=UTC)
    observed = seen + timedelta(milliseconds=silent_ms)
    connection = presence.ConnectionInfo("sid", "user", None, seen, seen, observed)
    assert connection.is_stale(threshold_seconds) is is_stale


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


# One manager is enough for thousands of calls: the scripts decide it, which both send alike.
@pytest.mark.parametrize("make_manager", ["blocking"], indirect=True)
@pytest.mark.parametrize("does", ["beats", "comes back"])
@pytest.mark.parametrize("interval_seconds", [30, 890, 6 * 60 * 60 - 400])
def test_a_player_never_falls_out_however_long_the_game_lasts(
    make_manager: ManagerFactory, wait: Callable[[float], None], interval_seconds: int, does: str
) -> None:
    """One who beats, and one who never does and is there again on another connection each time.

    Often, about as often as TTLs are refreshed, and as seldom as they may, for longer than any key lives without a
    refresh. What has expired meanwhile nothing would bring back.
    """
    manager = make_manager(conn_ttl_seconds=6 * 60 * 60)
    sid = "0"
    manager.register_connection(sid, "user")
    manager.join_game(sid, "game")
    for number in range(1, 120_000 // interval_seconds + 1):
        wait(interval_seconds)
        if does == "beats":
            assert manager.update_heartbeat(sid)
        else:
            sid = str(number)
            assert manager.register_connection(sid, "user").displaced
            assert manager.join_game(sid, "game")
    wait(5 * 60 * 60)

    connection = manager.get_connection(sid)
    assert connection is not None
    assert connection.game_id == "game"
    assert manager.get_user_connection("user") == connection
    assert manager.get_game_connections("game") == [connection]
    assert manager.get_connection_count() == manager.get_game_connection_count("game") == 1
    assert manager.update_heartbeat(sid)
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


def resume(manager: ConnectionManager) -> None:
    manager.unregister_connection("sid", grace_seconds=1)
    assert manager.register_connection("new", "user").resumed


@pytest.mark.parametrize(
    "see",
    [
        lambda manager: manager.update_heartbeat("sid"),
        lambda manager: manager.update_heartbeats(["sid"]),
        lambda manager: manager.register_connection("sid", "user"),
        resume,
    ],
    ids=["heartbeat", "heartbeats", "register", "resume"],
)
def test_what_marks_it_as_seen_keeps_every_key_for_as_long_as_it_is_live_then(
    make_manager: ManagerFactory,
    wait: Callable[[float], None],
    keys: Keys,
    see: Callable[[ConnectionManager], object],
) -> None:
    """The 27 hours by which keys outlive their connections would not hide a forgotten key, of a TTL of ten days."""
    seconds = 10 * 24 * 60 * 60
    manager = make_manager(conn_ttl_seconds=seconds, server_id="server")
    manager.register_connection("sid", "user")
    manager.join_game("sid", "game")
    wait(seconds - 1)

    see(manager)

    assert min(keys().ttls_ms.values()) > seconds * 1000


@pytest.mark.parametrize("of", ["one", "many"])
def test_the_ttls_are_refreshed_at_the_latest_after_15_minutes(
    make_manager: ManagerFactory, wait: Callable[[float], None], keys: Keys, of: str
) -> None:
    manager = make_manager(server_id="server")
    manager.register_connection("sid", "user")
    manager.join_game("sid", "game")
    before_ms = keys().ttls_ms
    # The first time, the answer that was kept with the user's list goes.
    for _ in range(2):
        wait(15 * 60)
        assert manager.update_heartbeat("sid") if of == "one" else manager.update_heartbeats(["sid"])["sid"]
        refreshed_ms = keys().ttls_ms
        assert len(refreshed_ms) == 5  # the connection, its user's list, its game, its server's list, last_seen
        assert min(refreshed_ms.values()) > min(before_ms.values()) - 60_000


def test_each_microsecond_is_another_chance_to_refresh_the_ttls(server_url: str) -> None:
    """However short the time between two heartbeats is, it counts."""
    text = (lua_folder() / "include" / "random_number.lua").read_text(encoding="utf-8")
    script = (
        f"local function number_of(clock)\n{text}\nreturn random_number\nend"
        + """
        local seen, distinct, small_after_small, before = {}, 0, 0, 1
        for microsecond = 0, 999999 do
          local number = number_of({'1763999999', tostring(microsecond)})
          local millionth = math.floor(number * 1000000 + 0.5)
          if not seen[millionth] then
            seen[millionth], distinct = true, distinct + 1
          end
          small_after_small, before = small_after_small + (math.max(number, before) < 0.1 and 1 or 0), number
        end
        return {distinct, small_after_small}
        """
    )
    # On a busy machine this takes longer than a client waits by default.
    with redis.Redis.from_url(server_url, socket_timeout=60) as client:
        assert client.eval(script, 0) == [1_000_000, 0]


def test_an_evicted_record_is_not_made_again_and_is_missed_after_15_minutes(
    manager: ConnectionManager, client: redis.Redis, namespace: str, wait: Callable[[float], None], keys: Keys
) -> None:
    manager.register_connection("sid", "user")
    client.delete(f"{{{namespace}}}:conn:sid", f"{{{namespace}}}:user_conns:user")
    manager.update_heartbeat("sid")
    assert keys().records == {}
    wait(15 * 60)
    assert not manager.update_heartbeat("sid")
    assert keys().ttls_ms == {}


def test_one_of_many_whose_record_was_evicted_is_unknown_from_the_heartbeat_on_that_misses_it(
    manager: ConnectionManager, client: redis.Redis, namespace: str, wait: Callable[[float], None]
) -> None:
    manager.register_connection("sid", "user")
    client.delete(f"{{{namespace}}}:conn:sid", f"{{{namespace}}}:user_conns:user")
    wait(15 * 60)
    assert manager.update_heartbeats(["sid"]) == {"sid": presence.HeartbeatStatus.UNKNOWN}
    assert manager.update_heartbeats(["sid"]) == {"sid": presence.HeartbeatStatus.UNKNOWN}


def test_a_refresh_brings_back_an_evicted_list_of_the_user(
    manager: ConnectionManager, client: redis.Redis, namespace: str, wait: Callable[[float], None]
) -> None:
    manager.register_connection("sid", "user")
    client.delete(f"{{{namespace}}}:user_conns:user")
    assert not manager.is_user_online("user")
    wait(15 * 60)  # The TTLs are refreshed for certain.
    assert manager.update_heartbeat("sid")
    assert manager.is_user_online("user")
    assert [gone.sid for gone in manager.register_connection("next", "user").displaced] == ["sid"]


def test_a_refresh_lists_a_connection_again_before_those_that_came_after_the_eviction(
    manager: ConnectionManager, client: redis.Redis, namespace: str, wait: Callable[[float], None]
) -> None:
    manager.register_connection("old", "user")
    wait(15 * 60)
    client.delete(f"{{{namespace}}}:user_conns:user")
    register = manager.operations.register_connection("new", "user")
    assert not manager.pipeline([register])[0].displaced
    assert manager.update_heartbeat("old")
    assert [one.sid for one in manager.get_all_user_connections("user")] == ["old", "new"]
    active = manager.get_user_connection("user")
    assert active is not None
    assert active.sid == "new"
    assert not manager.pipeline([register])[0].displaced  # Sent again, it finds the answer that was kept there.
    assert [gone.sid for gone in manager.register_connection("next", "user").displaced] == ["old", "new"]


def test_all_keys_of_an_abandoned_namespace_expire(
    make_manager: ManagerFactory, wait: Callable[[float], None], keys: Keys
) -> None:
    manager = make_manager(conn_ttl_seconds=100)
    manager.register_connection("sid", "user")
    manager.join_game("sid", "game")
    manager.update_heartbeat("sid")
    wait(101 + RETENTION_MS / 1000)
    assert keys().ttls_ms | keys().other_ttls_ms == {}


def test_hardly_a_heartbeat_refreshes_the_ttls(manager: ConnectionManager, client: redis.Redis) -> None:
    """Each that does reads the record and the user's list. (That two of these do is less likely than one in 10^6.)"""
    manager.register_connection("sid", "user")
    client.config_resetstat()

    assert all(manager.pipeline([manager.operations.update_heartbeat("sid") for _ in range(100)]))

    stats: Any = client.info("commandstats")
    assert stats.get("cmdstat_get", {"calls": 0})["calls"] <= 2
