"""Many at once: heartbeats of a whole server, online state of friends, snapshots of many games."""

from __future__ import annotations

import json
import math
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

import pytest

import presence
from presence import HeartbeatStatus, Operations
from presence.exchanges import perform_batches
from presence.operations import HEARTBEAT_BATCH_SIZE
from tests.server import free_port
from tests.watching import evalsha_calls

if TYPE_CHECKING:
    from collections.abc import Callable

    import redis

    from presence.sync import ConnectionManager
    from tests.conftest import Keys, ManagerFactory

MANY = 2 * HEARTBEAT_BATCH_SIZE + 1


class Read(NamedTuple):
    """A read of many: the read of one, and how many ids one script takes."""

    of_one: str
    batch_size: int


READS = {
    "are_users_online": Read("is_user_online", 100),
    "get_users_connections": Read("get_user_connection", 100),
    "get_games_connections": Read("get_game_connections", 10),
}
every_read = pytest.mark.parametrize("read", READS)


class TestHeartbeats:
    """update_heartbeats answers for each sid, and keeps what update_heartbeat keeps."""

    def test_each_sid_is_seen_or_told_why_not(
        self, manager: ConnectionManager, wait: Callable[[float], None], keys: Keys
    ) -> None:
        manager.register_connection("expired", "user-1")
        manager.register_connection("past its grace", "user-4")
        manager.unregister_connection("past its grace", grace_seconds=60)
        wait(3601)
        manager.register_connection("displaced", "user-2")
        manager.register_connection("seen", "user-2")
        manager.register_connection("detached", "user-3")
        manager.unregister_connection("detached", grace_seconds=60)
        before = keys()

        sids = ["seen", "unknown", "expired", "displaced", "past its grace", "detached"]
        assert manager.update_heartbeats(sids) == {
            "seen": HeartbeatStatus.SEEN,
            "unknown": HeartbeatStatus.UNKNOWN,
            "expired": HeartbeatStatus.EXPIRED,
            "displaced": HeartbeatStatus.UNKNOWN,
            "past its grace": HeartbeatStatus.EXPIRED,
            "detached": HeartbeatStatus.DETACHED,
        }

        after = keys()
        assert after.records == before.records
        assert after.last_seen | {"seen": 0} == before.last_seen | {"seen": 0}

    def test_only_seen_is_true(self) -> None:
        assert [status for status in HeartbeatStatus if status] == [HeartbeatStatus.SEEN]
        assert json.dumps(HeartbeatStatus.DETACHED) == '"detached"'

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

    def test_of_a_batch_as_many_refresh_their_ttls_as_their_silence_asks_for(
        self, manager: ConnectionManager, client: redis.Redis, wait: Callable[[float], None]
    ) -> None:
        sids = [f"sid-{number}" for number in range(HEARTBEAT_BATCH_SIZE)]
        manager.pipeline([manager.operations.register_connection(sid, f"user of {sid}") for sid in sids])
        wait(60)
        client.config_resetstat()

        assert all(manager.update_heartbeats(sids).values())

        # Each reads its record and its user's list. 60 s are a 15th of 15 minutes, and a little time passes besides.
        stats: Any = client.info("commandstats")
        due = HEARTBEAT_BATCH_SIZE // 15
        assert due <= stats["cmdstat_get"]["calls"] / 2 <= due + 2

    @pytest.mark.parametrize(("connections_per_user", "scripts"), [(30, 1), (100, 4)])
    def test_fewer_in_a_script_where_users_may_have_many_connections(
        self, make_manager: ManagerFactory, client: redis.Redis, connections_per_user: int, scripts: int
    ) -> None:
        """A refresh of the TTLs reads the list of the user's connections."""
        manager = make_manager(connections_per_user=connections_per_user)
        manager.update_heartbeats(["sid-0"])
        calls = evalsha_calls(client)

        manager.update_heartbeats([f"sid-{number}" for number in range(HEARTBEAT_BATCH_SIZE)])

        assert evalsha_calls(client) - calls == scripts

    # One manager is enough for thousands of calls: the scripts decide it, which both send alike.
    @pytest.mark.parametrize("make_manager", ["blocking"], indirect=True)
    @pytest.mark.parametrize("interval_seconds", [30, 890, 6 * 60 * 60 - 400])
    def test_a_player_who_beats_in_batches_never_falls_out(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], interval_seconds: int
    ) -> None:
        manager = make_manager(conn_ttl_seconds=6 * 60 * 60)
        manager.register_connection("sid", "user")
        manager.join_game("sid", "game")
        for _ in range(130_000 // interval_seconds):  # Longer than any key lives without a refresh.
            wait(interval_seconds)
            assert manager.update_heartbeats(["sid"]) == {"sid": HeartbeatStatus.SEEN}
        assert manager.get_game_user_sids("game") == {"user": "sid"}

    def test_a_fault_that_all_scripts_meet_is_raised_as_by_any_call(
        self, make_manager: ManagerFactory, hasty: dict[str, Any]
    ) -> None:
        manager = make_manager(f"redis://127.0.0.1:{free_port()}", **hasty)
        with pytest.raises(presence.ServerUnreachableError, match="check that it runs"):
            manager.update_heartbeats([f"sid-{number}" for number in range(HEARTBEAT_BATCH_SIZE + 1)])

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

    @every_read
    @pytest.mark.parametrize("share", [0.1, 1, 1.1, 10])
    def test_a_bounded_script_serves_so_many_ids(
        self, manager: ConnectionManager, client: redis.Redis, read: str, share: float
    ) -> None:
        ids = [f"id-{number}" for number in range(round(share * READS[read].batch_size))]
        getattr(manager, read)(["load the script"])
        calls = evalsha_calls(client)

        answers = getattr(manager, read)([*ids, ids[0], ids[-1]])

        assert list(answers) == ids
        assert evalsha_calls(client) - calls == math.ceil(share)

    @every_read
    def test_a_thousand_are_one_round_trip(self, make_manager: ManagerFactory, client: redis.Redis, read: str) -> None:
        manager = make_manager()
        ids = [f"id-{number}" for number in range(1000)]
        batches = {
            "are_users_online": manager.operations.users_online_batches,
            "get_users_connections": manager.operations.users_connections_batches,
            "get_games_connections": manager.operations.games_connections_batches,
        }[read](ids)
        exchange = perform_batches(batches)

        sent = next(exchange)

        evalsha = [command for command in sent if command[0] == "EVALSHA"]
        assert len(evalsha) == 1000 / READS[read].batch_size
        client.script_load(batches.operations[0].script.source)
        replies = [client.execute_command(*command, NEVER_DECODE=True) for command in sent if command in evalsha]
        # What is answered to that one message is all that it needs.
        with pytest.raises(StopIteration) as finished:
            exchange.send(replies)
        assert finished.value.value == getattr(manager, read)(ids)

    @pytest.mark.parametrize(("connections_per_user", "users"), [(1, 100), (10, 100), (11, 90), (50, 20), (100, 10)])
    @pytest.mark.parametrize("read", ["are_users_online", "get_users_connections"])
    def test_a_script_reads_a_bounded_number_of_connections(
        self, make_manager: ManagerFactory, client: redis.Redis, read: str, connections_per_user: int, users: int
    ) -> None:
        manager = make_manager(connections_per_user=connections_per_user)
        getattr(manager, read)(["load the script"])
        calls = evalsha_calls(client)

        getattr(manager, read)([f"id-{number}" for number in range(users + 1)])

        assert evalsha_calls(client) - calls == 2
        with pytest.raises(ValueError, match=f"1 to {users} ids"):
            manager.operations.users_online_batch([f"id-{number}" for number in range(users + 1)])

    def test_no_more_is_read_of_a_user_than_it_takes(self, make_manager: ManagerFactory, client: redis.Redis) -> None:
        manager = make_manager(connections_per_user=100)
        for number in range(100):
            manager.register_connection(f"sid-{number}", "user")
        client.config_resetstat()
        assert manager.is_user_online("user")
        stats: Any = client.info("commandstats")
        assert stats["cmdstat_zscore"]["calls"] == 1

    @every_read
    def test_each_id_is_answered_as_the_read_of_one_answers(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], read: str
    ) -> None:
        manager = make_manager(server_id="server", connections_per_user=2)
        for number, seconds in enumerate((3600, 91, 30, 10, 1, 0)):
            wait(seconds)
            for sid, user in ((f"a-{number}", f"user-{number}"), (f"b-{number}", f"user-{(number + 1) % 4}")):
                manager.register_connection(sid, user, metadata=sid)
                manager.join_game(sid, f"game-{number % 4}")
        manager.unregister_connection("a-4", grace_seconds=30)
        kind = "game" if "games" in read else "user"
        ids = [f"{kind}-{number}" for number in (5, 3, 1, 0, 2, 4, 3, 9)]

        answers = getattr(manager, read)(ids)

        assert list(answers) == list(dict.fromkeys(ids))
        assert answers == {name: getattr(manager, READS[read].of_one)(name) for name in ids}
        assert any(answers.values())
        assert not all(answers.values())

    @pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
    @every_read
    def test_none_are_no_round_trip(self, make_manager: ManagerFactory, read: str, scheme: str) -> None:
        assert getattr(make_manager(f"{scheme}://127.0.0.1:1/0"), read)([]) == {}

    @every_read
    def test_any_iterable_will_do(self, manager: ConnectionManager, read: str) -> None:
        assert list(getattr(manager, read)(name for name in ("one", "two"))) == ["one", "two"]

    @every_read
    @pytest.mark.parametrize("bad", ["user", b"user", None, 1])
    def test_one_id_in_place_of_several_is_refused(self, make_manager: ManagerFactory, read: str, bad: Any) -> None:
        with pytest.raises(TypeError, match="several ids"):
            getattr(make_manager("redis://127.0.0.1:1/0"), read)(bad)

    @every_read
    @pytest.mark.parametrize(
        ("bad", "error"), [("", ValueError), ("\ud800", ValueError), ("x" * 1025, ValueError), (1, TypeError)]
    )
    def test_a_bad_id_among_them_is_refused_before_anything_is_sent(
        self, make_manager: ManagerFactory, read: str, bad: Any, error: type[Exception]
    ) -> None:
        with pytest.raises(error, match="game_ids must" if "games" in read else "user_ids must"):
            getattr(make_manager("redis://127.0.0.1:1/0"), read)(["good", bad])


