"""register_connection: one active connection per user (guarantee 2), a sid registered once (guarantee 4)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import redis

from tests.clock import let_time_pass

if TYPE_CHECKING:
    from collections.abc import Callable

    from presence.sync import ConnectionManager
    from tests.conftest import Keys, ManagerFactory
    from tests.server import LocalServer


def test_a_new_connection_is_known_everywhere_at_once(manager: ConnectionManager, keys: Keys) -> None:
    registration = manager.register_connection("sid", "user")

    assert registration.displaced == ()
    assert registration.replaced is None
    assert not registration.resumed
    connection = registration.connection
    assert (connection.sid, connection.user_id, connection.game_id) == ("sid", "user", None)
    assert connection.connected_at == connection.last_seen == connection.observed_at
    assert manager.get_connection("sid") == connection
    assert manager.get_user_connection("user") == connection
    assert manager.is_user_online("user")
    assert manager.get_connection_count() == 1
    keyspace = keys()
    assert list(keyspace.records) == ["sid"]
    assert keyspace.users == {"user": ["sid"]}
    assert list(keyspace.last_seen) == ["sid"]


def test_times_are_those_of_the_server(manager: ConnectionManager, client: redis.Redis) -> None:
    def server_time() -> datetime:
        seconds, microseconds = client.time()
        return datetime.fromtimestamp(seconds, UTC) + timedelta(microseconds=microseconds)

    before = server_time()
    connected_at = manager.register_connection("sid", "user").connection.connected_at
    after = server_time()

    assert before - timedelta(milliseconds=1) < connected_at <= after
    assert connected_at.tzinfo is UTC


def test_a_newer_connection_displaces_the_earlier_one_out_of_every_structure(
    manager: ConnectionManager, keys: Keys
) -> None:
    manager.register_connection("old", "user")
    manager.join_game("old", "game")
    old = manager.get_connection("old")

    registration = manager.register_connection("new", "user")

    assert registration.displaced == (old,)
    assert manager.get_connection("old") is None
    assert manager.get_user_connection("user") == registration.connection
    assert manager.get_game_connections("game") == []
    keyspace = keys()
    assert list(keyspace.records) == list(keyspace.last_seen) == ["new"]
    assert keyspace.users == {"user": ["new"]}
    assert keyspace.games == {}


@pytest.mark.parametrize("new", ["n", "ö", "same length", "a longer one", "n" * 1024])
def test_sids_may_be_of_any_length(manager: ConnectionManager, new: str) -> None:
    manager.register_connection("some length", "user")
    manager.join_game("some length", "game")
    old = manager.get_connection("some length")

    assert manager.register_connection(new, "user").displaced == (old,)
    assert manager.register_connection("some length", "user").displaced[0].sid == new


def test_a_displaced_connection_is_reported_once(manager: ConnectionManager) -> None:
    manager.register_connection("first", "user")
    second = manager.register_connection("second", "user")
    third = manager.register_connection("third", "user")

    assert [connection.sid for connection in second.displaced] == ["first"]
    assert [connection.sid for connection in third.displaced] == ["second"]
    assert manager.cleanup_stale_connections(0).removed in ((), (third.connection,))


def test_users_do_not_displace_each_other(manager: ConnectionManager) -> None:
    manager.register_connection("sid-1", "user-1")
    assert manager.register_connection("sid-2", "user-2").displaced == ()
    assert manager.get_connection_count() == 2


def test_the_same_sid_and_user_is_refreshed_and_keeps_its_game(
    manager: ConnectionManager, wait: Callable[[float], None]
) -> None:
    manager.register_connection("sid", "user")
    manager.join_game("sid", "game")
    wait(60)
    before = manager.get_connection("sid")
    assert before is not None

    for _ in range(2):
        registration = manager.register_connection("sid", "user")

        assert registration.displaced == ()
        assert registration.connection.game_id == "game"
        assert registration.connection.connected_at == before.connected_at
        assert registration.connection.last_seen >= before.last_seen + timedelta(seconds=60)
        assert manager.get_game_connections("game") == [registration.connection]


def test_the_same_sid_for_another_user_removes_the_old_owners_connection_completely(
    manager: ConnectionManager, keys: Keys
) -> None:
    manager.register_connection("sid", "old-owner")
    manager.join_game("sid", "game")
    theirs = manager.get_connection("sid")

    registration = manager.register_connection("sid", "new-owner")

    # Its socket is the new one's own, so it is not among those to close.
    assert registration.displaced == ()
    assert registration.replaced == theirs
    assert registration.connection.game_id is None
    assert manager.get_user_connection("old-owner") is None
    assert not manager.is_user_online("old-owner")
    assert manager.get_game_connections("game") == []
    assert keys().users == {"new-owner": ["sid"]}


def test_a_sid_that_changes_hands_still_displaces_the_new_owners_earlier_connection(manager: ConnectionManager) -> None:
    manager.register_connection("sid", "old-owner")
    manager.register_connection("earlier", "new-owner")

    registration = manager.register_connection("sid", "new-owner")

    assert registration.replaced is not None
    assert registration.replaced.user_id == "old-owner"
    assert [connection.sid for connection in registration.displaced] == ["earlier"]


@pytest.mark.parametrize("user_id", ["user", "another"])
def test_an_expired_sid_registers_as_a_new_connection(
    make_manager: ManagerFactory, wait: Callable[[float], None], user_id: str
) -> None:
    manager = make_manager(conn_ttl_seconds=60)
    manager.register_connection("sid", "user")
    manager.join_game("sid", "game")
    wait(61)

    registration = manager.register_connection("sid", user_id)

    assert registration.displaced == ()
    # What had the sid is gone, and nobody else can tell its game.
    assert registration.replaced is not None
    assert (registration.replaced.user_id, registration.replaced.game_id) == ("user", "game")
    assert manager.cleanup_stale_connections().removed == ()
    assert registration.connection.game_id is None
    assert registration.connection.connected_at == registration.connection.last_seen
    assert manager.get_game_connections("game") == []


def test_an_expired_connection_of_the_user_is_displaced_and_reported(
    make_manager: ManagerFactory, wait: Callable[[float], None]
) -> None:
    manager = make_manager(conn_ttl_seconds=60)
    manager.register_connection("expired", "user")
    manager.join_game("expired", "game")
    wait(61)

    registration = manager.register_connection("new", "user")

    assert [(gone.sid, gone.game_id) for gone in registration.displaced] == [("expired", "game")]
    assert manager.cleanup_stale_connections().removed == ()


class TestSeveralConnectionsPerUser:
    """connections_per_user above one: the oldest are displaced first."""

    def test_the_oldest_is_displaced_when_the_limit_is_passed(self, make_manager: ManagerFactory, keys: Keys) -> None:
        manager = make_manager(connections_per_user=2)
        displaced = [
            [gone.sid for gone in manager.register_connection(f"sid-{number}", "user").displaced] for number in range(4)
        ]

        assert displaced == [[], [], ["sid-0"], ["sid-1"]]
        assert keys().users == {"user": ["sid-2", "sid-3"]}
        connection = manager.get_user_connection("user")
        assert connection is not None
        assert connection.sid == "sid-3"

    def test_the_newest_win_within_one_millisecond_too(self, make_manager: ManagerFactory, keys: Keys) -> None:
        manager = make_manager(connections_per_user=2)
        registrations: list[Any] = manager.pipeline(
            [manager.operations.register_connection(f"sid-{number}", "user") for number in range(100)]
        )
        assert all(registrations)
        assert keys().users == {"user": ["sid-98", "sid-99"]}

    def test_an_expired_one_goes_before_an_older_live_one(
        self, make_manager: ManagerFactory, wait: Callable[[float], None]
    ) -> None:
        manager = make_manager(connections_per_user=2, conn_ttl_seconds=60)
        manager.register_connection("older", "user")
        manager.register_connection("expired", "user")
        wait(40)
        manager.update_heartbeat("older")
        wait(40)

        registration = manager.register_connection("new", "user")

        assert [gone.sid for gone in registration.displaced] == ["expired"]
        assert manager.get_connection("older") is not None

    def test_the_user_is_online_while_any_connection_is(
        self, make_manager: ManagerFactory, wait: Callable[[float], None]
    ) -> None:
        manager = make_manager(connections_per_user=2)
        manager.register_connection("first", "user")
        manager.register_connection("second", "user")
        wait(80)
        manager.update_heartbeat("first")
        wait(20)

        assert manager.is_user_online("user")
        manager.unregister_connection("first")
        assert not manager.is_user_online("user")

    def test_the_active_connection_is_the_newest_live_one(self, make_manager: ManagerFactory) -> None:
        manager = make_manager(connections_per_user=3)
        for sid in ("first", "second", "third"):
            manager.register_connection(sid, "user")
        manager.unregister_connection("third")
        connection = manager.get_user_connection("user")
        assert connection is not None
        assert connection.sid == "second"

    @pytest.mark.parametrize("grace_seconds", [30, 300])
    def test_the_active_connection_is_an_older_one_while_the_newest_is_detached_or_past_its_grace(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], grace_seconds: float
    ) -> None:
        manager = make_manager(connections_per_user=2)
        for sid in ("older", "newer"):
            manager.register_connection(sid, "user")
        manager.unregister_connection("newer", grace_seconds=grace_seconds)
        wait(60)
        assert manager.get_user_connection("user") == manager.get_connection("older")

    def test_all_are_listed_live_ones_and_seats_in_the_order_of_registration(
        self, make_manager: ManagerFactory, wait: Callable[[float], None]
    ) -> None:
        manager = make_manager(connections_per_user=9, conn_ttl_seconds=1000)
        for sid in ("expired", "past its grace", "again", "seat", "removed", "stale", "live"):
            manager.register_connection(sid, "user")
        manager.register_connection("other's", "other")
        manager.unregister_connection("past its grace", grace_seconds=800)
        wait(500)
        manager.unregister_connection("seat", grace_seconds=800)
        manager.update_heartbeats(["again", "removed", "stale", "live"])
        wait(501)
        manager.update_heartbeat("live")
        manager.register_connection("again", "user")
        manager.unregister_connection("removed")

        listed = manager.get_all_user_connections("user")

        assert [connection.sid for connection in listed] == ["seat", "stale", "live", "again"]
        assert listed == [manager.get_connection(connection.sid) for connection in listed]
        assert manager.get_all_user_connections("unknown") == []

    def test_registering_again_makes_a_connection_the_newest(self, make_manager: ManagerFactory) -> None:
        manager = make_manager(connections_per_user=2)
        for sid in ("first", "second", "first"):
            manager.register_connection(sid, "user")

        assert [gone.sid for gone in manager.register_connection("third", "user").displaced] == ["second"]

    def test_a_lower_limit_displaces_all_that_are_too_many(self, make_manager: ManagerFactory) -> None:
        for sid in ("first", "second", "third"):
            make_manager(connections_per_user=3).register_connection(sid, "user")

        displaced = make_manager(connections_per_user=1).register_connection("new", "user").displaced

        assert [gone.sid for gone in displaced] == ["first", "second", "third"]

    def test_an_expired_one_does_not_count_where_a_lower_limit_displaces(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], keys: Keys
    ) -> None:
        for sid in ("expired", "second", "third"):
            make_manager(connections_per_user=3, conn_ttl_seconds=60).register_connection(sid, "user")
        wait(40)
        manager = make_manager(connections_per_user=2, conn_ttl_seconds=60)
        manager.update_heartbeats(["second", "third"])
        wait(40)

        displaced = manager.register_connection("new", "user").displaced

        assert [gone.sid for gone in displaced] == ["expired", "second"]
        assert keys().users == {"user": ["third", "new"]}


@pytest.mark.parametrize("sid", ["sid", "new"])
def test_a_registration_keeps_every_key_that_it_lives_in_from_expiring(
    make_manager: ManagerFactory, client: redis.Redis, keys: Keys, sid: str
) -> None:
    """Where the same sid is registered again, and where a new one takes the seat in the game over."""
    manager = make_manager(server_id="server")
    manager.register_connection("sid", "user")
    manager.join_game("sid", "game")
    lifetime_ms = min(keys().ttls_ms.values())
    if sid == "new":
        manager.unregister_connection("sid", grace_seconds=30)
    for key in keys().ttls_ms | keys().other_ttls_ms:
        client.pexpire(key, 60_000)

    assert manager.register_connection(sid, "user").connection.game_id == "game"

    kept_ms = {key: ttl for key, ttl in (keys().ttls_ms | keys().other_ttls_ms).items() if ":reply" not in key}
    assert len(kept_ms) == 6  # the connection, its user's list, its game, its server's list, the servers, last_seen
    assert min(kept_ms.values()) > lifetime_ms - 30_000


def test_a_user_who_only_comes_back_keeps_what_registers_share_from_expiring(
    manager: ConnectionManager, keys: Keys, wait: Callable[[float], None]
) -> None:
    """A register that displaces refreshes by chance. (That it fails by chance is less likely than one in 100,000.)"""
    manager.register_connection("sid", "user")
    lifetime_ms = min(keys().ttls_ms.values())
    for number in range(40):
        wait(5 * 60)
        assert manager.register_connection(f"sid {number}", "user").displaced
        assert min(keys().ttls_ms.values()) > lifetime_ms - 3 * 3600 * 1000


def test_the_usual_registration_takes_few_commands(
    make_manager: ManagerFactory, own_server: LocalServer, namespace: str
) -> None:
    """As docs/design.md counts them: the first of a user, and one that displaces a player, soon and later."""
    manager = make_manager(own_server.url)
    with redis.Redis.from_url(own_server.url) as client:

        def commands(sid: str, user_id: str) -> dict[str, int]:
            client.config_resetstat()
            assert manager.register_connection(sid, user_id)
            stats: Any = client.info("commandstats")
            calls = {name.removeprefix("cmdstat_"): about["calls"] for name, about in stats.items()}
            return {name: count for name, count in calls.items() if name not in ("evalsha", "config|resetstat")}

        manager.register_connection("other", "other user")  # The script is loaded.
        usual = {"time": 1, "get": 1, "set": 2, "zadd": 1}
        assert commands("first", "user") == usual | {"get": 2, "pexpire": 1}
        displacing = usual | {"zscore": 1, "getdel": 1, "zrem": 1}
        displacing_a_player = displacing | {"hdel": 1}
        manager.join_game("first", "game")
        users_list = f"{{{namespace}}}:user_conns:user"
        client.pexpire(users_list, 7_200_000)
        assert commands("soon", "user") == displacing_a_player | {"get": 2, "set": 3}
        ttl_ms: Any = client.pttl(users_list)
        assert ttl_ms <= 7_200_000, "left as it was, but once in 100,000 times by chance"
        manager.join_game("soon", "game")
        let_time_pass(client, namespace, 61)
        assert manager.update_heartbeat("soon")
        assert commands("later", "user") == displacing_a_player
        let_time_pass(client, namespace, 15 * 60)
        assert commands("after a long silence", "user") == displacing | {"pexpire": 1}


@pytest.mark.parametrize("call", ["register_connection", "start_server"])
def test_registrations_keep_the_index_from_expiring_though_nobody_beats(
    make_manager: ManagerFactory,
    client: redis.Redis,
    namespace: str,
    wait: Callable[[float], None],
    call: str,
) -> None:
    last_seen = f"{{{namespace}}}:last_seen"
    make_manager().register_connection("first", "user")
    lifetime_ms: Any = client.pttl(last_seen)
    wait(2_000)
    aged_ms: Any = client.pttl(last_seen)
    assert aged_ms <= lifetime_ms - 2_000_000
    if call == "start_server":
        make_manager(server_id="server").start_server()
        servers_ms: Any = client.pttl(f"{{{namespace}}}:servers")
        assert servers_ms > lifetime_ms - 60_000
    else:
        make_manager().register_connection("second", "other user")
    refreshed_ms: Any = client.pttl(last_seen)
    assert refreshed_ms > lifetime_ms - 60_000


@pytest.mark.parametrize("sid", ["sid", "new"])
def test_an_index_that_was_evicted_has_a_ttl_as_soon_as_it_is_there_again(
    manager: ConnectionManager, client: redis.Redis, namespace: str, sid: str
) -> None:
    last_seen = f"{{{namespace}}}:last_seen"
    manager.register_connection("sid", "user")
    lifetime_ms: Any = client.pttl(last_seen)
    client.delete(last_seen)
    manager.register_connection(sid, "user")
    ttl_ms: Any = client.pttl(last_seen)
    assert ttl_ms > lifetime_ms - 60_000


def test_registered_again_it_stays_connected_since_the_first_time_whatever_comes(
    manager: ConnectionManager, wait: Callable[[float], None]
) -> None:
    manager.register_connection("sid", "user")
    wait(10)
    connected_at = manager.register_connection("sid", "user").connection.connected_at
    changes: list[Callable[[], object]] = [
        lambda: manager.join_game("sid", "game"),
        lambda: manager.update_metadata("sid", b"metadata"),
        lambda: manager.leave_game("sid"),
        lambda: manager.unregister_connection("sid", grace_seconds=30),
        lambda: manager.register_connection("sid", "user"),
    ]
    for change in changes:
        assert change()
        connection = manager.get_connection("sid")
        assert connection is not None
        assert connection.connected_at == connected_at
        assert connection.last_seen - connected_at >= timedelta(seconds=10)
