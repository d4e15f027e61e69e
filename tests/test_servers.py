"""Game servers: one that dies is found by any other's cleanup, and each of its connections is reported once."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

import presence
import presence.sync
from presence import PresenceError
from presence.arguments import MAX_METADATA_BYTES
from presence.background import RepeatedServerHeartbeat
from presence.operations import CLEANUP_BATCH_SIZE
from tests.fault_calls import one_attempt
from tests.fault_proxy import Fate, Proxy
from tests.processes import PROCESSES, at_once, sleep_until, spawn
from tests.server import free_port
from tests.watching import evalsha_calls, is_held, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    import redis

    from presence import CleanupResult
    from presence.sync import ConnectionManager
    from tests.conftest import Keys, ManagerFactory
    from tests.server import LocalServer

BOUND_SECONDS = 30


def sids(connections: Any) -> list[str]:
    return sorted(connection.sid for connection in connections)


def register_many(manager: ConnectionManager, count: int, name: str = "sid") -> list[str]:
    manager.start_server()
    names = [f"{name}-{number:03}" for number in range(count)]
    manager.pipeline([manager.operations.register_connection(sid, f"user of {sid}") for sid in names])
    return names


def beats(keys: Keys) -> None:
    """Wait for the next heartbeat of a server."""
    known = keys().known_servers
    wait_until(lambda: keys().known_servers != known)


class TestADeadServer:
    """Not seen for three heartbeats, it is dead to the cleanup of any other."""

    def test_its_connections_are_removed_although_their_clients_beat(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], keys: Keys
    ) -> None:
        dead, other = make_manager(server_id="dead"), make_manager(server_id="other")
        mine = dead.register_connection("mine", "user-1").connection
        other.register_connection("another's", "user-2")
        make_manager().register_connection("nobody's", "user-3")
        dead.join_game("mine", "game")
        wait(91)
        assert all(dead.update_heartbeats(["mine", "another's", "nobody's"]).values())
        assert other.update_server_heartbeat()

        removed = other.cleanup_stale_connections().removed

        assert [(gone.sid, gone.server_id, gone.game_id) for gone in removed] == [("mine", "dead", "game")]
        assert mine.server_id == "dead"
        assert other.cleanup_stale_connections() == presence.CleanupResult()
        assert set(keys().records) == {"another's", "nobody's"}
        assert len(keys().known_servers) == 1

    def test_it_is_dead_as_soon_when_the_clock_is_set_back(
        self, make_manager: ManagerFactory, wait: Callable[[float], None]
    ) -> None:
        """Its last heartbeat is still to come, and so it counts from the first cleanup on."""
        dead, other = make_manager(server_id="dead"), make_manager(server_id="other")
        dead.register_connection("mine", "user")
        wait(-7200)
        assert not other.cleanup_stale_connections()
        wait(89)
        assert other.update_heartbeat("mine")
        assert not other.cleanup_stale_connections()
        wait(2)
        assert sids(other.cleanup_stale_connections()) == ["mine"]

    def test_a_stale_connection_of_no_server_has_no_grace(
        self, make_manager: ManagerFactory, wait: Callable[[float], None]
    ) -> None:
        manager = make_manager(server_grace_seconds=30)
        manager.register_connection("sid", "user")
        wait(91)
        result = manager.cleanup_stale_connections()
        assert (sids(result.removed), result.detached) == (["sid"], ())

    def test_its_registrations_are_no_heartbeats(
        self, make_manager: ManagerFactory, wait: Callable[[float], None]
    ) -> None:
        dead = make_manager(server_id="dead")
        dead.register_connection("early", "user-1")
        wait(80)
        dead.register_connection("late", "user-2")
        wait(11)
        assert sids(make_manager().cleanup_stale_connections()) == ["early", "late"]

    def test_it_lives_for_three_heartbeats(self, make_manager: ManagerFactory, wait: Callable[[float], None]) -> None:
        silent, other = make_manager(server_id="silent"), make_manager()
        silent.register_connection("sid", "user")
        wait(89)
        other.update_heartbeat("sid")
        assert not other.cleanup_stale_connections()
        wait(2)
        assert sids(other.cleanup_stale_connections()) == ["sid"]

    def test_one_that_beats_keeps_its_connections(
        self, make_manager: ManagerFactory, wait: Callable[[float], None]
    ) -> None:
        beating, other = make_manager(server_id="beating"), make_manager()
        beating.register_connection("sid", "user")
        for _ in range(10):
            wait(60)
            assert beating.update_server_heartbeat()
            assert beating.update_heartbeat("sid")
            assert not other.cleanup_stale_connections()
        assert other.is_user_online("user")

    def test_with_a_grace_its_seats_are_kept_and_resumed_on_another_server(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], keys: Keys
    ) -> None:
        dead = make_manager(server_id="dead", server_grace_seconds=60)
        other = make_manager(server_id="other", server_grace_seconds=60)
        dead.register_connection("old", "user", metadata="kept")
        dead.join_game("old", "game")
        wait(91)
        other.update_heartbeat("old")

        result = other.cleanup_stale_connections()

        assert (result.removed, sids(result.detached)) == ((), ["old"])
        seat = other.get_connection("old")
        assert result.detached == (seat,)
        assert seat is not None
        assert (seat.is_detached, seat.server_id, seat.game_id, seat.metadata) == (True, None, "game", b"kept")
        assert keys().servers == {}
        assert keys().known_servers == {}
        assert not other.is_user_online("user")

        registration = other.register_connection("new", "user")

        assert registration.resumed
        assert registration.resumed_from == seat
        connection = registration.connection
        assert (connection.game_id, connection.server_id, connection.metadata) == ("game", "other", b"kept")
        assert other.get_connection("new") == connection

    def test_a_seat_of_a_dead_server_that_nobody_resumes_is_removed_and_reported_once_more(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], keys: Keys
    ) -> None:
        make_manager(server_id="dead").register_connection("sid", "user")
        other = make_manager(server_grace_seconds=60)
        wait(91)
        assert sids(other.cleanup_stale_connections().detached) == ["sid"]
        wait(59)
        assert other.cleanup_stale_connections() == presence.CleanupResult()
        wait(2)
        result = other.cleanup_stale_connections()
        assert (sids(result.removed), result.detached) == (["sid"], ())
        assert keys().ttls_ms == {}

    @pytest.mark.parametrize("missed_seconds", [46, 91])
    def test_clients_that_fall_silent_with_their_server_are_detached_however_early_they_are_stale(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], missed_seconds: float
    ) -> None:
        """Their last heartbeats came up to thirty seconds before their server's last one."""
        dead, other = make_manager(server_id="dead"), make_manager(server_grace_seconds=60)
        dead.register_connection("sid", "user")
        wait(91 - min(missed_seconds, 91))
        dead.update_server_heartbeat()
        wait(missed_seconds)
        result = other.cleanup_stale_connections()
        assert (result.removed, sids(result.detached)) == ((), ["sid"])

    def test_a_silent_client_of_a_server_that_nobody_knows_any_more_is_detached(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str, wait: Callable[[float], None]
    ) -> None:
        manager = make_manager(server_id="server", server_grace_seconds=60)
        manager.register_connection("sid", "user")
        client.delete(f"{{{namespace}}}:servers")
        wait(91)
        result = manager.cleanup_stale_connections()
        assert (result.removed, sids(result.detached)) == ((), ["sid"])

    def test_a_client_that_falls_silent_alone_is_removed_at_once(
        self, make_manager: ManagerFactory, wait: Callable[[float], None]
    ) -> None:
        manager = make_manager(server_id="beating", server_grace_seconds=60)
        manager.register_connection("sid", "user")
        wait(91)
        manager.update_server_heartbeat()
        wait(44)
        result = manager.cleanup_stale_connections()
        assert (sids(result.removed), result.detached) == (["sid"], ())

    def test_an_expired_connection_of_it_is_removed_and_not_brought_back_as_a_seat(
        self, make_manager: ManagerFactory, wait: Callable[[float], None]
    ) -> None:
        dead = make_manager(server_id="dead", server_grace_seconds=60)
        dead.register_connection("sid-1", "user-1")
        wait(3601)
        assert dead.get_connection("sid-1") is None
        result = dead.cleanup_stale_connections()
        assert (sids(result.removed), result.detached) == (["sid-1"], ())

        dead.register_connection("sid-2", "user-2")
        wait(3601)
        result = dead.cleanup_server("dead", grace_seconds=60)
        assert (sids(result.removed), result.detached) == (["sid-2"], ())

    def test_many_dead_servers_are_taken_by_one_cleanup(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], keys: Keys
    ) -> None:
        for number in range(25):
            make_manager(server_id=f"dead {number}").start_server()
        expected = []
        for number in range(25, 37):
            make_manager(server_id=f"dead {number}").register_connection(f"sid-{number}", f"user-{number}")
            expected.append(f"sid-{number}")
        other = make_manager()
        wait(91)
        other.update_heartbeats(expected)
        assert sids(other.cleanup_stale_connections()) == expected
        assert (keys().servers, keys().known_servers) == ({}, {})

    def test_of_many_dead_servers_a_script_takes_ten(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], keys: Keys
    ) -> None:
        """It asks for the connections of each, so a bound on them bounds its time."""
        for number in range(25):
            make_manager(server_id=f"dead {number}").start_server()
        other = make_manager()
        wait(91)
        for left in (15, 5, 0):
            (batch,) = other.pipeline([other.operations.cleanup_batch()])
            assert (batch.is_last, len(keys().known_servers)) == (left == 0, left)

    @pytest.mark.parametrize("sid", ["a", "b"])
    def test_one_of_several_that_comes_again_through_another_is_not_taken_with_it(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], keys: Keys, sid: str
    ) -> None:
        before, after = (make_manager(server_id=name, connections_per_user=2) for name in ("before", "after"))
        for registered in ("a", "b"):
            before.register_connection(registered, "user")
        left = {"a": "b", "b": "a"}[sid]

        assert not after.register_connection(sid, "user").displaced

        assert {server.partition(":")[2]: set(listed) for server, listed in keys().servers.items()} == {
            "before": {left},
            "after": {sid},
        }

    def test_one_taken_for_dead_that_still_registers_is_known_again(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], keys: Keys
    ) -> None:
        late, other = make_manager(server_id="late"), make_manager()
        late.register_connection("old", "user")
        wait(91)
        assert sids(other.cleanup_stale_connections()) == ["old"]
        assert keys().known_servers == {}

        late.register_connection("new", "user")

        assert list(keys().known_servers.values()) == [keys().last_seen["new"]]
        assert not other.cleanup_stale_connections()
        assert late.update_server_heartbeat()
        wait(91)
        other.update_heartbeat("new")
        assert sids(other.cleanup_stale_connections()) == ["new"]

    def test_one_taken_for_dead_that_beats_is_known_again(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], keys: Keys
    ) -> None:
        late = make_manager(server_id="late")
        epoch = late.start_server()
        wait(91)
        make_manager().cleanup_stale_connections()
        assert keys().known_servers == {}
        assert late.update_server_heartbeat()
        assert list(keys().known_servers) == [f"{epoch}:late"]

    def test_one_taken_for_dead_is_not_replaced_by_a_later_start_of_another(
        self, make_manager: ManagerFactory, wait: Callable[[float], None]
    ) -> None:
        late = make_manager(server_id="late")
        late.start_server()
        wait(91)
        other = make_manager(server_id="other")
        other.start_server()
        other.cleanup_stale_connections()

        assert late.update_server_heartbeat()

    def test_a_connection_that_moved_to_another_server_is_not_taken_with_the_first(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], keys: Keys
    ) -> None:
        first, second = make_manager(server_id="first"), make_manager(server_id="second")
        first.register_connection("sid", "user")
        moved = second.register_connection("sid", "user").connection
        assert moved.server_id == "second"
        assert {server.partition(":")[2]: members for server, members in keys().servers.items()} == {"second": {"sid"}}
        wait(91)
        second.update_server_heartbeat()
        second.update_heartbeat("sid")
        assert not second.cleanup_stale_connections()

        unnamed = make_manager()
        assert unnamed.register_connection("sid", "user").connection.server_id is None
        assert keys().servers == {}

    def test_it_stays_known_while_its_records_are_too_large_for_one_batch(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], keys: Keys
    ) -> None:
        """Its clients beat, so only as long as it is known does cleanup find what is left of it."""
        dead, other = make_manager(server_id="dead"), make_manager()
        names = register_many(dead, CLEANUP_BATCH_SIZE // 2)
        for sid in names:
            dead.update_metadata(sid, b"x" * MAX_METADATA_BYTES)
        wait(91)
        assert all(other.update_heartbeats(names).values())

        assert sids(other.cleanup_stale_connections().removed) == names
        assert keys().known_servers == {}

    @pytest.mark.parametrize("grace_seconds", [0, 60])
    def test_one_of_its_connections_whose_score_was_lost_is_removed_too(
        self,
        make_manager: ManagerFactory,
        client: redis.Redis,
        namespace: str,
        wait: Callable[[float], None],
        grace_seconds: float,
    ) -> None:
        make_manager(server_id="dead").register_connection("sid", "user")
        client.zrem(f"{{{namespace}}}:last_seen", "sid")
        wait(91)
        result = make_manager(server_grace_seconds=grace_seconds).cleanup_stale_connections()
        assert (sids(result.removed), result.detached) == (["sid"], ())

    @pytest.mark.parametrize("is_there", [True, False])
    def test_what_eviction_left_in_its_list_ends_no_connection_of_another_and_stays_nowhere(
        self,
        make_manager: ManagerFactory,
        client: redis.Redis,
        namespace: str,
        wait: Callable[[float], None],
        keys: Keys,
        is_there: bool,
    ) -> None:
        dead, other = make_manager(server_id="dead"), make_manager(server_id="other")
        names = register_many(dead, CLEANUP_BATCH_SIZE + 1)
        client.delete(*[f"{{{namespace}}}:conn:{sid}" for sid in names])
        client.delete(*[f"{{{namespace}}}:user_conns:user of {sid}" for sid in names])
        if is_there:
            other.register_connection(names[0], "its next user")
        wait(91)
        other.update_server_heartbeat()
        if is_there:
            assert other.update_heartbeat(names[0])

        assert other.cleanup_stale_connections() == presence.CleanupResult()

        assert list(keys().records) == names[:is_there]
        assert set().union(*keys().servers.values()) == set(names[:is_there])


@pytest.mark.parametrize(
    ("there", "sid", "user_id"),
    [(["first"], "new", "user"), (["first", "second"], "new", "user"), (["first"], "first", "another user")],
    ids=["displaced", "two displaced", "replaced"],
)
def test_a_connection_that_a_register_ends_leaves_the_list_of_its_server(
    make_manager: ManagerFactory, keys: Keys, there: list[str], sid: str, user_id: str
) -> None:
    before, after = make_manager(server_id="before", connections_per_user=2), make_manager(server_id="after")
    for earlier in there:
        before.register_connection(earlier, "user")

    after.register_connection(sid, user_id)

    assert list(keys().servers.values()) == [{sid}]


class TestARestart:
    """Each start has its own boot epoch, and inherits nothing from the one before."""

    def test_boot_epochs_grow_with_those_of_registrations(self, make_manager: ManagerFactory) -> None:
        epochs = []
        for number in range(3):
            manager = make_manager(server_id="server")
            epochs.append(manager.start_server())
            epochs.append(manager.register_connection(f"sid-{number}", f"user-{number}").connection.epoch)
        assert epochs == sorted(set(epochs))

    def test_the_new_start_leaves_the_old_ones_to_the_next_cleanup_and_keeps_its_own(
        self, make_manager: ManagerFactory, keys: Keys
    ) -> None:
        make_manager(server_id="server").register_connection("old", "user-1")
        make_manager(server_id="server 2").register_connection("another's", "user-2")

        new = make_manager(server_id="server")
        new.register_connection("new", "user-3")

        assert sids(new.cleanup_stale_connections()) == ["old"]
        assert not new.cleanup_stale_connections()
        assert set(keys().records) == {"another's", "new"}
        assert new.update_server_heartbeat()

    def test_a_start_that_was_replaced_never_revives(self, make_manager: ManagerFactory, keys: Keys) -> None:
        first = make_manager(server_id="server")
        first.register_connection("sid-1", "user-1")
        assert first.update_server_heartbeat()
        second = make_manager(server_id="server")
        epoch = second.start_server()
        assert not first.update_server_heartbeat()
        first.register_connection("sid-0", "user-0")
        assert not first.update_server_heartbeat()
        assert sids(second.cleanup_stale_connections()) == ["sid-0", "sid-1"]

        # Cleanup has forgotten it by now.
        assert not first.update_server_heartbeat()
        assert list(keys().known_servers) == [f"{epoch}:server"]
        first.register_connection("sid-2", "user-2")
        assert not first.update_server_heartbeat()
        assert sids(second.cleanup_stale_connections()) == ["sid-2"]
        assert second.update_server_heartbeat()

    def test_a_registration_of_a_start_that_was_replaced_keeps_nothing_from_the_next_cleanup(
        self, make_manager: ManagerFactory
    ) -> None:
        first, second = make_manager(server_id="server"), make_manager(server_id="server")
        first.register_connection("before", "user-1")
        second.start_server()

        first.register_connection("after", "user-2")

        assert sids(second.cleanup_stale_connections()) == ["after", "before"]

    @pytest.mark.parametrize("comes_back_by", ["a heartbeat", "a registration"])
    def test_a_later_start_that_comes_back_replaces_an_earlier_one_that_came_back_before_it(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], comes_back_by: str
    ) -> None:
        def come_back(manager: presence.sync.ConnectionManager, name: str) -> None:
            if comes_back_by == "a heartbeat":
                assert manager.update_server_heartbeat()
            manager.register_connection(name, name)

        first, second = make_manager(server_id="server"), make_manager(server_id="server")
        first.start_server()
        second.start_server()
        wait(91)
        assert not make_manager().cleanup_stale_connections()  # Both are forgotten.

        come_back(first, "first")
        assert first.update_server_heartbeat()  # It is the only one.
        come_back(second, "second")

        assert not first.update_server_heartbeat()
        assert sids(second.cleanup_stale_connections()) == ["first"]
        assert not first.update_server_heartbeat()
        assert second.update_server_heartbeat()

    def test_however_often_it_restarts_no_start_is_missed(self, make_manager: ManagerFactory, keys: Keys) -> None:
        count = 25
        for number in range(count):
            make_manager(server_id="server").register_connection(f"sid-{number:02}", f"user-{number}")
        removed = make_manager().cleanup_stale_connections()
        assert sids(removed) == [f"sid-{number:02}" for number in range(count - 1)]
        assert list(keys().records) == [f"sid-{count - 1}"]

    def test_a_long_crash_loop_that_no_cleanup_follows_makes_no_start_slower(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str, keys: Keys
    ) -> None:
        client.zadd(f"{{{namespace}}}:servers", {f"{number}:server": 0 for number in range(1, 1_000)})
        client.zadd(f"{{{namespace}}}:servers", {"1000:server": 1})

        def written() -> int:
            stats: Any = client.info("commandstats")
            return int(stats["cmdstat_zadd"]["calls"])

        before = written()
        epoch = make_manager(server_id="server").start_server()
        assert written() - before == 3  # The epoch, the start before it, and itself.
        assert [start for start, seen in keys().known_servers.items() if seen] == [f"{epoch}:server"]

    def test_two_first_registrations_at_once_start_it_once(self, make_manager: ManagerFactory, keys: Keys) -> None:
        manager: Any = make_manager(server_id="server")
        if isinstance(manager, presence.sync.ConnectionManager):
            with ThreadPoolExecutor(8) as threads:
                list(threads.map(lambda number: manager.register_connection(f"{number}", f"{number}"), range(8)))
        else:

            async def register_all() -> None:
                register = manager._manager.register_connection
                await asyncio.gather(*(register(f"{number}", f"{number}") for number in range(8)))

            manager._runner.run(register_all())
        assert len(keys().servers) == 1
        assert list(keys().servers) == list(keys().known_servers) == [f"{manager.operations.boot_epoch}:server"]

    def test_a_start_of_another_id_that_ends_alike_replaces_nothing(self, make_manager: ManagerFactory) -> None:
        names = ["1:server", "server", "r", "1", ":", "a b", "é"]
        managers = [make_manager(server_id=name) for name in names]
        for number, manager in enumerate(managers):
            manager.register_connection(f"sid-{number}", f"user-{number}")
        assert not managers[0].cleanup_stale_connections()
        assert all(manager.update_server_heartbeat() for manager in managers)
        for number, name in enumerate(names):
            assert [(gone.sid, gone.server_id) for gone in managers[0].cleanup_server(name)] == [
                (f"sid-{number}", name)
            ]


