"""A cluster: every operation works on it, also while its slots move and its nodes go."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from threading import Timer
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import redis
import redis.asyncio

import presence
import presence.sync
from presence import addresses, clients, retrying
from presence.commands import load_command
from presence.operations import (
    ARE_USERS_ONLINE,
    GET_ALL_USER_CONNECTIONS,
    GET_GAMES,
    GET_USERS_CONNECTIONS,
    HEARTBEAT,
    HEARTBEATS,
    JOIN,
    Operation,
)
from tests.clock import let_time_pass
from tests.conftest import Awaited
from tests.fault_calls import CALLS, call, load_late, one_attempt, play, set_the_scene
from tests.fault_proxy import BOUND_SECONDS, Proxy
from tests.fault_tls import server_context, write_certificate
from tests.processes import in_child
from tests.rights import LEAST_RIGHTS, MORE_ON_A_CLUSTER
from tests.server import LocalServer, free_port, program
from tests.subscribed import Subscribed, subscribed
from tests.watching import admin, evalsha_calls, every_refusal, refuse_next_write, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from presence.commands import Command
    from presence.operations import EventsMode
    from presence.scripts import Script
    from presence.sync import ConnectionManager
    from tests.conftest import ManagerFactory


class Migration:
    """The keys of a slot that is being moved; a call moves some of them."""

    def __init__(self, source: Any, port: int, keys: list[str]) -> None:
        self.keys = keys
        self._source = source
        self._port = port

    def __call__(self, keys: list[str]) -> None:
        if keys:
            self._source.migrate("127.0.0.1", self._port, keys, 0, BOUND_SECONDS * 1000)


def check_pool_class(url: str) -> None:
    """Give a blocking client a class for its pools; redis-py would ignore it, unless it had a URL as well."""
    options: dict[str, Any] = {"connection_pool_class": redis.BlockingConnectionPool}
    with presence.sync.ConnectionManager.from_url(url, namespace="one", **options) as manager:
        assert manager.get_connection_count() == 0
        client: Any = manager._client()
        pools = [node.redis_connection.connection_pool for node in client.get_nodes()]
        assert {type(pool) for pool in pools} == {redis.BlockingConnectionPool}


class Cluster:
    """Two nodes, each with half of the slots, or with other shares."""

    def __init__(self, one: tuple[int, ...] = (8192, 16383), two: tuple[int, ...] = (0, 8191)) -> None:
        self._shares = one, two
        self._numbers = itertools.count()
        self.nodes = [
            LocalServer(
                program(), "--cluster-enabled", "yes", "--cluster-port", str(port), "--cluster-node-timeout", "2000"
            )
            for port in (free_port(), free_port())
        ]

    @property
    def url(self) -> str:
        return f"redis+cluster://127.0.0.1:{self.nodes[0].port}"

    @contextmanager
    def running(self) -> Iterator[Cluster]:
        with self.nodes[0], self.nodes[1], admin(self.nodes[0]) as one, admin(self.nodes[1]) as two:
            self.clients = [one, two]
            for client, share in zip(self.clients, self._shares, strict=True):
                if share:
                    client.execute_command("CLUSTER", "ADDSLOTSRANGE", *share)
            bus_port = two.config_get("cluster-port")["cluster-port"]
            one.execute_command("CLUSTER", "MEET", "127.0.0.1", self.nodes[1].port, bus_port)
            wait_until(lambda: all(self._knows_every_slot(client) for client in self.clients))
            yield self

    @staticmethod
    def _knows_every_slot(client: Any) -> bool:
        info = client.cluster("INFO")
        return bool(info["cluster_state"] == "ok" and info["cluster_slots_assigned"] == "16384")

    def namespaces(self) -> list[str]:
        """Name two namespaces, one for each node."""
        names = ["one", "two"]
        assert [self.slot(name) < 8192 for name in names] == [False, True]
        return names

    def new_namespace(self) -> str:
        """Name a namespace of the first node whose slot has not moved yet.

        Where a slot moves back, the nodes may not agree for a while on who has it.
        """
        return next(name for name in map("namespace-{}".format, self._numbers) if self.slot(name) >= 8192)

    def slot(self, namespace: str) -> int:
        slot: int = self.clients[0].cluster("KEYSLOT", f"{{{namespace}}}:")
        return slot

    def move(self, slot: int, node: int) -> None:
        """Give an empty slot to a node."""
        to, source = self.clients[node], self.clients[1 - node]
        owner = to.cluster("MYID")
        with suppress(redis.ResponseError):  # It has the slot already.
            # Else the node gets no newer epoch, and gives the slot back as soon as it hears from its earlier owner.
            to.cluster("SETSLOT", slot, "IMPORTING", source.cluster("MYID"))
        for client in (to, source):
            client.cluster("SETSLOT", slot, "NODE", owner)

    def migrate(self, slot: int, node: int) -> None:
        """Move a slot with its keys to a node, as the cluster's own tools do."""
        with self.migrating(slot, node):
            pass

    @contextmanager
    def migrating(self, slot: int, node: int) -> Iterator[Migration]:
        """Move a slot to a node key by key; what was not moved inside the block is moved in the end."""
        to, source = self.clients[node], self.clients[1 - node]
        to.cluster("SETSLOT", slot, "IMPORTING", source.cluster("MYID"))
        source.cluster("SETSLOT", slot, "MIGRATING", to.cluster("MYID"))
        migration = Migration(source, self.nodes[node].port, source.cluster("GETKEYSINSLOT", slot, 1000))
        try:
            yield migration
        finally:
            migration(source.cluster("GETKEYSINSLOT", slot, 1000))
            self.move(slot, node)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let no node answer."""
        for node in self.nodes:
            os.kill(node.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for node in self.nodes:
                os.kill(node.pid, signal.SIGCONT)

    def forget_everything(self) -> None:
        for client in self.clients:
            client.flushall()
            client.script_flush()


@pytest.fixture(scope="module")
def running_cluster() -> Iterator[Cluster]:
    with Cluster().running() as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster: Cluster) -> Cluster:
    running_cluster.forget_everything()
    return running_cluster


@contextmanager
def given_cluster_client(kind: str, namespace: str, *, events: EventsMode = "off", **options: Any) -> Iterator[Any]:
    """Make a cluster client as an application makes its own, and the manager that it is given to."""
    if kind == "blocking":
        with redis.RedisCluster(host="127.0.0.1", **options) as client:
            yield presence.sync.ConnectionManager(client, namespace=namespace, events=events)
        return
    with asyncio.Runner() as runner:
        asyncio_client = redis.asyncio.RedisCluster(host="127.0.0.1", **options)
        yield Awaited(presence.ConnectionManager(asyncio_client, namespace=namespace, events=events), runner)
        runner.run(asyncio_client.aclose())


class TestCluster:
    """A namespace is one slot, so every script is legal; several namespaces spread over the nodes."""

    def test_serves_every_operation_on_every_node(self, make_manager: ManagerFactory, cluster: Cluster) -> None:
        for namespace in cluster.namespaces():
            play(make_manager(cluster.url, namespace=namespace))
        assert all(client.dbsize() > 0 for client in cluster.clients)

    def test_does_not_send_a_call_again_when_its_answer_may_be_forgotten(
        self, make_manager: ManagerFactory, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        namespace = next(iter(cluster.namespaces()))
        manager = make_manager(cluster.url, namespace=namespace)
        assert manager.get_connection_count() == 0
        monkeypatch.setattr(retrying, "RETRYING_SECONDS", 0.2)
        monkeypatch.setattr("presence.exchanges.load_command", load_late)
        with pytest.raises(presence.ServerUnreachableError, match="may be forgotten"):
            manager.register_connection("sid", "user")
        assert manager.get_connection_count() == 0

    @pytest.mark.parametrize("kind", ["asyncio", "blocking"])
    @pytest.mark.parametrize("decode_responses", [False, True])
    @pytest.mark.parametrize("protocol", [2, 3])
    def test_serves_a_client_that_the_caller_made(
        self, cluster: Cluster, kind: str, decode_responses: bool, protocol: int
    ) -> None:
        options: dict[str, Any] = {"decode_responses": decode_responses, "protocol": protocol}
        for namespace in cluster.namespaces():
            with given_cluster_client(kind, namespace, port=cluster.nodes[0].port, **options) as manager:
                play(manager)

    @pytest.mark.parametrize("kind", ["asyncio", "blocking"])
    @pytest.mark.parametrize("mode", ["pubsub", "stream"])
    def test_asks_the_node_of_the_namespace_whatever_the_encoding_of_the_client(
        self, cluster: Cluster, kind: str, mode: EventsMode
    ) -> None:
        options: dict[str, Any] = {"port": cluster.nodes[0].port, "encoding": "latin-1"}
        for namespace in ("ゲーム", "équipe", "été"):
            with given_cluster_client(kind, namespace, events=mode, **options) as manager:
                play(manager)
                with subscribed(manager) as events:
                    manager.register_connection("ß", "ß")
                    assert events.next().connection.sid == "ß"

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_forked_process_waits_for_no_thread_of_its_parent_that_asks_for_the_layout(
        self, cluster: Cluster
    ) -> None:
        asking, may_go_on = threading.Event(), threading.Event()
        with presence.sync.ConnectionManager.from_url(cluster.url, namespace="one") as manager:
            manager.register_connection("sid", "user")
            open_client: Any = manager._open_client
            nodes = open_client.client.nodes_manager
            learn = nodes.initialize._learn

            def learn_slowly() -> None:
                asking.set()
                assert may_go_on.wait(BOUND_SECONDS)
                learn()

            nodes.initialize._learn = learn_slowly
            thread = threading.Thread(target=nodes.initialize)
            thread.start()
            assert asking.wait(BOUND_SECONDS)
            nodes.slots_cache.clear()  # The next call has to ask, too.
            in_child(lambda: manager.update_heartbeat("sid"))
            may_go_on.set()
            thread.join(BOUND_SECONDS)
            assert manager.update_heartbeat("sid")

    def test_ids_with_braces_stay_in_the_slot_of_their_namespace(
        self, make_manager: ManagerFactory, cluster: Cluster
    ) -> None:
        manager = make_manager(cluster.url, namespace="one")
        for odd in ("{two}", "}{two}", "a{b}c", "{}", "}", "{"):
            manager.register_connection(odd, odd)
            manager.join_game(odd, odd)
            assert manager.get_game_user_sids(odd) == {odd: odd}
        assert [client.dbsize() > 0 for client in cluster.clients] == [True, False]

    @pytest.mark.parametrize("kind", ["asyncio", "blocking"])
    def test_asks_no_node_for_the_keys_of_a_pipelines_calls(self, cluster: Cluster, kind: str) -> None:
        """redis-py would ask the default node, for each call; that may be another shard's, and down."""
        with given_cluster_client(kind, "one", port=cluster.nodes[0].port) as manager:
            play(manager)
            for client in cluster.clients:
                client.config_resetstat()
            manager.pipeline([manager.operations.update_heartbeat("sid") for _ in range(10)])
            for client in cluster.clients:
                assert "cmdstat_command|getkeys" not in client.info("commandstats")

    def test_sends_a_pipeline_that_is_not_answered_no_longer_than_a_call(
        self, make_manager: ManagerFactory, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many calls it has: the answers are forgotten after a minute."""
        monkeypatch.setattr(retrying, "RETRYING_SECONDS", 1)
        manager = make_manager(cluster.url, namespace="one", socket_timeout=0.2, socket_connect_timeout=0.2)
        manager.register_connection("sid", "user")
        joins = [manager.operations.join_game("sid", f"game-{number}") for number in range(41)]
        manager.pipeline(joins[:1])
        start = time.monotonic()
        cluster.clients[0].execute_command("CLIENT", "PAUSE", 1000 * BOUND_SECONDS, "WRITE")
        try:
            with pytest.raises(presence.PipelineError):
                manager.pipeline(joins[1:])
        finally:
            cluster.clients[0].execute_command("CLIENT", "UNPAUSE")
        assert time.monotonic() - start < 6, "40 calls that wait for a timeout each take 8 seconds"

    def test_serves_a_pipeline_and_loads_the_scripts_that_a_node_lost(
        self, make_manager: ManagerFactory, cluster: Cluster
    ) -> None:
        for namespace in cluster.namespaces():
            manager = make_manager(cluster.url, namespace=namespace)
            set_the_scene(manager)
            for client in cluster.clients:
                client.script_flush()
            operations = manager.operations
            described: list[presence.Operation[Any]] = [
                operations.leave_game("sid-1"),
                operations.get_game_user_sids("game"),
                operations.get_connection_count(),
            ]
            assert manager.pipeline(described) == ["game", {"user-2": "sid-2"}, 2]

    def test_heeds_a_cancellation_while_a_script_is_loaded(self, cluster: Cluster) -> None:
        async def run() -> None:
            async with presence.ConnectionManager.from_url(cluster.url, namespace="one") as manager:
                await manager.get_connection_count()
                for attempt in range(200):
                    cluster.clients[0].script_flush()

                    async def count_and_wait() -> None:
                        await manager.get_connection_count()
                        await asyncio.sleep(60)

                    task = asyncio.create_task(count_and_wait())
                    await asyncio.sleep(attempt / 100_000)  # Up to 2 ms.
                    task.cancel()
                    done, _ = await asyncio.wait([task], timeout=10)
                    assert done, attempt

        asyncio.run(run())

    def test_loads_scripts_on_the_node_of_the_namespace_alone(
        self, make_manager: ManagerFactory, cluster: Cluster
    ) -> None:
        """Another node may be down."""
        manager = make_manager(cluster.url, namespace="one")
        manager.register_connection("sid", "user")
        manager.pipeline([manager.operations.join_game("sid", "game"), manager.operations.leave_game("sid")])
        assert [client.info("memory")["number_of_cached_scripts"] for client in cluster.clients] == [3, 0]

    def test_a_pipeline_keeps_the_results_of_the_operations_that_worked(
        self, make_manager: ManagerFactory, cluster: Cluster
    ) -> None:
        manager = make_manager(cluster.url, namespace="one")
        set_the_scene(manager)
        cluster.clients[0].set("{one}:game_conns:foreign", "what another program wrote")
        operations = manager.operations
        with pytest.raises(presence.PipelineError, match="use another namespace") as raised:
            manager.pipeline(
                [operations.get_game_connection_count("game"), operations.get_game_connection_count("foreign")]
            )
        worked, failed = raised.value.results
        assert worked == 2
        assert isinstance(failed, presence.UnexpectedReplyError)

    def test_a_slot_that_moves_to_another_node_is_followed(
        self, make_manager: ManagerFactory, cluster: Cluster
    ) -> None:
        slot = cluster.slot("one")
        managers = {name: make_manager(cluster.url, namespace="one") for name in CALLS}
        for manager in managers.values():
            manager.get_connection_count()
        cluster.move(slot, node=1)
        try:
            for name, manager in managers.items():
                call(manager, name)
                assert cluster.clients[0].dbsize() == 0
                cluster.clients[1].flushall()
        finally:
            cluster.move(slot, node=0)

    @pytest.mark.parametrize("seconds", [0.1, 1])
    def test_what_reads_behind_a_call_that_waits_for_the_slot_sees_what_that_did(
        self, make_manager: ManagerFactory, cluster: Cluster, seconds: float
    ) -> None:
        """First the client asks again by itself, and then the manager does."""
        namespace = cluster.new_namespace()
        manager = make_manager(cluster.url, namespace=namespace)
        set_the_scene(manager)
        operations = manager.operations

        def leave_and_read() -> list[Any]:
            described: list[Operation[Any]] = [operations.leave_game("sid-1"), operations.get_connection("sid-1")]
            return manager.pipeline(described)

        leave_and_read()  # The node has the scripts now.
        manager.join_game("sid-1", "game")
        with ThreadPoolExecutor(1) as thread:
            with cluster.migrating(cluster.slot(namespace), node=1):
                answers = thread.submit(leave_and_read)
                time.sleep(seconds)
            left, found = answers.result(BOUND_SECONDS)
        assert left == "game"
        assert found.game_id is None

    @pytest.mark.parametrize("between", ["leaves", "joins another", "is removed"])
    def test_a_join_that_has_acted_does_not_act_again(
        self, make_manager: ManagerFactory, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, between: str
    ) -> None:
        """The slot has moved to a node that has its script, and not that of the leave before it."""
        namespace = cluster.new_namespace()
        manager = make_manager(cluster.url, namespace=namespace)
        assert manager.get_connection_count() == 0
        cluster.move(cluster.slot(namespace), node=1)
        other = presence.sync.ConnectionManager.from_url(cluster.url, namespace=namespace)
        other.register_connection("sid", "user")
        cluster.clients[1].script_load(JOIN.source)
        calls: dict[str, Callable[[], Any]] = {
            "leaves": lambda: other.leave_game("sid"),
            "joins another": lambda: other.join_game("sid", "another").left_game_id,
            "is removed": lambda: other.unregister_connection("sid").game_id,  # type: ignore[union-attr]
        }
        load, loads, left = load_command, itertools.count(1), []

        def load_and_meet(script: Script) -> Any:
            if next(loads) == 3:  # After those at the head: the leave has missed its script, and the join has acted.
                left.append(calls[between]())
            return load(script)

        monkeypatch.setattr("presence.exchanges.load_command", load_and_meet)
        operations = manager.operations
        described: list[Operation[Any]] = [operations.leave_game("nobody"), operations.join_game("sid", "game")]
        assert manager.pipeline(described) == [None, presence.JoinResult(joined=True)]
        assert left == ["game"]
        found = other.get_connection("sid")
        assert (found and found.game_id) == {"joins another": "another"}.get(between)
        other.close()

    @pytest.mark.parametrize("moved_first", ["last_seen", "the users", "all but the users", "all but last_seen"])
    def test_while_a_slot_moves_key_by_key_no_call_works_on_half_of_them(
        self,
        make_manager: ManagerFactory,
        cluster: Cluster,
        hasty: dict[str, Any],
        moved_first: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for client_class in (redis.RedisCluster, redis.asyncio.RedisCluster):
            monkeypatch.setattr(client_class, "RedisClusterRequestTTL", 4)  # Times that it asks, rather than 16.
        namespace = cluster.new_namespace()
        manager = make_manager(cluster.url, namespace=namespace, **hasty)
        sids, users = [f"sid-{number}" for number in range(20)], [f"user-{number}" for number in range(20)]
        for sid, user_id in zip(sids, users, strict=True):
            manager.register_connection(sid, user_id)
            manager.join_game(sid, "game")
        let_time_pass(cluster.clients[0], namespace, 1000)  # The next heartbeat refreshes the TTLs of what it finds.
        calls: dict[str, tuple[Any, ...]] = {
            "update_heartbeat": ("sid-1",),
            "update_heartbeats": (sids,),
            "are_users_online": (users,),
            "is_user_online": ("user-1",),
            "get_users_connections": (users,),
            "get_user_connection": ("user-1",),
            "get_all_user_connections": ("user-1",),
            "get_games_connections": (["game"],),
        }
        for client in cluster.clients:
            for script in (
                HEARTBEAT, HEARTBEATS, ARE_USERS_ONLINE, GET_USERS_CONNECTIONS, GET_ALL_USER_CONNECTIONS, GET_GAMES
            ):  # fmt: skip
                client.script_load(script.source)

        def is_moved_first(key: str) -> bool:
            named = "user_conns:" if moved_first.endswith("the users") else "last_seen"
            return key.startswith(f"{{{namespace}}}:{named}") is not moved_first.startswith("all but")

        with cluster.migrating(cluster.slot(namespace), node=1) as move:
            move([key for key in move.keys if is_moved_first(key)])
            for name, given in calls.items():
                with pytest.raises(presence.ServerUnreachableError):
                    getattr(manager, name)(*given)
        assert all(manager.update_heartbeats(sids).values())
        assert manager.get_connection_count() == manager.get_game_connection_count("game") == 20

    @pytest.mark.parametrize("mode", ["pubsub", "stream"])
    def test_events_arrive_from_the_node_of_their_namespace(
        self, make_manager: ManagerFactory, cluster: Cluster, mode: str
    ) -> None:
        for namespace in cluster.namespaces():
            manager = make_manager(cluster.url, namespace=namespace, events=mode)
            with subscribed(manager) as events, subscribed(manager, game_id="game") as of_game:
                set_the_scene(manager)
                assert [event.connection.sid for event in events.take(6)] == ["sid-1"] * 3 + ["sid-2"] * 3
                assert [event.connection.sid for event in of_game.take(2)] == ["sid-1", "sid-2"]

    def test_many_calls_at_once_work_from_the_first_on(self, cluster: Cluster) -> None:
        async def run() -> None:
            for namespace in cluster.namespaces():
                async with presence.ConnectionManager.from_url(cluster.url, namespace=namespace) as manager:
                    for _ in range(2):
                        counts = await asyncio.gather(*(manager.get_connection_count() for _ in range(100)))
                        assert counts == [0] * 100

        for _ in range(5):
            cluster.forget_everything()
            asyncio.run(run())

    def test_a_cancellation_that_the_client_swallows_is_not_lost(self, cluster: Cluster) -> None:
        """Python 3.11's asyncio.wait_for, through which redis-py writes, can do that."""
        entered = asyncio.Event()

        class Swallowing(redis.asyncio.RedisCluster):
            async def execute_command(self, *args: Any, **options: Any) -> Any:
                if entered.is_set():
                    return await super().execute_command(*args, **options)
                entered.set()
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(BOUND_SECONDS)
                return 0

        async def cancel_a_call() -> None:
            async with Swallowing(host="127.0.0.1", port=cluster.nodes[0].port) as client:
                manager = presence.ConnectionManager(client, namespace="one")
                call = asyncio.create_task(manager.update_heartbeat("sid"))
                await entered.wait()
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                assert await manager.update_heartbeat("sid") is False

        asyncio.run(cancel_a_call())

    def test_has_the_options_of_the_readme_by_default(self, cluster: Cluster) -> None:
        address = addresses.parse(cluster.url)
        asyncio_client: Any = clients.connect_asyncio(address, {})
        options = asyncio_client.connection_kwargs
        limits = [options[name] for name in ("socket_timeout", "socket_connect_timeout", "protocol")]
        assert limits == [5, 5, 3]
        blocking: Any = clients.connect_blocking(address, {})
        # redis-py's cluster clients would try again without a pause, so the managers do.
        assert (asyncio_client.retry.get_retries(), blocking.retry.get_retries()) == (0, 0)
        seconds = [sum(retrying.cluster_pauses()) for _ in range(200)]
        assert 4 < sum(seconds) / len(seconds) < 6
        with blocking:
            for node in blocking.get_nodes():
                pool = blocking.get_redis_connection(node).connection_pool
                options = pool.connection_kwargs
                limits = [options[name] for name in ("socket_timeout", "socket_connect_timeout", "protocol")]
                assert (pool.max_connections, limits) == (10_000, [5, 5, 3])

    def test_serves_tls(self, make_manager: ManagerFactory, tmp_path: Path) -> None:
        certificate = write_certificate(tmp_path)
        with (
            LocalServer(program(), "--cluster-enabled", "yes", "--cluster-port", str(free_port())) as node,
            Proxy(node.port, tls=server_context(tmp_path)) as proxy,
            admin(node) as client,
        ):
            client.config_set("cluster-announce-port", proxy.port)
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            wait_until(lambda: client.cluster("INFO")["cluster_state"] == "ok")
            manager = make_manager(f"rediss+cluster://127.0.0.1:{proxy.port}?ssl_ca_certs={certificate}")
            play(manager)
            assert proxy.accepted > 0
            manager.close()
            check_pool_class(f"rediss+cluster://127.0.0.1:{proxy.port}?ssl_ca_certs={certificate}")

    def test_takes_connections_out_of_pools_of_the_class_that_is_given(self, cluster: Cluster) -> None:
        check_pool_class(cluster.url)

    def test_serves_more_threads_than_connections(self, cluster: Cluster) -> None:
        """None of them waits for a free connection, but what finds none is sent again."""
        manager = presence.sync.ConnectionManager.from_url(f"{cluster.url}?max_connections=3", namespace="one")
        with manager, ThreadPoolExecutor(8) as threads:
            assert list(threads.map(lambda _: manager.get_connection_count(), range(400))) == [0] * 400

    def test_never_takes_another_nodes_connection_into_a_pool(self, cluster: Cluster) -> None:
        """redis-py's blocking client releases one twice when the next node has none; two calls would read from it."""
        blocking: Any = clients.connect_blocking(addresses.parse(cluster.url), {})
        with blocking:
            one, two = (blocking.get_redis_connection(node).connection_pool for node in blocking.get_nodes())
            connection = one.get_connection()
            one.release(connection)
            taken = two.get_connection()
            two.release(connection)
            assert two.get_connection() is not connection
            two.release(taken)

    def test_gives_nobody_the_connection_that_another_thread_has_taken(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """redis-py gives one back again when a call that was told to ask again cannot connect."""
        options: dict[str, Any] = {"namespace": "one", **one_attempt("blocking")}
        with (
            ThreadPoolExecutor(1) as other_thread,
            presence.sync.ConnectionManager.from_url(cluster.url, **options) as manager,
        ):
            manager.get_connection_count()
            client: Any = manager._open_client.client  # type: ignore[union-attr]
            pool = client.get_redis_connection(client.get_node_from_key("{one}:")).connection_pool
            parse_response: Any = redis.Redis.parse_response
            take, taken = pool.get_connection, list[Any]()

            def refuse(client: Any, connection: Any, *arguments: Any, **named: Any) -> Any:
                monkeypatch.setattr(redis.Redis, "parse_response", parse_response)
                monkeypatch.setattr(pool, "get_connection", take_elsewhere)
                parse_response(client, connection, *arguments, **named)
                raise redis.exceptions.TryAgainError

            def take_elsewhere(*_: Any) -> Any:
                monkeypatch.setattr(pool, "get_connection", take)
                taken.append(other_thread.submit(take).result())
                raise redis.ConnectionError

            monkeypatch.setattr(redis.Redis, "parse_response", refuse)
            with pytest.raises(presence.ServerUnreachableError):
                manager.get_connection_count()
            assert len(taken) == 1
            assert take() not in taken

    def test_sends_calls_again_whose_connections_break(self, make_manager: ManagerFactory, cluster: Cluster) -> None:
        manager = make_manager(cluster.url, namespace="one")
        operations = manager.operations
        set_the_scene(manager)
        sids = ["sid-1", "sid-2", *(f"unknown {number}" for number in range(200))]
        for _ in range(3):
            for client in cluster.clients:
                client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            assert sum(map(bool, manager.update_heartbeats(sids).values())) == 2
            for client in cluster.clients:
                client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            assert manager.pipeline([operations.update_heartbeat(sid) for sid in sids[:3]]) == [True, True, False]
            for client in cluster.clients:
                client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            assert manager.update_heartbeat("sid-1")

    def test_a_first_call_that_is_cancelled_leaves_nothing_behind(self, cluster: Cluster) -> None:
        async def run() -> None:
            async with presence.ConnectionManager.from_url(cluster.url, namespace="one", client_name="p") as manager:
                call = asyncio.create_task(manager.get_connection_count())
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(run())

        def names() -> list[str]:
            connected: Any = [client.client_list() for client in cluster.clients]
            return [client["name"] for clients in connected for client in clients]

        wait_until(lambda: "p" not in names())

    def test_serves_a_call_in_the_finally_of_a_first_call_that_is_cancelled_with_all_tasks(
        self, cluster: Cluster
    ) -> None:
        removed: list[Any] = []
        with presence.sync.ConnectionManager.from_url(cluster.url, namespace="one") as registering:
            registering.register_connection("sid", "user")

        async def play_until_the_end(manager: presence.ConnectionManager) -> None:
            try:
                await manager.get_connection_count()
            finally:
                removed.append(await manager.unregister_connection("sid"))
                await manager.aclose()

        async def run() -> None:
            manager = presence.ConnectionManager.from_url(cluster.url, namespace="one")
            running.append(asyncio.create_task(play_until_the_end(manager)))
            for _ in range(3):
                await asyncio.sleep(0)

        running: list[asyncio.Task[None]] = []
        asyncio.run(run())
        assert [connection and connection.sid for connection in removed] == ["sid"]

    def test_a_close_after_a_fault_leaves_no_connection_open(self, cluster: Cluster) -> None:
        async def meet_a_fault_and_close() -> Any:
            options: dict[str, Any] = {"client_name": "leaving", "socket_timeout": 0.1, **one_attempt("asyncio")}
            async with presence.ConnectionManager.from_url(cluster.url, namespace="one", **options) as manager:
                await asyncio.gather(*(manager.get_connection_count() for _ in range(5)))
                with cluster.frozen(), pytest.raises(presence.ServerUnreachableError):
                    await manager.get_connection_count()
                return manager._open_client().client

        def left() -> int:
            return [one["name"] for client in cluster.clients for one in client.client_list()].count("leaving")

        client = asyncio.run(meet_a_fault_and_close())
        wait_until(lambda: left() == 0)
        assert client is not None, "it was not the garbage collector"

    def test_waits_for_a_node_that_restarts(self, make_manager: ManagerFactory) -> None:
        node = LocalServer(program(), "--cluster-enabled", "yes", "--cluster-port", str(free_port()))
        with node, admin(node) as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            wait_until(lambda: client.cluster("INFO")["cluster_state"] == "ok")
            manager = make_manager(f"redis+cluster://127.0.0.1:{node.port}")
            manager.register_connection("sid", "user")
            node.kill()
            restart = Timer(0.5, node.start)
            restart.start()
            try:
                assert manager.get_connection_count() == 0
            finally:
                restart.join()

    @pytest.mark.parametrize("kind", ["asyncio", "blocking"])
    def test_tells_all_at_once_who_wait_for_a_node_that_is_mute(self, kind: str) -> None:
        """It is asked for the layout once for all of them, not by one after the other."""
        with socket.socket() as mute:
            mute.bind(("127.0.0.1", 0))
            mute.listen(64)
            url = f"redis+cluster://127.0.0.1:{mute.getsockname()[1]}"
            options: dict[str, Any] = {"socket_timeout": 0.5, **one_attempt(kind)}

            async def ask() -> list[Any]:
                async with presence.ConnectionManager.from_url(url, **options) as manager:
                    return await asyncio.gather(
                        *(manager.get_connection_count() for _ in range(8)), return_exceptions=True
                    )

            def ask_in_threads() -> list[Any]:
                manager = presence.sync.ConnectionManager.from_url(url, **options)
                with ThreadPoolExecutor(8) as threads:
                    calls = [threads.submit(manager.get_connection_count) for _ in range(8)]
                return [call.exception() for call in calls]

            start = time.monotonic()
            answers = asyncio.run(ask()) if kind == "asyncio" else ask_in_threads()
            assert [type(answer) for answer in answers] == [presence.ServerUnreachableError] * 8
            assert time.monotonic() - start < 4 * 0.5

    def test_a_slot_that_moves_to_a_node_without_the_scripts_is_served_there(
        self, make_manager: ManagerFactory, cluster: Cluster
    ) -> None:
        namespace = cluster.new_namespace()
        manager = make_manager(cluster.url, namespace=namespace)
        set_the_scene(manager)
        with cluster.migrating(cluster.slot(namespace), node=1) as move:
            move(move.keys)
            # What declares a key that is nowhere, as all that write do, waits until the slot has moved.
            found = manager.get_connection("sid-1")
            assert found is not None
            assert found.game_id == "game"
            assert manager.get_game_user_sids("game") == {"user-1": "sid-1", "user-2": "sid-2"}

    def test_a_script_that_is_lost_again_is_loaded_again_though_another_shard_is_down(
        self, make_manager: ManagerFactory
    ) -> None:
        """From the second time on all primaries get it, of those that can be reached."""
        with Cluster().running() as cluster:
            node = cluster.clients[0]
            node.config_set("cluster-require-full-coverage", "no")
            manager = make_manager(cluster.url, namespace="one")
            assert manager.get_connection_count() == 0
            cluster.nodes[1].kill()
            losses: list[Callable[[], object]] = []

            class Unlucky(Operation[int]):
                def command(self) -> Command:
                    if losses:
                        losses.pop()()
                    return super().command()

            count = manager.operations.get_connection_count()
            for times in (2, 3):
                losses += [node.script_flush] * times
                assert manager.pipeline([Unlucky(count.script, count.keys, count.arguments, count.parse)]) == [0]
                assert losses == []
            manager.close()

    def test_sends_nothing_again_when_it_took_too_long_to_learn_the_layout(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its answer may have been forgotten by then."""
        monkeypatch.setattr(retrying, "RETRYING_SECONDS", 0.5)

        async def register(cluster: Cluster) -> None:
            options: dict[str, Any] = {"namespace": "one", "socket_timeout": 0.3}
            async with presence.ConnectionManager.from_url(cluster.url, **options) as manager:
                await manager.register_connection("sid-1", "user")
                with cluster.frozen():
                    call = asyncio.create_task(manager.register_connection("sid-2", "user"))
                    await asyncio.sleep(0.85)  # The first attempt is over, and the nodes are asked for the layout.
                await asyncio.gather(call, return_exceptions=True)

        with Cluster().running() as cluster:
            before = evalsha_calls(cluster.clients[0])
            asyncio.run(register(cluster))
            wait_until(lambda: cluster.clients[0].ping())
            # The one for the script that was missing, both registrations, and none of the second again.
            assert evalsha_calls(cluster.clients[0]) - before == 3

    @every_refusal
    def test_does_not_notice_that_a_write_is_refused(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, refusal: Exception
    ) -> None:
        """As on a connection that is closed."""

        async def register() -> None:
            async with presence.ConnectionManager.from_url(cluster.url, namespace="one") as manager:
                await manager.register_connection("sid", "user")
                refuse_next_write(monkeypatch, refusal)
                assert await manager.update_heartbeat("sid")

        asyncio.run(register())

    def test_tells_all_threads_at_once_when_no_node_answers_any_more(self) -> None:
        options: dict[str, Any] = {"namespace": "one", "socket_timeout": 0.5, **one_attempt("blocking")}
        with (
            Cluster().running() as cluster,
            presence.sync.ConnectionManager.from_url(cluster.url, **options) as manager,
        ):
            manager.get_connection_count()
            start = time.monotonic()
            with cluster.frozen(), ThreadPoolExecutor(8) as threads:
                calls = [threads.submit(manager.get_connection_count) for _ in range(8)]
                answers = [call.exception() for call in calls]
            took = time.monotonic() - start
        assert [type(answer) for answer in answers] == [presence.ServerUnreachableError] * 8
        assert took < 8 * 0.5, "each by itself waits for both nodes, and the next one after it"

    def test_a_slot_that_moves_to_a_node_without_any_is_a_clear_error(
        self, make_manager: ManagerFactory, hasty: dict[str, Any]
    ) -> None:
        """redis-py's clients do not know that node."""
        cluster = Cluster(one=(0, 16383), two=())
        with cluster.running():
            manager = make_manager(cluster.url, namespace="one", **hasty)
            set_the_scene(manager)
            with cluster.migrating(cluster.slot("one"), node=1) as move:
                move(move.keys)
                for call_it in (manager.get_connection_count, lambda: manager.update_heartbeats(["sid-1", "sid-2"])):
                    with pytest.raises(presence.ServerUnreachableError):
                        call_it()
                operations = manager.operations
                with pytest.raises(presence.PipelineError) as raised:
                    manager.pipeline([operations.update_heartbeat("sid-1"), operations.get_connection_count()])
                assert [type(result) for result in raised.value.results] == [presence.ServerUnreachableError] * 2
            assert manager.get_connection_count() == 2

    @pytest.mark.parametrize("as_option", [False, True])
    def test_opens_as_many_connections_to_a_node_as_it_is_allowed(self, cluster: Cluster, as_option: bool) -> None:
        async def run() -> None:
            options: dict[str, Any] = one_attempt("asyncio") | ({"max_connections": 3} if as_option else {})
            url = cluster.url if as_option else f"{cluster.url}?max_connections=3"
            async with presence.ConnectionManager.from_url(url, namespace="one", **options) as manager:
                await manager.get_connection_count()
                calls = (manager.get_connection_count() for _ in range(50))
                answers = await asyncio.gather(*calls, return_exceptions=True)
                refused = [answer for answer in answers if answer != 0]
                assert 0 < len(refused) < 50
                for error in refused:
                    assert isinstance(error, presence.ServerUnreachableError)
                    assert "raise max_connections" in str(error)

        asyncio.run(run())

    def test_least_rights_are_those_for_one_server_and_three_more(
        self, make_manager: ManagerFactory, cluster: Cluster
    ) -> None:
        granted = (*LEAST_RIGHTS, "~{one}:*", "~{two}:*", *MORE_ON_A_CLUSTER)
        for client in cluster.clients:
            client.execute_command("ACL", "SETUSER", "game-server", "on", ">password", *granted)
        url = cluster.url.replace("//", "//game-server:password@", 1)
        for namespace in cluster.namespaces():
            play(make_manager(url, namespace=namespace))
        # Where the keys of a slot that moves are on the other node already, the client has to ask there.
        with cluster.migrating(cluster.slot("one"), node=1) as move:
            move(move.keys)
            assert make_manager(url, namespace="one").get_connection_count() == 2
        cluster.migrate(cluster.slot("one"), node=0)


class TestEventsOfASlotThatMovesWithItsKeys:
    """The stream is read on where it is now; through pub/sub, the loss is told."""

    def test_pubsub_tells_a_subscriber_that_its_slot_has_moved(
        self, make_manager: ManagerFactory, cluster: Cluster
    ) -> None:
        manager = make_manager(cluster.url, namespace=cluster.new_namespace(), events="pubsub")
        with self.subscribed_while_the_slot_moves(manager, cluster) as (events, of_game):
            set_the_scene(manager)
            for subscription, count in ((events, 3), (of_game, 1)):
                assert [event.connection.sid for event in subscription.take(count)] == ["before"] * count
                subscription.tells_the_loss("moved to another node")
            with subscribed(manager) as anew:
                manager.register_connection("after", "after")
                assert anew.next().connection.sid == "after"

    def test_a_subscriber_to_the_stream_follows_its_slot_to_another_node(
        self, make_manager: ManagerFactory, cluster: Cluster
    ) -> None:
        manager = make_manager(cluster.url, namespace=cluster.new_namespace(), events="stream")
        with self.subscribed_while_the_slot_moves(manager, cluster) as (events, of_game):
            set_the_scene(manager)
            sids = ["before"] * 3 + ["sid-1"] * 3 + ["sid-2"] * 3
            assert [event.connection.sid for event in events.take(9)] == sids
            assert [event.connection.sid for event in of_game.take(3)] == ["before", "sid-1", "sid-2"]

    def test_a_task_goes_on_where_another_was_cancelled_in_any_turn(self, cluster: Cluster) -> None:
        async def read_on() -> None:
            async with (
                presence.ConnectionManager.from_url(cluster.url, namespace="one", events="stream") as manager,
                manager.subscribe() as events,
            ):
                for turns in range(20):
                    cancelled = asyncio.create_task(anext(events))
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    cancelled.cancel()
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(anext(events), 0.02)
                    await asyncio.wait([cancelled])

        asyncio.run(read_on())

    @contextmanager
    def subscribed_while_the_slot_moves(
        self, manager: ConnectionManager, cluster: Cluster
    ) -> Iterator[tuple[Subscribed, Subscribed]]:
        """Move the slot and its keys after a first change that has not been read yet."""
        slot = cluster.slot(manager.operations.namespace)
        with subscribed(manager) as events, subscribed(manager, game_id="game") as of_game:
            manager.register_connection("before", "before")
            manager.join_game("before", "game")
            cluster.migrate(slot, node=1)
            yield events, of_game


class TestAClusterThatCannotServe:
    """The error says so, and what to do."""

    def test_a_client_for_one_server_is_told_to_be_a_cluster_client(
        self, make_manager: ManagerFactory, cluster: Cluster
    ) -> None:
        manager = make_manager(cluster.nodes[0].url, namespace="two")
        with pytest.raises(presence.UnexpectedReplyError, match=r"use a redis\+cluster:// URL"):
            manager.get_connection_count()

    def test_a_server_that_is_no_cluster_is_named(self, make_manager: ManagerFactory, own_server: LocalServer) -> None:
        manager = make_manager(f"redis+cluster://127.0.0.1:{own_server.port}")
        with pytest.raises(presence.ServerUnreachableError, match=r"check that its nodes run in cluster mode"):
            manager.get_connection_count()

    def test_nodes_that_cannot_be_reached_are_named(self, make_manager: ManagerFactory, hasty: dict[str, Any]) -> None:
        manager = make_manager(f"redis+cluster://127.0.0.1:{free_port()}", **hasty)
        with pytest.raises(presence.ServerUnreachableError, match="check that it runs") as raised:
            manager.get_connection_count()
        assert isinstance(raised.value.__cause__, redis.exceptions.RedisClusterException)

    def test_a_wrong_password_is_named(self, make_manager: ManagerFactory, cluster: Cluster) -> None:
        manager = make_manager(cluster.url.replace("//", "//user:wrong@", 1))
        with pytest.raises(presence.AuthenticationFailedError, match="correct them in the URL"):
            manager.get_connection_count()

    def test_a_wrong_password_may_be_made_the_right_one(self, make_manager: ManagerFactory, cluster: Cluster) -> None:
        manager = make_manager(cluster.url.replace("//", "//late:secret@", 1))
        cluster.clients[0].config_resetstat()
        with pytest.raises(presence.AuthenticationFailedError):
            manager.get_connection_count()
        assert cluster.clients[0].info("errorstats")["errorstat_WRONGPASS"]["count"] <= 2, "not again and again"
        try:
            for client in cluster.clients:
                client.execute_command("ACL", "SETUSER", "late", "on", ">secret", "~*", "&*", "+@all")
            assert manager.get_connection_count() == 0
        finally:
            manager.close()
            for client in cluster.clients:
                client.execute_command("ACL", "DELUSER", "late")

    def test_is_waited_for_where_it_is_about_to_start(self, make_manager: ManagerFactory, cluster: Cluster) -> None:
        with Proxy(free_port()) as proxy:
            starting = threading.Timer(0.1, setattr, (proxy, "server_port", cluster.nodes[0].port))
            starting.start()
            assert make_manager(f"redis+cluster://127.0.0.1:{proxy.port}").get_connection_count() == 0
            starting.join()

    def test_a_fault_that_nobody_waits_for_any_more_is_not_logged(self) -> None:
        unhandled: list[object] = []

        async def work() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
            url = f"redis+cluster://127.0.0.1:{free_port()}"
            async with presence.ConnectionManager.from_url(url, **one_attempt("asyncio")) as manager:
                call = asyncio.create_task(manager.get_connection_count())
                for _ in range(3):
                    await asyncio.sleep(0)
                call.cancel()
                await asyncio.wait([call])
                assert call.cancelled()
                layout = manager._open_client().layout
                assert layout is not None
                await asyncio.wait([layout])

        asyncio.run(work())
        gc.collect()
        assert unhandled == []

    @pytest.mark.parametrize("to", ["server", "cluster"])
    def test_credentials_that_cannot_be_fetched_are_a_fault_with_that_cause(
        self, make_manager: ManagerFactory, cluster: Cluster, own_server: LocalServer, hasty: dict[str, Any], to: str
    ) -> None:
        class Broken(redis.CredentialProvider):
            def get_credentials(self) -> tuple[str]:
                raise PermissionError("the token cannot be read")

        url = cluster.url if to == "cluster" else own_server.url
        manager = make_manager(url, namespace="one", credential_provider=Broken(), **hasty)
        with pytest.raises(presence.ServerUnreachableError, match="the token cannot be read") as raised:
            manager.get_connection_count()
        cause = raised.value.__cause__
        assert PermissionError in (type(cause), type(cause and cause.__cause__))

    @pytest.mark.parametrize(
        "error", [PermissionError, LookupError, RuntimeError], ids=["a fault", "another error", "as of an event loop"]
    )
    def test_credentials_that_cannot_be_fetched_once_leave_no_connection_half_greeted(
        self, make_manager: ManagerFactory, own_server: LocalServer, error: type[Exception]
    ) -> None:
        class BrokenOnce(redis.CredentialProvider):
            errors: ClassVar = [error("the token cannot be read")]

            def get_credentials(self) -> tuple[str, str]:
                if self.errors:
                    raise self.errors.pop()
                return "default", "any password"

        url = own_server.url.removesuffix("0") + "3"
        make_manager(url).register_connection("sid", "alice")
        manager = make_manager(url, credential_provider=BrokenOnce())
        with pytest.raises(Exception, match="the token cannot be read"):
            manager.get_connection_count()
        assert manager.get_connection_count() == 1

    def test_slots_that_nobody_serves_are_named(self, make_manager: ManagerFactory) -> None:
        with LocalServer(program(), "--cluster-enabled", "yes", "--cluster-port", str(free_port())) as lone:
            with pytest.raises(presence.ServerUnreachableError, match="every slot is covered"):
                make_manager(f"redis+cluster://127.0.0.1:{lone.port}").get_connection_count()
            with pytest.raises(presence.ServerUnreachableError, match="CLUSTER INFO"):
                make_manager(lone.url).get_connection_count()
