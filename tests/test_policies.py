"""Who gives way to whom: the policies of displacement, epochs as fencing tokens, and games with a capacity."""

from __future__ import annotations

import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import redis

import presence.sync
from presence import JoinResult, Registration
from presence.scripts import lua_folder
from tests.invariants import violations
from tests.processes import PROCESSES, in_each, sleep_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import ProcessPoolExecutor

    from presence.sync import ConnectionManager
    from tests.conftest import Keys, ManagerFactory
    from tests.invariants import Keyspace
    from tests.server import LocalServer


def assert_unchanged(before: Keyspace, after: Keyspace) -> None:
    """Nothing was written where connections live, and no key was kept longer."""
    for part in ("records", "users", "games", "last_seen", "epoch"):
        assert getattr(after, part) == getattr(before, part)
    assert after.ttls_ms.keys() == before.ttls_ms.keys()
    assert all(after.ttls_ms[key] <= ttl for key, ttl in before.ttls_ms.items())


@pytest.fixture
def rejecting(make_manager: ManagerFactory) -> ConnectionManager:
    return make_manager(displacement="reject_while_alive")


class TestRejectWhileAlive:
    """The connection that is there stays, as long as it is alive; the newcomer is told which one it is."""

    def test_a_register_is_refused_and_changes_nothing(self, rejecting: ConnectionManager, keys: Keys) -> None:
        rejecting.register_connection("alive", "user")
        rejecting.join_game("alive", "game")
        alive = rejecting.get_connection("alive")
        before = keys()

        registration = rejecting.register_connection("new", "user")

        assert not registration
        assert registration == Registration(alive, refused=True)  # type: ignore[arg-type]
        assert_unchanged(before, keys())
        assert rejecting.get_connection("new") is None
        assert rejecting.get_user_connection("user") == alive

    def test_a_register_that_is_not_refused_is_true(self, rejecting: ConnectionManager) -> None:
        registration = rejecting.register_connection("sid", "user")
        assert registration
        assert not registration.refused
        assert rejecting.register_connection("another sid", "another user")

    def test_the_refused_may_come_back_when_the_other_has_left(self, rejecting: ConnectionManager) -> None:
        rejecting.register_connection("alive", "user")
        assert not rejecting.register_connection("new", "user")
        rejecting.unregister_connection("alive")
        assert rejecting.register_connection("new", "user") == Registration(
            rejecting.get_connection("new")  # type: ignore[arg-type]
        )

    @pytest.mark.parametrize("heartbeat_seconds", [10, 30])
    def test_one_that_missed_three_heartbeats_is_displaced(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], heartbeat_seconds: float
    ) -> None:
        manager = make_manager(displacement="reject_while_alive", heartbeat_seconds=heartbeat_seconds)
        manager.register_connection("old", "user")
        manager.join_game("old", "game")
        wait(3 * heartbeat_seconds - 2)
        assert not manager.register_connection("new", "user")
        wait(3)

        registration = manager.register_connection("new", "user")

        assert registration
        assert [(gone.sid, gone.game_id) for gone in registration.displaced] == [("old", "game")]
        assert manager.get_connection("old") is None

    def test_one_that_beats_is_never_displaced(
        self, rejecting: ConnectionManager, wait: Callable[[float], None]
    ) -> None:
        rejecting.register_connection("alive", "user")
        for _ in range(10):
            wait(60)
            rejecting.update_heartbeat("alive")
            assert not rejecting.register_connection("new", "user")

    def test_a_refused_register_is_no_heartbeat(
        self, rejecting: ConnectionManager, wait: Callable[[float], None]
    ) -> None:
        rejecting.register_connection("silent", "user")
        wait(60)
        assert not rejecting.register_connection("new", "user")
        wait(31)
        assert rejecting.register_connection("new", "user")

    def test_who_is_refused_is_told_for_how_long_the_other_was_not_seen(
        self, rejecting: ConnectionManager, wait: Callable[[float], None]
    ) -> None:
        rejecting.register_connection("silent", "user")
        wait(60)

        connection = rejecting.register_connection("new", "user").connection

        assert timedelta(seconds=60) <= connection.observed_at - connection.last_seen < timedelta(seconds=90)

    def test_an_expired_one_locks_nobody_out(self, make_manager: ManagerFactory, wait: Callable[[float], None]) -> None:
        # It expires before it would be stale.
        manager = make_manager(displacement="reject_while_alive", conn_ttl_seconds=60)
        manager.register_connection("expired", "user")
        wait(61)

        registration = manager.register_connection("new", "user")

        assert registration
        assert [gone.sid for gone in registration.displaced] == ["expired"]

    @pytest.mark.parametrize("sid", ["new", "detached"])
    def test_a_detached_one_locks_nobody_out_and_is_resumed(self, rejecting: ConnectionManager, sid: str) -> None:
        rejecting.register_connection("detached", "user")
        rejecting.join_game("detached", "game")
        rejecting.unregister_connection("detached", grace_seconds=30)

        registration = rejecting.register_connection(sid, "user")

        assert registration
        assert (registration.resumed, registration.displaced) == (True, ())
        assert registration.connection.game_id == "game"

    def test_one_past_its_grace_locks_nobody_out(
        self, rejecting: ConnectionManager, wait: Callable[[float], None]
    ) -> None:
        rejecting.register_connection("detached", "user")
        rejecting.unregister_connection("detached", grace_seconds=30)
        wait(31)

        registration = rejecting.register_connection("new", "user")

        assert (registration.refused, registration.resumed) == (False, False)
        assert [gone.sid for gone in registration.displaced] == ["detached"]

    def test_its_own_sid_is_refreshed(self, rejecting: ConnectionManager, wait: Callable[[float], None]) -> None:
        first = rejecting.register_connection("sid", "user").connection
        rejecting.join_game("sid", "game")
        wait(60)

        registration = rejecting.register_connection("sid", "user")

        assert registration
        assert (registration.displaced, registration.replaced) == ((), None)
        assert registration.connection.game_id == "game"
        assert registration.connection.epoch > first.epoch
        wait(60)
        assert not rejecting.register_connection("new", "user")

    def test_who_is_refused_does_not_take_over_the_sid_of_another_user(
        self, rejecting: ConnectionManager, keys: Keys
    ) -> None:
        mine = rejecting.register_connection("mine", "user").connection
        theirs = rejecting.register_connection("theirs", "another user").connection
        before = keys()

        registration = rejecting.register_connection("theirs", "user")

        assert registration == Registration(mine, refused=True)
        assert_unchanged(before, keys())
        assert rejecting.get_user_connection("another user") == theirs

    def test_who_is_not_refused_does(self, rejecting: ConnectionManager) -> None:
        theirs = rejecting.register_connection("sid", "another user").connection
        registration = rejecting.register_connection("sid", "user")
        assert registration
        assert registration.replaced == theirs

    def test_it_is_the_policy_of_the_manager_that_is_asked(
        self, make_manager: ManagerFactory, rejecting: ConnectionManager
    ) -> None:
        rejecting.register_connection("old", "user")
        registration = make_manager().register_connection("new", "user")
        assert registration
        assert [gone.sid for gone in registration.displaced] == ["old"]


