"""join_game, leave_game and the reads of a game."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import redis

from presence import JoinResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from presence.sync import ConnectionManager
    from tests.conftest import Keys, ManagerFactory
    from tests.server import LocalServer


def enter(manager: ConnectionManager, *names: str, game_id: str = "game") -> None:
    """Let user-<name> register sid-<name> and join the game, one after the other."""
    for name in names:
        manager.register_connection(f"sid-{name}", f"user-{name}")
        manager.join_game(f"sid-{name}", game_id)


class TestJoin:
    def test_it_puts_the_connection_into_the_game(self, manager: ConnectionManager, keys: Keys) -> None:
        manager.register_connection("sid", "user")

        result = manager.join_game("sid", "game")

        assert result == JoinResult(joined=True, left_game_id=None)
        assert result
        connection = manager.get_connection("sid")
        assert connection is not None
        assert connection.game_id == "game"
        assert manager.get_game_connections("game") == [connection]
        assert list(keys().games["game"]) == ["sid"]

    def test_it_leaves_another_game_first(self, manager: ConnectionManager, keys: Keys) -> None:
        enter(manager, "a", game_id="old game")

        assert manager.join_game("sid-a", "new game") == JoinResult(joined=True, left_game_id="old game")

        assert manager.get_game_connections("old game") == []
        assert list(keys().games) == ["new game"]

    def test_joining_the_current_game_again_changes_nothing(self, manager: ConnectionManager, keys: Keys) -> None:
        enter(manager, "a")
        before = keys()

        assert manager.join_game("sid-a", "game") == JoinResult(joined=True, left_game_id=None)
        assert keys().games == before.games

    def test_it_is_falsy_when_there_is_no_such_connection(self, manager: ConnectionManager) -> None:
        assert not manager.join_game("unknown", "game")

    def test_it_does_not_count_as_a_heartbeat(self, manager: ConnectionManager, wait: Callable[[float], None]) -> None:
        manager.register_connection("sid", "user")
        wait(100)
        manager.join_game("sid", "game")
        assert not manager.is_user_online("user")


class TestLeave:
    def test_it_answers_the_game_that_was_left(self, manager: ConnectionManager, keys: Keys) -> None:
        enter(manager, "a", "b")

        assert manager.leave_game("sid-a") == "game"

        connection = manager.get_connection("sid-a")
        assert connection is not None
        assert connection.game_id is None
        assert manager.get_game_user_sids("game") == {"user-b": "sid-b"}
        manager.leave_game("sid-b")
        assert keys().games == {}

    def test_it_answers_none_outside_a_game(self, manager: ConnectionManager) -> None:
        manager.register_connection("sid", "user")
        assert manager.leave_game("sid") is None


class TestReads:
    def test_connections_come_in_the_order_of_registration(self, manager: ConnectionManager) -> None:
        enter(manager, "c", "a", "b")
        assert [connection.sid for connection in manager.get_game_connections("game")] == ["sid-c", "sid-a", "sid-b"]

    def test_user_sids_maps_each_user_to_the_sid(self, manager: ConnectionManager) -> None:
        enter(manager, "a", "b")
        assert manager.get_game_user_sids("game") == {"user-a": "sid-a", "user-b": "sid-b"}

    def test_the_newest_connection_of_a_user_counts(self, make_manager: ManagerFactory) -> None:
        manager = make_manager(connections_per_user=2)
        for sid in ("z-older", "a-newer"):
            manager.register_connection(sid, "user")
            manager.join_game(sid, "game")
        assert manager.get_game_user_sids("game") == {"user": "a-newer"}
        assert manager.get_opponent_sid("game", "another") == "a-newer"

        # The one that registered last, be it again, is the user's active one in every answer.
        manager.register_connection("z-older", "user")
        active = manager.get_user_connection("user")
        assert active is not None
        assert active.sid == "z-older"
        assert manager.get_game_user_sids("game") == {"user": "z-older"}
        assert manager.get_game_connections("game")[-1] == active

    def test_the_opponent_is_the_other_user(self, manager: ConnectionManager) -> None:
        enter(manager, "a", "b")
        assert manager.get_opponent_sid("game", "user-a") == "sid-b"
        assert manager.get_opponent_sid("game", "user-b") == "sid-a"

    def test_there_is_no_opponent_in_a_game_alone(self, manager: ConnectionManager) -> None:
        enter(manager, "a")
        assert manager.get_opponent_sid("game", "user-a") is None

    def test_of_several_opponents_the_first_to_connect_is_meant(
        self, manager: ConnectionManager, wait: Callable[[float], None]
    ) -> None:
        for name in ("z", "m", "a"):
            enter(manager, name)
            wait(1)
        assert manager.get_opponent_sid("game", "user-z") == "sid-m"
        assert manager.get_opponent_sid("game", "user-m") == "sid-z"

    def test_an_unknown_game_is_empty(self, manager: ConnectionManager) -> None:
        assert manager.get_game_connections("game") == []
        assert manager.get_game_user_sids("game") == {}
        assert manager.get_opponent_sid("game", "user") is None
        assert manager.get_game_connection_count("game") == 0

    def test_expired_connections_are_in_no_read(
        self, make_manager: ManagerFactory, wait: Callable[[float], None]
    ) -> None:
        manager = make_manager(conn_ttl_seconds=60)
        enter(manager, "expired")
        wait(40)
        enter(manager, "live")
        wait(21)

        assert [connection.sid for connection in manager.get_game_connections("game")] == ["sid-live"]
        assert manager.get_game_user_sids("game") == {"user-live": "sid-live"}
        assert manager.get_opponent_sid("game", "user-live") is None
        assert manager.get_game_connection_count("game") == 1
        assert manager.get_connection_count() == 1
        assert manager.get_connection("sid-expired") is None
        assert manager.get_user_connection("user-expired") is None
        assert not manager.is_user_online("user-expired")

    def test_a_large_game_is_read_whole(self, manager: ConnectionManager) -> None:
        # More than the 1,000 values that a script passes to one command.
        operations = manager.operations
        size = 2_500
        manager.pipeline([operations.register_connection(f"sid-{number}", f"user-{number}") for number in range(size)])
        manager.pipeline([operations.join_game(f"sid-{number}", "game") for number in range(size)])

        assert len(manager.get_game_connections("game")) == size
        assert manager.get_game_connection_count("game") == size
        assert manager.get_game_user_sids("game") == {f"user-{number}": f"sid-{number}" for number in range(size)}

    def test_a_game_of_more_members_than_lua_s_stack_holds_is_read_whole(
        self, make_manager: ManagerFactory, own_server: LocalServer
    ) -> None:
        # It holds 8,000 values. What the reads of a game need is written as a register and a join of each would.
        size = 8_500
        with redis.Redis.from_url(own_server.url) as client:
            seconds, _ = client.time()
            client.zadd("{large}:last_seen", {f"sid-{number}": seconds * 1000 for number in range(size)})
            bodies: Any = {f"sid-{number}": f"{seconds * 1_000_000 + number} user-{number}" for number in range(size)}
            client.hset("{large}:game_conns:game", mapping=bodies)
        manager = make_manager(own_server.url, namespace="large")

        assert manager.get_game_user_sids("game") == {f"user-{number}": f"sid-{number}" for number in range(size)}

    def test_a_game_in_which_more_have_expired_than_lua_s_stack_holds_is_counted(
        self, make_manager: ManagerFactory, own_server: LocalServer
    ) -> None:
        # It holds 8,000 values. What the count needs is written as a register and a join of each would.
        live, expired = 500, 8_100
        with redis.Redis.from_url(own_server.url) as client:
            seconds, _ = client.time()
            scores = {f"sid-{number}": 1000 * (seconds if number < live else 1) for number in range(live + expired)}
            client.zadd("{large}:last_seen", scores)
            client.hset("{large}:game_conns:game", mapping=dict.fromkeys(scores, "1 user"))

        assert make_manager(own_server.url, namespace="large").get_game_connection_count("game") == live

    @pytest.mark.parametrize(("size", "gone"), [(51, 0), (51, 3), (51, 30), (1_001, 30), (1_001, 700)])
    def test_a_large_game_is_counted_as_a_small_one(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], size: int, gone: int
    ) -> None:
        """Of each kind that counts as no member there are as many, in the game and in another."""
        manager = make_manager(conn_ttl_seconds=60)
        operations = manager.operations

        def enter_all(kind: str, game_id: str, count: int) -> list[str]:
            sids = [f"{kind} {number} of {game_id}" for number in range(count)]
            manager.pipeline([operations.register_connection(sid, f"user of {sid}") for sid in sids])
            manager.pipeline([operations.join_game(sid, game_id) for sid in sids])
            return sids

        past_grace, detached = [], []
        for game_id in ("game", "another") if gone else ():
            enter_all("expired", game_id, gone)
            past_grace += enter_all("past its grace", game_id, gone)
        manager.pipeline([operations.unregister_connection(sid, grace_seconds=10) for sid in past_grace])
        wait(61)
        for game_id in ("game", "another") if gone else ():
            detached += enter_all("detached", game_id, gone)
        manager.pipeline([operations.unregister_connection(sid, grace_seconds=60) for sid in detached])
        live = enter_all("live", "game", size)

        assert manager.get_game_connection_count("game") == len(live)
        manager.register_connection("sid", "user")
        seats = len(live) + gone
        assert manager.join_game("sid", "game", capacity=seats).is_full
        assert manager.join_game("sid", "game", capacity=seats + 1)
