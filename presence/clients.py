"""How a URL becomes a redis-py client, asyncio or blocking, with the defaults that presence chooses on purpose."""

from __future__ import annotations

import asyncio
import os
import re
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from inspect import signature
from itertools import takewhile
from queue import LifoQueue
from threading import Condition, RLock, get_ident
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit, urlunsplit

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
from redis.backoff import EqualJitterBackoff, NoBackoff

from presence import arguments
from presence.errors import FAULTS, as_fault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from presence.operations import Command

ENVIRONMENT_VARIABLES = ("PRESENCE_REDIS_URL", "REDIS_URL")
DEFAULT_URL = "redis://localhost:6379/0"
DEFAULT_SENTINEL_PORT = 26379
DEFAULT_CLUSTER_PORT = 6379

SCHEMES = (
    "redis",
    "rediss",
    "unix",
    "redis+sentinel",
    "rediss+sentinel",
    "redis+cluster",
    "rediss+cluster",
)

_QUOTING = {
    "Port could not": "the port is no number",
    "netloc ": "a character before the path is not allowed there",
}
"""How the errors begin that quote what may be a password, and what is said instead."""
_QUOTING_HINT = "special characters in a password must be percent-encoded"

PROTOCOLS = (None, 2, 3, "2", "3")
"""The versions of RESP, as redis-py takes them."""

MAX_CONNECTIONS = 64
"""Connections of one manager's pool. Operations beyond it wait for a free one instead of failing."""

MAX_CLUSTER_CONNECTIONS = 10_000
"""Connections to one node from a cluster client: one for each operation that is under way."""

RETRIES = 6
"""Attempts after the first. With the backoff below they span 1.75 to 3.5 seconds: a restart, not a long outage.

Every script that is sent again after a lost reply changes nothing more and answers the same, for a minute.
"""

RETRYING_SECONDS = 33
"""A call is not sent again later than this after it was first to be sent, however few attempts it had: the answers are
kept for a minute. The rest of that is for a cluster's client, which connects within its last attempt: a pause, the
socket and the greeting, with a timeout of 5 seconds each. Elsewhere the manager looks at the time once more when it is
connected.
"""

CLUSTER_RETRIES = 10
"""The same for a cluster, 3.75 to 7.5 seconds: a node refuses all for two seconds more after its restart."""


