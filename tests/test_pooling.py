"""Calls of the blocking manager: each takes a connection of the client's pool, and nothing else sees what is on it."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import redis
from redis.backoff import ConstantBackoff, NoBackoff
from redis.cache import CacheConfig
from redis.retry import Retry

from presence import HeartbeatStatus, ServerUnreachableError, UnexpectedReplyError, pooling, retrying
from presence.sync import ConnectionManager
from tests.fault_proxy import Fate, Proxy
from tests.server import LocalServer, free_port, program
from tests.watching import raising_after, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PAUSE_MS = 300
MANY = 150
"""Sids for more than one script."""


@contextmanager
def interrupted(interruption: type[BaseException], *, is_slow: redis.Redis) -> Iterator[None]:
    """Let a signal handler raise between the next request and its reply, which a server is slow to give."""
    is_slow.client_pause(PAUSE_MS)
    with pytest.MonkeyPatch.context() as patch:

        def raise_once(*_: Any, **__: Any) -> None:
            patch.undo()
            raise interruption

        patch.setattr(redis.Connection, "read_response", raise_once)
        with pytest.raises(interruption):
            yield


class OutOfTimeError(Exception):
    """As a handler raises that bounds the time of a call."""


def beat_one(manager: ConnectionManager) -> object:
    return manager.update_heartbeat("sid")


def beat_many(manager: ConnectionManager) -> object:
    return manager.update_heartbeats([f"sid {number}" for number in range(MANY)])


class Traced(redis.Redis):
    """Overrides what a call goes through."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, OutOfTimeError])
@pytest.mark.parametrize("interrupted_call", [beat_one, beat_many])
@pytest.mark.parametrize("client", ["own", "plain", "single", "traced"])
def test_the_reply_to_a_call_that_was_interrupted_answers_no_other(
    own_server: LocalServer,
    client: str,
    interrupted_call: Callable[[ConnectionManager], object],
    interruption: type[BaseException],
) -> None:
    with ExitStack() as stack:
        other = stack.enter_context(redis.Redis.from_url(own_server.url))
        if client == "own":
            manager = stack.enter_context(ConnectionManager.from_url(own_server.url))
        else:
            kind = Traced if client == "traced" else redis.Redis
            given = kind.from_url(own_server.url, single_connection_client=client == "single")
            manager = ConnectionManager(stack.enter_context(given))
        check_that_no_reply_is_left(manager, other, interrupted_call, interruption)


@pytest.fixture(scope="module")
def node() -> Iterator[LocalServer]:
    """A cluster of one."""
    with LocalServer(program(), "--cluster-enabled", "yes", "--cluster-port", str(free_port())) as server:
        with redis.Redis.from_url(server.url, decode_responses=True) as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            wait_until(lambda: client.cluster("INFO")["cluster_state"] == "ok")
        yield server


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OutOfTimeError])
@pytest.mark.parametrize("interrupted_call", [beat_one, beat_many])
@pytest.mark.parametrize("is_given", [False, True])
def test_nor_on_a_cluster(
    node: LocalServer,
    interrupted_call: Callable[[ConnectionManager], object],
    interruption: type[BaseException],
    is_given: bool,
) -> None:
    with redis.Redis.from_url(node.url) as other, ExitStack() as stack:
        other.flushall()
        if is_given:
            client = stack.enter_context(redis.RedisCluster(host="127.0.0.1", port=node.port))
            manager = ConnectionManager(client)
        else:
            manager = stack.enter_context(ConnectionManager.from_url(f"redis+cluster://127.0.0.1:{node.port}"))
        check_that_no_reply_is_left(manager, other, interrupted_call, interruption)


def test_nor_where_no_call_has_gone_to_a_node_yet(node: LocalServer) -> None:
    """As to one that a MOVED has named: redis-py makes its connections when it is first used."""
    with redis.Redis.from_url(node.url) as other, redis.RedisCluster(host="127.0.0.1", port=node.port) as client:
        other.flushall()
        client.nodes_manager.nodes_cache["another"] = redis.cluster.ClusterNode("127.0.0.1", free_port(), "primary")
        check_that_no_reply_is_left(ConnectionManager(client), other, beat_one, OutOfTimeError)


