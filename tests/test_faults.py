"""Faults of the server and the network: what the caller is told (guarantee 10), and what it never notices (8)."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import resource
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import pytest
import redis
import redis.asyncio
import redis.exceptions
from redis.cache import CacheConfig

import presence
import presence.sync
from presence import addresses, clients, pooling, retrying
from presence.commands import Command, Repeated, load_command
from presence.operations import CLEANUP_BATCH_SIZE, KEPT_SECONDS, Operation, Operations
from presence.subscriptions import Feed
from tests.clock import let_time_pass
from tests.fault_calls import CALLS, READS, assert_cause, call, check, load_late, one_attempt, pipeline, set_the_scene
from tests.fault_proxy import BOUND_SECONDS, Fate, Proxy
from tests.invariants import read_keyspace, violations
from tests.server import LocalServer, free_port, program
from tests.watching import admin, counted, is_held, wait_until

if TYPE_CHECKING:
    from presence import CleanupResult
    from presence.operations import EventsMode
    from presence.sync import ConnectionManager
    from tests.conftest import ManagerFactory

every_operation = pytest.mark.parametrize("name", CALLS)


class TestAServerThatCannotBeReached:
    """The error says so, and what to check."""

    @every_operation
    def test_is_named_with_what_to_check(self, make_manager: ManagerFactory, hasty: dict[str, Any], name: str) -> None:
        manager = make_manager(f"redis://127.0.0.1:{free_port()}/0", **hasty)
        with pytest.raises(presence.ServerUnreachableError, match="check that it runs, the host and port") as raised:
            call(manager, name)
        assert_cause(raised.value, redis.ConnectionError)

    def test_that_accepts_but_never_answers_is_named_too(
        self, make_manager: ManagerFactory, hasty: dict[str, Any]
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            manager = make_manager(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", socket_timeout=0.05, **hasty)
            with pytest.raises(
                presence.ServerUnreachableError, match=r"did not answer in time.*socket_timeout"
            ) as raised:
                manager.get_connection_count()
        assert_cause(raised.value, redis.TimeoutError)

    def test_that_takes_no_more_clients_is_named_too(
        self, make_manager: ManagerFactory, own_server: LocalServer, own_client: redis.Redis, hasty: dict[str, Any]
    ) -> None:
        own_client.config_set("maxclients", 1)
        with pytest.raises(presence.ServerUnreachableError, match="raise its maxclients"):
            make_manager(own_server.url, **hasty).get_connection_count()

    def test_that_cannot_be_reached_for_want_of_files_is_named_too(
        self, make_manager: ManagerFactory, own_server: LocalServer, hasty: dict[str, Any]
    ) -> None:
        manager = make_manager(own_server.url, **hasty)
        gc.collect()  # What other tests have left, and would be closed in the midst of this.
        most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        opened: list[socket.socket] = []
        try:
            with suppress(OSError):
                opened.append(socket.socket())
                resource.setrlimit(resource.RLIMIT_NOFILE, (opened[0].fileno() + 1, hard))
                while True:  # There may be numbers below it that are free.
                    opened.append(socket.socket())
            with pytest.raises(presence.ServerUnreachableError, match=r"raise its limit \(ulimit -n\)"):
                manager.get_connection_count()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            for each in opened:
                each.close()

    def test_is_used_again_once_it_is_back(self, own_server: LocalServer, hasty_manager: ConnectionManager) -> None:
        set_the_scene(hasty_manager)
        own_server.kill()
        with pytest.raises(presence.ServerUnreachableError):
            hasty_manager.get_connection_count()
        own_server.start()
        set_the_scene(hasty_manager)
        assert hasty_manager.get_connection_count() == 2


def test_a_database_that_the_server_does_not_have_is_named(
    make_manager: ManagerFactory, own_server: LocalServer, hasty: dict[str, Any]
) -> None:
    manager = make_manager(f"redis://127.0.0.1:{own_server.port}/99", **hasty)
    with pytest.raises(presence.UnexpectedReplyError, match="no database of the number in the URL") as raised:
        manager.get_connection_count()
    assert_cause(raised.value, redis.ResponseError)


def test_a_server_that_is_no_sentinel_is_named(
    make_manager: ManagerFactory, own_server: LocalServer, hasty: dict[str, Any]
) -> None:
    manager = make_manager(f"redis+sentinel://127.0.0.1:{own_server.port}/service", **hasty)
    with pytest.raises(presence.UnexpectedReplyError, match="is no sentinel") as raised:
        manager.get_connection_count()
    assert_cause(raised.value, redis.ResponseError)


class TestAServerThatKnowsNeitherUserNorPassword:
    """The error says which of both it is, and where it is to be corrected."""

    def test_a_wrong_password(
        self, make_manager: ManagerFactory, own_server: LocalServer, own_client: redis.Redis, hasty: dict[str, Any]
    ) -> None:
        own_client.config_set("requirepass", "secret")
        manager = make_manager(f"redis://:wrong@127.0.0.1:{own_server.port}/0", **hasty)
        with pytest.raises(presence.AuthenticationFailedError, match="correct them in the URL") as raised:
            manager.get_connection_count()
        assert_cause(raised.value, redis.AuthenticationError)
        assert "secret" not in str(raised.value)
        assert "wrong" not in str(raised.value)

    def test_is_not_asked_again_and_again(
        self, make_manager: ManagerFactory, own_server: LocalServer, own_client: redis.Redis
    ) -> None:
        own_client.config_set("requirepass", "secret")
        manager = make_manager(f"redis://:wrong@127.0.0.1:{own_server.port}/0")
        own_client.config_resetstat()
        with pytest.raises(presence.AuthenticationFailedError):
            manager.get_connection_count()
        errors: Any = own_client.info("errorstats")
        assert errors["errorstat_WRONGPASS"]["count"] == 1

    @pytest.mark.parametrize("protocol", [2, 3])
    def test_a_missing_password(
        self,
        make_manager: ManagerFactory,
        own_server: LocalServer,
        own_client: redis.Redis,
        hasty: dict[str, Any],
        protocol: int,
    ) -> None:
        own_client.config_set("requirepass", "secret")
        manager = make_manager(f"{own_server.url}?protocol={protocol}", **hasty)
        with pytest.raises(presence.AuthenticationFailedError, match="asks for a password; put it into") as raised:
            manager.get_connection_count()
        assert_cause(raised.value, redis.AuthenticationError)

    def test_a_password_for_a_server_without_one(
        self, make_manager: ManagerFactory, own_server: LocalServer, hasty: dict[str, Any]
    ) -> None:
        manager = make_manager(f"redis://:needless@127.0.0.1:{own_server.port}/0?protocol=2", **hasty)
        with pytest.raises(presence.AuthenticationFailedError, match="correct them in the URL"):
            manager.get_connection_count()


@pytest.mark.parametrize(
    "rules",
    [
        pytest.param(("+@all", "~*", "-evalsha"), id="may not run scripts"),
        pytest.param(("+@all", "~*", "-script|load"), id="may not load scripts"),
        pytest.param(("+@all", "~*", "-set"), id="may not run a command of the script"),
        pytest.param(("+@all", "~{other}:*"), id="may not touch the namespace"),
        pytest.param(("+@all", "~{*}:conn:*", "~{*}:user_conns:*", "%R~{*}:last_seen"), id="may not write a key"),
    ],
)
def test_a_missing_right_is_named_with_where_to_read_which_are_needed(
    make_manager: ManagerFactory,
    own_server: LocalServer,
    own_client: redis.Redis,
    hasty: dict[str, Any],
    rules: tuple[str, ...],
) -> None:
    own_client.execute_command("ACL", "SETUSER", "game-server", "on", ">secret", *rules)
    manager = make_manager(f"redis://game-server:secret@127.0.0.1:{own_server.port}/0", **hasty)
    with pytest.raises(presence.PermissionDeniedError, match="README lists the rights") as raised:
        manager.register_connection("sid", "user")
    assert_cause(raised.value, redis.ResponseError)
    assert own_client.dbsize() == 0


class TestScriptsThatTheServerLost:
    """They are loaded again, and what had not run runs: once (guarantee 8)."""

    @every_operation
    def test_a_flushed_script_is_loaded_again_without_the_caller_noticing(
        self, manager: ConnectionManager, client: redis.Redis, name: str
    ) -> None:
        set_the_scene(manager)
        call(manager, "get_connection_count")
        client.script_flush()
        check(manager, name)

    def test_a_call_that_missed_its_script_runs_once(
        self, own_manager: ConnectionManager, own_client: redis.Redis
    ) -> None:
        set_the_scene(own_manager)
        own_client.script_flush()
        with counted(own_client) as counts:
            own_manager.register_connection("sid-3", "user-3")
        assert counts == {"evalsha": 2, "evalsha that failed": 1, "script|load": 1}

    def test_a_pipeline_that_missed_its_script_runs_once(
        self, own_manager: ConnectionManager, own_client: redis.Redis
    ) -> None:
        set_the_scene(own_manager)
        own_client.script_flush()
        calls = [own_manager.operations.leave_game("sid-1") for _ in range(3)]
        with counted(own_client) as counts:
            assert own_manager.pipeline(calls) == ["game", None, None]
        assert counts == {"evalsha": 3, "evalsha that failed": 0, "script|load": 1}

    @pytest.mark.parametrize("known", ["nothing", "get_connection_count", "leave_game", "get_game_connection_count"])
    def test_a_pipeline_keeps_its_order_whichever_scripts_are_there_and_runs_each_call_once(
        self, own_manager: ConnectionManager, own_client: redis.Redis, known: str
    ) -> None:
        operations = own_manager.operations
        set_the_scene(own_manager)
        own_client.script_flush()
        if known != "nothing":
            getattr(own_manager, known)(*("unknown" for _ in CALLS[known].arguments))
        with counted(own_client) as counts:
            results = pipeline(
                own_manager,
                operations.register_connection("sid-3", "user-3"),
                operations.join_game("sid-3", "game"),
                operations.get_game_connection_count("game"),
                operations.leave_game("sid-3"),
                operations.get_game_connection_count("game"),
                operations.get_connection_count(),
            )
        assert results[1].joined
        assert results[2:] == [3, "game", 2, 3]
        assert (counts["evalsha"], counts["evalsha that failed"]) == (6, 0)

    def test_a_pipeline_keeps_its_order_where_another_client_loads_its_script_meanwhile(
        self, own_manager: ConnectionManager, own_client: redis.Redis
    ) -> None:
        set_the_scene(own_manager)
        joins = [own_manager.operations.join_game("sid-1", f"game-{number}") for number in range(3)]
        own_client.script_flush()
        pipeline(own_manager, joins[0], joins[1], ScriptLoad(joins[0].script, (), (), bool), joins[2])
        connection = own_manager.get_connection("sid-1")
        assert connection is not None
        assert connection.game_id == "game-2"

    def test_what_follows_a_call_that_missed_its_script_is_called_again_after_it(
        self, own_manager: ConnectionManager
    ) -> None:
        operations = own_manager.operations
        set_the_scene(own_manager)
        register, join = operations.register_connection("sid-3", "user-3"), operations.join_game("sid-3", "game")
        results = pipeline(
            own_manager,
            ScriptFlush(join.script, (), (), bool),
            ScriptLoad(join.script, (), (), bool),
            register,
            join,
            operations.get_game_connection_count("game"),
        )
        assert results[3].joined
        assert results[4] == 3

    def test_within_a_pipeline_they_are_all_loaded_again_but_one_that_cannot_be(
        self, own_manager: ConnectionManager
    ) -> None:
        operations = own_manager.operations
        set_the_scene(own_manager)
        count = operations.get_connection_count()
        unloadable = operations.get_connection_count()
        unloadable.script = replace(unloadable.script, source="!# flags", sha="0" * 40)
        with pytest.raises(presence.PipelineError, match="1 of 6 operations failed") as raised:
            pipeline(
                own_manager,
                operations.leave_game("sid-1"),
                ScriptFlush(count.script, (), (), bool),
                operations.leave_game("sid-2"),
                unloadable,
                operations.get_game_connection_count("game"),
                count,
            )
        *worked, failed, in_game, connections = raised.value.results
        assert worked == ["game", True, "game"]
        assert isinstance(failed, presence.UnexpectedReplyError)
        assert (in_game, connections) == (0, 2)

    def test_one_that_cannot_be_loaded_again_takes_no_answer_that_it_gave_before(
        self, own_manager: ConnectionManager
    ) -> None:
        set_the_scene(own_manager)
        assert own_manager.get_connection_count() == 2
        before, after = (own_manager.operations.get_connection_count() for _ in range(2))
        before.script = after.script = replace(before.script, source="!# flags")
        with pytest.raises(presence.PipelineError, match="1 of 3 operations failed") as raised:
            pipeline(own_manager, before, ScriptFlush(before.script, (), (), bool), after)
        *worked, failed = raised.value.results
        assert worked == [2, True]
        assert isinstance(failed, presence.UnexpectedReplyError)


class ScriptFlush(Operation[bool]):
    """What another client may do in the midst of a pipeline."""

    def command(self) -> Command:
        return ("SCRIPT", "FLUSH")


class ScriptLoad(Operation[bool]):
    """The same."""

    def command(self) -> Command:
        return load_command(self.script)


class TestRestart:
    """A server that was restarted has new sockets, and neither scripts nor data; no caller notices (guarantee 8)."""

    @every_operation
    def test_after_it_the_next_call_works(
        self, own_server: LocalServer, own_manager: ConnectionManager, name: str
    ) -> None:
        call(own_manager, name)
        own_server.kill()
        own_server.start()
        call(own_manager, name)
        set_the_scene(own_manager)
        check(own_manager, name)

    def test_after_it_a_pipeline_works(self, own_server: LocalServer, own_manager: ConnectionManager) -> None:
        operations = own_manager.operations
        set_the_scene(own_manager)
        own_server.kill()
        own_server.start()
        registration, joined, count = pipeline(
            own_manager,
            operations.register_connection("sid", "user"),
            operations.join_game("sid", "game"),
            operations.get_game_connection_count("game"),
        )
        assert registration.connection.sid == "sid"
        assert (joined.joined, count) == (True, 1)

    def test_a_call_that_is_made_during_it_waits_for_it(
        self, own_server: LocalServer, own_manager: ConnectionManager
    ) -> None:
        set_the_scene(own_manager)
        own_server.kill()
        restart = threading.Timer(0.3, own_server.start)
        restart.start()
        try:
            assert own_manager.register_connection("sid", "user").displaced == ()
        finally:
            restart.join()
        assert own_manager.get_connection_count() == 1

    def test_after_it_many_idle_connections_are_replaced_at_once(self, own_server: LocalServer) -> None:
        async def run() -> None:
            async with presence.ConnectionManager.from_url(own_server.url) as manager:

                async def register_many() -> None:
                    await asyncio.gather(*(manager.register_connection(f"sid-{n}", f"user-{n}") for n in range(20)))

                await register_many()
                await asyncio.to_thread(own_server.kill)
                await asyncio.to_thread(own_server.start)
                await register_many()
                assert await manager.get_connection_count() == 20

        asyncio.run(run())

    def test_after_it_the_idle_connections_of_many_threads_are_replaced(self, own_server: LocalServer) -> None:
        with presence.sync.ConnectionManager.from_url(own_server.url) as manager:

            def register_many() -> None:
                with ThreadPoolExecutor(8) as threads:
                    for registration in threads.map(
                        lambda n: manager.register_connection(f"sid-{n}", f"user-{n}"), range(20)
                    ):
                        assert registration.displaced == ()

            register_many()
            own_server.kill()
            own_server.start()
            register_many()
            assert manager.get_connection_count() == 20


def blocking_retry() -> Any:
    """Give the policy of the clients that blocking managers make."""
    client: Any = clients.connect_blocking(addresses.parse("redis://localhost"), {})
    return client.get_retry()


class TestABrokenConnection:
    """A request that is lost is sent again; so is one whose reply is lost, for every script may run twice."""

    @pytest.mark.parametrize("fate", [Fate.LOSE_REQUEST, Fate.LOSE_REPLY])
    @pytest.mark.parametrize("name", sorted(CALLS.keys() - READS))
    def test_is_not_noticed_and_the_state_is_that_of_one_call(
        self,
        make_manager: ManagerFactory,
        own_server: LocalServer,
        own_client: redis.Redis,
        own_manager: ConnectionManager,
        namespace: str,
        fate: Fate,
        name: str,
    ) -> None:
        states = []
        for is_broken in (False, True):
            own_client.flushdb()
            set_the_scene(own_manager)
            with Proxy(own_server.port) as proxy:
                manager = make_manager(proxy.url)
                manager.get_connection_count()
                proxy.fates = [fate] if is_broken else []
                call(manager, name)
                assert proxy.fates == []
                manager.close()
            keyspace = read_keyspace(own_client, namespace)
            assert violations(keyspace) == []
            states.append((keyspace.users, {game: set(sids) for game, sids in keyspace.games.items()}))
        assert states[0] == states[1]

    def test_is_named_when_it_stays_broken(
        self, make_manager: ManagerFactory, own_server: LocalServer, hasty: dict[str, Any]
    ) -> None:
        with Proxy(own_server.port) as proxy:
            manager = make_manager(proxy.url, **hasty)
            manager.get_connection_count()
            proxy.fates = [Fate.LOSE_REPLY]
            with pytest.raises(presence.ServerUnreachableError, match="check that it runs") as raised:
                manager.register_connection("sid", "user")
            assert_cause(raised.value, redis.ConnectionError)
            manager.close()

    def test_has_its_last_attempt_before_the_answer_is_forgotten(self) -> None:
        with clients.connect_blocking(addresses.parse("redis://127.0.0.1:1"), {}) as client:
            options = client.connection_pool.connection_kwargs
        timeouts = options["socket_connect_timeout"], options["socket_timeout"]
        longest_pause = 1
        # A cluster's client connects within the attempt: the node is reached and greeted.
        assert retrying.RETRYING_SECONDS + longest_pause + sum(timeouts) < KEPT_SECONDS

    def test_is_not_tried_again_when_the_answer_may_be_forgotten(
        self, make_manager: ManagerFactory, own_server: LocalServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A register that ran a second time then would displace who has connected elsewhere meanwhile."""
        monkeypatch.setattr(retrying, "RETRYING_SECONDS", 0.3)
        with Proxy(own_server.port) as proxy:
            manager = make_manager(proxy.url)
            manager.register_connection("another", "user")
            proxy.fates = [Fate.LOSE_REPLY] * (1 + retrying.RETRIES)
            with pytest.raises(presence.ServerUnreachableError, match="check that it runs"):
                manager.register_connection("sid", "user")
            assert 3 <= len(proxy.fates) < retrying.RETRIES
            # The next call has as much time as that one had.
            proxy.fates = [Fate.LOSE_REPLY]
            assert manager.update_heartbeat("sid")

    def test_is_not_tried_again_when_it_takes_too_long_to_connect(
        self,
        make_manager: ManagerFactory,
        own_server: LocalServer,
        own_client: redis.Redis,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(retrying, "RETRYING_SECONDS", 0.3)
        with Proxy(own_server.port) as proxy:
            manager = make_manager(proxy.url)
            manager.register_connection("another", "user")
            runs_before = own_client.info("commandstats")["cmdstat_evalsha"]["calls"]
            proxy.delay = 0.6
            proxy.fates = [Fate.LOSE_REPLY]
            with pytest.raises(presence.ServerUnreachableError, match="check that it runs"):
                manager.register_connection("sid", "user")
            assert own_client.info("commandstats")["cmdstat_evalsha"]["calls"] == runs_before + 1
            # The next call has as much time as that one had.
            proxy.fates = [Fate.LOSE_REPLY]
            proxy.delay = 0
            assert manager.update_heartbeat("sid")

    def test_is_not_sent_again_then_either_where_the_server_has_lost_its_script(
        self,
        make_manager: ManagerFactory,
        own_server: LocalServer,
        own_client: redis.Redis,
        namespace: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """As after a failover: what the new primary answers that it has not run, the earlier one may have run."""
        monkeypatch.setattr(retrying, "RETRYING_SECONDS", 0.3)
        with (
            Proxy(own_server.port) as proxy,
            presence.sync.ConnectionManager.from_url(own_server.url, namespace=namespace) as other,
            ThreadPoolExecutor() as threads,
        ):
            manager = make_manager(proxy.url)
            manager.register_connection("another", "another user")
            proxy.fates = [Fate.LOSE_REPLY, Fate.HOLD_REQUEST]
            registering = threads.submit(manager.register_connection, "first", "user")
            assert proxy.is_holding.wait(BOUND_SECONDS)
            assert [gone.sid for gone in other.register_connection("second", "user").displaced] == ["first"]
            own_client.script_flush()
            time.sleep(0.4)
            proxy.release()
            with pytest.raises(presence.ServerUnreachableError, match="may be forgotten"):
                registering.result()
            assert other.update_heartbeat("second")

    def test_has_no_more_time_after_a_script_was_loaded(
        self,
        make_manager: ManagerFactory,
        own_server: LocalServer,
        own_client: redis.Redis,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(retrying, "RETRYING_SECONDS", 0.5)
        with Proxy(own_server.port) as proxy, ThreadPoolExecutor() as threads:
            manager = make_manager(proxy.url)
            manager.register_connection("another", "another user")
            proxy.fates = [Fate.HOLD_REPLY, Fate.LOSE_REPLY]
            own_client.script_flush()
            with counted(own_client) as counts:
                registering = threads.submit(manager.register_connection, "sid", "user")
                assert proxy.is_holding.wait(BOUND_SECONDS)
                time.sleep(0.3)
                # The next attempt begins when less time has passed since the load than since the call was made.
                proxy.delay = 0.35
                proxy.release()
                with pytest.raises(presence.ServerUnreachableError, match="check that it runs"):
                    registering.result()
            assert counts == {"evalsha": 2, "evalsha that failed": 1, "script|load": 1}

    @pytest.mark.parametrize("client", ["plain", "single", "traced", "asyncio", "single, asyncio"])
    def test_is_not_sent_again_then_whatever_client_was_given(
        self, own_server: LocalServer, own_client: redis.Redis, monkeypatch: pytest.MonkeyPatch, client: str
    ) -> None:
        class Traced(redis.Redis):
            """A subclass may do something with each call, and so has to see it."""

        monkeypatch.setattr(retrying, "RETRYING_SECONDS", 0.2)
        monkeypatch.setattr("presence.exchanges.load_command", load_late)

        options: dict[str, Any] = {"single_connection_client": "single" in client}

        async def call_asyncio() -> None:
            async with redis.asyncio.Redis.from_url(own_server.url, **options) as given:
                await presence.ConnectionManager(given).register_connection("sid", "user")

        def call_blocking() -> None:
            kind = Traced if client == "traced" else redis.Redis
            with kind.from_url(own_server.url, **options) as given:
                presence.sync.ConnectionManager(given).register_connection("sid", "user")

        with (
            counted(own_client) as counts,
            pytest.raises(presence.ServerUnreachableError, match="may be forgotten"),
        ):
            asyncio.run(call_asyncio()) if "asyncio" in client else call_blocking()
        assert counts == {"evalsha": 1, "evalsha that failed": 1, "script|load": 1}

    def test_is_not_sent_again_then_if_it_has_waited_for_a_connection(
        self, own_server: LocalServer, own_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retrying, "RETRYING_SECONDS", 0.2)
        take, requests = pooling._take, itertools.count(1)

        def take_late(pool: redis.ConnectionPool) -> Any:
            if next(requests) == 3:  # After the call and the load.
                time.sleep(0.3)
            return take(pool)

        with presence.sync.ConnectionManager.from_url(own_server.url) as manager:
            monkeypatch.setattr(pooling, "_take", take_late)
            with (
                counted(own_client) as counts,
                pytest.raises(presence.ServerUnreachableError, match="may be forgotten"),
            ):
                manager.register_connection("sid", "user")
        assert counts == {"evalsha": 1, "evalsha that failed": 1, "script|load": 1}

    def test_is_not_tried_again_on_a_cluster_when_the_answer_may_be_forgotten(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retrying, "RETRYING_SECONDS", 0.2)
        pauses = retrying.cluster_pauses()
        assert next(pauses) <= 0.1
        time.sleep(0.3)  # As an attempt that only its timeouts end.
        assert list(pauses) == []
        assert list(retrying.cluster_pauses(Repeated((), time.monotonic() - 0.3))) == []
        replies: dict[int, Any] = {}
        for _, part in retrying.attempts(Repeated([("GET",)], time.monotonic() - 0.3), replies, tries_again=True):
            assert not replies
            replies |= dict.fromkeys(part, redis.ConnectionError("away"))

    def test_is_opened_again_as_often_as_the_policy_says(
        self, make_manager: ManagerFactory, own_server: LocalServer
    ) -> None:
        """redis-py would try so often to connect within each of as many attempts to send."""
        with Proxy(own_server.port) as proxy:
            manager = make_manager(proxy.url)
            manager.register_connection("sid", "user")
            accepted_before = proxy.accepted
            proxy.fates, proxy.server_port = [Fate.LOSE_REPLY], free_port()
            with pytest.raises(presence.ServerUnreachableError, match="check that it runs"):
                manager.update_heartbeat("sid")
            assert proxy.accepted == accepted_before + retrying.RETRIES

    def test_is_not_tried_again_and_again_within_each_attempt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """redis-py connects within the attempt to send a command, and tries that as often."""
        monkeypatch.setattr(retrying, "RETRYING_SECONDS", 0.1)
        retry = blocking_retry()
        attempts = 0

        def connect() -> None:
            nonlocal attempts
            attempts += 1
            raise redis.ConnectionError

        def send() -> None:
            retry.call_with_retry(connect, lambda error: None)

        with pytest.raises(redis.ConnectionError):
            retry.call_with_retry(send, lambda error: None)
        assert 1 < attempts <= 3

    def test_has_no_more_time_for_the_second_of_two_things_within_an_attempt(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Such as to connect, and then to check the connection."""
        now = 1.0
        monkeypatch.setattr(retrying, "monotonic", lambda: now)
        retry = blocking_retry()
        attempts = 0

        def fail() -> None:
            nonlocal attempts
            attempts += 1
            raise redis.ConnectionError

        def connect_and_fail() -> None:
            nonlocal now
            retry.call_with_retry(lambda: None, lambda error: None)
            now += retrying.RETRYING_SECONDS + 1
            retry.call_with_retry(fail, lambda error: None)

        with pytest.raises(redis.ConnectionError):
            retry.call_with_retry(connect_and_fail, lambda error: None)
        assert attempts == 1


class TestAFullMemory:
    """What would add data is refused and changes nothing; what keeps players in and takes them out goes on."""

    @pytest.fixture
    def full_manager(self, own_client: redis.Redis, hasty_manager: ConnectionManager) -> ConnectionManager:
        set_the_scene(hasty_manager)
        own_client.config_set("maxmemory", 1)
        return hasty_manager

    @pytest.mark.parametrize("name", ["register_connection", "join_game"])
    def test_refuses_to_add_and_changes_nothing(
        self, own_client: redis.Redis, full_manager: ConnectionManager, namespace: str, name: str
    ) -> None:
        before = read_keyspace(own_client, namespace)
        with pytest.raises(presence.OutOfMemoryError, match=r"memory is full.*raise maxmemory") as raised:
            call(full_manager, name)
        assert_cause(raised.value, redis.OutOfMemoryError)
        after = read_keyspace(own_client, namespace)
        assert (after.records, after.users, after.games) == (before.records, before.users, before.games)
        assert after.last_seen == before.last_seen

    @pytest.mark.parametrize("name", sorted(CALLS.keys() - {"register_connection", "join_game"}))
    def test_stops_nothing_else(
        self, own_client: redis.Redis, full_manager: ConnectionManager, namespace: str, name: str
    ) -> None:
        own_client.script_flush()
        check(full_manager, name)
        assert violations(read_keyspace(own_client, namespace)) == []

    def test_does_not_stop_cleanup(
        self, own_client: redis.Redis, hasty_manager: ConnectionManager, namespace: str
    ) -> None:
        set_the_scene(hasty_manager)
        let_time_pass(own_client, namespace, 91)
        own_client.config_set("maxmemory", 1)
        assert [gone.sid for gone in hasty_manager.cleanup_stale_connections()] == ["sid-1", "sid-2"]
        assert read_keyspace(own_client, namespace).ttls_ms == {}

    def test_does_not_let_a_player_who_beats_expire(
        self, make_manager: ManagerFactory, own_server: LocalServer, own_client: redis.Redis, namespace: str
    ) -> None:
        manager = make_manager(own_server.url, conn_ttl_seconds=60)
        set_the_scene(manager)
        let_time_pass(own_client, namespace, 59)
        own_client.config_set("maxmemory", 1)
        assert manager.update_heartbeat("sid-1")
        own_client.config_set("maxmemory", 0)
        let_time_pass(own_client, namespace, 59)
        assert manager.get_game_user_sids("game") == {"user-1": "sid-1"}


class TestAServerThatRefusesToWrite:
    """A server that protects its data refuses; the error names the setting."""

    def test_for_want_of_replicas(self, own_client: redis.Redis, hasty_manager: ConnectionManager) -> None:
        own_client.config_set("min-replicas-to-write", 1)
        with pytest.raises(presence.ReadOnlyServerError, match="start the missing replicas") as raised:
            hasty_manager.register_connection("sid", "user")
        assert_cause(raised.value, redis.ResponseError)

    def test_for_want_of_a_disk(
        self, own_server: LocalServer, own_client: redis.Redis, hasty_manager: ConnectionManager
    ) -> None:
        (own_server.folder / "dump.rdb").mkdir()
        own_client.config_set("save", "3600 1")
        own_client.bgsave()
        info: Any = own_client.info
        wait_until(lambda: info("persistence")["rdb_last_bgsave_status"] == "err")
        with pytest.raises(presence.ReadOnlyServerError, match="fix its disk"):
            hasty_manager.register_connection("sid", "user")


class TestAServerThatIsBusy:
    """It runs nothing now; the error says what holds it."""

    def test_with_the_script_of_another_client(
        self, own_server: LocalServer, own_client: redis.Redis, hasty_manager: ConnectionManager
    ) -> None:
        set_the_scene(hasty_manager)
        own_client.config_set("busy-reply-threshold", 1)

        def run_an_endless_script() -> None:
            with admin(own_server) as client, pytest.raises(redis.ResponseError, match="killed"):
                client.eval("while true do end", 0)

        other = threading.Thread(target=run_an_endless_script)
        other.start()
        try:
            wait_until(lambda: is_busy(own_client))
            for name in CALLS:
                with pytest.raises(presence.ServerBusyError, match="SCRIPT KILL to end it") as raised:
                    call(hasty_manager, name)
                assert_cause(raised.value, redis.ResponseError)
        finally:
            own_client.script_kill()
            other.join(BOUND_SECONDS)
        assert hasty_manager.get_connection_count() == 2

    def test_with_loading_its_data(self, make_manager: ManagerFactory, hasty: dict[str, Any]) -> None:
        slowly = ("--enable-debug-command", "yes", "--loading-process-events-interval-bytes", "1024")
        with LocalServer(program(), *slowly) as server, admin(server) as client:
            manager = make_manager(server.url, **hasty)
            set_the_scene(manager)
            client.config_set("rdbcompression", "no")  # While it loads, it answers once for each 1,024 bytes only.
            for number in range(200):
                client.set(f"ballast-{number}", "x" * 1024)
            client.config_set("key-load-delay", 20_000)

            def reload() -> None:
                with redis.Redis.from_url(server.url, socket_timeout=BOUND_SECONDS) as other:
                    other.execute_command("DEBUG", "RELOAD")

            loading = threading.Thread(target=reload)
            loading.start()
            try:
                wait_until(lambda: is_loading(client))
                with pytest.raises(presence.ServerBusyError, match="call again in a moment") as raised:
                    manager.get_connection_count()
                assert_cause(raised.value, redis.BusyLoadingError)
            finally:
                client.config_set("key-load-delay", 0)
                loading.join(BOUND_SECONDS)
            assert manager.get_connection_count() == 2
            manager.close()


def is_busy(client: redis.Redis) -> bool:
    try:
        client.ping()
    except redis.ResponseError as error:
        return str(error).startswith("BUSY")
    return False


def is_loading(client: Any) -> bool:
    return bool(client.info("persistence")["loading"])


class TestForeignData:
    """A key of the namespace that another program wrote is named as such."""

    @pytest.mark.parametrize("name", CALLS)
    def test_of_another_type_is_named_with_what_to_do(
        self, own_client: redis.Redis, hasty_manager: ConnectionManager, namespace: str, name: str
    ) -> None:
        own_client.set(f"{{{namespace}}}:last_seen", "what another program wrote")
        own_client.hset(f"{{{namespace}}}:game_conns:game", "sid", "1 user")
        own_client.zadd(f"{{{namespace}}}:user_conns:user-1", {"sid": 1})
        with pytest.raises(presence.UnexpectedReplyError, match="use another namespace") as raised:
            call(hasty_manager, name)
        assert_cause(raised.value, redis.ResponseError)

    @pytest.mark.parametrize("name", ["get_connection", "unregister_connection"])
    def test_of_another_content_is_named_with_what_to_do(
        self, manager: ConnectionManager, client: redis.Redis, namespace: str, name: str
    ) -> None:
        manager.register_connection("sid", "user")
        client.set(f"{{{namespace}}}:conn:sid", "9:what another program wrote", keepttl=True)
        with pytest.raises(presence.UnexpectedReplyError, match="use another namespace"):
            getattr(manager, name)("sid")
        client.delete(*client.keys(f"{{{namespace}}}:*"))

    @pytest.mark.parametrize("behind", ["x" * length for length in (0, 1, 12, 13, 19, 20, 26)])
    def test_behind_a_users_list_is_no_answer(
        self, manager: ConnectionManager, client: redis.Redis, namespace: str, behind: str
    ) -> None:
        """An answer is a token of twelve characters, and at least the eight bytes of its time."""
        client.set(f"{{{namespace}}}:user_conns:user", f"3:sid={behind}", ex=60)
        assert manager.register_connection("new", "user").displaced == ()
        client.delete(*client.keys(f"{{{namespace}}}:*"))

    @pytest.mark.parametrize("mode", ["pubsub", "stream"])
    def test_among_the_events_is_named_with_what_to_do(
        self, client: redis.Redis, namespace: str, mode: EventsMode
    ) -> None:
        manager = presence.sync.ConnectionManager(client, namespace=namespace, events=mode)
        key = f"{{{namespace}}}:events"
        with manager.subscribe() as events:
            if mode == "pubsub":
                client.spublish(key, "what another program told")
            else:
                client.xadd(key, {"message": "what another program wrote"})
            with pytest.raises(presence.UnexpectedReplyError, match="use another namespace"):
                next(events)
        client.delete(key)


class TestAServerThatCannotRunTheScripts:
    """It is told which one can."""

    NEEDED = "Redis 7.0.1 or newer, or Valkey 8 or newer"

    @pytest.mark.parametrize("command", ["EVALSHA", "SCRIPT", "ZCOUNT"])
    def test_for_want_of_a_command(self, make_manager: ManagerFactory, command: str) -> None:
        with LocalServer(program(), "--rename-command", command, "") as server:
            with pytest.raises(presence.UnexpectedReplyError, match=self.NEEDED) as raised:
                make_manager(server.url).get_connection_count()
            assert_cause(raised.value, redis.ResponseError)

    def test_since_it_cannot_read_them(self, manager: ConnectionManager) -> None:
        """As Redis 6 cannot read the first line of ours."""
        operation = manager.operations.get_connection_count()
        operation.script = replace(operation.script, source="!# flags", sha="0" * 40)
        with pytest.raises(presence.PipelineError, match=self.NEEDED):
            manager.pipeline([operation])


def test_what_is_no_redis_server_is_named(make_manager: ManagerFactory) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(presence.UnexpectedReplyError, match="does not speak the protocol of Redis") as raised:
                make_manager(f"redis://127.0.0.1:{server.server_port}").get_connection_count()
        finally:
            server.shutdown()
            thread.join()
    assert_cause(raised.value, redis.RedisError)


def test_a_client_that_wants_to_cache_is_told_that_the_server_is_too_old(
    own_server: LocalServer, own_client: redis.Redis
) -> None:
    about: Any = own_client.info("server")
    can_cache = [int(part) for part in about["redis_version"].split(".")[:2]] >= [7, 4]
    client = redis.Redis.from_url(own_server.url, protocol=3, cache_config=CacheConfig())
    with client, presence.sync.ConnectionManager(client, events="stream") as manager:
        if can_cache:
            with manager.subscribe() as events:
                threading.Timer(0.1, manager.register_connection, ("sid", "user")).start()
                assert next(events).connection.sid == "sid"
        else:
            with pytest.raises(presence.UnexpectedReplyError, match="make it without a cache_config"):
                manager.get_connection_count()


def test_no_command_is_taken_for_one_to_cache() -> None:
    """On older servers, which cannot cache, redis-py does not get so far as to ask."""
    operations = Operations(events="stream")
    commands = [operations.get_connection("sid").command(), *next(Feed(operations, None, None, None).wait(None))]
    assert [command[0].upper() for command in commands] == ["EVALSHA", "XREAD"]
    assert not any(CacheConfig().is_allowed_to_cache(str(command[0])) for command in commands)


def test_a_server_whose_lua_lacks_a_function_is_told_which_one_can(manager: ConnectionManager) -> None:
    operation = manager.operations.get_connection_count()
    for expression in ("redis.nothing()", "nothing()", "nothing.of_it()"):
        source = f"#!lua flags=no-writes\nreturn {expression}"
        sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
        operation.script = replace(operation.script, source=source, sha=sha)
        with pytest.raises(presence.PipelineError, match=TestAServerThatCannotRunTheScripts.NEEDED):
            manager.pipeline([operation])


class TestAPipelineWithAFault:
    """What worked is not lost with what did not."""

    def test_keeps_the_results_of_the_operations_that_worked(
        self, own_client: redis.Redis, hasty_manager: ConnectionManager, namespace: str
    ) -> None:
        operations = hasty_manager.operations
        set_the_scene(hasty_manager)
        own_client.set(f"{{{namespace}}}:game_conns:foreign", "what another program wrote")
        with pytest.raises(presence.PipelineError, match=r"1 of 3 operations failed.*use another namespace") as raised:
            pipeline(
                hasty_manager,
                operations.update_heartbeat("sid-1"),
                operations.get_game_user_sids("foreign"),
                operations.leave_game("sid-1"),
            )
        worked, failed, also_worked = raised.value.results
        assert (worked, also_worked) == (True, "game")
        assert isinstance(failed, presence.UnexpectedReplyError)
        assert raised.value.__cause__ is failed
        assert_cause(failed, redis.ResponseError)

    def test_keeps_them_beside_a_reply_that_cannot_be_read(
        self, own_client: redis.Redis, hasty_manager: ConnectionManager, namespace: str
    ) -> None:
        operations = hasty_manager.operations
        set_the_scene(hasty_manager)
        own_client.set(f"{{{namespace}}}:conn:sid-2", "9:what another program wrote", keepttl=True)
        with pytest.raises(presence.PipelineError, match=r"1 of 2 operations failed.*use another namespace") as raised:
            pipeline(hasty_manager, operations.leave_game("sid-1"), operations.get_connection("sid-2"))
        left, failed = raised.value.results
        assert left == "game"
        assert isinstance(failed, presence.UnexpectedReplyError)

    def test_of_a_bulk_call_tells_what_was_answered_for_each_id(
        self, own_client: redis.Redis, hasty_manager: ConnectionManager, namespace: str
    ) -> None:
        set_the_scene(hasty_manager)
        own_client.set(f"{{{namespace}}}:game_conns:12", "what another program wrote")
        games = ["game", *(str(number) for number in range(24)), "game"]
        with pytest.raises(
            presence.PipelineError, match=r"10 of 25 operations failed.*use another namespace"
        ) as raised:
            hasty_manager.get_games_connections(games)
        first, *others = raised.value.results
        assert [connection.sid for connection in first] == ["sid-1", "sid-2"]
        failed = [error for error in others if isinstance(error, presence.UnexpectedReplyError)]
        assert others == [[]] * 9 + failed + [[]] * 5
        assert len(failed) == 10
        assert_cause(failed[0], redis.ResponseError)

    def test_names_an_unreachable_server_for_each(self, make_manager: ManagerFactory, hasty: dict[str, Any]) -> None:
        manager = make_manager(f"redis://127.0.0.1:{free_port()}/0", **hasty)
        operations = manager.operations
        with pytest.raises(presence.PipelineError, match=r"2 of 2 operations failed.*check that it runs") as raised:
            manager.pipeline([operations.get_connection_count(), operations.get_connection_count()])
        for error in raised.value.results:
            assert isinstance(error, presence.ServerUnreachableError)


class TestACleanupThatMeetsAFault:
    """Nobody else can report what a cleanup removed, so no fault takes that away."""

    COUNT = CLEANUP_BATCH_SIZE + 50

    @pytest.fixture
    def stale(self, own_client: redis.Redis, own_manager: ConnectionManager, namespace: str) -> list[str]:
        sids = [f"sid-{number}" for number in range(self.COUNT)]
        own_manager.pipeline([own_manager.operations.register_connection(sid, f"user of {sid}") for sid in sids])
        let_time_pass(own_client, namespace, 91)
        return sids

    def test_between_two_batches_returns_what_it_removed_and_the_fault(
        self,
        make_manager: ManagerFactory,
        own_server: LocalServer,
        own_manager: ConnectionManager,
        hasty: dict[str, Any],
        stale: list[str],
    ) -> None:
        with Proxy(own_server.port) as proxy:
            manager = make_manager(proxy.url, **hasty)
            manager.cleanup_stale_connections(threshold_seconds=1000)
            proxy.fates = [Fate.PASS, Fate.LOSE_REQUEST]
            first = manager.cleanup_stale_connections()
            manager.close()
        rest = own_manager.cleanup_stale_connections()

        assert len(first) == CLEANUP_BATCH_SIZE
        assert isinstance(first.error, presence.ServerUnreachableError)
        assert_cause(first.error, redis.ConnectionError)
        assert rest.error is None
        assert sorted(gone.sid for gone in (*first, *rest)) == sorted(stale)

    def test_between_two_batches_returns_what_it_detached_and_the_fault(
        self, make_manager: ManagerFactory, own_server: LocalServer, hasty: dict[str, Any]
    ) -> None:
        with Proxy(own_server.port) as proxy:
            manager = make_manager(proxy.url, server_grace_seconds=60, **hasty)
            manager.cleanup_stale_connections()
            dead = make_manager(own_server.url, server_id="dead")
            dead.start_server()
            sids = [f"sid-{number}" for number in range(self.COUNT)]
            dead.pipeline([dead.operations.register_connection(sid, f"user of {sid}") for sid in sids])
            make_manager(own_server.url, server_id="dead").start_server()
            proxy.fates = [Fate.PASS, Fate.LOSE_REQUEST]
            first = manager.cleanup_stale_connections()
            rest = manager.cleanup_stale_connections()
            manager.close()

        assert (first.removed, len(first.detached)) == ((), CLEANUP_BATCH_SIZE)
        assert isinstance(first.error, presence.ServerUnreachableError)
        assert (rest.removed, rest.error) == ((), None)
        assert sorted(seat.sid for seat in (*first.detached, *rest.detached)) == sorted(sids)

    def test_before_anything_is_removed_raises_it(
        self,
        make_manager: ManagerFactory,
        own_server: LocalServer,
        own_manager: ConnectionManager,
        hasty: dict[str, Any],
        stale: list[str],
    ) -> None:
        with Proxy(own_server.port) as proxy:
            manager = make_manager(proxy.url, **hasty)
            manager.get_connection_count()
            proxy.fates = [Fate.LOSE_REQUEST]
            with pytest.raises(presence.ServerUnreachableError):
                manager.cleanup_stale_connections()
            manager.close()
        assert len(own_manager.cleanup_stale_connections()) == len(stale)


class TestACancelledCall:
    """asyncio cancels the wait of one task; its reply never reaches another."""

    @pytest.mark.parametrize("name", CALLS)
    def test_harms_no_later_call(self, own_server: LocalServer, name: str) -> None:
        async def run() -> None:
            with Proxy(own_server.port) as proxy:
                async with presence.ConnectionManager.from_url(proxy.url, max_connections=1) as manager:
                    for number in (1, 2):
                        await manager.register_connection(f"sid-{number}", f"user-{number}")
                        await manager.join_game(f"sid-{number}", "game")
                    proxy.fates = [Fate.HOLD_REPLY]
                    cancelled = asyncio.create_task(getattr(manager, name)(*CALLS[name].arguments))
                    await is_held(proxy)
                    cancelled.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await cancelled
                    proxy.release()

                    assert await manager.get_opponent_sid("game", "user-1") == "sid-2"
                    count, seen, online, left = await asyncio.gather(
                        manager.get_game_connection_count("no game"),
                        manager.update_heartbeat("sid-2"),
                        manager.is_user_online("no user"),
                        manager.leave_game("sid-2"),
                    )
                    assert (count, seen, online, left) == (0, True, False, "game")

        asyncio.run(run())


AT_ONCE = 30
"""The threshold of a run_cleanup that waits for no heartbeats: a heartbeat."""


class TestRunCleanup:
    """It outlives every fault, and never loses what it removed."""

    def test_survives_an_outage_and_goes_on(self, own_server: LocalServer, caplog: pytest.LogCaptureFixture) -> None:
        reported: list[str] = []

        async def on_removed(result: CleanupResult) -> None:
            reported.extend(gone.sid for gone in result)

        async def run() -> None:
            url, options = own_server.url, one_attempt("asyncio")
            async with presence.ConnectionManager.from_url(url, **options) as manager:
                task = asyncio.create_task(manager.run_cleanup(0.01, threshold_seconds=0.001, on_removed=on_removed))
                await manager.register_connection("before", "user")
                await asyncio.to_thread(wait_until, lambda: reported == ["before"])
                own_server.kill()
                await asyncio.to_thread(wait_until, lambda: "cleanup failed" in caplog.text)
                await asyncio.to_thread(own_server.start)
                await manager.register_connection("after", "user")
                await asyncio.to_thread(wait_until, lambda: reported == ["before", "after"])
                assert not task.done()
            await asyncio.wait_for(task, BOUND_SECONDS)

        asyncio.run(run())
        assert "next attempt in 0.01 s: the server cannot be reached; check that it runs" in caplog.text

    def test_survives_an_outage_in_a_thread_too(
        self, own_server: LocalServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        reported: list[str] = []
        with presence.sync.ConnectionManager.from_url(own_server.url, **one_attempt("blocking")) as manager:
            thread = threading.Thread(
                target=manager.run_cleanup,
                args=(0.01,),
                kwargs={
                    "threshold_seconds": 0.001,
                    "on_removed": lambda result: reported.extend(gone.sid for gone in result),
                },
                daemon=True,
            )
            thread.start()
            manager.register_connection("before", "user")
            wait_until(lambda: reported == ["before"])
            own_server.kill()
            wait_until(lambda: "cleanup failed" in caplog.text)
            own_server.start()
            manager.register_connection("after", "user")
            wait_until(lambda: reported == ["before", "after"])
        thread.join(BOUND_SECONDS)
        assert not thread.is_alive()

    def test_delivers_what_it_removed_before_a_fault_and_logs_the_fault(
        self, own_server: LocalServer, own_client: redis.Redis, namespace: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        reported: list[str] = []
        options: dict[str, Any] = {"namespace": namespace, **one_attempt("blocking")}
        with Proxy(own_server.port) as proxy:
            with presence.sync.ConnectionManager.from_url(proxy.url, **options) as manager:
                operations = manager.operations
                count = CLEANUP_BATCH_SIZE + 1
                manager.pipeline([operations.register_connection(f"sid-{n}", f"user-{n}") for n in range(count)])
                let_time_pass(own_client, namespace, 91)
                manager.pipeline([operations.cleanup_batch(threshold_seconds=1000)])
                proxy.fates = [Fate.PASS, Fate.LOSE_REQUEST]
                thread = threading.Thread(
                    target=manager.run_cleanup,
                    args=(0.01,),
                    kwargs={
                        "threshold_seconds": AT_ONCE,
                        "on_removed": lambda result: reported.extend(gone.sid for gone in result),
                    },
                    daemon=True,
                )
                thread.start()
                wait_until(lambda: len(reported) == count)
            thread.join(BOUND_SECONDS)
        assert len(set(reported)) == count
        assert "cleanup failed, next attempt in 0.01 s" in caplog.text

    def test_that_is_cancelled_delivers_what_the_pass_under_way_removed(
        self, own_server: LocalServer, own_client: redis.Redis, namespace: str
    ) -> None:
        reported: list[str] = []

        async def on_removed(result: CleanupResult) -> None:
            await asyncio.sleep(0)
            reported.extend(gone.sid for gone in result)

        async def run() -> None:
            with Proxy(own_server.port) as proxy:
                async with presence.ConnectionManager.from_url(proxy.url, namespace=namespace) as manager:
                    await manager.register_connection("sid", "user")
                    await manager.cleanup_stale_connections(threshold_seconds=1000)
                    let_time_pass(own_client, namespace, 91)
                    proxy.fates = [Fate.HOLD_REPLY]
                    task = asyncio.create_task(manager.run_cleanup(threshold_seconds=AT_ONCE, on_removed=on_removed))
                    await is_held(proxy)
                    for _ in range(3):
                        task.cancel()
                        await asyncio.sleep(0)
                    proxy.release()
                    with pytest.raises(asyncio.CancelledError):
                        await asyncio.wait_for(task, BOUND_SECONDS)
                    assert reported == ["sid"]

        asyncio.run(run())
        assert read_keyspace(own_client, namespace).ttls_ms == {}

    def test_that_is_closed_waits_for_the_pass_under_way(
        self, own_server: LocalServer, own_client: redis.Redis, namespace: str
    ) -> None:
        reported: list[str] = []

        async def on_removed(result: CleanupResult) -> None:
            reported.extend(gone.sid for gone in result)

        async def run() -> None:
            with Proxy(own_server.port) as proxy:
                manager = presence.ConnectionManager.from_url(proxy.url, namespace=namespace)
                await manager.register_connection("sid", "user")
                await manager.cleanup_stale_connections(threshold_seconds=1000)
                let_time_pass(own_client, namespace, 91)
                proxy.fates = [Fate.HOLD_REPLY]
                task = asyncio.create_task(manager.run_cleanup(threshold_seconds=AT_ONCE, on_removed=on_removed))
                await is_held(proxy)
                closing = asyncio.create_task(manager.aclose())
                await asyncio.sleep(0)
                proxy.release()
                await asyncio.wait_for(closing, BOUND_SECONDS)
                assert reported == ["sid"]
                await asyncio.wait_for(task, BOUND_SECONDS)

        asyncio.run(run())