def default_url() -> str:
    """Give the URL from the environment, else that of the local server."""
    return next((url for name in ENVIRONMENT_VARIABLES if (url := os.environ.get(name))), DEFAULT_URL)


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed URL: which kind of deployment, which hosts, and what redis-py is to be told."""

    url: str = field(repr=False)
    deployment: str = "server"
    hosts: tuple[tuple[str, int], ...] = ()
    service_name: str = ""
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    sentinel_options: dict[str, Any] = field(default_factory=dict, repr=False)


def parse(url: str) -> Address:
    """Check a URL and take it apart, without connecting.

    Args:
        url: ``redis://``, ``rediss://`` (TLS) and ``unix://`` as redis-py has them;
            ``redis+sentinel://[user:password@]host[:port][,host[:port]…]/service[/db]``, whose query may hold
            ``sentinel_username`` and ``sentinel_password``; ``redis+cluster://[user:password@]host[:port][,…]``.
            With ``rediss+`` both use TLS. The query may hold redis-py's options, as in redis-py's own URLs.

    Returns:
        The address.

    Raises:
        TypeError: it is not a str.
        ValueError: the scheme is unknown, or a part is missing or malformed.

    """
    if not isinstance(url, str):
        raise TypeError(f"url must be a str, not {type(url).__name__}")
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        raise ValueError(f"url must start with one of {', '.join(f'{known}://' for known in SCHEMES)}")
    try:
        if "+" in scheme:
            return _parse_fleet(url, *scheme.split("+"))
        _check_host(redis.connection.parse_url(url).get("host", ""))
        parts = urlsplit(url)
        if scheme != "unix":
            _parse_database(parts.path.strip("/"))
        elif parts.hostname or not parts.path:
            raise ValueError("it must name the socket's path after three slashes: unix:///path/to.sock")
    except ValueError as error:
        for beginning, problem in _QUOTING.items():
            if str(error).startswith(beginning):
                raise ValueError(f"url is malformed: {problem}; {_QUOTING_HINT}") from None
        raise ValueError(f"url is malformed: {error}") from error
    return Address(url)


def parse_default(module: Any, manager: type) -> Address:
    """Take the default URL apart; raises ``ValueError`` as :func:`parse` and :func:`check_options` do."""
    try:
        address = parse(default_url())
        check_options(address, {}, module, manager)
    except ValueError as error:
        raise ValueError(f"{' or '.join(ENVIRONMENT_VARIABLES)} in the environment: {error}") from error
    return address


def _parse_fleet(url: str, base: str, deployment: str) -> Address:
    # urlsplit refuses several hosts where one is an IPv6 address, in those Python versions that check the brackets.
    location = url.partition("://")[2]
    netloc = re.split("[/?#]", location, maxsplit=1)[0]
    parts = urlsplit("//hosts" + location[len(netloc) :])
    credentials, at, host_list = netloc.rpartition("@")
    if "@" in credentials:
        raise ValueError(f"user and password stand there once, before the first host; {_QUOTING_HINT}")
    default_port = DEFAULT_SENTINEL_PORT if deployment == "sentinel" else DEFAULT_CLUSTER_PORT
    hosts = tuple(_parse_host(host, default_port) for host in host_list.split(","))
    service_name, _, database = parts.path.strip("/").partition("/")
    # What is left is one of redis-py's own URLs; it knows its options and their types.
    plain = urlunsplit((base, f"{credentials}{at}localhost", "", parts.query, ""))
    options = dict(redis.connection.parse_url(plain))
    for name in ("host", "connection_class"):
        options.pop(name, None)
    if deployment == "cluster":
        service_name, database = "", service_name
    elif not service_name:
        raise ValueError("it must name the sentinels' service: redis+sentinel://host:26379/service")
    if database:
        options["db"] = _parse_database(database)
    if deployment == "cluster" and options.pop("db", 0):
        raise ValueError("a cluster has no database but 0")
    sentinel_options = {
        name.removeprefix("sentinel_"): options.pop(name)
        for name in ("sentinel_username", "sentinel_password")
        if name in options
    }
    if base == "rediss":
        options["ssl"] = True
    return Address(url, deployment, hosts, unquote(service_name), options, sentinel_options)


def _parse_host(text: str, default_port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("a host is missing")
    _check_host(parts.hostname)
    return parts.hostname, parts.port or default_port


def _parse_database(text: str) -> int:
    # redis-py would take another database, 0, for a number that it cannot read.
    if not re.fullmatch(r"\d*", text, re.ASCII):
        # It is not quoted: it may be half a password.
        raise ValueError(f"the database is no number; {_QUOTING_HINT}")
    return int(text or 0)


def _check_host(host: str) -> None:
    try:
        # As the socket module will, whose error is no fault of the network.
        host.encode("idna")
    except UnicodeError:
        # It is not quoted: it may be half a password.
        raise ValueError("a host is no host name: a part of it is empty or too long") from None


def check_options(address: Address, given: dict[str, Any], module: Any, manager: type) -> None:
    """Refuse what no client of this module of redis-py takes; perhaps an option of the manager was meant.

    redis-py itself would do so on first use, perhaps in a background task, and its blocking cluster client never.
    """
    if "connection_class" in given or "connection_pool_class" in given:
        return  # The caller's own class may take more.
    known, own = _options_of(module), signature(manager).parameters.keys() - {"client"}
    in_url = redis.connection.parse_url(address.url) if address.deployment == "server" else address.options
    for name in (*given, *in_url):
        if name not in known:
            meant = get_close_matches(name, {*known, *own}, 1)
            if name in given:
                raise TypeError(
                    f"from_url() has no option {name!r}" + (f"; did you mean {meant[0]!r}?" if meant else "")
                )
            # It is not quoted: it may be a part of a password.
            hint = f"did you mean {meant[0]!r}?" if meant else _QUOTING_HINT
            if name in own:
                hint = f"{name} is one of from_url() itself"
            raise ValueError(f"url is malformed: an option in it does not exist; {hint}")
    # Two that exist, but would be a fault of every call.
    if "ssl" in given and address.deployment == "server":
        raise TypeError("from_url() has no option 'ssl' for one server: its URL says so, redis:// or rediss://")
    if isinstance(in_url.get("ssl"), str):
        raise ValueError("url is malformed: ssl is no option in it; write rediss instead of redis")
    if given.get("protocol") not in PROTOCOLS:
        raise ValueError(f"protocol must be 2 or 3, not {arguments.shown(given['protocol'])}")
    if in_url.get("protocol") not in PROTOCOLS:
        raise ValueError("url is malformed: protocol must be 2 or 3")


@cache
def _options_of(module: Any) -> frozenset[str]:
    """Name the options of a module's clients, pools and connections, which hand on those of their base classes."""
    connections = module.connection
    kinds = (
        module.RedisCluster,
        module.sentinel.Sentinel,
        module.BlockingConnectionPool,
        connections.Connection,
        connections.SSLConnection,
        connections.UnixDomainSocketConnection,
    )
    classes = {base for kind in kinds for base in kind.__mro__ if "__init__" in vars(base)}
    # Two are taken out of the rest, so that no signature names them.
    return frozenset({"ssl", "check_connection"}.union(*(signature(base.__init__).parameters for base in classes)))