class TestRejectWithSeveralConnectionsPerUser:
    """A register is refused while as many as are allowed are alive; what is not alive goes first."""

    @pytest.fixture
    def rejecting(self, make_manager: ManagerFactory) -> ConnectionManager:
        return make_manager(displacement="reject_while_alive", connections_per_user=2)

    def test_all_that_are_allowed_are_accepted_and_the_next_is_refused(
        self, rejecting: ConnectionManager, keys: Keys
    ) -> None:
        first, second = (rejecting.register_connection(sid, "user") for sid in ("first", "second"))
        assert (bool(first), first.displaced) == (True, ())
        assert (bool(second), second.displaced) == (True, ())
        before = keys()

        third = rejecting.register_connection("third", "user")

        assert third == Registration(second.connection, refused=True)
        assert_unchanged(before, keys())

    @pytest.mark.parametrize(("alive", "stale"), [("first", "second"), ("second", "first")])
    def test_the_stale_one_of_two_is_displaced_even_when_it_is_the_newer(
        self, rejecting: ConnectionManager, wait: Callable[[float], None], alive: str, stale: str
    ) -> None:
        for sid in ("first", "second"):
            rejecting.register_connection(sid, "user")
        wait(60)
        rejecting.update_heartbeat(alive)
        wait(31)

        registration = rejecting.register_connection("third", "user")

        assert registration
        assert [gone.sid for gone in registration.displaced] == [stale]
        assert rejecting.get_connection(alive) is not None
        refused = rejecting.register_connection("fourth", "user")
        assert (refused.refused, refused.connection.sid) == (True, "third")

    def test_a_detached_one_of_two_is_resumed_and_the_one_alive_stays(self, rejecting: ConnectionManager) -> None:
        for sid in ("first", "second"):
            rejecting.register_connection(sid, "user")
        rejecting.unregister_connection("first", grace_seconds=30)

        registration = rejecting.register_connection("third", "user")

        assert (registration.resumed, registration.displaced) == (True, ())
        assert rejecting.get_connection("second") is not None
        assert not rejecting.register_connection("fourth", "user")

    def test_more_than_are_allowed_by_now_refuse_too(self, make_manager: ManagerFactory, keys: Keys) -> None:
        for sid in ("first", "second", "third"):
            make_manager(connections_per_user=3).register_connection(sid, "user")
        before = keys()

        manager = make_manager(displacement="reject_while_alive")

        assert manager.register_connection("new", "user").connection.sid == "third"
        assert_unchanged(before, keys())

    def test_more_than_are_allowed_by_now_do_not_refuse_one_of_them(self, make_manager: ManagerFactory) -> None:
        for sid in ("first", "second", "third"):
            make_manager(connections_per_user=3).register_connection(sid, "user")
        manager = make_manager(displacement="reject_while_alive")

        registration = manager.register_connection("first", "user")

        assert (registration.refused, registration.resumed, registration.displaced) == (False, False, ())

    def test_more_than_are_allowed_by_now_refuse_a_resume_by_the_same_sid(
        self, make_manager: ManagerFactory, keys: Keys
    ) -> None:
        for sid in ("first", "second"):
            make_manager(connections_per_user=2).register_connection(sid, "user")
        manager = make_manager(displacement="reject_while_alive")
        manager.unregister_connection("first", grace_seconds=30)
        before = keys()

        assert manager.register_connection("first", "user").connection.sid == "second"
        assert_unchanged(before, keys())