class TestCleanupServer:
    """cleanup_server takes all connections of one server, whether it is dead or not."""

    @pytest.mark.parametrize("grace_seconds", [0, 30])
    def test_a_process_that_takes_its_own_leaves_those_of_a_later_start(
        self, make_manager: ManagerFactory, grace_seconds: float
    ) -> None:
        starts = [make_manager(server_id="server") for _ in range(3)]
        for number, manager in enumerate(starts):
            manager.register_connection(f"sid-{number}", f"user-{number}")
        result = starts[1].cleanup_server("server", grace_seconds=grace_seconds)
        assert sids(result.detached or result.removed) == ["sid-0", "sid-1"]
        assert starts[2].update_server_heartbeat()
        assert starts[2].is_user_online("user-2")
        assert starts[1].cleanup_server("server") == presence.CleanupResult()

    def test_a_process_that_has_not_started_takes_those_of_every_start(self, make_manager: ManagerFactory) -> None:
        starts = [make_manager(server_id="server") for _ in range(2)]
        for number, manager in enumerate(starts):
            manager.register_connection(f"sid-{number}", f"user-{number}")
        assert sids(make_manager(server_id="server").cleanup_server("server")) == ["sid-0", "sid-1"]

    def test_a_process_that_takes_those_of_another_id_takes_every_start(self, make_manager: ManagerFactory) -> None:
        other = make_manager(server_id="other")
        other.start_server()
        make_manager(server_id="server").register_connection("sid", "user")
        assert sids(other.cleanup_server("server")) == ["sid"]

    @pytest.mark.parametrize("grace_seconds", [None, 30])
    def test_it_goes_on_in_bounded_batches_until_nothing_of_that_server_is_left(
        self, make_manager: ManagerFactory, client: redis.Redis, keys: Keys, grace_seconds: float | None
    ) -> None:
        count = 2 * CLEANUP_BATCH_SIZE + 1
        manager, other = make_manager(server_id="server"), make_manager(server_id="other")
        names = register_many(manager, count)
        register_many(other, 3, "other")
        other.cleanup_server("unknown")
        calls = evalsha_calls(client)

        result = other.cleanup_server("server", grace_seconds=grace_seconds)

        assert evalsha_calls(client) - calls == 3
        assert sids(result.detached if grace_seconds else result.removed) == names
        assert not (result.removed if grace_seconds else result.detached)
        assert [len(members) for members in keys().servers.values()] == [3]
        assert all(other.update_heartbeats(["other-000", "other-001", "other-002"]).values())
        assert other.cleanup_server("server", grace_seconds=grace_seconds) == presence.CleanupResult()

    def test_it_takes_any_number_of_starts(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str, keys: Keys
    ) -> None:
        manager = make_manager(server_id="server")
        manager.register_connection("sid", "user")
        # A crash loop that no cleanup has followed; Lua cannot pass so many values at once.
        starts = {f"{number}:server": 0 for number in range(1, 8_002)}
        client.zadd(f"{{{namespace}}}:servers", {**starts, "1:another": 0})
        assert sids(make_manager().cleanup_server("server")) == ["sid"]
        assert set(keys().known_servers) - {f"{manager.operations.boot_epoch}:server"} == {"1:another"}

    def test_what_a_living_start_has_replaced_stays_dead(self, make_manager: ManagerFactory) -> None:
        first, second = make_manager(server_id="server"), make_manager(server_id="server")
        for number, manager in enumerate((first, second)):
            manager.register_connection(f"sid-{number}", f"user-{number}")
        assert not first.update_server_heartbeat()
        assert sids(make_manager().cleanup_server("server")) == ["sid-0", "sid-1"]
        assert not first.update_server_heartbeat()
        first.register_connection("sid-2", "user-2")
        assert not first.update_server_heartbeat()
        assert second.update_server_heartbeat()

    def test_the_grace_is_the_managers_unless_one_is_given(self, make_manager: ManagerFactory) -> None:
        manager = make_manager(server_id="server", server_grace_seconds=30)
        manager.register_connection("sid-1", "user-1")
        assert sids(manager.cleanup_server("server").detached) == ["sid-1"]
        manager.register_connection("sid-2", "user-2")
        assert sids(manager.cleanup_server("server", grace_seconds=0).removed) == ["sid-2"]

    def test_a_detached_connection_belongs_to_no_server(self, make_manager: ManagerFactory, keys: Keys) -> None:
        manager = make_manager(server_id="server")
        manager.register_connection("sid", "user")
        detached = manager.unregister_connection("sid", grace_seconds=30)
        assert detached is not None
        assert detached.server_id is None
        assert keys().servers == {}
        assert manager.cleanup_server("server") == presence.CleanupResult()
        assert manager.get_connection("sid") == detached

    @pytest.mark.parametrize(
        ("arguments", "named", "error"),
        [
            (("",), {}, ValueError),
            ((None,), {}, TypeError),
            ((b"server",), {}, TypeError),
            (("\ud800",), {}, ValueError),
            (("x" * 1025,), {}, ValueError),
            (("server",), {"grace_seconds": -1}, ValueError),
            (("server",), {"grace_seconds": 3601}, ValueError),
            (("server",), {"grace_seconds": "1"}, TypeError),
        ],
    )
    def test_bad_arguments_are_refused(
        self, manager: ConnectionManager, arguments: Any, named: Any, error: type[Exception]
    ) -> None:
        with pytest.raises(error, match="grace_seconds" if named else "server_id"):
            manager.cleanup_server(*arguments, **named)

    @pytest.mark.parametrize("server_id", ["", 1, b"server", "\ud800", "x" * 1025])
    def test_a_bad_server_id_of_a_manager_is_refused(self, make_manager: ManagerFactory, server_id: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="server_id"):
            make_manager(server_id=server_id)

    @pytest.mark.parametrize("grace", [-1, 3601, None, "1"])
    def test_a_bad_grace_of_a_manager_is_refused(self, make_manager: ManagerFactory, grace: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="server_grace_seconds"):
            make_manager(server_grace_seconds=grace)

    def test_a_manager_starts_its_server_once(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], client: redis.Redis, namespace: str
    ) -> None:
        """Called again after the minute in which the answer is kept, it would take its own connections for dead."""
        manager = make_manager(server_id="server")
        manager.register_connection("sid", "user")
        boot_epoch = manager.operations.boot_epoch
        client.delete(*client.keys(f"{{{namespace}}}:reply:*"))

        assert manager.start_server() == boot_epoch
        assert not manager.cleanup_stale_connections()
        assert manager.update_heartbeat("sid")

    def test_a_pipeline_starts_it_too(self, make_manager: ManagerFactory) -> None:
        manager = make_manager(server_id="server")
        (boot_epoch,) = manager.pipeline([manager.operations.start_server()])
        assert manager.operations.boot_epoch == boot_epoch
        (registration,) = manager.pipeline([manager.operations.register_connection("sid", "user")])
        assert registration.connection.server_id == "server"

    @pytest.mark.parametrize("method", ["start_server", "update_server_heartbeat", "run_server_heartbeat"])
    def test_a_manager_without_a_server_id_has_no_server(self, manager: ConnectionManager, method: str) -> None:
        with pytest.raises(ValueError, match="server_id is None"):
            getattr(manager, method)()


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the clock by which a manager tells how long its server has been silent."""

    def set_to(now: float) -> None:
        monkeypatch.setattr("presence.operations.monotonic", lambda: now)

    set_to(0)
    return set_to


def test_a_manager_whose_server_does_not_beat_says_once_that_its_players_will_be_taken(
    make_manager: ManagerFactory, set_clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    manager = make_manager(server_id="server", heartbeat_seconds=10)
    manager.register_connection("sid-1", "user-1")
    set_clock(19)
    manager.update_server_heartbeat()
    set_clock(38)
    manager.register_connection("sid-2", "user-2")
    assert caplog.messages == []
    set_clock(40)
    manager.operations.update_server_heartbeat()  # Only described, as by one that never gets through.
    manager.register_connection("sid-3", "user-3")
    manager.register_connection("sid-4", "user-4")
    (message,) = caplog.messages
    assert message.startswith("the game server 'server' has sent no heartbeat for 21 s")
    assert "run_server_heartbeat()" in message


def test_it_waits_for_heartbeats_that_come_more_seldom(
    make_manager: ManagerFactory, set_clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    manager = make_manager(server_id="server", heartbeat_seconds=10)
    RepeatedServerHeartbeat(manager.operations, 25)
    manager.register_connection("sid", "user")
    for now, told in ((27, 0), (28, 1)):
        set_clock(now)
        manager.update_heartbeat("sid")
        assert len(caplog.messages) == told


@pytest.mark.parametrize(
    "work",
    [
        lambda manager: manager.update_heartbeat("sid"),
        lambda manager: manager.update_heartbeats(["sid"]),
        lambda manager: manager.cleanup_stale_connections(),
    ],
    ids=["heartbeat", "heartbeats", "cleanup"],
)
def test_it_says_so_where_nobody_new_comes_as_well(
    make_manager: ManagerFactory,
    set_clock: Callable[[float], None],
    caplog: pytest.LogCaptureFixture,
    work: Callable[[ConnectionManager], object],
) -> None:
    manager, another = make_manager(server_id="server", heartbeat_seconds=10), make_manager(server_id="not started")
    manager.register_connection("sid", "user")
    for now in (20, 21, 22):
        set_clock(now)
        work(manager)
        work(another)
    (message,) = caplog.messages
    assert message.startswith("the game server 'server' has sent no heartbeat for 21 s")


class TestRunServerHeartbeat:
    """It beats at once and then again and again, and ends with its manager or when it was replaced."""

    @pytest.mark.parametrize("interval", [0, -1, float("nan"), "1"])
    def test_an_interval_that_would_spin_is_refused(self, make_manager: ManagerFactory, interval: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="interval_seconds"):
            make_manager(server_id="server").run_server_heartbeat(interval)

    def test_an_interval_after_which_the_server_would_be_taken_for_dead_is_refused(
        self, make_manager: ManagerFactory
    ) -> None:
        with pytest.raises(ValueError, match="interval_seconds must be less than three heartbeat_seconds, 30, not 30"):
            make_manager(server_id="server", heartbeat_seconds=10).run_server_heartbeat(30)

    def test_it_beats_at_once_and_then_each_interval_until_the_manager_is_closed(
        self, server_url: str, namespace: str, keys: Keys, wait: Callable[[float], None]
    ) -> None:
        async def run() -> None:
            manager = presence.ConnectionManager.from_url(server_url, namespace=namespace, server_id="server")
            other = presence.ConnectionManager.from_url(server_url, namespace=namespace)
            async with other, manager:
                task = asyncio.create_task(manager.run_server_heartbeat(0.01))
                for _ in range(3):
                    await asyncio.to_thread(beats, keys)
                    wait(91)
            await asyncio.wait_for(task, BOUND_SECONDS)

        asyncio.run(run())

    def test_of_the_blocking_manager_it_ends_with_it(
        self, server_url: str, namespace: str, keys: Keys, wait: Callable[[float], None]
    ) -> None:
        with presence.sync.ConnectionManager.from_url(server_url, namespace=namespace, server_id="server") as manager:
            thread = threading.Thread(target=manager.run_server_heartbeat, args=(0.01,), daemon=True)
            thread.start()
            for _ in range(3):
                beats(keys)
                wait(91)
        thread.join(BOUND_SECONDS)
        assert not thread.is_alive()

    def test_a_cancellation_ends_it(self, server_url: str, namespace: str) -> None:
        async def run() -> None:
            async with presence.ConnectionManager.from_url(
                server_url, namespace=namespace, server_id="server"
            ) as manager:
                task = asyncio.create_task(manager.run_server_heartbeat())
                await asyncio.to_thread(wait_until, lambda: manager.operations.boot_epoch is not None)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

        asyncio.run(run())

    def test_a_cancellation_does_not_wait_for_a_server_that_does_not_answer(self, own_server: LocalServer) -> None:
        async def run() -> None:
            with Proxy(own_server.port) as proxy:
                async with presence.ConnectionManager.from_url(
                    proxy.url, server_id="server", socket_timeout=10 * BOUND_SECONDS
                ) as manager:
                    await manager.start_server()
                    proxy.fates = [Fate.HOLD_REPLY]
                    task = asyncio.create_task(manager.run_server_heartbeat())
                    await is_held(proxy)
                    task.cancel()
                    done, _ = await asyncio.wait([task], timeout=BOUND_SECONDS)
                    proxy.release()
                    assert done

        asyncio.run(run())

    def test_it_logs_that_it_was_replaced_and_ends(
        self, make_manager: ManagerFactory, caplog: pytest.LogCaptureFixture
    ) -> None:
        first = make_manager(server_id="server")
        first.start_server()
        make_manager(server_id="server").start_server()

        first.run_server_heartbeat()

        assert [(record.levelname, record.args) for record in caplog.records] == [("ERROR", ("server",))]

    def test_a_fault_is_logged_and_does_not_end_it(self, namespace: str, caplog: pytest.LogCaptureFixture) -> None:
        url = f"redis://127.0.0.1:{free_port()}/0"
        with presence.sync.ConnectionManager.from_url(
            url, namespace=namespace, server_id="server", **one_attempt("blocking")
        ) as manager:
            thread = threading.Thread(target=manager.run_server_heartbeat, args=(0.01,), daemon=True)
            thread.start()
            wait_until(lambda: len(caplog.records) >= 3)
        thread.join(BOUND_SECONDS)
        assert not thread.is_alive()
        assert len(caplog.records) >= 3
        assert {record.levelname for record in caplog.records} == {"WARNING"}
        assert all(
            isinstance(record.args, tuple) and isinstance(record.args[1], PresenceError) for record in caplog.records
        )

    def test_a_fault_does_not_end_that_of_asyncio(self, namespace: str, caplog: pytest.LogCaptureFixture) -> None:
        async def run() -> None:
            url = f"redis://127.0.0.1:{free_port()}/0"
            async with presence.ConnectionManager.from_url(
                url, namespace=namespace, server_id="server", **one_attempt("asyncio")
            ) as manager:
                task = asyncio.create_task(manager.run_server_heartbeat(0.01))
                await asyncio.to_thread(wait_until, lambda: len(caplog.records) >= 3)
            await asyncio.wait_for(task, BOUND_SECONDS)

        asyncio.run(run())
        assert {record.levelname for record in caplog.records} == {"WARNING"}

    def test_run_cleanup_reports_what_it_detached(
        self, make_manager: ManagerFactory, server_url: str, namespace: str
    ) -> None:
        make_manager(server_id="server").register_connection("sid", "user")
        make_manager(server_id="server").start_server()
        reported: list[CleanupResult] = []
        if isinstance(make_manager(), presence.sync.ConnectionManager):
            with presence.sync.ConnectionManager.from_url(
                server_url, namespace=namespace, server_grace_seconds=60, heartbeat_seconds=0.1
            ) as manager:

                def on_removed(result: CleanupResult) -> None:
                    reported.append(result)
                    manager.close()

                manager.run_cleanup(0.01, on_removed=on_removed)
        else:

            async def run() -> None:
                async with presence.ConnectionManager.from_url(
                    server_url, namespace=namespace, server_grace_seconds=60, heartbeat_seconds=0.1
                ) as manager:

                    async def on_removed(result: CleanupResult) -> None:
                        reported.append(result)
                        await manager.aclose()

                    await asyncio.wait_for(manager.run_cleanup(0.01, on_removed=on_removed), BOUND_SECONDS)

            asyncio.run(run())
        assert [(result.removed, sids(result.detached)) for result in reported] == [((), ["sid"])]


def clean_up(start: float, url: str, namespace: str, grace_seconds: float) -> list[str]:
    sleep_until(start)
    with presence.sync.ConnectionManager.from_url(
        url, namespace=namespace, server_grace_seconds=grace_seconds
    ) as manager:
        result = manager.cleanup_stale_connections()
        return sids(result.detached if grace_seconds else result.removed)


@pytest.mark.parametrize("grace_seconds", [0, 60])
def test_of_many_cleanups_exactly_one_reports_each_connection_of_dead_servers(
    processes: ProcessPoolExecutor,
    server_url: str,
    namespace: str,
    wait: Callable[[float], None],
    keys: Keys,
    grace_seconds: float,
) -> None:
    names = []
    for number in range(5):
        with presence.sync.ConnectionManager.from_url(
            server_url, namespace=namespace, server_id=f"dead-{number}"
        ) as manager:
            names += register_many(manager, 400, f"sid-{number}")
    wait(91)
    with presence.sync.ConnectionManager.from_url(server_url, namespace=namespace) as manager:
        assert all(manager.update_heartbeats(names).values())
    reports = at_once(processes, *[(clean_up, server_url, namespace, grace_seconds)] * PROCESSES)

    assert Counter(sid for report in reports for sid in report) == Counter(names)
    keyspace = keys()
    assert (keyspace.servers, keyspace.known_servers) == ({}, {})
    assert len(keyspace.records) == (len(names) if grace_seconds else 0)


def serve(url: str, namespace: str) -> None:
    """Be a game server with some connections that beats until it is killed."""
    with presence.sync.ConnectionManager.from_url(url, namespace=namespace, server_id="killed") as manager:
        for sid in register_many(manager, 3):
            manager.join_game(sid, "game")
        manager.run_server_heartbeat(0.01)


def test_the_players_of_a_server_that_is_killed_are_taken_and_resumed_by_another(
    make_manager: ManagerFactory, server_url: str, namespace: str, wait: Callable[[float], None], keys: Keys
) -> None:
    survivor = make_manager(server_id="survivor", server_grace_seconds=60)
    killed = spawn.Process(target=serve, args=(server_url, namespace))
    killed.start()
    try:
        wait_until(lambda: len(survivor.get_game_connections("game")) == 3)
        # As long as it beats it is alive, whatever time passes.
        wait(91)
        survivor.update_heartbeats(["sid-000", "sid-001", "sid-002"])
        beats(keys)
        assert survivor.cleanup_stale_connections() == presence.CleanupResult()
    finally:
        killed.kill()
        killed.join(BOUND_SECONDS)
    wait(91)

    result = survivor.cleanup_stale_connections()

    assert (result.removed, sids(result.detached)) == ((), ["sid-000", "sid-001", "sid-002"])
    for number in range(3):
        registration = survivor.register_connection(f"new-{number}", f"user of sid-00{number}")
        assert registration.resumed
        assert (registration.connection.game_id, registration.connection.server_id) == ("game", "survivor")
    assert len(survivor.get_game_user_sids("game")) == 3