def is_client(given: object, *kinds: type) -> bool:
    """Tell whether it is a client of these kinds, and none of redis-py's pipelines, which are clients to Python."""
    return isinstance(given, kinds) and not isinstance(given, _PIPELINES)


_PIPELINES = (
    redis.client.Pipeline,
    redis.cluster.ClusterPipeline,
    redis.asyncio.client.Pipeline,
    redis.asyncio.cluster.ClusterPipeline,
)


def not_a_client(given: object, module: str) -> str:
    """Say what a manager takes as its client, from which module of redis-py, and what takes the given one."""
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
        # redis-py 8's default. To say HELLO is to read why a server that is full or loading refuses a connection; with
        # RESP2, redis-py sends more before it reads, and may find only that the connection is closed.
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


def _backoff() -> EqualJitterBackoff:
    # Half of each wait is certain, so that the attempts cannot all fall into the first moment of an outage.
    return EqualJitterBackoff(base=0.05, cap=1)


def tries_again(address: Address, given: dict[str, Any]) -> bool:
    """Tell whether the manager sends calls again; else the client does, as its own policy says."""
    return address.deployment == "cluster" and "retry" not in given


def cluster_pauses() -> Iterator[float]:
    """Give the seconds to wait before each further attempt on a cluster; redis-py's clients would not wait at all.

    Call it before the first attempt: the time within which a call may be sent again begins then.
    """
    backoff, end = _backoff(), monotonic() + RETRYING_SECONDS
    failures = takewhile(lambda _: monotonic() < end, range(1, CLUSTER_RETRIES + 1))
    return map(backoff.compute, failures)


def attempts(request: Sequence[Command], replies: dict[int, Any]) -> Iterator[tuple[float, dict[int, Command]]]:
    """Give the seconds to wait before each attempt on a cluster, and the commands to send then, by their indexes.

    These are all of a request, and after that the ones which met a fault that may pass: whoever has sent them notes
    each reply, by its index, before the next attempt is asked for.
    """
    pauses = cluster_pauses()
    yield 0, dict(enumerate(request))
    for pause in pauses:
        failed = transient_faults([*replies.values()])
        if not failed:
            return
        yield pause, {index: request[index] for index in failed}


def transient_faults(replies: Sequence[Any]) -> list[int]:
    """Give the places of a cluster's replies that are faults which may pass: nodes that are away, slots that move."""
    return [index for index, reply in enumerate(replies) if isinstance(reply, Exception) and _is_transient(reply)]


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, redis.exceptions.RedisClusterException) and error.__cause__:
        return _is_transient(error.__cause__)  # It could not read the layout.
    return isinstance(error, _TRANSIENT) and not isinstance(error, _PERMANENT)