@pytest.mark.parametrize("displacement", ["", "reject", "NEWEST_WINS", None, True])
def test_an_unknown_policy_is_refused(make_manager: ManagerFactory, displacement: Any) -> None:
    choices = '"newest_wins", "newest_resumes" or "reject_while_alive"'
    error = ValueError if isinstance(displacement, str) else TypeError
    with pytest.raises(error, match=f"displacement must be {choices}"):
        make_manager(displacement=displacement)


@pytest.fixture
def resuming(make_manager: ManagerFactory) -> ConnectionManager:
    return make_manager(displacement="newest_resumes")


class TestNewestResumes:
    """The newest wins, and takes over the seat of the connection that it displaces, though nobody detached that."""

    def test_it_is_in_the_game_of_the_one_that_it_displaces(self, resuming: ConnectionManager) -> None:
        resuming.register_connection("old", "user", metadata="metadata")
        resuming.join_game("old", "game")
        old = resuming.get_connection("old")

        registration = resuming.register_connection("new", "user")

        assert registration.displaced == (old,)
        assert (registration.resumed, registration.resumed_from) == (True, old)
        assert registration.connection.game_id == "game"
        assert registration.connection.metadata == b"metadata"
        assert resuming.get_game_connections("game") == [registration.connection]
        assert resuming.get_connection("new") == registration.connection
        assert resuming.get_connection("old") is None

    def test_the_first_of_a_user_resumes_nothing(self, resuming: ConnectionManager) -> None:
        registration = resuming.register_connection("sid", "user")
        assert (registration.displaced, registration.resumed, registration.connection.game_id) == ((), False, None)

    def test_one_that_is_in_no_game_is_resumed_too(self, resuming: ConnectionManager) -> None:
        resuming.register_connection("old", "user", metadata="old")
        registration = resuming.register_connection("new", "user", metadata="new")
        assert (registration.resumed, registration.connection.game_id) == (True, None)
        assert registration.connection.metadata == b"new"

    def test_its_place_in_a_full_game_is_never_free(self, resuming: ConnectionManager) -> None:
        for user in ("user", "opponent"):
            resuming.register_connection(f"{user}'s", user)
            resuming.join_game(f"{user}'s", "game", capacity=2)
        resuming.register_connection("third", "third")

        resuming.register_connection("new", "user")

        assert resuming.join_game("third", "game", capacity=2).is_full
        assert resuming.get_opponent_sid("game", "opponent") == "new"

    def test_an_expired_one_is_displaced_and_not_resumed(
        self, make_manager: ManagerFactory, wait: Callable[[float], None]
    ) -> None:
        manager = make_manager(displacement="newest_resumes", conn_ttl_seconds=60)
        manager.register_connection("expired", "user")
        manager.join_game("expired", "game")
        wait(61)

        registration = manager.register_connection("new", "user")

        assert [gone.sid for gone in registration.displaced] == ["expired"]
        assert (registration.resumed, registration.connection.game_id) == (False, None)
        assert manager.get_game_connections("game") == []

    def test_its_own_sid_is_refreshed(self, resuming: ConnectionManager) -> None:
        resuming.register_connection("sid", "user")
        resuming.join_game("sid", "game")
        registration = resuming.register_connection("sid", "user")
        assert (registration.displaced, registration.resumed) == ((), False)
        assert registration.connection.game_id == "game"

    def test_with_the_sid_of_another_user_it_resumes_its_own_users(self, resuming: ConnectionManager) -> None:
        for user in ("user", "another"):
            resuming.register_connection(f"{user}'s", user)
            resuming.join_game(f"{user}'s", f"{user}'s game")

        registration = resuming.register_connection("another's", "user")

        assert registration.replaced is not None
        assert registration.replaced.user_id == "another"
        assert registration.connection.game_id == "user's game"
        assert resuming.get_game_connections("another's game") == []

    def test_a_seat_that_is_kept_comes_first_and_then_nobody_is_displaced(self, make_manager: ManagerFactory) -> None:
        manager = make_manager(displacement="newest_resumes", connections_per_user=2)
        for sid in ("seat", "live"):
            manager.register_connection(sid, "user")
            manager.join_game(sid, f"{sid}'s game")
        manager.unregister_connection("seat", grace_seconds=60)

        registration = manager.register_connection("new", "user")

        assert (registration.displaced, registration.connection.game_id) == ((), "seat's game")
        assert manager.is_user_online("user")

    @pytest.mark.parametrize("sid", ["new", "live-2"])
    def test_where_it_has_a_seat_already_it_takes_none_of_those_that_a_lower_limit_displaces(
        self, make_manager: ManagerFactory, resuming: ConnectionManager, sid: str
    ) -> None:
        earlier = make_manager(connections_per_user=3)
        for earlier_sid in ("live-1", "live-2", "seat"):
            earlier.register_connection(earlier_sid, "user")
            earlier.join_game(earlier_sid, f"{earlier_sid} game")
        earlier.unregister_connection("seat", grace_seconds=60)

        registration = resuming.register_connection(sid, "user")

        assert registration.resumed is (sid == "new")
        assert registration.displaced[0].sid == "live-1"
        assert registration.connection.game_id == ("seat game" if sid == "new" else "live-2 game")

    def test_below_the_limit_nobody_is_displaced_or_resumed(self, make_manager: ManagerFactory) -> None:
        manager = make_manager(displacement="newest_resumes", connections_per_user=2)
        manager.register_connection("old", "user")
        manager.join_game("old", "game")
        registration = manager.register_connection("new", "user")
        assert (registration.displaced, registration.resumed, registration.connection.game_id) == ((), False, None)

    def test_of_several_that_it_displaces_it_resumes_the_newest_live_one(
        self, make_manager: ManagerFactory, wait: Callable[[float], None]
    ) -> None:
        earlier = make_manager(connections_per_user=4, conn_ttl_seconds=60)
        for sid in ("first", "second", "third", "expired"):
            earlier.register_connection(sid, "user")
            earlier.join_game(sid, f"{sid} game")
        wait(40)
        earlier.update_heartbeats(["first", "second", "third"])
        wait(40)

        registration = make_manager(
            displacement="newest_resumes", connections_per_user=2, conn_ttl_seconds=60
        ).register_connection("new", "user")

        assert [gone.sid for gone in registration.displaced] == ["first", "second", "expired"]
        assert registration.resumed_from == registration.displaced[1]
        assert registration.connection.game_id == "second game"