def check_that_no_reply_is_left(
    manager: ConnectionManager,
    other: redis.Redis,
    interrupted_call: Callable[[ConnectionManager], object],
    interruption: type[BaseException],
) -> None:
    manager.register_connection("sid", "alice")
    beat_one(manager)
    beat_many(manager)
    with interrupted(interruption, is_slow=other):
        interrupted_call(manager)

    assert manager.get_connection("unknown") is None
    assert manager.get_connection_count() == 1
    assert beat_many(manager) == {f"sid {number}": HeartbeatStatus.UNKNOWN for number in range(MANY)}


@pytest.fixture
def sentinel(own_server: LocalServer, tmp_path: Path) -> Iterator[LocalServer]:
    """Watches the test's own server."""
    config = tmp_path / "sentinel.conf"
    config.write_text(f"sentinel monitor game 127.0.0.1 {own_server.port} 1\n")
    with LocalServer(program(), "--sentinel", config=config) as server:
        yield server


@pytest.mark.parametrize("is_asked", [False, True], ids=["server", "sentinel"])
def test_a_call_that_is_interrupted_while_it_connects_leaves_no_connection_half_greeted(
    own_server: LocalServer, sentinel: LocalServer, is_asked: bool
) -> None:
    """Before whichever reply to a greeting, the server's or the sentinel's."""
    url = f"redis+sentinel://127.0.0.1:{sentinel.port}/game" if is_asked else f"redis://127.0.0.1:{own_server.port}"
    with ConnectionManager.from_url(f"{url}/3") as manager:
        manager.register_connection("sid", "alice")
    for replies in count():
        with ConnectionManager.from_url(f"{url}/3") as manager:
            was_interrupted = interrupt_after(replies, lambda: manager.get_connection("sid"))
            for _ in range(2):
                assert manager.get_connection("unknown") is None
                assert manager.get_connection_count() == 1
        if not was_interrupted:
            break
    assert replies > 3