_TRANSIENT = (
    OSError,
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.ClusterError,
    redis.exceptions.SlotNotCoveredError,
    redis.exceptions.AskError,
    redis.exceptions.TryAgainError,
)
_PERMANENT = (redis.exceptions.AuthenticationError, redis.exceptions.AuthorizationError)


def cluster_replies(replies: list[Any]) -> list[Any]:
    """Name what redis-py's cluster clients meet of a node that they do not know yet, or that is closed under a call."""
    return [as_cluster_fault(reply) for reply in replies]


def as_cluster_fault(error: Any) -> Any:
    """Give an error of a cluster's client as redis-py should have named it."""
    if not isinstance(error, AttributeError):
        return as_fault(error)
    fault = redis.exceptions.ClusterError("a node came or went during the call")
    fault.__cause__ = error
    return fault


def connect_once(connection: Any) -> Any:
    """Connect, to be awaited with asyncio, trying it once: it is a part of an attempt that is tried again.

    To connect, or to send without doing so before, redis-py would try as often within each attempt.
    """
    if isinstance(connection, _ASKING_SENTINELS):
        return connection._connect_retry()
    return connection.connect_check_health(retry_socket_connect=False)


_ASKING_SENTINELS = (redis.sentinel.SentinelManagedConnection, redis.asyncio.sentinel.SentinelManagedConnection)


@contextmanager
def heeding_cancellation() -> Iterator[None]:
    """End what a cancellation was to end, though it was swallowed within: put it around what redis-py awaits.

    Python 3.11's asyncio.wait_for, through which redis-py connects and writes, can lose one.
    """
    before = cancellations()
    yield
    if cancellations() > before:
        raise asyncio.CancelledError


def cancellations() -> int:
    """Count how often the task that asks has been cancelled."""
    task = asyncio.current_task()
    return task.cancelling() if task else 0


class _TimelyRetry(redis.retry.Retry):
    """Gives up in time, too; redis-py only counts, and tries to connect as often again within each attempt to send.

    Each connection has a copy of its own. Where the managers send themselves, they see to the time: this is for the
    first time that a connection is opened, and for calls that go through redis-py's ``execute_command``.
    """

    _end: float | None = None

    def call_with_retry(self, do: Callable[[], Any], fail: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call until it succeeds, as redis-py does; attempts within an attempt have no more time than that."""
        outer_end = self._end
        end = monotonic() + RETRYING_SECONDS if outer_end is None else outer_end

        def fail_or_end(error: Exception, *failures: int) -> None:
            fail(error, *failures)
            if monotonic() > end:
                raise error

        try:
            self._end = end  # Not before, where an interruption would leave it for good.
            return super().call_with_retry(do, fail_or_end, *arguments, **options)
        finally:
            self._end = outer_end


class _SentinelConnection(redis.sentinel.SentinelManagedConnection):
    """Asks the sentinels before each attempt; redis-py's own retries stay with the address that it had before."""

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        if not self._sock:
            self._connect_retry()  # type: ignore[no-untyped-call]
        super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]


class _SentinelTLSConnection(_SentinelConnection, redis.sentinel.SentinelManagedSSLConnection):
    """The same with TLS."""


class _FreeConnections(LifoQueue[Any]):
    """A pool's free connections. A signal's handler may make a call while its thread is in here for another."""

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
    """Asks the sentinels before each attempt; redis-py's own retries stay with the address that it had before."""

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


def _sentinel_options(address: Address, options: dict[str, Any], retry: object) -> dict[str, Any]:
    # Each sentinel is asked once, then the next; the connection's own retries begin the round again.
    shared = {name: value for name, value in options.items() if name.startswith("ssl")}
    for name in ("socket_timeout", "socket_connect_timeout"):
        # All together have the time that the server has.
        shared[name] = options[name] and options[name] / len(address.hosts)
    return {"retry": retry} | shared | address.sentinel_options


