"""The managers themselves: pipelines, closing, cancellation, event loops, threads, and what they refuse."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import gc
import os
import pickle
import sys
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, get_type_hints

import pytest
import redis
import redis.asyncio

import presence
import presence.sync
from presence.operations import CLEANUP_BATCH_SIZE, RETENTION_MS
from presence.replies import parse_message
from tests.fault_proxy import BOUND_SECONDS, Fate, Proxy
from tests.processes import in_child
from tests.watching import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from presence import CleanupResult, EventsMode
    from presence.sync import ConnectionManager
    from tests.conftest import Keys, ManagerFactory
    from tests.server import LocalServer


class TestPipelines:
    def test_an_iterator_will_do(self, manager: ConnectionManager) -> None:
        heartbeats: Any = (manager.operations.update_heartbeat(sid) for sid in ("one", "two"))
        assert manager.pipeline(heartbeats) == [False, False]

    @pytest.mark.parametrize("wrong", [None, 7, [None], ["heartbeat"]])
    def test_anything_else_is_refused_before_it_is_sent(self, manager: ConnectionManager, wrong: Any) -> None:
        with pytest.raises(TypeError, match="operations must"):
            manager.pipeline(wrong)

    def test_what_ran_is_reported_where_a_script_may_not_be_loaded(
        self, own_server: LocalServer, make_manager: ManagerFactory
    ) -> None:
        """Or a displaced connection would be displaced, and nobody told."""
        all_rights = make_manager(own_server.url)
        all_rights.register_connection("old", "user")
        with redis.Redis.from_url(own_server.url) as client:
            client.execute_command("ACL", "SETUSER", "player", "on", "nopass", "~*", "+@all", "-script|load")
        few_rights = make_manager(own_server.url.replace("redis://", "redis://player:any@"))
        operations = few_rights.operations

        with pytest.raises(presence.PipelineError) as caught:
            few_rights.pipeline([operations.register_connection("new", "user"), operations.join_game("new", "game")])

        registration, failure = caught.value.results
        assert [gone.sid for gone in registration.displaced] == ["old"]
        assert isinstance(failure, presence.PermissionDeniedError)


def test_results_and_errors_can_be_pickled_and_copied(manager: ConnectionManager) -> None:
    registration = manager.register_connection("sid", "user")
    error = presence.PipelineError([registration, presence.ServerBusyError("busy")])
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert again.results[0] == registration
        assert isinstance(again.results[1], presence.ServerBusyError)
        assert str(again) == str(error)
    lost = presence.EventsLostError("the stream was trimmed")
    for lost_again in (pickle.loads(pickle.dumps(lost)), copy.copy(lost)):
        assert (lost_again.reason, str(lost_again)) == (lost.reason, str(lost))
    assert pickle.loads(pickle.dumps(registration)) == registration


def test_connections_that_are_read_are_as_frozen_as_any(manager: ConnectionManager) -> None:
    manager.register_connection("sid", "user", metadata="kept")
    manager.register_connection("other", "other user")
    for sid in ("sid", "other"):
        manager.join_game(sid, "game")
    for read in (manager.get_connection("sid"), *manager.get_game_connections("game")):
        assert type(read) is presence.ConnectionInfo
        # Before any of its times was asked for.
        assert pickle.loads(pickle.dumps(read)) == read
        by_hand = presence.ConnectionInfo(*(getattr(read, field.name) for field in dataclasses.fields(read)))
        assert (read, hash(read), repr(read)) == (by_hand, hash(by_hand), repr(by_hand))
        for name in ("sid", "metadata", "another"):
            with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
                setattr(read, name, "changed")
        assert not hasattr(read, "__dict__")
        with pytest.raises(AttributeError, match="'ConnectionInfo' object has no attribute 'connected'"):
            _ = read.connected  # type: ignore[attr-defined]
        assert dataclasses.replace(read, sid="another").sid == "another"


RESULTS = ("CleanupResult", "ConnectionInfo", "Event", "GameSnapshot", "JoinResult", "Registration")


@pytest.mark.parametrize("name", RESULTS)
def test_the_annotations_of_a_result_can_be_resolved(name: str) -> None:
    result = getattr(presence, name)
    assert {field.name for field in dataclasses.fields(result)} <= {*get_type_hints(result)}


def test_a_cleanup_is_true_when_it_did_anything() -> None:
    connection = presence.ConnectionInfo("sid", "user", None, datetime.now(UTC), datetime.now(UTC))
    assert presence.CleanupResult((connection,))
    assert presence.CleanupResult(detached=(connection,))
    assert not presence.CleanupResult()


def test_a_manager_refuses_what_is_no_client_of_its_kind() -> None:
    asyncio_client, blocking_client = redis.asyncio.Redis(), redis.Redis()
    wrong_clients: list[tuple[Any, Any]] = [
        (presence.ConnectionManager, "redis://localhost"),
        (presence.ConnectionManager, blocking_client),
        (presence.sync.ConnectionManager, "redis://localhost"),
        (presence.sync.ConnectionManager, asyncio_client),
        (presence.ConnectionManager, asyncio_client.pipeline()),
        (presence.sync.ConnectionManager, blocking_client.pipeline()),
    ]
    for manager_type, wrong in wrong_clients:
        with pytest.raises(TypeError, match=r"client must be a redis\.") as raised:
            manager_type(wrong)
        twin = "presence.ConnectionManager" if wrong is asyncio_client else "presence.sync.ConnectionManager"
        assert (twin in str(raised.value)) is (wrong in (asyncio_client, blocking_client))


class TestClosing:
    def test_a_closed_manager_connects_again(self, manager: ConnectionManager) -> None:
        manager.register_connection("sid", "user")
        manager.close()
        assert manager.update_heartbeat("sid")

    @pytest.mark.parametrize("how", ["entered", "called"])
    def test_a_closed_manager_that_is_used_again_cleans_up_again(
        self, server_url: str, namespace: str, wait: Callable[[float], None], how: str
    ) -> None:
        reported: list[str] = []
        manager = presence.ConnectionManager.from_url(server_url, namespace=namespace, heartbeat_seconds=0.1)
        blocking = presence.sync.ConnectionManager.from_url(server_url, namespace=namespace, heartbeat_seconds=0.1)

        async def report_and_close(result: CleanupResult) -> None:
            reported.extend(gone.sid for gone in result)
            await manager.aclose()

        def report_and_close_blocking(result: CleanupResult) -> None:
            reported.extend(gone.sid for gone in result)
            blocking.close()

        async def run() -> None:
            await manager.register_connection("sid-1", "user")
            wait(91)
            await manager.aclose()
            await (manager.__aenter__() if how == "entered" else manager.get_connection_count())
            await manager.run_cleanup(0.01, on_removed=report_and_close)

        asyncio.run(run())
        blocking.register_connection("sid-2", "user")
        wait(91)
        blocking.close()
        if how == "entered":
            blocking.__enter__()
        else:
            blocking.get_connection_count()
        blocking.run_cleanup(0.01, on_removed=report_and_close_blocking)
        assert reported == ["sid-1", "sid-2"]

    def test_operations_under_way_are_answered_first(self, server_url: str, namespace: str) -> None:
        async def run() -> list[Any]:
            manager = presence.ConnectionManager.from_url(server_url, namespace=namespace)
            await manager.register_connection("sid-0", "user")
            registers = [
                asyncio.create_task(manager.register_connection(f"sid-{number}", "user")) for number in range(1, 200)
            ]
            await asyncio.sleep(0)
            await manager.aclose()
            assert all(register.done() for register in registers)
            return await asyncio.gather(*registers)

        displaced = [gone.sid for registration in asyncio.run(run()) for gone in registration.displaced]
        assert len(displaced) == len(set(displaced)) == 199

    def test_threads_under_way_are_answered_first(self, server_url: str, namespace: str) -> None:
        answers: list[Any] = []
        manager = presence.sync.ConnectionManager.from_url(server_url, namespace=namespace)

        def register(thread: int) -> None:
            answers.extend(manager.register_connection(f"sid-{thread}-{number}", "user") for number in range(50))

        threads = [threading.Thread(target=register, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            manager.close()
        manager.close()

        displaced = [gone.sid for registration in answers for gone in registration.displaced]
        assert len(answers) == 400
        assert len(displaced) == len(set(displaced)) == 399

    def test_that_is_cancelled_leaves_no_connection_open(self, own_server: LocalServer) -> None:
        async def run(turns: int) -> bool:
            manager = presence.ConnectionManager.from_url(own_server.url, client_name="closing")
            await manager.update_heartbeat("unknown")
            close = asyncio.create_task(manager.aclose())
            for _ in range(turns):
                await asyncio.sleep(0)
            is_over = close.done()
            close.cancel()
            await asyncio.wait([close])
            return is_over

        turns = 1  # Before the first it has not begun.
        with redis.Redis.from_url(own_server.url, decode_responses=True) as admin:
            while not asyncio.run(run(turns)):
                gc.collect()
                turns += 1
            wait_until(lambda: "closing" not in [client["name"] for client in admin.client_list()])
        assert turns > 2

    def test_that_gives_up_while_calls_are_under_way_can_be_done_again(self, own_server: LocalServer) -> None:
        async def run() -> None:
            with Proxy(own_server.port) as proxy:
                manager = presence.ConnectionManager.from_url(proxy.url, client_name="closing")
                await manager.register_connection("sid", "user")
                await manager.update_heartbeat("sid")
                proxy.fates = [Fate.HOLD_REPLY]
                beat = asyncio.create_task(manager.update_heartbeat("sid"))
                assert await asyncio.to_thread(proxy.is_holding.wait, BOUND_SECONDS)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(manager.aclose(), 0.01)
                proxy.release()
                assert await beat
                await manager.aclose()
                assert manager._open_clients == {}

        asyncio.run(run())
        gc.collect()

    # A loop that ends without aclose() leaves sockets for the garbage collector, as with any asyncio client.
    @pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
    def test_what_ended_event_loops_left_behind_is_dropped(self, server_url: str, namespace: str) -> None:
        manager = presence.ConnectionManager.from_url(server_url, namespace=namespace)

        async def beat() -> int:
            assert await manager.update_heartbeat("sid") is False
            return len(manager._open_clients)

        assert [asyncio.run(beat()) for _ in range(3)] == [1, 1, 1]
        manager._open_clients.clear()
        gc.collect()


class TestCancellation:
    def test_a_cancelled_call_is_cancelled_and_harms_no_other(self, server_url: str, namespace: str) -> None:
        async def run() -> None:
            async with presence.ConnectionManager.from_url(server_url, namespace=namespace) as manager:
                await manager.register_connection("sid", "user")

                async def count_for_long() -> None:
                    for _ in range(1_000):
                        assert await manager.get_connection_count() == 1

                for number in range(100):
                    task = asyncio.create_task(count_for_long())
                    await asyncio.sleep(number % 10 / 5000)
                    task.cancel()
                    # Without care, one in two of these goes on to its end on Python 3.11.
                    with pytest.raises(asyncio.CancelledError):
                        await task
                    assert await manager.get_connection_count() == 1

        asyncio.run(run())

    def test_a_cancelled_run_cleanup_reports_what_it_has_removed(
        self, make_manager: ManagerFactory, server_url: str, namespace: str, wait: Callable[[float], None], keys: Keys
    ) -> None:
        count = 10 * CLEANUP_BATCH_SIZE
        operations = make_manager().operations
        make_manager().pipeline(
            [operations.register_connection(f"sid-{number}", f"user-{number}") for number in range(count)]
        )
        wait(91)
        reported: list[str] = []
        first_report = asyncio.Event()

        async def on_removed(result: CleanupResult) -> None:
            reported.extend(gone.sid for gone in result)
            first_report.set()

        async def run() -> None:
            async with presence.ConnectionManager.from_url(
                server_url, namespace=namespace, heartbeat_seconds=0.1
            ) as manager:
                task = asyncio.create_task(manager.run_cleanup(on_removed=on_removed))
                await asyncio.wait_for(first_report.wait(), 10)
                task.cancel()
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

        asyncio.run(run())
        left = set(keys().records)
        assert 0 < len(reported) < count
        assert set(reported) == {f"sid-{number}" for number in range(count)} - left
        assert len(set(reported)) == len(reported)


class TestTheEndOfRunCleanup:
    """It ends with the manager, whoever closes that and whenever."""

    @staticmethod
    def run(work: Callable[[presence.ConnectionManager], Coroutine[Any, Any, None]], url: str, namespace: str) -> None:
        async def bounded() -> None:
            manager = presence.ConnectionManager.from_url(url, namespace=namespace, heartbeat_seconds=0.1)
            await asyncio.wait_for(work(manager), 10)
            assert not manager._repetitions
            await manager.aclose()

        asyncio.run(bounded())

    def test_when_the_callbacks_of_two_threads_close_it(
        self, server_url: str, namespace: str, wait: Callable[[float], None]
    ) -> None:
        manager = presence.sync.ConnectionManager.from_url(server_url, namespace=namespace, heartbeat_seconds=0.1)
        for sid in ("sid-1", "sid-2"):
            manager.register_connection(sid, f"user of {sid}")
        wait(91)
        threads = [
            threading.Thread(
                target=manager.run_cleanup,
                args=(0.01,),
                kwargs={"on_removed": lambda _: manager.close()},
                daemon=True,
            )
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        manager.close()

    def test_when_it_starts_after_the_close(self, server_url: str, namespace: str) -> None:
        async def work(manager: presence.ConnectionManager) -> None:
            async with manager:
                task = asyncio.create_task(manager.run_cleanup(0.01))
            await task

        self.run(work, server_url, namespace)
        with presence.sync.ConnectionManager.from_url(server_url, namespace=namespace) as manager:
            pass
        manager.run_cleanup(0.01)

    def test_and_begins_again_when_the_manager_is_used_again(self, server_url: str, namespace: str) -> None:
        async def work(manager: presence.ConnectionManager) -> None:
            for _ in range(2):
                task = asyncio.create_task(manager.run_cleanup(0.01))
                await asyncio.sleep(0.05)
                assert not task.done()
                await manager.aclose()
                await task

        self.run(work, server_url, namespace)

    def test_which_the_blocking_manager_says_when_it_is_closed_already(
        self, server_url: str, namespace: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        manager = presence.sync.ConnectionManager.from_url(server_url, namespace=namespace, server_id="server")
        manager.close()
        manager.run_cleanup(0.01)
        manager.run_server_heartbeat(0.01)
        assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
        assert "start it inside `with manager:`" in caplog.text

    def test_when_another_event_loop_closes_it(self, server_url: str, namespace: str) -> None:
        manager = presence.ConnectionManager.from_url(server_url, namespace=namespace)
        started = threading.Event()

        async def clean_up() -> None:
            await manager.get_connection_count()
            asyncio.get_running_loop().call_later(0.05, started.set)
            await manager.run_cleanup(0.01)
            await manager.aclose()

        thread = threading.Thread(target=asyncio.run, args=(clean_up(),), daemon=True)
        thread.start()
        assert started.wait(10)
        asyncio.run(asyncio.wait_for(manager.aclose(), 5))
        thread.join(10)
        assert not thread.is_alive()

    # The task of a loop that was closed without its end is dropped, as is its connection.
    @pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
    @pytest.mark.parametrize("is_used_again", [True, False])
    def test_when_its_event_loop_was_closed_under_it(
        self, server_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch, is_used_again: bool
    ) -> None:
        ignored: list[BaseException | None] = []
        monkeypatch.setattr(sys, "unraisablehook", lambda what: ignored.append(what.exc_value))
        manager = presence.ConnectionManager.from_url(server_url, namespace=namespace)
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)

        async def begin() -> None:
            running = loop.create_task(manager.run_cleanup())
            await manager.get_connection_count()
            assert manager._repetitions
            assert not running.done()

        loop.run_until_complete(begin())
        loop.close()

        async def close(*, after_use: bool) -> None:
            if after_use:
                assert not await manager.update_heartbeat("unknown")
                assert not manager._repetitions
            await manager.aclose()
            assert not manager._repetitions

        asyncio.run(close(after_use=is_used_again))
        asyncio.run(close(after_use=True))  # It drops the connection of the closed loop.
        gc.collect()
        # It ended in another context than it began in.
        assert not [error for error in ignored if isinstance(error, ValueError)]


# The child goes on with one thread, so what it inherited of the others must hold nothing up.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class TestAForkedProcess:
    """It has the blocking manager without the other threads: neither their calls nor what they ran."""

    @staticmethod
    def use_and_close(manager: ConnectionManager) -> None:
        assert manager.update_heartbeat("sid")
        manager.close()

    def test_waits_for_no_cleanup_of_its_parent(self, server_url: str, namespace: str) -> None:
        with presence.sync.ConnectionManager.from_url(server_url, namespace=namespace) as manager:
            manager.register_connection("sid", "user")
            thread = threading.Thread(target=manager.run_cleanup, daemon=True)
            thread.start()
            while not manager._repetitions:
                thread.join(0.01)
            in_child(lambda: self.use_and_close(manager))
        thread.join(10)
        assert not thread.is_alive()

    @pytest.mark.parametrize("has_started", [False, True])
    def test_is_another_start_of_the_game_server(self, server_url: str, namespace: str, has_started: bool) -> None:
        """Otherwise the two would be taken for one, of which neither is found dead while the other beats."""
        with presence.sync.ConnectionManager.from_url(server_url, namespace=namespace, server_id="server") as manager:
            if has_started:
                manager.start_server()
            reading, writing = os.pipe()
            for _ in range(2):
                in_child(lambda: os.write(writing, b"%d\n" % manager.start_server()))
            os.close(writing)
            with open(reading) as lines:
                epochs = [int(line) for line in lines]
            assert len(epochs) == 2
            assert len({manager.start_server(), *epochs}) == 3

    def test_waits_for_no_call_of_its_parent(self, own_server: LocalServer) -> None:
        with Proxy(own_server.port) as proxy, presence.sync.ConnectionManager.from_url(proxy.url) as manager:
            manager.register_connection("sid", "user")
            manager.update_heartbeat("sid")
            proxy.fates = [Fate.HOLD_REPLY]
            thread = threading.Thread(target=manager.update_heartbeat, args=("sid",), daemon=True)
            thread.start()
            assert proxy.is_holding.wait(BOUND_SECONDS)
            with manager._lock:  # As if another thread had just begun a call.
                in_child(manager.close)
            proxy.release()
            thread.join(10)
            self.use_and_close(manager)


class TestAStateThatTheServerLostInPart:
    """Eviction, or a failover to a server whose clock is behind."""

    def test_a_sid_of_an_evicted_record_is_left_to_another_user_whatever_stands_behind_the_name(
        self, manager: ConnectionManager, client: redis.Redis, namespace: str
    ) -> None:
        manager.register_connection("sid", "user")
        client.delete(f"{{{namespace}}}:conn:sid")
        others = manager.register_connection("sid", "us", metadata=b"er").connection

        assert manager.register_connection("new", "user").displaced == ()

        assert manager.get_connection("sid") == others

    def test_the_newest_registration_is_the_active_one_though_the_clock_ran_back(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str
    ) -> None:
        manager = make_manager(connections_per_user=2)
        manager.register_connection("before", "user")
        # The last epoch is minus the score of the empty sid.
        last: Any = client.zincrby(f"{{{namespace}}}:last_seen", -3_600_000_000, "")
        client.set(f"{{{namespace}}}:conn:before", f"0:{-int(last)} user", keepttl=True)

        manager.register_connection("after", "user")

        active = manager.get_user_connection("user")
        assert active is not None
        assert active.sid == "after"
        manager.join_game("after", "game")
        assert manager.get_game_connections("game") == [manager.get_connection("after")]
        assert [gone.sid for gone in manager.register_connection("third", "user").displaced] == ["before"]

    def test_an_evicted_record_refuses_nobody(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str
    ) -> None:
        manager = make_manager(displacement="reject_while_alive")
        manager.register_connection("evicted", "user")
        client.delete(f"{{{namespace}}}:conn:evicted")

        assert manager.register_connection("new", "user")
        assert not manager.register_connection("another", "user")
        client.zrem(f"{{{namespace}}}:last_seen", "evicted")

    def test_an_evicted_record_does_not_let_one_user_refuse_another(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str
    ) -> None:
        manager = make_manager(displacement="reject_while_alive")
        manager.register_connection("sid", "evicted user")
        client.delete(f"{{{namespace}}}:conn:sid")
        manager.register_connection("sid", "new owner")

        registration = manager.register_connection("new", "evicted user")

        assert registration
        assert registration.displaced == ()
        assert manager.is_user_online("new owner")

    def test_what_is_alive_beside_an_evicted_record_still_refuses(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str
    ) -> None:
        for sid in ("alive", "evicted"):
            make_manager(connections_per_user=2).register_connection(sid, "user")
        client.delete(f"{{{namespace}}}:conn:evicted")
        manager = make_manager(displacement="reject_while_alive")

        registration = manager.register_connection("new", "user")

        assert registration.refused
        assert registration.connection.sid == "alive"
        manager.unregister_connection("alive")
        client.zrem(f"{{{namespace}}}:last_seen", "evicted")
        client.delete(f"{{{namespace}}}:user_conns:user")

    @pytest.mark.parametrize(
        "score",
        [
            pytest.param(lambda now: now - 50_000, id="live"),
            pytest.param(lambda now: now - 3_600_001, id="expired"),
            pytest.param(lambda now: now + 60_000, id="of a clock that ran back"),
            pytest.param(lambda now: -now - 60_000, id="detached"),
            pytest.param(lambda now: -now + 60_000, id="past its grace"),
        ],
    )
    def test_the_score_that_is_left_of_an_evicted_record_is_no_part_of_the_sids_next_connection(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str, score: Callable[[int], int]
    ) -> None:
        manager = make_manager(conn_ttl_seconds=3600)
        now_ms = int(manager.register_connection("other", "other").connection.connected_at.timestamp() * 1000)
        client.zadd(f"{{{namespace}}}:last_seen", {"sid": score(now_ms)})

        registration = manager.register_connection("sid", "user")

        assert (registration.displaced, registration.resumed) == ((), False)
        connection = registration.connection
        assert connection.connected_at == connection.last_seen == connection.observed_at
        assert manager.get_connection("sid") == connection
        assert manager.is_user_online("user")
        assert manager.cleanup_stale_connections().removed == ()

    @pytest.mark.parametrize("sid", ["sid", "new"])
    def test_a_connection_whose_score_was_lost_is_no_part_of_the_users_next_connection(
        self, manager: ConnectionManager, client: redis.Redis, namespace: str, sid: str
    ) -> None:
        manager.register_connection("sid", "user")
        manager.join_game("sid", "game")
        client.zrem(f"{{{namespace}}}:last_seen", "sid")
        assert manager.get_connection("sid") is None

        registration = manager.register_connection(sid, "user")

        assert (registration.connection.game_id, registration.resumed) == (None, False)
        assert [gone.sid for gone in registration.displaced] == ["sid"] * (sid == "new")
        assert manager.get_user_connection("user") == registration.connection

    def test_a_member_whose_score_was_lost_is_not_counted_and_holds_no_seat(
        self, manager: ConnectionManager, client: redis.Redis, namespace: str
    ) -> None:
        for sid in ("lost", "sid"):
            manager.register_connection(sid, f"user of {sid}")
        manager.join_game("lost", "game")
        client.zrem(f"{{{namespace}}}:last_seen", "lost")

        assert manager.get_game_connection_count("game") == 0
        assert manager.join_game("sid", "game", capacity=1)

        assert manager.get_game_connection_count("game") == 1
        assert manager.get_game_connections("game") == [manager.get_connection("sid")]
        manager.register_connection("lost", "user of lost")

    def test_a_large_game_can_be_counted_although_all_scores_were_lost(
        self, manager: ConnectionManager, client: redis.Redis, namespace: str
    ) -> None:
        operations, sids = manager.operations, [f"sid-{number}" for number in range(51)]
        manager.pipeline([operations.register_connection(sid, f"user of {sid}") for sid in sids])
        manager.pipeline([operations.join_game(sid, "game") for sid in sids])
        client.delete(f"{{{namespace}}}:last_seen")

        assert manager.get_game_connection_count("game") <= len(sids)

        manager.pipeline([operations.register_connection(sid, f"user of {sid}") for sid in sids])
        assert manager.get_game_connection_count("game") == 0

    @pytest.mark.parametrize("user_id", ["user", "another"])
    @pytest.mark.parametrize("connections_per_user", [1, 2])
    def test_a_sid_whose_score_was_lost_is_registered_anew_and_stays_in_no_game_or_list_of_before(
        self,
        make_manager: ManagerFactory,
        client: redis.Redis,
        namespace: str,
        keys: Keys,
        user_id: str,
        connections_per_user: int,
    ) -> None:
        manager = make_manager(connections_per_user=connections_per_user, server_id="before")
        manager.register_connection("sid", "user")
        manager.join_game("sid", "game")
        client.zrem(f"{{{namespace}}}:last_seen", "sid")

        registration = make_manager(connections_per_user=connections_per_user).register_connection("sid", user_id)

        assert registration.replaced is not None
        assert (registration.replaced.user_id, registration.replaced.game_id) == ("user", "game")
        assert registration.connection.game_id is None
        assert manager.get_game_connections("game") == []
        keyspace = keys()
        assert (keyspace.users, keyspace.games, keyspace.servers) == ({user_id: ["sid"]}, {}, {})

    @pytest.mark.parametrize("events", ["off", "stream"])
    def test_who_comes_back_after_the_record_was_evicted_displaces_nobody(
        self,
        make_manager: ManagerFactory,
        client: redis.Redis,
        namespace: str,
        wait: Callable[[float], None],
        keys: Keys,
        events: EventsMode,
    ) -> None:
        manager = make_manager(events=events)
        manager.register_connection("evicted", "user")
        client.delete(f"{{{namespace}}}:conn:evicted")

        registration = manager.register_connection("new", "user")

        assert registration.displaced == ()
        assert manager.get_all_user_connections("user") == [registration.connection]
        wait(91)
        manager.update_heartbeat("new")
        assert not manager.cleanup_stale_connections()
        assert list(keys().last_seen) == ["new"]

    @pytest.mark.parametrize(
        ("owner", "metadata"),
        [("new owner", None), ("evicted", b" user")],
        ids=["another", "one whose record ends as the user's would"],
    )
    @pytest.mark.parametrize("events", ["off", "stream"])
    def test_an_evicted_record_does_not_let_one_user_displace_another(
        self,
        make_manager: ManagerFactory,
        client: redis.Redis,
        namespace: str,
        keys: Keys,
        owner: str,
        metadata: bytes | None,
        events: EventsMode,
    ) -> None:
        manager = make_manager(events=events)
        manager.register_connection("sid", "evicted user")
        client.delete(f"{{{namespace}}}:conn:sid")
        client.zrem(f"{{{namespace}}}:last_seen", "sid")
        owned = manager.register_connection("sid", owner, metadata=metadata).connection
        lifetime_ms = min(keys().ttls_ms.values())

        assert manager.get_user_connection("evicted user") is None
        assert manager.get_all_user_connections("evicted user") == []
        assert manager.register_connection("new", "evicted user").displaced == ()
        assert manager.is_user_online(owner)
        assert manager.get_connection("sid") == owned
        assert min(keys().ttls_ms.values()) > lifetime_ms - 30_000
        last: Any = client.xrevrange(f"{{{namespace}}}:events", count=1)
        told = [event.type.value for _, message in last for event in parse_message(message[b"message"])]
        assert told == ([] if events == "off" else ["registered"])

    def test_a_join_does_not_fail_halfway_when_the_users_key_was_evicted(
        self, manager: ConnectionManager, client: redis.Redis, namespace: str
    ) -> None:
        manager.register_connection("sid", "user")
        manager.join_game("sid", "old game")
        client.delete(f"{{{namespace}}}:user_conns:user")

        assert manager.join_game("sid", "new game").left_game_id == "old game"

        assert manager.get_game_connections("new game") == [manager.get_connection("sid")]
        assert manager.get_game_connections("old game") == []
        manager.unregister_connection("sid")

    def test_a_ttl_that_was_lowered_lets_no_game_expire(
        self, make_manager: ManagerFactory, wait: Callable[[float], None]
    ) -> None:
        day = 24 * 60 * 60
        make_manager(conn_ttl_seconds=10 * day).register_connection("sid", "user")
        manager = make_manager(conn_ttl_seconds=3600)
        manager.join_game("sid", "game")
        for _ in range(60):
            wait(1800)
            assert manager.update_heartbeat("sid")
        assert manager.get_game_user_sids("game") == {"user": "sid"}


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda manager: manager.register_connection("sid", "user"), id="register again"),
        pytest.param(lambda manager: manager.register_connection("new", "user"), id="displace"),
        pytest.param(lambda manager: manager.register_connection("sid", "another user"), id="take the sid of another"),
        pytest.param(lambda manager: manager.unregister_connection("sid"), id="unregister"),
        pytest.param(lambda manager: manager.unregister_connection("sid", grace_seconds=30), id="detach"),
        pytest.param(lambda manager: manager.join_game("sid", "game"), id="join"),
        pytest.param(lambda manager: manager.leave_game("other"), id="leave"),
        pytest.param(lambda manager: manager.update_metadata("other", "new"), id="update the metadata"),
        pytest.param(lambda manager: manager.update_server_heartbeat(), id="beat as a server"),
        pytest.param(lambda manager: manager.cleanup_server("server", grace_seconds=30), id="detach a server's"),
    ],
)
def test_what_a_call_writes_lives_as_long_as_any_key_in_which_connections_live(
    make_manager: ManagerFactory, keys: Keys, call: Callable[[ConnectionManager], object]
) -> None:
    manager = make_manager(conn_ttl_seconds=3600, connections_per_user=2, server_id="server", events="stream")
    manager.register_connection("sid", "user")
    manager.register_connection("other", "user")
    manager.join_game("other", "game")

    call(manager)

    ttls_ms = keys().ttls_ms | keys().other_ttls_ms
    lived_in = {key: ttl for key, ttl in ttls_ms.items() if "}:reply:" not in key}
    least, most = RETENTION_MS + 3_570_000, RETENTION_MS + 3_600_000
    assert {key: ttl for key, ttl in lived_in.items() if not least < ttl <= most} == {}