def interrupt_after(replies: int, call: Callable[[], object]) -> bool:
    """Let a signal handler raise in a call that has read so many replies; tell whether it had not ended before."""
    left = replies
    read = redis.Connection.read_response

    def read_or_raise(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return read(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redis.Connection, "read_response", read_or_raise)
        try:
            call()
        except KeyboardInterrupt:
            return True
    return False


@pytest.mark.parametrize("interrupted_call", [beat_one, beat_many])
def test_an_error_reply_to_a_signal_handler_is_not_taken_for_the_reply_to_the_call(
    own_server: LocalServer, sentinel: LocalServer, interrupted_call: Callable[[ConnectionManager], object]
) -> None:
    """It must close the connection, whose reply is still to come; redis-py's own for sentinels stays open then."""
    with (
        ConnectionManager.from_url(f"redis+sentinel://127.0.0.1:{sentinel.port}/game") as manager,
        redis.Redis.from_url(own_server.url) as other,
    ):
        manager.register_connection("sid", "alice")
        beat_one(manager)
        beat_many(manager)
        other.client_pause(PAUSE_MS)
        error = redis.ResponseError("ERR of a command that the handler sent")
        with suppress(UnexpectedReplyError), raising_after(PAUSE_MS / 3000, error):
            interrupted_call(manager)
        assert manager.get_connection("unknown") is None
        assert manager.get_connection_count() == 1


def test_a_call_that_is_interrupted_gives_its_connection_back_closed(
    own_server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same moment another thread may take it, which waits for one."""
    with (
        ConnectionManager.from_url(own_server.url) as manager,
        redis.Redis.from_url(own_server.url) as other,
    ):
        beat_one(manager)
        pool: Any = pooling.pool_of(manager._client())
        release, open_sockets = pool.release, []

        def note_and_release(connection: Any) -> None:
            open_sockets.append(connection._sock)
            release(connection)

        monkeypatch.setattr(pool, "release", note_and_release)
        with interrupted(OutOfTimeError, is_slow=other):
            beat_one(manager)
        assert open_sockets == [None]


@pytest.mark.parametrize("is_cluster", [False, True])
def test_a_call_that_is_interrupted_leaves_those_of_other_threads_alone(node: LocalServer, is_cluster: bool) -> None:
    with redis.Redis.from_url(node.url) as other, ExitStack() as stack:
        client: Any = stack.enter_context(
            redis.RedisCluster(host="127.0.0.1", port=node.port) if is_cluster else Traced.from_url(node.url)
        )
        manager = ConnectionManager(client)
        beat_one(manager)
        plain = client.get_redis_connection(client.get_nodes()[0]) if is_cluster else client
        # As in another thread's call, which has sent its command and waits for the reply.
        in_use = plain.connection_pool.get_connection()
        in_use.send_command("PING")
        with interrupted(OutOfTimeError, is_slow=other):
            beat_one(manager)

        assert in_use.read_response() == b"PONG"
        plain.connection_pool.release(in_use)


def test_nor_does_it_end_what_other_threads_ask_the_sentinels(own_server: LocalServer, sentinel: LocalServer) -> None:
    with (
        ConnectionManager.from_url(f"redis+sentinel://127.0.0.1:{sentinel.port}/game") as manager,
        redis.Redis.from_url(own_server.url) as other,
    ):
        beat_one(manager)
        pool: Any = pooling.pool_of(manager._client())
        asked = pool.sentinel_manager.sentinels[0].connection_pool
        in_use = asked.get_connection()
        in_use.send_command("PING")
        with interrupted(OutOfTimeError, is_slow=other):
            beat_one(manager)

        assert in_use.read_response() == b"PONG"
        asked.release(in_use)


def test_no_attempts_are_made_for_a_call_whose_time_is_over(
    own_server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the policy would go on, and each of them meets a server that is not there."""
    monkeypatch.setattr(retrying, "RETRYING_SECONDS", 0.3)
    retry = Retry(ConstantBackoff(0.05), 60)
    with Proxy(own_server.port) as proxy, ConnectionManager.from_url(proxy.url, retry=retry) as manager:
        manager.update_heartbeat("sid")
        accepted = proxy.accepted
        proxy.fates, proxy.server_port = [Fate.LOSE_REPLY], free_port()
        with pytest.raises(ServerUnreachableError):
            manager.update_heartbeat("sid")
        assert proxy.accepted <= accepted + 10


def test_an_error_reply_costs_no_connection(own_server: LocalServer) -> None:
    with (
        Proxy(own_server.port) as proxy,
        ConnectionManager.from_url(proxy.url) as manager,
        redis.Redis.from_url(own_server.url) as other,
    ):
        other.set("{presence}:game_conns:foreign", "what another program wrote")
        assert manager.get_game_user_sids("game") == {}
        for _ in range(3):
            with pytest.raises(UnexpectedReplyError):
                manager.get_game_user_sids("foreign")
        assert proxy.accepted == 1


def test_a_client_of_a_single_connection_needs_no_other(server_url: str, namespace: str) -> None:
    with redis.Redis.from_url(server_url, single_connection_client=True, max_connections=1) as client:
        manager = ConnectionManager(client, namespace=namespace)
        assert manager.update_heartbeats(["a", "b"]) == dict.fromkeys("ab", HeartbeatStatus.UNKNOWN)
        assert not manager.update_heartbeat("a")


CALLING_IN_A_HANDLER = """
import random, signal, sys, time
from presence.sync import ConnectionManager

manager = ConnectionManager.from_url(sys.argv[1])
manager.register_connection("sid", "alice")
interruptions = 0

def call(*_):
    global interruptions
    interruptions += 1
    assert manager.get_connection("sid").user_id == "alice"

signal.signal(signal.SIGALRM, call)
while interruptions < 2000:
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-4))
    assert manager.get_connection("unknown") is None
signal.setitimer(signal.ITIMER_REAL, 0)
print("done")
"""


def test_a_signal_handler_may_make_calls_in_the_midst_of_another(own_server: LocalServer) -> None:
    """Even where that one is about to take a connection, or to give one back."""
    code = [sys.executable, "-c", CALLING_IN_A_HANDLER, own_server.url]
    finished = subprocess.run(code, capture_output=True, text=True, timeout=60)
    assert (finished.stdout, finished.stderr) == ("done\n", "")


class RecordingConnection(redis.Connection):
    """Keeps the sizes of what it sends at once."""

    sizes: ClassVar[list[int]] = []

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        self.sizes.extend(map(len, command))
        super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]


def test_a_large_request_is_sent_in_pieces_each_of_which_has_the_whole_timeout(own_server: LocalServer) -> None:
    """As in redis-py's own pipelines: redis-py gives the socket's timeout to each piece, however many there are."""
    pool = redis.ConnectionPool.from_url(own_server.url, connection_class=RecordingConnection)
    with redis.Redis.from_pool(pool) as client:
        manager = ConnectionManager(client)
        manager.register_connection("sid", "alice")
        register = manager.operations.register_connection
        RecordingConnection.sizes.clear()
        manager.pipeline([register(f"sid {number}", f"user {number}", metadata="x" * 4096) for number in range(100)])
        assert manager.get_connection_count() == 101
    assert sum(RecordingConnection.sizes) > 100 * 4096
    assert max(RecordingConnection.sizes) <= 1 << 16


class UnluckyConnection(redis.Connection):
    """Some are closed right after the server has greeted them."""

    closed_next: ClassVar[int] = 0

    def on_connect_check_health(self, check_health: bool = True) -> None:
        super().on_connect_check_health(check_health)
        if UnluckyConnection.closed_next:
            UnluckyConnection.closed_next -= 1
            own_socket: Any = self._sock
            own_socket.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("unlucky", [1, 3, 6])
def test_connections_that_are_closed_as_soon_as_they_are_there_are_retried(
    own_server: LocalServer, own_client: redis.Redis, unlucky: int
) -> None:
    pool = redis.ConnectionPool.from_url(
        own_server.url, connection_class=UnluckyConnection, retry=Retry(NoBackoff(), 6)
    )
    with redis.Redis.from_pool(pool) as client:
        manager = ConnectionManager(client)
        manager.register_connection("sid", "user")
        own_client.client_kill_filter(skipme=True)
        UnluckyConnection.closed_next = unlucky
        assert manager.update_heartbeat("sid")
    assert UnluckyConnection.closed_next == 0


def test_they_are_named_where_the_pool_has_no_policy(own_server: LocalServer) -> None:
    pool = redis.ConnectionPool.from_url(own_server.url, connection_class=UnluckyConnection)
    UnluckyConnection.closed_next = 2  # redis-py itself opens it once more.
    with redis.Redis.from_pool(pool) as client, pytest.raises(ServerUnreachableError):
        ConnectionManager(client).get_connection_count()
    assert UnluckyConnection.closed_next == 0


class CountingConnection(redis.Connection):
    """Counts how often it is opened."""

    opened: ClassVar[list[None]] = []
    is_unanswered: ClassVar[bool] = False

    def _connect(self) -> Any:
        CountingConnection.opened.append(None)
        if self.is_unanswered:
            raise TimeoutError
        return super()._connect()  # type: ignore[no-untyped-call]


def test_a_client_that_cannot_connect_tries_as_often_as_its_policy_says() -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    pool = redis.ConnectionPool.from_url(url, connection_class=CountingConnection, retry=Retry(NoBackoff(), 3))
    CountingConnection.opened.clear()
    with redis.Redis.from_pool(pool) as client, pytest.raises(ServerUnreachableError):
        ConnectionManager(client).get_connection_count()
    assert len(CountingConnection.opened) == 4


def test_it_connects_once_for_each_attempt_to_send(own_server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """redis-py would try that as often as to send, within each attempt."""
    with Proxy(own_server.port) as proxy:
        pool = redis.ConnectionPool.from_url(
            proxy.url, connection_class=CountingConnection, retry=Retry(NoBackoff(), 3)
        )
        with redis.Redis.from_pool(pool) as client:
            manager = ConnectionManager(client)
            assert not manager.update_heartbeat("unknown")
            proxy.fates = [Fate.LOSE_REPLY]
            CountingConnection.opened.clear()
            monkeypatch.setattr(CountingConnection, "is_unanswered", True)
            with pytest.raises(ServerUnreachableError):
                manager.update_heartbeat("unknown")
    assert len(CountingConnection.opened) == 3


class RefusedConnection(redis.Connection):
    """Sends streamed credentials to a server that does not accept them."""

    def re_auth(self) -> None:
        raise redis.AuthenticationError("WRONGPASS")


def test_credentials_that_cannot_be_renewed_after_a_call_do_not_take_its_answer(own_server: LocalServer) -> None:
    """redis-py renews them when a connection is given back."""
    pool = redis.ConnectionPool.from_url(own_server.url, connection_class=RefusedConnection)
    with redis.Redis.from_pool(pool) as client:
        manager = ConnectionManager(client)
        manager.register_connection("old", "alice")
        assert [gone.sid for gone in manager.register_connection("new", "alice").displaced] == ["old"]


class TestWhatSeesEachCallOfAClient:
    """Tracing wraps ``execute_command``, or an application overrides it."""

    def test_does_so_where_a_subclass_overrides_it(self, server_url: str, namespace: str) -> None:
        class Traced(redis.Redis):
            def execute_command(self, *args: Any, **options: Any) -> Any:
                seen.append(args[0])
                return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

        seen: list[str] = []
        with Traced.from_url(server_url) as client:
            self.check(ConnectionManager(client, namespace=namespace), seen)

    def test_so_does_a_subclass_that_overrides_what_it_calls(self, server_url: str, namespace: str) -> None:
        class Reading(redis.Redis):
            def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
                seen.append(command_name)
                return super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]

        seen: list[str] = []
        with Reading.from_url(server_url) as client:
            self.check(ConnectionManager(client, namespace=namespace), seen)

    def test_does_so_where_the_client_s_own_is_replaced(self, server_url: str, namespace: str) -> None:
        seen: list[str] = []
        with redis.Redis.from_url(server_url) as client:
            execute = client.execute_command

            def traced(*args: Any, **options: Any) -> Any:
                seen.append(args[0])
                return execute(*args, **options)

            client.execute_command = traced
            self.check(ConnectionManager(client, namespace=namespace), seen)

    @pytest.mark.parametrize("is_given", [True, False])
    @pytest.mark.parametrize("looks_like_it", [True, False])
    def test_does_so_where_that_of_the_class_is_replaced(
        self, server_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch, looks_like_it: bool, is_given: bool
    ) -> None:
        seen: list[str] = []
        execute = redis.Redis.execute_command

        def traced(self: redis.Redis, *args: Any, **options: Any) -> Any:
            seen.append(args[0])
            return execute(self, *args, **options)  # type: ignore[no-untyped-call]

        monkeypatch.setattr(redis.Redis, "execute_command", wraps(execute)(traced) if looks_like_it else traced)
        with redis.Redis.from_url(server_url) as client:
            if is_given:
                self.check(ConnectionManager(client, namespace=namespace), seen)
            else:
                with ConnectionManager.from_url(server_url, namespace=namespace) as manager:
                    self.check(manager, seen)

    def test_does_so_where_a_call_is_sent_again(self, own_server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
        execute = redis.Redis.execute_command

        def traced(self: redis.Redis, *args: Any, **options: Any) -> Any:
            return execute(self, *args, **options)  # type: ignore[no-untyped-call]

        monkeypatch.setattr(redis.Redis, "execute_command", traced)
        with Proxy(own_server.port) as proxy, ConnectionManager.from_url(proxy.url) as manager:
            assert manager.register_connection("sid", "alice")
            proxy.fates = [Fate.LOSE_REPLY]
            assert manager.update_heartbeat("sid")

    def test_does_so_where_the_client_has_a_cache(self) -> None:
        with redis.Redis(protocol=3, cache_config=CacheConfig()) as client:
            assert pooling.pool_of(client) is None

    @staticmethod
    def check(manager: ConnectionManager, seen: list[str]) -> None:
        assert manager.register_connection("sid", "alice")
        assert manager.update_heartbeat("sid")
        before = len(seen)
        for _ in range(3):
            assert manager.update_heartbeat("sid")
        assert seen[before:] == ["EVALSHA"] * 3