def _cluster_options(options: dict[str, Any], address: Address, given: dict[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in options.items() if name != "retry_on_error"}
    # redis-py's asyncio client has no pool that waits, and into one its blocking client may put another node's
    # connections, which two calls would then read from. So beyond the limit an operation fails.
    if "max_connections" not in address.options | given:
        options["max_connections"] = MAX_CLUSTER_CONNECTIONS
    return options


class _LayoutLearner:
    """Lets a blocking cluster's client ask the nodes who serves what: once for all threads that wait for it.

    redis-py lets each ask for itself, one after the other, and each waits for every node that does not answer.
    """

    def __init__(self, learn: Callable[..., None]) -> None:
        self._learn = learn
        # A signal's handler may make a call in the midst of this.
        self._lock = RLock()
        self._learner = 0
        self._outcome: Future[None] | None = None

    def __call__(self, *arguments: Any, **named: Any) -> None:
        own, own_thread = Future[None](), get_ident()
        try:
            with self._lock:
                others = self._outcome
                # One that is over may stand here still, if a signal's handler raised at its end.
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
    is_cluster = address.deployment == "cluster"  # Its retries are the manager's: see cluster_pauses.
    options = _options(address, given, once if is_cluster else _TimelyRetry(_backoff(), RETRIES))
    match address.deployment:
        case "sentinel":
            asking = _sentinel_options(address, options, once)
            options["connection_class"] = _SentinelTLSConnection if options.pop("ssl", False) else _SentinelConnection
            sentinel = redis.sentinel.Sentinel(list(address.hosts), sentinel_kwargs=asking, **options)
            client: redis.Redis = sentinel.master_for(address.service_name, connection_pool_class=_SentinelPool)
            return client
        case "cluster":
            nodes = [redis.cluster.ClusterNode(host, port) for host, port in address.hosts]
            if "connection_pool_class" in given:
                # redis-py heeds it only where it has a URL too, which then must say whether to use TLS.
                url = "rediss://{}:{}" if options.pop("ssl", False) else "redis://{}:{}"
                host, port = address.hosts[0]
                options["url"] = url.format(f"[{host}]" if ":" in host else host, port)
            cluster = redis.RedisCluster(startup_nodes=nodes, **_cluster_options(options, address, given))
            cluster.nodes_manager.initialize = _LayoutLearner(cluster.nodes_manager.initialize)  # type: ignore[method-assign]
            return cluster
    return redis.Redis.from_pool(_Pool(**options))


def connect_asyncio(address: Address, given: dict[str, Any]) -> redis.asyncio.Redis | redis.asyncio.RedisCluster:
    """Make the asyncio client of an address; ``given`` are options for redis-py."""
    if address.deployment == "server":
        given = {**redis.asyncio.connection.parse_url(address.url), **given}
    once = redis.asyncio.retry.Retry(NoBackoff(), 0)
    is_cluster = address.deployment == "cluster"  # Its retries are the manager's: see cluster_pauses.
    options = _options(address, given, once if is_cluster else redis.asyncio.retry.Retry(_backoff(), RETRIES))
    match address.deployment:
        case "sentinel":
            asking = _sentinel_options(address, options, once)
            options["connection_class"] = (
                _AsyncSentinelTLSConnection if options.pop("ssl", False) else AsyncSentinelConnection
            )
            sentinel = redis.asyncio.sentinel.Sentinel(list(address.hosts), sentinel_kwargs=asking, **options)
            client: redis.asyncio.Redis = sentinel.master_for(
                address.service_name, connection_pool_class=_AsyncSentinelPool
            )
            return client
        case "cluster":
            nodes = [redis.asyncio.cluster.ClusterNode(host, port) for host, port in address.hosts]
            return redis.asyncio.RedisCluster(startup_nodes=nodes, **_cluster_options(options, address, given))
    return redis.asyncio.Redis.from_pool(redis.asyncio.BlockingConnectionPool(**options))
