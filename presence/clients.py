"""How an address becomes a redis-py client, asyncio or blocking, with the defaults that presence chooses on purpose."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import suppress
from queue import LifoQueue
from threading import Condition, RLock, get_ident
from typing import TYPE_CHECKING, Any

import redis
import redis.asyncio
import redis.asyncio.client
import redis.asyncio.cluster
import redis.asyncio.connection
import redis.asyncio.retry
import redis.asyncio.sentinel
import redis.client
import redis.cluster
import redis.connection
import redis.exceptions
import redis.retry
import redis.sentinel
from redis.backoff import NoBackoff

from presence import retrying
from presence.errors import FAULTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from presence.addresses import Address

MAX_CONNECTIONS = 64
"""Connections of one manager's pool. Operations beyond that wait for a free one instead of failing."""

MAX_CLUSTER_CONNECTIONS = 10_000
"""Connections to one node from a cluster client: one for each operation that is under way."""


def is_client(given: object, *kinds: type) -> bool:
    """Tell whether it is a client of these kinds, and not one of redis-py's pipelines, which pass for clients."""
    return isinstance(given, kinds) and not isinstance(given, _PIPELINES)


_PIPELINES = (
    redis.client.Pipeline,
    redis.cluster.ClusterPipeline,
    redis.asyncio.client.Pipeline,
    redis.asyncio.cluster.ClusterPipeline,
)


def not_a_client(given: object, module: str) -> str:
    """Say what a manager takes as its client, from which module of redis-py, and what would take the given one."""
    kind = type(given)
    text = (
        f"client must be a {module}.Redis or {module}.RedisCluster (for a URL, there is ConnectionManager.from_url), "
        f"not {kind.__module__}.{kind.__qualname__}"
    )
    if isinstance(given, _PIPELINES):
        text += "; give it the client, not a pipeline of it"
    elif isinstance(given, redis.Redis | redis.RedisCluster):
        text += "; a blocking client is for presence.sync.ConnectionManager"
    elif isinstance(given, redis.asyncio.Redis | redis.asyncio.RedisCluster):
        text += "; an asyncio client is for presence.ConnectionManager"
    return text


def _options(address: Address, given: dict[str, Any], retry: object) -> dict[str, Any]:
    """Give the options for a client of ours: the caller's, else the URL's, else these."""
    options = {
        "retry": retry,
        "max_connections": MAX_CONNECTIONS,
        # redis-py 8's default. It begins with HELLO, so the client reads why a server that is full or loading refuses a
        # connection; with RESP2, redis-py sends more before it reads, and may find only that the connection is closed.
        "protocol": 3,
        # A primary that became a replica answers READONLY: connect again, the name may lead to the new primary.
        "retry_on_error": [redis.exceptions.ReadOnlyError],
        "socket_timeout": 5,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        **address.options,
        **given,
    }
    if address.url.startswith("unix://"):
        del options["socket_keepalive"], options["socket_connect_timeout"]
        if "protocol" not in given:
            # redis-py 7.4 cannot speak RESP3 here: the notifications that it then wants need a host. 8 can, and does.
            del options["protocol"]
    return options


class _Sentinels(list[Any]):
    """The clients of the sentinels, the one that answered last in front. None is lost.

    redis-py exchanges that one with the first by the index at which it found it, ``s[0], s[index] = sentinel, s[0]``.
    Where several threads or tasks do so at once, another sentinel would be overwritten, and never be asked again.
    """

    def __iter__(self) -> Iterator[Any]:
        return iter(self[:])  # Who goes through them asks each once, whichever is put in front meanwhile.

    def __setitem__(self, index: Any, sentinel: Any) -> None:
        if index == 0:
            super().__setitem__(slice(None), sorted(self, key=lambda each: each is not sentinel))


class _SentinelConnection(redis.sentinel.SentinelManagedConnection):
    """Asks the sentinels before each attempt; redis-py's own retries keep the address that it had before."""

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        if not self._sock:
            self._connect_retry()  # type: ignore[no-untyped-call]
        super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]


class _SentinelTLSConnection(_SentinelConnection, redis.sentinel.SentinelManagedSSLConnection):
    """The same with TLS."""


