"""A server that becomes a replica, or a replica that becomes the primary, while managers have connections to it."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import LifoQueue
from typing import TYPE_CHECKING, Any

import pytest
import redis
import redis.asyncio
import redis.exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

import presence
import presence.sync
from presence import pooling
from tests.conftest import Awaited
from tests.fault_calls import CALLS, READS, assert_cause, call, check, pipeline, set_the_scene
from tests.fault_proxy import BOUND_SECONDS, Fate, Proxy
from tests.invariants import read_keyspace
from tests.server import LocalServer, free_port, program
from tests.watching import admin, counted, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from presence.sync import ConnectionManager
    from tests.conftest import ManagerFactory


class TestFailover:
    """A primary that became a replica refuses to write; behind a name that leads to the new one, nobody notices."""

    def test_a_write_on_a_replica_is_refused_with_what_to_do(
        self, own_client: redis.Redis, hasty_manager: ConnectionManager, namespace: str
    ) -> None:
        set_the_scene(hasty_manager)
        before = read_keyspace(own_client, namespace)
        own_client.replicaof("127.0.0.1", str(free_port()))
        for name in CALLS.keys() - READS:
            with pytest.raises(presence.ReadOnlyServerError, match="point the URL at the primary") as raised:
                call(hasty_manager, name)
            assert_cause(raised.value, redis.exceptions.ReadOnlyError)
        after = read_keyspace(own_client, namespace)
        assert (after.records, after.last_seen) == (before.records, before.last_seen)

    def test_reads_work_on_a_replica(self, own_client: redis.Redis, hasty_manager: ConnectionManager) -> None:
        set_the_scene(hasty_manager)
        own_client.replicaof("127.0.0.1", str(free_port()))
        for name in READS:
            check(hasty_manager, name)

    def test_a_replica_that_serves_no_stale_data_says_what_it_waits_for(
        self, own_client: redis.Redis, hasty_manager: ConnectionManager
    ) -> None:
        own_client.config_set("replica-serve-stale-data", "no")
        own_client.replicaof("127.0.0.1", str(free_port()))
        with pytest.raises(presence.ServerBusyError, match="wait for the failover"):
            hasty_manager.get_connection_count()

    @pytest.mark.parametrize("is_flushed", [False, True], ids=["", "and the old primary lost its scripts too"])
    def test_when_a_replica_is_promoted_the_next_call_works_there(
        self,
        make_manager: ManagerFactory,
        replicated: tuple[LocalServer, LocalServer],
        namespace: str,
        is_flushed: bool,
    ) -> None:
        primary, replica = replicated
        with Proxy(primary.port) as address:
            managers = {name: make_manager(address.url, namespace=f"{namespace} {name}") for name in CALLS}
            for name, manager in managers.items():
                call(manager, name)
                set_the_scene(manager)
                check(manager, "update_heartbeat")
            promote(replica, primary, address)
            if is_flushed:
                with admin(primary) as old:
                    old.script_flush()

            for name, manager in managers.items():
                if name in READS:  # The old primary would answer them for ever: reading is not refused.
                    check(manager, "update_heartbeat")
                check(manager, name)
                manager.close()

    def test_one_while_a_lost_script_is_loaded_again_is_not_noticed(
        self, make_manager: ManagerFactory, own_server: LocalServer
    ) -> None:
        """The call goes along with the load then, and redis-py tries again for a single command only."""
        with Proxy(own_server.port) as proxy, admin(own_server) as server, ThreadPoolExecutor(1) as threads:
            manager = make_manager(proxy.url)
            set_the_scene(manager)
            check(manager, "leave_game")
            set_the_scene(manager)
            server.script_flush()
            proxy.fates = [Fate.PASS, Fate.HOLD_REQUEST]
            leaving = threads.submit(check, manager, "leave_game")
            assert proxy.is_holding.wait(BOUND_SECONDS)
            server.script_flush()
            server.replicaof("127.0.0.1", str(free_port()))
            proxy.release()
            wait_until(lambda: "errorstat_READONLY" in server.info("errorstats"))
            server.replicaof("NO", "ONE")
            leaving.result()

    @pytest.mark.parametrize("kind", ["own", "ConnectionPool", "BlockingConnectionPool", "without a mutex"])
    def test_when_a_write_has_found_the_new_primary_no_connection_reads_from_the_old_any_more(
        self, replicated: tuple[LocalServer, LocalServer], kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        primary, replica = replicated
        with Proxy(primary.port) as address, manager_with_a_pool(address.url, kind) as manager:
            manager.register_connection("old", "user")
            pool: Any = pooling.pool_of(manager._client())
            taken = [pool.get_connection() for _ in range(4)]
            for connection in taken[1:]:
                pool.release(connection)
            promote(replica, primary, address)
            with admin(primary) as old:
                old.replicaof("127.0.0.1", str(free_port()))  # It hears nothing of the new one.

            # Another thread takes one as soon as it can, while this one leaves the old primary.
            taker = threading.Thread(target=lambda: taken.append(pool.get_connection()))
            mark = pool.update_active_connections_for_reconnect

            def mark_and_let_another_take() -> None:
                mark()
                if not taker.ident and kind != "without a mutex":
                    taker.start()
                    taker.join(0.2)

            monkeypatch.setattr(pool, "update_active_connections_for_reconnect", mark_and_let_another_take)
            assert [gone.sid for gone in manager.register_connection("new", "user").displaced] == ["old"]
            if taker.ident:
                taker.join()
                pool.release(taken.pop())
            pool.release(taken[0])  # As at the end of another thread's call.
            for connection in [pool.get_connection() for _ in range(4)]:
                pool.release(connection)  # Each is the next to be taken.
                read = manager.get_user_connection("user")
                assert read is not None
                assert read.sid == "new"

    @pytest.mark.parametrize("module", [redis, redis.asyncio])
    def test_a_client_that_does_not_try_again_writes_there_by_the_next_call(
        self, replicated: tuple[LocalServer, LocalServer], module: Any
    ) -> None:
        primary, replica = replicated
        with asyncio.Runner() as runner, Proxy(primary.port) as address:
            if module is redis:
                client: Any = redis.Redis.from_url(address.url)
                manager: Any = presence.sync.ConnectionManager(client)
            else:
                client = redis.asyncio.Redis.from_url(address.url)
                manager = Awaited(presence.ConnectionManager(client), runner)
            manager.register_connection("sid", "user")
            promote(replica, primary, address)
            with pytest.raises(presence.ReadOnlyServerError):
                manager.leave_game("sid")

            assert manager.join_game("sid", "game")
            manager.close()
            if module is redis:
                client.close()
            else:
                runner.run(client.aclose())

    def test_when_a_replica_is_promoted_the_next_pipeline_works_there(
        self, promoted_manager: ConnectionManager
    ) -> None:
        operations = promoted_manager.operations
        results = pipeline(
            promoted_manager,
            operations.leave_game("sid-1"),
            operations.join_game("sid-1", "next game"),
            operations.leave_game("sid-1"),
        )
        assert [results[0], results[1].joined, results[2]] == ["game", True, "next game"]

    def test_when_a_replica_is_promoted_the_only_write_of_a_pipeline_works_there(
        self, promoted_manager: ConnectionManager
    ) -> None:
        operations = promoted_manager.operations
        count = operations.get_game_connection_count("game")
        # What follows it is asked again after it, on the new primary.
        assert pipeline(promoted_manager, count, operations.leave_game("sid-1"), count) == [2, "game", 1]

    @pytest.mark.parametrize("size", [2, 5])
    def test_while_no_replica_is_promoted_one_write_of_a_pipeline_is_tried_again_for_all(
        self, own_client: redis.Redis, hasty_manager: ConnectionManager, size: int
    ) -> None:
        set_the_scene(hasty_manager)
        hasty_manager.leave_game("unknown")
        own_client.replicaof("127.0.0.1", str(free_port()))
        failing = pytest.raises(presence.PipelineError, match=f"{size} of {size} operations failed")
        with counted(own_client) as counts, failing:
            hasty_manager.pipeline([hasty_manager.operations.leave_game("sid-1") for _ in range(size)])
        assert counts["evalsha that failed"] == size + 1


class Queue:
    """What a redis-py pool needs of its queue, and no more; gevent's is such a one."""

    def __init__(self, size: int) -> None:
        self._queue = LifoQueue[Any](size)
        self.queue = self._queue.queue
        self.put_nowait, self.get = self._queue.put_nowait, self._queue.get