ROUNDS = 150
ROUND_SECONDS = 0.003


def come_back_to_each_game(start: float, process: int, url: str, namespace: str) -> list[tuple[list[str], str | None]]:
    """Register for each user at the moment when the others do; give whom each displaced, and the game it is in."""
    answers = []
    with presence.sync.ConnectionManager.from_url(url, namespace=namespace, displacement="newest_resumes") as manager:
        manager.get_connection_count()
        for number in range(ROUNDS):
            sleep_until(start + number * ROUND_SECONDS)
            registration = manager.register_connection(f"sid-{process}-{number}", f"user-{number}")
            answers.append(([gone.sid for gone in registration.displaced], registration.connection.game_id))
    return answers


def test_of_many_that_come_back_at_once_the_last_has_the_game_and_each_other_is_reported_once(
    processes: ProcessPoolExecutor, server_url: str, namespace: str, resuming: ConnectionManager, keys: Keys
) -> None:
    for number in range(ROUNDS):
        resuming.register_connection(f"first-{number}", f"user-{number}")
        resuming.join_game(f"first-{number}", f"game-{number}")

    answers = in_each(processes, come_back_to_each_game, server_url, namespace)

    keyspace = keys()
    assert violations(keyspace) == []
    for number, of_user in enumerate(zip(*answers, strict=True)):
        (stayed,) = keyspace.users[f"user-{number}"]
        registered = {f"first-{number}"} | {f"sid-{process}-{number}" for process in range(PROCESSES)}
        assert sorted(sid for displaced, _ in of_user for sid in displaced) == sorted(registered - {stayed})
        assert {game_id for _, game_id in of_user} == {f"game-{number}"}
        assert list(keyspace.games[f"game-{number}"]) == [stayed]


def register_for_each_user(start: float, process: int, url: str, namespace: str) -> list[tuple[str, bool]]:
    """Register for each user at the moment when the others do; give which sid has it, and whether that is this one."""
    answers = []
    with presence.sync.ConnectionManager.from_url(
        url, namespace=namespace, displacement="reject_while_alive"
    ) as manager:
        manager.get_connection_count()
        for number in range(ROUNDS):
            sleep_until(start + number * ROUND_SECONDS)
            registration = manager.register_connection(f"sid-{process}-{number}", f"user-{number}")
            assert registration.displaced == ()
            answers.append((registration.connection.sid, bool(registration)))
    return answers


def test_of_many_registers_at_once_one_is_accepted_and_all_others_are_told_which(
    processes: ProcessPoolExecutor, server_url: str, namespace: str, keys: Keys
) -> None:
    answers = in_each(processes, register_for_each_user, server_url, namespace)

    keyspace = keys()
    assert violations(keyspace) == []
    for number, of_user in enumerate(zip(*answers, strict=True)):
        (accepted,) = [process for process, (_, is_accepted) in enumerate(of_user) if is_accepted]
        assert {sid for sid, _ in of_user} == {f"sid-{accepted}-{number}"}
        assert keyspace.users[f"user-{number}"] == [f"sid-{accepted}-{number}"]