class _FreeConnections(LifoQueue[Any]):
    """A pool's free connections. A signal handler may make a call while its thread is in here for another."""

    def __init__(self, maxsize: int = 0) -> None:
        super().__init__(maxsize)
        self.mutex = RLock()  # type: ignore[assignment]
        self.not_empty, self.not_full, self.all_tasks_done = (Condition(self.mutex) for _ in range(3))


class _Pool(redis.BlockingConnectionPool):
    """Lets operations wait for a free connection."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"queue_class": _FreeConnections} | options)  # type: ignore[no-untyped-call]


class _SentinelPool(redis.sentinel.SentinelConnectionPool, _Pool):
    """Like a plain server's pool, it lets operations wait for a free connection instead of failing."""


class AsyncSentinelConnection(redis.asyncio.sentinel.SentinelManagedConnection):
    """Asks the sentinels before each attempt; redis-py's own retries keep the address that it had before."""

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Ask the sentinels where to connect to, if it is not connected, and send."""
        if not self.is_connected:
            await self._connect_retry()  # type: ignore[no-untyped-call]
        await super().send_packed_command(command, check_health)


class _AsyncSentinelTLSConnection(AsyncSentinelConnection, redis.asyncio.sentinel.SentinelManagedSSLConnection):
    """The same with TLS."""


class _AsyncSentinelPool(redis.asyncio.sentinel.SentinelConnectionPool, redis.asyncio.BlockingConnectionPool):
    """Like a plain server's pool, it lets operations wait; it closes the connections to the sentinels with its own."""

    async def disconnect(self, inuse_connections: bool = True) -> None:
        try:
            await super().disconnect(inuse_connections)
        finally:
            if inuse_connections:  # Otherwise the primary has changed, and the sentinels are still asked.
                for sentinel in self.sentinel_manager.sentinels:
                    with suppress(*FAULTS):  # Over TLS, the other end's farewell may not come.
                        await sentinel.aclose()


class _InUse(set[Any]):
    """The connections of a pool that are in use. Only the thread that took one gives it back.

    Where redis-py's blocking cluster client was told to ask again or elsewhere and then cannot connect, it gives back
    once more what it had before. By then another thread may have that, and would share it with a third.
    """

    def __init__(self, connections: set[Any]) -> None:
        super().__init__(connections)
        self._takers: dict[Any, int] = {}

    def add(self, connection: Any) -> None:
        self._takers[connection] = get_ident()
        super().add(connection)

    def remove(self, connection: Any) -> None:
        own_thread = get_ident()
        if self._takers.get(connection, own_thread) != own_thread:
            raise KeyError(connection)  # As of one that is not in use, which the pool does not take.
        super().remove(connection)
        self._takers.pop(connection, None)


class _Cluster(redis.RedisCluster):
    """Sees to it that no connection is given back by a thread that does not have it."""

    def get_redis_connection(self, node: Any) -> redis.Redis:
        client = super().get_redis_connection(node)
        pool = client.connection_pool
        if type(getattr(pool, "_in_use_connections", None)) is set:
            with pool._lock:
                if type(pool._in_use_connections) is set:  # A forked process begins with another set.
                    pool._in_use_connections = _InUse(pool._in_use_connections)
        return client


def _sentinel_options(address: Address, options: dict[str, Any], retry: object) -> dict[str, Any]:
    # Each sentinel is asked once, then the next; the connection's own retries begin the round again.
    shared = {name: value for name, value in options.items() if name.startswith("ssl")}
    for name in ("socket_timeout", "socket_connect_timeout"):
        # Together they have the time that the server alone would have.
        shared[name] = options[name] and options[name] / len(address.hosts)
    return {"retry": retry} | shared | address.sentinel_options