@contextmanager
def manager_with_a_pool(url: str, kind: str) -> Iterator[presence.sync.ConnectionManager]:
    """A manager's own pool, or that of a client which is passed in, which tries again as presence's own do."""
    if kind == "own":
        with presence.sync.ConnectionManager.from_url(url) as manager:
            yield manager
        return
    options = {"queue_class": Queue} if kind == "without a mutex" else {}
    pool_type = redis.ConnectionPool if kind == "ConnectionPool" else redis.BlockingConnectionPool
    retry = Retry(NoBackoff(), 3)
    pool: Any = pool_type.from_url(url, retry=retry, retry_on_error=[redis.exceptions.ReadOnlyError], **options)
    with redis.Redis(connection_pool=pool) as client:
        yield presence.sync.ConnectionManager(client)
        pool.disconnect()


def promote(replica: LocalServer, primary: LocalServer, address: Proxy) -> None:
    """Let the replica, once it has all that was written, and its primary change places, and the address follow."""
    with admin(primary) as old, admin(replica) as new:
        written = old.info("replication")["master_repl_offset"]
        wait_until(lambda: new.info("replication")["slave_repl_offset"] >= written)
        new.replicaof("NO", "ONE")
        address.server_port = replica.port
        old.replicaof("127.0.0.1", str(replica.port))


@pytest.fixture
def replicated() -> Iterator[tuple[LocalServer, LocalServer]]:
    """A primary, and a replica that follows it."""
    options = ("--repl-diskless-sync-delay", "0")
    with LocalServer(program(), *options) as primary, LocalServer(program(), *options) as replica:
        with admin(replica) as client:
            client.replicaof("127.0.0.1", str(primary.port))
            wait_until(lambda: client.info("replication")["master_link_status"] == "up")
        yield primary, replica


@pytest.fixture
def promoted_manager(
    make_manager: ManagerFactory, replicated: tuple[LocalServer, LocalServer]
) -> Iterator[ConnectionManager]:
    """A manager that has set the scene; since then the primary and its replica have changed places."""
    primary, replica = replicated
    with Proxy(primary.port) as address:
        manager = make_manager(address.url)
        set_the_scene(manager)
        promote(replica, primary, address)
        yield manager
        manager.close()