class TestEpochs:
    """Every registration has a number larger than all before it in the namespace."""

    def test_grow_over_users_sids_and_registrations_of_the_same(self, make_manager: ManagerFactory) -> None:
        managers = make_manager(), make_manager()
        epochs = [
            managers[number % 2].register_connection(sid, user_id).connection.epoch
            for number, (sid, user_id) in enumerate(
                [
                    ("sid-1", "user-1"),
                    ("sid-2", "user-2"),
                    ("sid-1", "user-1"),  # refreshed
                    ("sid-3", "user-1"),  # displaces
                    ("sid-2", "user-3"),  # replaces
                    ("sid-1", "user-1"),  # is back
                ]
            )
        ]
        assert epochs[0] > 0
        assert all(earlier < later for earlier, later in pairwise(epochs))

    def test_are_told_by_every_read(self, manager: ConnectionManager) -> None:
        connection = manager.register_connection("sid", "user").connection
        manager.join_game("sid", "game")

        read = manager.get_connection("sid"), manager.get_user_connection("user"), *manager.get_game_connections("game")

        assert [found.epoch for found in read if found] == [connection.epoch] * 3

    def test_stay_while_nobody_registers(self, manager: ConnectionManager) -> None:
        epoch = manager.register_connection("sid", "user").connection.epoch
        manager.join_game("sid", "game")
        manager.update_heartbeat("sid")
        manager.join_game("sid", "next game")
        manager.leave_game("sid")
        detached = manager.unregister_connection("sid", grace_seconds=30)
        assert detached is not None
        assert detached.epoch == epoch

    def test_grow_after_everything_was_removed(self, manager: ConnectionManager) -> None:
        first = manager.register_connection("sid", "user").connection.epoch
        manager.unregister_connection("sid")
        second = manager.register_connection("sid", "user").connection.epoch
        assert second > first

    def test_grow_after_an_older_copy_of_the_data_was_restored(
        self, make_manager: ManagerFactory, own_server: LocalServer
    ) -> None:
        manager = make_manager(own_server.url)
        with redis.Redis.from_url(own_server.url) as client:
            manager.register_connection("sid", "user")
            stored = [key for key in client.scan_iter() if b":reply:" not in key]
            copy = {key: (client.pttl(key), client.dump(key)) for key in stored}
            epochs = [manager.register_connection(f"sid-{number}", "user").connection.epoch for number in range(50)]
            client.flushdb()
            for key, (ttl, dump) in copy.items():
                client.restore(key, ttl, dump, replace=True)
        assert manager.get_connection("sid") is not None

        registration = manager.register_connection("sid-0", "user")

        assert registration.connection.epoch > max(epochs)
        assert [gone.sid for gone in registration.displaced] == ["sid"]

    def test_grow_after_all_data_was_lost(self, make_manager: ManagerFactory, own_server: LocalServer) -> None:
        manager = make_manager(own_server.url)
        before = manager.register_connection("sid", "user").connection.epoch
        own_server.kill()
        own_server.start()
        assert manager.register_connection("sid", "user").connection.epoch > before


class TestEpochsAheadOfTheClock:
    """Where the server's clock ran back, epochs go on growing by one; times are the clock's all the same."""

    @pytest.fixture
    def ahead(self, client: redis.Redis, namespace: str) -> int:
        epoch = self.now_us(client) + 3_600_000_000
        client.zadd(f"{{{namespace}}}:last_seen", {"": -epoch})
        client.expire(f"{{{namespace}}}:last_seen", 3600)
        return epoch

    @staticmethod
    def now_us(client: redis.Redis) -> int:
        seconds, microseconds = client.time()
        return int(seconds) * 1_000_000 + int(microseconds)

    def test_the_next_is_one_more(self, manager: ConnectionManager, ahead: int, keys: Keys) -> None:
        epochs = [
            manager.register_connection(sid, user_id).connection.epoch
            for sid, user_id in (("sid", "user"), ("other sid", "other user"), ("sid", "user"), ("new", "user"))
        ]
        assert epochs == [ahead + 1, ahead + 2, ahead + 3, ahead + 4]
        assert keys().epoch == ahead + 4

    def test_the_boot_epochs_of_servers_are_among_them(
        self, make_manager: ManagerFactory, ahead: int, keys: Keys
    ) -> None:
        servers = [make_manager(server_id="server") for _ in range(2)]
        assert [server.start_server() for server in servers] == [ahead + 1, ahead + 2]
        assert servers[1].register_connection("sid", "user").connection.epoch == ahead + 3
        assert keys().epoch == ahead + 3

    @pytest.mark.parametrize("earlier", ["none", "displaced", "resumed"])
    def test_a_connection_was_connected_when_the_clock_says(
        self, manager: ConnectionManager, client: redis.Redis, ahead: int, earlier: str
    ) -> None:
        if earlier != "none":
            manager.register_connection("earlier", "user")
        if earlier == "resumed":
            manager.unregister_connection("earlier", grace_seconds=30)
        before = self.now_us(client)
        connection = manager.register_connection("sid", "user").connection
        after = self.now_us(client)

        assert connection.epoch == ahead + (1 if earlier == "none" else 2)
        earliest = datetime.fromtimestamp(before / 1e6, UTC) - timedelta(milliseconds=1)
        assert earliest < connection.connected_at <= datetime.fromtimestamp(after / 1e6, UTC)
        assert connection.connected_at == connection.last_seen == connection.observed_at
        manager.join_game("sid", "game")
        for read in (manager.get_connection("sid"), *manager.get_game_connections("game")):
            assert read is not None
            assert (read.epoch, read.connected_at) == (connection.epoch, connection.connected_at)

    def test_the_same_microsecond_does_not_give_the_last_one_again(self, client: redis.Redis) -> None:
        includes = [(lua_folder() / "include" / f"{name}.lua").read_text() for name in ("as_argument", "next_epoch")]
        calls = "return {next_epoch(false, '5'), next_epoch('-5', '4'), next_epoch('-5', '5'), next_epoch('-5', '6')}"
        assert client.eval("\n".join([*includes, calls]), 0) == [b"5", b"6", b"6", b"6"]

    def test_the_newest_registration_still_wins_and_resumes(self, manager: ConnectionManager, ahead: int) -> None:
        manager.register_connection("old", "user")
        assert [gone.sid for gone in manager.register_connection("new", "user").displaced] == ["old"]
        manager.join_game("new", "game")
        manager.unregister_connection("new", grace_seconds=30)
        registration = manager.register_connection("newest", "user")
        assert (registration.resumed, registration.connection.game_id) == (True, "game")