def _cluster_options(options: dict[str, Any], address: Address, given: dict[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in options.items() if name != "retry_on_error"}
    # redis-py's asyncio client has no pool that waits, and its blocking client may put another node's connections into
    # one, which two calls would then read from. Beyond the limit, an operation therefore fails.
    if "max_connections" not in address.options | given:
        options["max_connections"] = MAX_CLUSTER_CONNECTIONS
    return options


class _LayoutLearner:
    """Lets a blocking cluster client ask the nodes who serves what: once for all threads that wait for the answer.

    redis-py lets each thread ask for itself, one after the other, and each waits for every node that does not answer.
    """

    def __init__(self, learn: Callable[..., None]) -> None:
        self._learn = learn
        # A signal handler may make a call in the midst of this.
        self._lock = RLock()
        self._learner = 0
        self._outcome: Future[None] | None = None

    def __call__(self, *arguments: Any, **named: Any) -> None:
        own, own_thread = Future[None](), get_ident()
        try:
            with self._lock:
                others = self._outcome
                # One that has ended may still be here, if a signal handler raised at its end.
                if others is None or others.done() or self._learner == own_thread:
                    others, self._learner, self._outcome = None, own_thread, own
            if others is not None:
                others.result()
                return
            self._learn(*arguments, **named)
        except BaseException as error:
            is_fault = isinstance(error, Exception)
            own.set_exception(error if is_fault else redis.exceptions.ConnectionError("it was interrupted"))
            raise
        else:
            own.set_result(None)
        finally:
            with self._lock:
                if self._outcome is own:
                    self._learner, self._outcome = 0, None


def connect_blocking(address: Address, given: dict[str, Any]) -> redis.Redis | redis.RedisCluster:
    """Make the blocking client of an address; ``given`` are options for redis-py."""
    if address.deployment == "server":
        # Not by the pool's from_url, in which the URL's options would win over the caller's.
        given = {**redis.connection.parse_url(address.url), **given}
    once = redis.retry.Retry(NoBackoff(), 0)
    is_cluster = address.deployment == "cluster"  # Its retries are the manager's: see retrying.attempts.
    options = _options(
        address, given, once if is_cluster else retrying.TimelyRetry(retrying.backoff(), retrying.RETRIES)
    )
    match address.deployment:
        case "sentinel":
            asking = _sentinel_options(address, options, once)
            options["connection_class"] = _SentinelTLSConnection if options.pop("ssl", False) else _SentinelConnection
            sentinel = redis.sentinel.Sentinel(list(address.hosts), sentinel_kwargs=asking, **options)
            sentinel.sentinels = _Sentinels(sentinel.sentinels)
            client: redis.Redis = sentinel.master_for(address.service_name, connection_pool_class=_SentinelPool)
            return client
        case "cluster":
            nodes = [redis.cluster.ClusterNode(host, port) for host, port in address.hosts]
            if "connection_pool_class" in given:
                # redis-py heeds it only if it also has a URL, which must then say whether to use TLS.
                url = "rediss://{}:{}" if options.pop("ssl", False) else "redis://{}:{}"
                host, port = address.hosts[0]
                options["url"] = url.format(f"[{host}]" if ":" in host else host, port)
            cluster = _Cluster(startup_nodes=nodes, **_cluster_options(options, address, given))
            cluster.nodes_manager.initialize = _LayoutLearner(cluster.nodes_manager.initialize)  # type: ignore[method-assign]
            return cluster
    return redis.Redis.from_pool(_Pool(**options))


def connect_asyncio(address: Address, given: dict[str, Any]) -> redis.asyncio.Redis | redis.asyncio.RedisCluster:
    """Make the asyncio client of an address; ``given`` are options for redis-py."""
    if address.deployment == "server":
        given = {**redis.asyncio.connection.parse_url(address.url), **given}
    once = redis.asyncio.retry.Retry(NoBackoff(), 0)
    is_cluster = address.deployment == "cluster"  # Its retries are the manager's: see retrying.attempts.
    options = _options(
        address, given, once if is_cluster else retrying.AsyncRetry(retrying.backoff(), retrying.RETRIES)
    )
    match address.deployment:
        case "sentinel":
            asking = _sentinel_options(address, options, once)
            options["connection_class"] = (
                _AsyncSentinelTLSConnection if options.pop("ssl", False) else AsyncSentinelConnection
            )
            sentinel = redis.asyncio.sentinel.Sentinel(list(address.hosts), sentinel_kwargs=asking, **options)
            sentinel.sentinels = _Sentinels(sentinel.sentinels)
            client: redis.asyncio.Redis = sentinel.master_for(
                address.service_name, connection_pool_class=_AsyncSentinelPool
            )
            return client
        case "cluster":
            nodes = [redis.asyncio.cluster.ClusterNode(host, port) for host, port in address.hosts]
            return redis.asyncio.RedisCluster(startup_nodes=nodes, **_cluster_options(options, address, given))
    return redis.asyncio.Redis.from_pool(redis.asyncio.BlockingConnectionPool(**options))