BATCHES = {
    "heartbeat_batch": "sids",
    "users_connections_batch": "user_ids",
    "users_online_batch": "user_ids",
    "games_connections_batch": "game_ids",
}


@pytest.mark.parametrize("operation", BATCHES)
class TestADescriptionOfABatch:
    """For ``pipeline``; what it is given is checked as by the managers' methods for any number."""

    def test_refuses_one_id_in_place_of_several(self, operation: str) -> None:
        for bad in ("sid", b"sid", None, 7):
            with pytest.raises(TypeError, match=f"{BATCHES[operation]} must be several ids"):
                getattr(Operations(), operation)(bad)

    def test_takes_any_iterable(self, manager: ConnectionManager, operation: str) -> None:
        describe = getattr(manager.operations, operation)
        (from_list,) = manager.pipeline([describe(["one", "two"])])
        (from_iterator,) = manager.pipeline([describe(iter(["one", "two"]))])
        assert from_iterator == from_list
        assert len(from_list) == 2


@pytest.mark.parametrize(
    "read", ["update_heartbeats", "are_users_online", "get_users_connections", "get_games_connections"]
)
def test_a_list_among_the_ids_is_refused_and_named(manager: ConnectionManager, read: str) -> None:
    with pytest.raises(TypeError, match=r"each of (sids|user_ids|game_ids) must be a str.*, not list"):
        getattr(manager, read)(["good", ["bad"]])