def register_many(start: float, process: int, url: str, namespace: str) -> list[int]:
    sleep_until(start)
    with presence.sync.ConnectionManager.from_url(url, namespace=namespace) as manager:
        return [
            manager.register_connection(f"sid-{process}-{number}", f"user-{number % 7}").connection.epoch
            for number in range(500)
        ]


@pytest.mark.parametrize("is_ahead", [False, True], ids=["", "ahead of the clock"])
def test_epochs_grow_over_all_processes(
    processes: ProcessPoolExecutor, server_url: str, namespace: str, client: redis.Redis, keys: Keys, is_ahead: bool
) -> None:
    if is_ahead:
        client.zadd(f"{{{namespace}}}:last_seen", {"": -int((time.time() + 3600) * 1e6)})
        client.expire(f"{{{namespace}}}:last_seen", 3600)

    of_processes = in_each(processes, register_many, server_url, namespace)

    for epochs in of_processes:
        assert all(earlier < later for earlier, later in pairwise(epochs))
    assert max(Counter(epoch for epochs in of_processes for epoch in epochs).values()) == 1
    keyspace = keys()
    assert violations(keyspace) == []
    # Each user's connection is the one that registered last: that of the largest epoch.
    assert max(int(record["epoch"]) for record in keyspace.records.values()) == keyspace.epoch
    assert keyspace.epoch == max(max(epochs) for epochs in of_processes)


FENCED: dict[str, tuple[Callable[..., Any], Any, Any]] = {
    "heartbeat": (lambda manager, epoch: manager.update_heartbeat("sid", epoch=epoch), False, True),
    "join": (
        lambda manager, epoch: manager.join_game("sid", "next game", epoch=epoch),
        JoinResult(False),
        JoinResult(True, "game"),
    ),
    "join with a capacity": (
        lambda manager, epoch: manager.join_game("sid", "next game", capacity=1, epoch=epoch),
        JoinResult(False),
        JoinResult(True, "game"),
    ),
    "leave": (lambda manager, epoch: manager.leave_game("sid", epoch=epoch), None, "game"),
    "unregister": (
        lambda manager, epoch: sid_and_game(manager.unregister_connection("sid", epoch=epoch)),
        None,
        ("sid", "game"),
    ),
    "detach": (
        lambda manager, epoch: sid_and_game(manager.unregister_connection("sid", grace_seconds=30, epoch=epoch)),
        None,
        ("sid", "game"),
    ),
}


def sid_and_game(connection: presence.ConnectionInfo | None) -> tuple[str, str | None] | None:
    return (connection.sid, connection.game_id) if connection else None


@pytest.mark.parametrize("name", FENCED)
class TestFencing:
    """With an epoch, a call acts for that registration of the sid only."""

    @staticmethod
    def register_twice(manager: ConnectionManager, users: tuple[str, str] = ("user", "user")) -> tuple[int, int]:
        older = manager.register_connection("sid", users[0]).connection.epoch
        manager.join_game("sid", "game")
        newer = manager.register_connection("sid", users[1]).connection.epoch
        manager.join_game("sid", "game")
        return older, newer

    def test_an_older_epoch_changes_nothing(self, manager: ConnectionManager, keys: Keys, name: str) -> None:
        older, _ = self.register_twice(manager)
        before = keys()
        call, refused, _ = FENCED[name]

        assert call(manager, older) == refused

        assert_unchanged(before, keys())

    def test_the_epoch_of_an_earlier_owner_changes_nothing(
        self, manager: ConnectionManager, keys: Keys, name: str
    ) -> None:
        older, _ = self.register_twice(manager, ("earlier owner", "owner"))
        before = keys()
        call, refused, _ = FENCED[name]

        assert call(manager, older) == refused

        assert_unchanged(before, keys())

    @pytest.mark.parametrize("difference", [-1, 1])
    def test_an_epoch_that_is_off_by_one_changes_nothing(
        self, manager: ConnectionManager, keys: Keys, name: str, difference: int
    ) -> None:
        _, newer = self.register_twice(manager)
        before = keys()
        call, refused, _ = FENCED[name]

        assert call(manager, newer + difference) == refused
        assert call(manager, 0) == refused

        assert_unchanged(before, keys())

    def test_an_evicted_record_has_no_epoch(
        self, manager: ConnectionManager, client: redis.Redis, namespace: str, name: str
    ) -> None:
        self.register_twice(manager)
        client.delete(*(f"{{{namespace}}}:{key}" for key in ("conn:sid", "user_conns:user", "game_conns:game")))
        call, refused, _ = FENCED[name]
        assert call(manager, 0) == refused
        client.zrem(f"{{{namespace}}}:last_seen", "sid")

    def test_the_current_epoch_acts(self, manager: ConnectionManager, name: str) -> None:
        _, newer = self.register_twice(manager)
        call, _, done = FENCED[name]
        assert call(manager, newer) == done

    def test_no_epoch_acts(self, manager: ConnectionManager, name: str) -> None:
        self.register_twice(manager)
        call, _, done = FENCED[name]
        assert call(manager, None) == done

    def test_the_epoch_from_before_a_resume_of_the_same_sid_changes_nothing(
        self, manager: ConnectionManager, keys: Keys, name: str
    ) -> None:
        older = manager.register_connection("sid", "user").connection.epoch
        manager.join_game("sid", "game")
        manager.unregister_connection("sid", grace_seconds=30)
        newer = manager.register_connection("sid", "user").connection.epoch
        before = keys()
        call, refused, done = FENCED[name]

        assert call(manager, older) == refused
        assert_unchanged(before, keys())
        assert call(manager, newer) == done

    @pytest.mark.parametrize(
        ("epoch", "error"),
        [("1", TypeError), (b"1", TypeError), (1.0, TypeError), (True, TypeError), (-1, ValueError)],
    )
    def test_a_wrong_epoch_is_named(
        self, manager: ConnectionManager, keys: Keys, name: str, epoch: Any, error: type[Exception]
    ) -> None:
        self.register_twice(manager)
        before = keys()
        call, _, _ = FENCED[name]

        with pytest.raises(error, match="epoch must be"):
            call(manager, epoch)

        assert_unchanged(before, keys())


