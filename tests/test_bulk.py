"""Many at once: heartbeats of a whole server, online state of friends, snapshots of many games."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest

from presence import HeartbeatStatus
from presence.operations import HEARTBEAT_BATCH_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    import redis

    from presence.sync import ConnectionManager
    from tests.conftest import Keys, ManagerFactory

MANY = 2 * HEARTBEAT_BATCH_SIZE + 1


def evalsha_calls(client: redis.Redis) -> int:
    stats: Any = client.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {"calls": 0})["calls"])


class TestHeartbeats:
    """update_heartbeats answers for each sid, and keeps what update_heartbeat keeps."""

    def test_each_sid_is_seen_or_told_why_not(
        self, manager: ConnectionManager, wait: Callable[[float], None], keys: Keys
    ) -> None:
        manager.register_connection("expired", "user-1")
        wait(3601)
        manager.register_connection("displaced", "user-2")
        manager.register_connection("seen", "user-2")
        manager.register_connection("detached", "user-3")
        manager.unregister_connection("detached", grace_seconds=60)
        before = keys()

        assert manager.update_heartbeats(["seen", "unknown", "expired", "displaced", "detached"]) == {
            "seen": HeartbeatStatus.SEEN,
            "unknown": HeartbeatStatus.UNKNOWN,
            "expired": HeartbeatStatus.EXPIRED,
            "displaced": HeartbeatStatus.UNKNOWN,
            "detached": HeartbeatStatus.DETACHED,
        }

        after = keys()
        assert after.records == before.records
        assert after.last_seen | {"seen": 0} == before.last_seen | {"seen": 0}

    def test_only_seen_is_true(self) -> None:
        assert [status for status in HeartbeatStatus if status] == [HeartbeatStatus.SEEN]

    def test_those_that_are_seen_are_seen_now(self, manager: ConnectionManager, wait: Callable[[float], None]) -> None:
        manager.register_connection("sid-1", "user-1")
        manager.register_connection("sid-2", "user-2")
        wait(100)
        assert all(manager.update_heartbeats(["sid-1", "sid-2"]).values())
        connection = manager.get_connection("sid-1")
        assert connection is not None
        assert connection.last_seen - connection.connected_at >= timedelta(seconds=100)
        assert manager.cleanup_stale_connections().removed == ()

    def test_any_number_goes_in_one_round_trip_and_bounded_scripts(
        self, manager: ConnectionManager, client: redis.Redis
    ) -> None:
        sids = [f"sid-{number}" for number in range(MANY)]
        manager.pipeline([manager.operations.register_connection(sid, sid) for sid in sids])
        manager.update_heartbeats(["sid-0"])
        calls = evalsha_calls(client)

        statuses = manager.update_heartbeats([*sids, "unknown", "sid-0"])

        assert list(statuses) == [*sids, "unknown"]
        assert [sid for sid, status in statuses.items() if not status] == ["unknown"]
        assert evalsha_calls(client) - calls == 3

    @pytest.mark.parametrize("interval_hours", [0.01, 0.4, 5.9])
    def test_a_player_who_beats_in_batches_never_falls_out(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], interval_hours: float
    ) -> None:
        manager = make_manager(conn_ttl_seconds=6 * 60 * 60)
        manager.register_connection("sid", "user")
        manager.join_game("sid", "game")
        # As if so often, in as many steps as it takes: three times as long as any key lives.
        for _ in range(min(400, round(100 / interval_hours))):
            wait(max(interval_hours, 0.25) * 60 * 60)
            assert manager.update_heartbeats(["sid"]) == {"sid": HeartbeatStatus.SEEN}
            assert manager.get_game_user_sids("game") == {"user": "sid"}

    def test_none_are_no_round_trip(self, manager: ConnectionManager) -> None:
        assert manager.update_heartbeats([]) == {}

    @pytest.mark.parametrize("bad", ["sid", b"sid", None, 1])
    def test_one_id_in_place_of_several_is_refused(self, manager: ConnectionManager, bad: Any) -> None:
        with pytest.raises(TypeError, match="several ids"):
            manager.update_heartbeats(bad)

    def test_a_bad_id_among_them_is_refused_before_anything_is_sent(self, manager: ConnectionManager) -> None:
        with pytest.raises(ValueError, match="sids must not be empty"):
            manager.update_heartbeats(["sid", ""])


class TestReads:
    """Each answers for every id what the read of one answers."""

    def test_the_online_state_of_many_users(self, manager: ConnectionManager, wait: Callable[[float], None]) -> None:
        user = UUID(int=1)
        manager.register_connection("sid-1", "stale")
        wait(91)
        manager.register_connection("sid-2", user)
        assert manager.are_users_online(["stale", user, "unknown"]) == {
            "stale": False,
            str(user): True,
            "unknown": False,
        }

    def test_the_connections_of_many_users(self, manager: ConnectionManager) -> None:
        registered = manager.register_connection("sid", "user").connection
        assert manager.get_users_connections(["user", "unknown", "user"]) == {"user": registered, "unknown": None}

    def test_the_connections_in_many_games(self, manager: ConnectionManager) -> None:
        manager.register_connection("sid", "user")
        manager.join_game("sid", "game")
        assert manager.get_games_connections(["game", "empty"]) == {
            "game": [manager.get_connection("sid")],
            "empty": [],
        }

    @pytest.mark.parametrize("read", ["are_users_online", "get_users_connections", "get_games_connections"])
    def test_none_are_no_round_trip(self, manager: ConnectionManager, read: str) -> None:
        assert getattr(manager, read)([]) == {}

    @pytest.mark.parametrize("read", ["are_users_online", "get_users_connections", "get_games_connections"])
    def test_one_id_in_place_of_several_is_refused(self, manager: ConnectionManager, read: str) -> None:
        with pytest.raises(TypeError, match="several ids"):
            getattr(manager, read)("user")