def fill(manager: ConnectionManager, *sids: str, game_id: str = "game") -> None:
    for sid in sids:
        manager.register_connection(sid, f"user of {sid}")
        assert manager.join_game(sid, game_id)


class TestCapacity:
    """join_game with a capacity: a full game takes nobody more."""

    def test_the_game_takes_as_many_as_its_capacity(self, manager: ConnectionManager) -> None:
        for number in range(3):
            manager.register_connection(f"sid-{number}", f"user-{number}")
        assert [manager.join_game(f"sid-{number}", "game", capacity=2) for number in range(3)] == [
            JoinResult(True),
            JoinResult(True),
            JoinResult(False, is_full=True),
        ]
        assert manager.get_game_connection_count("game") == 2

    def test_who_finds_it_full_stays_in_the_current_game(self, manager: ConnectionManager, keys: Keys) -> None:
        fill(manager, "sid-1", "sid-2")
        fill(manager, "sid", game_id="current game")
        before = keys()

        joined = manager.join_game("sid", "game", capacity=2)

        assert not joined
        assert joined == JoinResult(False, is_full=True)
        assert_unchanged(before, keys())
        assert manager.join_game("sid", "game", capacity=3) == JoinResult(True, "current game")

    def test_an_unknown_connection_is_not_told_that_it_is_full(self, manager: ConnectionManager) -> None:
        fill(manager, "sid-1", "sid-2")
        assert manager.join_game("unknown", "game", capacity=2) == JoinResult(False)

    def test_joining_the_own_game_is_fine_when_it_is_full(self, manager: ConnectionManager) -> None:
        fill(manager, "sid-1", "sid-2")
        assert manager.join_game("sid-1", "game", capacity=2) == JoinResult(True)
        assert manager.join_game("sid-1", "game", capacity=1) == JoinResult(True)

    def test_a_lower_capacity_puts_nobody_out(self, manager: ConnectionManager) -> None:
        fill(manager, "sid-1", "sid-2", "sid-3")
        fill(manager, "sid", game_id="current game")
        assert manager.join_game("sid", "game", capacity=2).is_full
        assert manager.get_game_connection_count("game") == 3

    def test_the_largest_capacity_is_accepted(self, manager: ConnectionManager) -> None:
        manager.register_connection("sid", "user")
        assert manager.join_game("sid", "game", capacity=1_000_000)

    def test_without_a_capacity_any_number_may_join(self, manager: ConnectionManager) -> None:
        fill(manager, *(f"sid-{number}" for number in range(20)))
        assert manager.get_game_connection_count("game") == 20

    @pytest.mark.parametrize(
        "free",
        [
            pytest.param(lambda manager: manager.leave_game("sid-1"), id="leave"),
            pytest.param(lambda manager: manager.join_game("sid-1", "next game"), id="join another game"),
            pytest.param(lambda manager: manager.unregister_connection("sid-1"), id="unregister"),
            pytest.param(lambda manager: manager.register_connection("new", "user of sid-1"), id="be displaced"),
            pytest.param(lambda manager: manager.register_connection("sid-1", "new owner"), id="be replaced"),
        ],
    )
    def test_whoever_goes_frees_a_seat(
        self, manager: ConnectionManager, free: Callable[[ConnectionManager], object]
    ) -> None:
        fill(manager, "sid-1", "sid-2")
        manager.register_connection("sid", "user")
        free(manager)
        assert manager.join_game("sid", "game", capacity=2)

    def test_an_expired_member_frees_its_seat_before_any_cleanup(
        self, make_manager: ManagerFactory, wait: Callable[[float], None]
    ) -> None:
        manager = make_manager(conn_ttl_seconds=60)
        fill(manager, "expires", "stays")
        wait(40)
        manager.update_heartbeat("stays")
        for sid in ("sid-1", "sid-2"):
            manager.register_connection(sid, f"user of {sid}")
        assert manager.join_game("sid-1", "game", capacity=2).is_full
        wait(21)

        assert manager.join_game("sid-1", "game", capacity=2)
        assert manager.join_game("sid-2", "game", capacity=2).is_full
        assert manager.get_game_connection_count("game") == 2

    def test_a_stale_member_that_may_come_back_keeps_its_seat(
        self, manager: ConnectionManager, wait: Callable[[float], None]
    ) -> None:
        fill(manager, "sid-1", "sid-2")
        wait(100)
        manager.register_connection("sid", "user")
        assert manager.join_game("sid", "game", capacity=2).is_full

    def test_a_game_of_thousands_counts_all_its_members(self, manager: ConnectionManager) -> None:
        count, operations = 2_500, manager.operations
        for start in range(0, count, 500):
            numbers = range(start, start + 500)
            manager.pipeline([operations.register_connection(f"sid-{n}", f"user-{n}") for n in numbers])
            manager.pipeline([operations.join_game(f"sid-{n}", "game") for n in numbers])
        manager.register_connection("sid", "user")
        assert manager.join_game("sid", "game", capacity=count).is_full
        assert manager.join_game("sid", "game", capacity=count + 1)

    @pytest.mark.parametrize(
        ("capacity", "error", "rule"),
        [
            (0, ValueError, "from 1 to 1000000"),
            (-1, ValueError, "from 1 to 1000000"),
            (1_000_001, ValueError, "from 1 to 1000000"),
            ("2", TypeError, "an int"),
            (2.0, TypeError, "an int"),
            (True, TypeError, "an int"),
        ],
    )
    def test_a_wrong_capacity_is_named(
        self, manager: ConnectionManager, capacity: Any, error: type[Exception], rule: str
    ) -> None:
        manager.register_connection("sid", "user")
        with pytest.raises(error, match=f"capacity must be {rule}"):
            manager.join_game("sid", "game", capacity=capacity)
        assert manager.get_game_connections("game") == []


SEATS = 3
GAMES = 100


def join_each_game(start: float, process: int, url: str, namespace: str) -> list[list[JoinResult]]:
    """Join each game, with two connections of this process, at the moment when the others do."""
    sids = [f"sid-{process}-{number}" for number in range(2)]
    answers = []
    with presence.sync.ConnectionManager.from_url(url, namespace=namespace) as manager:
        for sid in sids:
            manager.register_connection(sid, f"user of {sid}")
        for game in range(GAMES):
            sleep_until(start + game * ROUND_SECONDS)
            answers.append([manager.join_game(sid, f"game-{game}", capacity=SEATS) for sid in sids])
    return answers


def test_connections_that_race_from_game_to_game_overfill_none_and_are_where_they_were_last_let_in(
    processes: ProcessPoolExecutor, server_url: str, namespace: str, keys: Keys
) -> None:
    answers = in_each(processes, join_each_game, server_url, namespace)

    keyspace = keys()
    assert violations(keyspace) == []
    assert all(len(members) <= SEATS for members in keyspace.games.values())
    for process, of_process in enumerate(answers):
        for number, results in enumerate(zip(*of_process, strict=True)):
            current = None
            for game, result in enumerate(results):
                assert result in (JoinResult(True, current), JoinResult(False, is_full=True))
                current = f"game-{game}" if result else current
            assert keyspace.records[f"sid-{process}-{number}"]["game_id"] == (current or "")
    # Nobody leaves the last game.
    assert len(keyspace.games[f"game-{GAMES - 1}"]) == SEATS


def crowd_into_each_game(start: float, process: int, url: str, namespace: str) -> list[list[bool]]:
    """Join each game with connections that have no other, so that no seat is freed."""
    answers = []
    with presence.sync.ConnectionManager.from_url(url, namespace=namespace) as manager:
        operations = manager.operations
        sids = [f"sid-{process}-{game}-{number}" for game in range(GAMES) for number in range(2)]
        manager.pipeline([operations.register_connection(sid, f"user of {sid}") for sid in sids])
        for game in range(GAMES):
            sleep_until(start + 0.2 + game * ROUND_SECONDS)
            joined = [
                manager.join_game(f"sid-{process}-{game}-{number}", f"game-{game}", capacity=SEATS)
                for number in range(2)
            ]
            assert all(bool(result) is not result.is_full for result in joined)
            answers.append([bool(result) for result in joined])
    return answers


def test_in_each_of_many_races_for_the_seats_of_a_game_exactly_its_capacity_joins(
    processes: ProcessPoolExecutor, server_url: str, namespace: str, keys: Keys
) -> None:
    answers = in_each(processes, crowd_into_each_game, server_url, namespace)

    keyspace = keys()
    assert violations(keyspace) == []
    for game in range(GAMES):
        joined = {
            f"sid-{process}-{game}-{number}"
            for process, of_process in enumerate(answers)
            for number, has_joined in enumerate(of_process[game])
            if has_joined
        }
        assert len(joined) == SEATS
        assert set(keyspace.games[f"game-{game}"]) == joined
